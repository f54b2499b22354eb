# SPDX-License-Identifier: Apache-2.0
"""What a row of the table of model families says (``core.families``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ConfigWord:
    """One key of a ``config.json`` beyond those that all families share.

    ``part``: model (``ModelSpec``), moe (``MoESpec``) or shared (``SharedExpertSpec``), whose ``field`` it fills; of
    several, with blanks between, all. ``means``: where the file's values are called otherwise here, each pair of them.
    """

    key: str
    part: str
    field: str
    kind: str
    default: Any
    means: tuple[tuple[Any, Any], ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that it fills."""
        return tuple(self.field.split())


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row.

    name: Hugging Face's ``model_type`` and the stem of every file about the family.
    hf_class: transformers' class.
    yaml_names: pairs of ``model_config.type`` and ``arch.type`` that mean it in a YAML, the one to write first.
    has_experts: whether some layers are mixtures.
    implied: whether experts, or their absence, mean this family where nothing is named.
    variant_of: a family whose ``model_type`` and class its ``config.json`` is written with, and ``variant_key`` keys of
        which any tells it there, unless 0 or null. Its own ``name`` and ``hf_class`` are read too.
    reads_as: a family of the same tensors and formulas under which it is known here without a window; "" for itself.
    defaults: of transformers' configuration class, by ``ModelSpec`` field (= key); None: derived from other keys.
    words: further keys.
    says: keys that change the function, each with the one value that is built; written, and read where it stands.
    model, moe, shared: what the family's name fixes of each spec, by field.
    weighs_loss: whether ``router_aux_loss_coef`` weighs a loss of its routing.
    shares_width: whether its experts, the shared ones too, are parts of one layer as wide as ``intermediate_size``.
    chooses_layers: whether ``decoder_sparse_step`` and ``mlp_only_layers`` make layers dense.
    dense_ends: a key that says how many layers at each end are dense, and ``dense_width`` one for their width, where
        ``intermediate_size`` is that of an expert.
    attends_by_experts: whether heads may be experts in its mixtures (``use_attn_moe``).
    windowed: whether it has ``sliding_window``: in all layers, or where ``mixes_windows`` in those that ``layer_types``
        or ``max_window_layers`` name. ``window``: its default; ``window_switch`` a key without which it has no effect.
    tokenizer: transformers' class where the tokenizer's own files name none.
    """

    name: str
    hf_class: str
    yaml_names: tuple[tuple[str, str], ...] = ()
    has_experts: bool = False
    implied: bool = False
    reads_as: str = ""
    variant_of: str = ""
    variant_key: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[ConfigWord, ...] = ()
    says: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    moe: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] | None = None
    weighs_loss: bool = True
    shares_width: bool = False
    chooses_layers: bool = False
    dense_ends: str = ""
    dense_width: str = ""
    attends_by_experts: bool = False
    windowed: bool = False
    mixes_windows: bool = False
    window: int | None = None
    window_switch: str = ""
    tokenizer: str = ""

    @property
    def gate(self) -> str:
        """The gate of its mixtures where none is named (of ``core.families.GATES``)."""
        kinds = [ours for word in self.words if word.field == "gate" for _, ours in word.means]
        return kinds[0] if kinds else str(self.moe.get("gate", "linear"))


def end_layers(count: int, layers: int) -> tuple[int, ...]:
    """The numbers of ``count`` layers at each end of ``layers``."""
    return tuple(index for index in range(max(layers, 0)) if not count <= index < layers - count)
