# SPDX-License-Identifier: Apache-2.0
"""Every weight of a network: name, dimensions, cut over devices, initial values. The one table of them.

Placement, memory, traffic and initial weights are computed from it; conversion tables and built networks are held
against it by tests. Names are MindFormers' (r1.3 to r1.7, and its feed-forward with shared experts). Dimensions are
products of size letters:

    V vocabulary    D model    F dense feed-forward    M routed expert    U shared experts together
    E experts       H heads    N key/value heads       P head width       R shared experts, each S wide    1 2
    A attention experts, each of Q query heads
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from mindformers_ext.core.families import GATES, RESIDUAL_GATE, SHARED_GATE, WEIGHTING, GateWeight
from mindformers_ext.core.layers import MIXTURE_POINTS, POINTS, AttentionSpec, LayerSpec, MoESpec
from mindformers_ext.core.spec import ModelSpec

EMBEDDING, HEAD = "model.tok_embeddings.embedding_weight", "lm_head.weight"
LAYER = "model.layers.{}."
ROUTED = "routed_experts."  # before router and experts where a shared expert stands beside them


@dataclass(frozen=True)
class WeightRow:
    """One weight.

    ``dims``: its shape in size letters, a word per dimension. ``cut``: what cuts each dimension over devices: ``mp``
    model parallel, ``ep`` expert parallel, ``head`` model parallel where the vocabulary is cut, ``-`` nothing.
    ``init``: normal (of ``initializer_range``), ones or zeros. ``fixed``: always float32 and whole on every device.
    """

    name: str
    dims: str
    cut: str
    init: str = "normal"
    fixed: bool = False


@dataclass(frozen=True)
class Weight:
    """A row at one model's sizes. ``layer``: None outside the layers; ``last``: it belongs behind the last layer."""

    name: str
    shape: tuple[int, ...]
    row: WeightRow
    layer: int | None = None
    last: bool = False


_QKV = {"wq": "HP", "wk": "NP", "wv": "NP"}
_NORM = ("D", "-", "ones")


def attention_rows(spec: AttentionSpec) -> Iterator[WeightRow]:
    """Attention with the norm before it."""
    yield WeightRow("attention_norm.weight", *_NORM)
    for name, rows in ({**_QKV, "wk": "AP", "wv": "AP"} if spec.experts else _QKV).items():
        yield WeightRow(f"attention.{name}.weight", f"{rows} D", "mp -")
        if spec.qkv_bias:
            yield WeightRow(f"attention.{name}.bias", rows, "mp", "zeros")
    yield WeightRow("attention.wo.weight", "D HP", "- mp")
    if spec.out_bias:
        yield WeightRow("attention.wo.bias", "D", "-", "zeros")
    if spec.experts:
        (gate,) = GATES[spec.experts.gate]
        yield _gate_row("attention.router.", replace(gate, dims="A D"))
        if spec.experts.expert_bias:
            yield WeightRow("attention.expert_bias", "A D", "- -", "zeros")
    if spec.qk_norm:
        yield WeightRow("attention.q_norm.weight", "P", "-", "ones")
        yield WeightRow("attention.k_norm.weight", "P", "-", "ones")


def swiglu_rows(prefix: str, width: str, bias: bool = False) -> Iterator[WeightRow]:
    """w1 (gate), w2 (down) and w3 (up) of a feed-forward layer whose width has the letter ``width``."""
    for name, dims, cut in (("w1", f"{width} D", "mp -"), ("w2", f"D {width}", "- mp"), ("w3", f"{width} D", "mp -")):
        yield WeightRow(f"{prefix}{name}.weight", dims, cut)
        if bias:
            yield WeightRow(f"{prefix}{name}.bias", dims.split()[0], cut.split()[0], "zeros")


def mixture_rows(spec: MoESpec) -> Iterator[WeightRow]:
    """Gate, routed experts, and the shared ones."""
    start = "feed_forward." + (ROUTED if spec.shared_expert else "")
    yield from (_gate_row(f"{start}router.", weight) for weight in GATES[spec.gate])
    yield WeightRow(f"{start}ffn.w1.weight", "E M D", "ep mp -")
    yield WeightRow(f"{start}ffn.w2.weight", "E D M", "ep - mp")
    if spec.expert_bias:
        yield WeightRow(f"{start}ffn.w2.bias", "E D", "ep -", "zeros")
    yield WeightRow(f"{start}ffn.w3.weight", "E M D", "ep mp -")
    if spec.shared_expert:
        yield from swiglu_rows("feed_forward.shared_experts.", "U")
        if spec.shared_expert.gated or spec.shared_expert.weighs_each:
            gate = RESIDUAL_GATE if spec.shared_expert.weighs_each else SHARED_GATE
            yield _gate_row("feed_forward.shared_experts_gate.", gate)
        if spec.shared_expert.use_weighting:
            yield _gate_row("feed_forward.weighting.", WEIGHTING)


def _gate_row(start: str, weight: GateWeight) -> WeightRow:
    return WeightRow(start + weight.name, weight.dims, " ".join("-" for _ in weight.dims.split()), weight.init, True)


def layer_rows(layer: LayerSpec) -> Iterator[WeightRow]:
    """All weights of a layer, names below ``model.layers.N.``, in the network's order."""
    yield from attention_rows(layer.attention)
    yield WeightRow("ffn_norm.weight", *_NORM)
    if isinstance(layer.feed_forward, MoESpec):
        yield from mixture_rows(layer.feed_forward)
    else:
        yield from swiglu_rows("feed_forward.", "F", layer.feed_forward.bias)


def model_weights(model: ModelSpec) -> Iterator[Weight]:
    """Every weight of the network, in the order in which MindSpore makes them."""
    sizes = size_letters(model)

    def at_size(row: WeightRow, layer: int | None = None, last: bool = False) -> Weight:
        name = row.name if layer is None else LAYER.format(layer) + row.name
        return Weight(name, shape_of(row.dims, sizes), row, layer, last)

    yield at_size(WeightRow(EMBEDDING, "V D", "head -"))
    for index in range(model.num_hidden_layers):
        yield from (at_size(row, index) for row in layer_rows(model.layer(index)))
    yield at_size(WeightRow("model.norm_out.weight", *_NORM), last=True)
    if not model.tie_word_embeddings:
        yield at_size(WeightRow(HEAD, "V D", "head -"), last=True)


def size_letters(model: ModelSpec) -> dict[str, int]:
    """The sizes behind the letters; those of experts only where there are any."""
    letters = {
        "V": model.vocab_size,
        "D": model.hidden_size,
        "F": model.intermediate_size,
        "H": model.num_attention_heads,
        "N": model.num_key_value_heads,
        "P": model.head_dim,
        "1": 1,
        "2": 2,
    }
    if model.attn_experts:
        letters |= {"A": model.attn_experts, "Q": model.num_attention_heads // model.attn_experts}
    if model.moe:
        letters |= {"E": model.moe.num_local_experts, "M": model.expert_size}
        if model.moe.shared_expert:
            shared = model.moe.shared_expert
            letters |= {"U": shared.intermediate_size, "R": shared.num_experts}
            letters["S"] = shared.intermediate_size // shared.num_experts
    return letters


def shape_of(dims: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """``"E M D"`` at the sizes of ``size_letters``."""
    return tuple(math.prod(sizes[letter] for letter in word) for word in dims.split())


def point_widths(model: ModelSpec) -> dict[str, int]:
    """Numbers a token has at each of ``core.layers.POINTS``, in a mixture also at each of ``MIXTURE_POINTS``."""
    sizes, points = size_letters(model), POINTS | (MIXTURE_POINTS if model.moe else {})
    return {name: shape_of(dims, sizes)[0] for name, dims in points.items()}


def parameter_count(model: ModelSpec) -> int:
    """Numbers in all weights of the network."""
    return sum(math.prod(weight.shape) for weight in model_weights(model))
