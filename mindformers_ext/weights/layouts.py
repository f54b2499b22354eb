# SPDX-License-Identifier: Apache-2.0
"""How a MindSpore checkpoint arranges its weights, and how to tell.

- experts "dense": w1, w3 (E, F, D), w2 (E, D, F), for training; "gmm": last two axes swapped, for the grouped matmul of
  MindFormers' predict with ``use_past``;
- ``qkv_concat``: q, k, v in ``attention.w_qkv.weight``; in a dense model gate and up in ``w_gate_hidden`` too.

Names tell ``qkv_concat``; shapes tell the experts' side unless F = D; the description that we write tells both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.parameters import EMBEDDING, HEAD, ROUTED
from mindformers_ext.core.spec import ModelSpec, MoESpec
from mindformers_ext.formats.tensors import TensorInfo

MOST_MATRICES = 10**6  # layers times experts
DENSE, GMM = "dense", "gmm"
_LAYER = "model.layers.{}."
_W1, _DENSE_W1 = _LAYER + "feed_forward.ffn.w1.weight", _LAYER + "feed_forward.w1.weight"
_WQ, _WK, _QKV = (_LAYER + f"attention.{name}.weight" for name in ("wq", "wk", "w_qkv"))


@dataclass(frozen=True)
class Layout:
    """One arrangement."""

    experts: str = DENSE
    qkv_concat: bool = False

    def __str__(self) -> str:
        """As messages name it."""
        return self.experts + (" with qkv_concat" if self.qkv_concat else "")


@dataclass(frozen=True)
class Seen:
    """What names and shapes tell; ``experts`` is None where they tell nothing (F = D, or no experts)."""

    experts: str | None
    qkv_concat: bool


def check_count(spec: ModelSpec) -> None:
    """A damaged configuration must not fill the memory with names: ``UserError`` beyond any known model."""
    experts = spec.moe.num_local_experts if spec.moe else 1
    if spec.num_hidden_layers * experts > MOST_MATRICES:
        raise UserError(f"{spec.num_hidden_layers} layers of {experts} experts: no such model; correct config.json")


def see_layout(infos: Mapping[str, TensorInfo], spec: ModelSpec) -> Seen:
    """Look at every layer; layers that differ among themselves are a ``UserError``."""
    check_count(spec)
    layers = range(spec.num_hidden_layers)
    concat = {_QKV.format(layer) in infos for layer in layers}
    if len(concat) > 1:
        raise UserError("some layers hold attention.w_qkv.weight and others do not: they come from different files")
    return Seen(_see_experts(infos, spec), concat.pop() if concat else False)


def resolve_layout(
    infos: Mapping[str, TensorInfo], spec: ModelSpec, described: Layout | None, told: str | None = None
) -> Layout:
    """The layout of a checkpoint from its tensors, its description and what the user told (``--input_layout``).

    Raises:
        UserError: they contradict each other, or nothing tells how the experts lie.
    """
    seen = see_layout(infos, spec)
    words = {
        "its tensors": seen.experts,
        "its description": described.experts if described else None,
        "--input_layout": told,
    }
    given = {who: experts for who, experts in words.items() if experts}
    if spec.moe and len(set(given.values())) > 1:
        listed = ", ".join(f"{who} says {what}" for who, what in given.items())
        raise UserError(
            f"the checkpoint's layout is contradictory: {listed}. A description belongs to one file only; correct "
            "--input_layout, or remove a description that was copied beside another file"
        )
    if described and described.qkv_concat != seen.qkv_concat:
        raise UserError(
            f"the checkpoint's description says qkv_concat {described.qkv_concat}, its tensors {seen.qkv_concat}: the "
            "description belongs to another file; remove it and pass --config"
        )
    if spec.moe and not given:
        raise UserError(
            f"nothing tells whether the experts lie dense or transposed (gmm): hidden and expert width are both "
            f"{spec.hidden_size} and the checkpoint has no description; pass --input_layout dense or --input_layout gmm"
        )
    return Layout(next(iter(given.values())) if spec.moe else DENSE, seen.qkv_concat)


def sizes_from_shapes(infos: Mapping[str, TensorInfo]) -> ModelSpec:
    """A spec with the sizes that shapes show, enough to move tensors between dense and gmm, and no more.

    Head counts are not in the shapes (any pair that multiplies to the rows would do), so ``w_qkv`` cannot be taken
    apart with it.

    Raises:
        UserError: the shapes do not tell.
    """
    layers = sum(1 for name in infos if name.endswith(".attention_norm.weight") and name.startswith("model.layers."))
    # without its head a checkpoint may be tied, or cut: only a configuration knows
    needed = [EMBEDDING, HEAD, _WQ.format(0), _WK.format(0)]
    missing = [name for name in needed if name not in infos or len(infos[name].shape) != 2]
    if missing or not layers:
        raise UserError(
            f"the checkpoint does not show its sizes ('{(missing or ['any layer'])[0]}' is not there): "
            "pass --config with a Hugging Face config.json"
        )
    vocab, hidden = infos[EMBEDDING].shape
    q, kv = infos[_WQ.format(0)].shape[0], infos[_WK.format(0)].shape[0]
    width, experts = _expert_width(infos, hidden)
    head = gcd(q, kv)
    return ModelSpec(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=q // head,
        num_key_value_heads=kv // head,
        head_dim=head,
        moe=MoESpec(num_local_experts=experts, num_experts_per_tok=1) if experts else None,
    )


def _expert_width(infos: Mapping[str, TensorInfo], hidden: int) -> tuple[int, int]:
    """F and the number of experts (0: dense)."""
    stacked, plain = infos.get(_W1.format(0)), infos.get(_DENSE_W1.format(0))
    if stacked and len(stacked.shape) == 3 and hidden in stacked.shape[1:]:
        experts, *sides = stacked.shape
        sides.remove(hidden)
        return sides[0], experts
    if plain and len(plain.shape) == 2:
        return plain.shape[0], 0
    raise UserError("the checkpoint does not show the width of its feed-forward: pass --config with a config.json")


def _see_experts(infos: Mapping[str, TensorInfo], spec: ModelSpec) -> str | None:
    if not spec.moe or spec.hidden_size == spec.expert_size:
        return None
    template = _LAYER + "feed_forward." + (ROUTED if spec.moe.shared_expert else "") + "ffn.w1.weight"
    shapes = {infos[name].shape[1:] for layer in spec.moe_layers if (name := template.format(layer)) in infos}
    dense, turned = (spec.expert_size, spec.hidden_size), (spec.hidden_size, spec.expert_size)
    if {dense, turned} <= shapes:
        raise UserError("some layers' experts are dense, others transposed (gmm): they come from different files")
    if shapes == {turned}:
        return GMM
    return DENSE if shapes == {dense} else None
