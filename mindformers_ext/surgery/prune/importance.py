# SPDX-License-Identifier: Apache-2.0
"""How much every unit of a dense decoder matters, by several published measures, from what one pass has measured.

Sizes: L layers, F neurons, H query heads of P numbers in N groups, D channels of the hidden state. All float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mindformers_ext.core.pruning import ModelShape
from mindformers_ext.surgery.prune.hard_concrete import Floats

Statistics = Mapping[str, Floats]
# What a pass measures: by name the letters of its shape. z: what enters down_proj, c: what enters o_proj, n: what
# leaves a norm; b: a row of text, t: a token of it.
FORWARD = {
    "neuron_absolute": "L F",  # sqrt(sum_b (mean_t |z|)^2)
    "neuron_mean": "L F",  # mean over all tokens of z
    "neuron_variance": "L F",  # variance over all tokens of z
    "neuron_out": "L F",  # sum of squares of the neuron's column of down_proj
    "neuron_weight": "L F",  # the same, and of its rows of gate_proj and up_proj
    "context_absolute": "L HP",  # as of neurons, of c
    "context_mean": "L HP",
    "context_variance": "L HP",
    "context_out": "L HP",  # sum of squares of a column of o_proj
    "head_weight": "L H",  # sum of squares of a head's rows of q_proj and columns of o_proj
    "group_weight": "L N",  # of a group's rows of k_proj and v_proj
    "hidden_absolute": "L D",  # sqrt(sum_b (mean_t |n|)^2), added over a layer's two norms
    "final_absolute": "D",  # of the last norm
    "hidden_weight": "L D",  # sum of squares of all of a layer's matrices that read or write the channel
    "layer_influence": "L",  # 1 - mean_t cos(what enters the layer, what leaves it)
}
TAYLOR = {
    "neuron_taylor": "L F",  # sum over the weights w of gate_proj, up_proj, down_proj of |w dLoss/dw|
    "head_taylor": "L H",  # sum_t |sum over the head of c dLoss/dc|
    "hidden_taylor": "L D",  # sum_t |n dLoss/dn|, added over a layer's two norms
}
KINDS = {"forward": FORWARD, "taylor": TAYLOR}


@dataclass(frozen=True, eq=False)
class Scores:
    """The larger, the more a unit matters: neurons (L, F), heads (L, H), groups of them (L, N), hidden (D), layers (L).

    ``hidden`` None: the measure knows none.
    """

    neurons: Floats
    heads: Floats
    groups: Floats
    hidden: Floats | None
    layers: Floats


@dataclass(frozen=True)
class Method:
    """A measure, and of which pass it needs what has been measured (``KINDS``)."""

    score: Callable[[Statistics, ModelShape], Scores]
    needs: tuple[str, ...] = ("forward",)


def shape_of_statistic(dims: str, shape: ModelShape) -> tuple[int, ...]:
    """``"L HP"`` at a model's sizes."""
    sizes = {
        "L": shape.num_hidden_layers,
        "F": shape.intermediate_size,
        "H": shape.num_attention_heads,
        "N": shape.num_key_value_heads,
        "HP": shape.num_attention_heads * shape.head_dim,
        "D": shape.hidden_size,
    }
    return tuple(sizes[letter] for letter in dims.split())


def _by_head(values: Floats, shape: ModelShape) -> Floats:
    """(L, H, P) of (L, H P)."""
    return values.reshape(len(values), shape.num_attention_heads, shape.head_dim)


def _by_group(heads: Floats, shape: ModelShape) -> Floats:
    """(L, N): the sum over a group's heads."""
    return heads.reshape(len(heads), shape.num_key_value_heads, shape.heads_per_group).sum(-1)


def magnitude(found: Statistics, shape: ModelShape) -> Scores:
    """Sums of squares of a unit's weights; of layers those of what writes into the hidden state. Reads no text."""
    heads = found["head_weight"]
    layers = found["neuron_out"].sum(1) + found["context_out"].sum(1)
    groups = _by_group(heads, shape) + found["group_weight"]
    return Scores(found["neuron_weight"], heads, groups, found["hidden_weight"].sum(0), layers)


def minitron(found: Statistics, shape: ModelShape) -> Scores:
    """Mean absolute activations (Muralidharan et al. 2024, arXiv:2407.14679, section 2.2): per row of text the mean,
    over the rows the square norm, over a head's numbers the norm; of channels the sum over all norms."""
    heads = np.sqrt(np.square(_by_head(found["context_absolute"], shape)).sum(-1))
    hidden = found["hidden_absolute"].sum(0) + found["final_absolute"]
    return Scores(found["neuron_absolute"], heads, _by_group(heads, shape), hidden, found["layer_influence"])


def flap(found: Statistics, shape: ModelShape) -> Scores:
    """How much a unit's answer fluctuates, weighed by the weights that read it: "WIFV" of FLAP (An et al. 2023,
    arXiv:2312.11983, equation 5). It knows no channels. FLAP cuts all layers at one height, which gives them different
    widths; config.json knows one, so here every layer keeps as many, its own best."""
    heads = _by_head(found["context_variance"] * found["context_out"], shape).sum(-1)
    neurons = found["neuron_variance"] * found["neuron_out"]
    return Scores(neurons, heads, _by_group(heads, shape), None, found["layer_influence"])


def taylor(found: Statistics, shape: ModelShape) -> Scores:
    """To first order how the loss changes without the unit: of neurons over their weights, element by element
    (LLM-Pruner, Ma et al. 2023, arXiv:2305.11627, equation 5); of heads and channels over what they answer (Michel et
    al. 2019, arXiv:1905.10650, equation 2)."""
    heads = found["head_taylor"]
    hidden = found["hidden_taylor"].sum(0)
    return Scores(found["neuron_taylor"], heads, _by_group(heads, shape), hidden, found["layer_influence"])


METHODS = {
    "magnitude": Method(magnitude),
    "minitron": Method(minitron),
    "flap": Method(flap),
    "taylor": Method(taylor, ("forward", "taylor")),
}


def by_chance(shape: ModelShape, seed: int) -> Scores:
    """Numbers drawn at random: what a measure has to beat."""
    draw = np.random.default_rng(seed).random
    layers, groups = shape.num_hidden_layers, shape.num_key_value_heads
    return Scores(
        draw((layers, shape.intermediate_size)),
        draw((layers, shape.num_attention_heads)),
        draw((layers, groups)),
        draw(shape.hidden_size),
        draw(layers),
    )


def best(scores: Floats, count: int) -> Floats:
    """1 for the ``count`` highest of every row (..., n), else 0; of equal ones the lower number stays."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    found = np.zeros(scores.shape)
    np.put_along_axis(found, order, 1.0, axis=-1)
    return found


def masks_of_scores(scores: Scores, source: ModelShape, target: ModelShape) -> dict[str, Floats]:
    """Masks of 0 and 1 by module (``core.pruning.MODULES``) that leave ``target``, the best units of every layer.

    With grouped queries whole groups go first, the weakest, and of every group that stays as many heads: each group
    chooses its own.

    Raises:
        ValueError: channels are to go, and the measure has none.
    """
    found: dict[str, Floats] = {}
    if target.intermediate_size < source.intermediate_size:
        found["intermediate"] = best(scores.neurons, target.intermediate_size)
    if target.num_attention_heads < source.num_attention_heads:
        found |= _head_masks(scores, source, target)
    if target.hidden_size < source.hidden_size:
        if scores.hidden is None:
            raise ValueError("a measure without scores of channels")
        found["hidden"] = best(scores.hidden, target.hidden_size)
    if target.num_hidden_layers < source.num_hidden_layers:
        found["layer"] = best(scores.layers, target.num_hidden_layers)
    return found


def _head_masks(scores: Scores, source: ModelShape, target: ModelShape) -> dict[str, Floats]:
    if source.heads_per_group == 1:
        return {"head": best(scores.heads, target.num_attention_heads)}
    groups = best(scores.groups, target.num_key_value_heads)
    grouped = scores.heads.reshape(len(groups), source.num_key_value_heads, source.heads_per_group)
    inside = best(grouped, target.heads_per_group) * groups[..., None]
    return {"head": inside.reshape(len(groups), -1), "kv_head": groups}
