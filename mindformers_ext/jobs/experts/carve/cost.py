# SPDX-License-Identifier: Apache-2.0
"""What carving takes, said before it starts: memory by arithmetic, time by arithmetic and a measured product."""

from __future__ import annotations

import time

import numpy as np

from mindformers_ext.jobs.experts.probe import Needs, needs
from mindformers_ext.jobs.experts.texts import Ready
from mindformers_ext.surgery.experts.carve.grouping import ROUNDS
from mindformers_ext.surgery.experts.carve.recipes import METHODS, Recipe
from mindformers_ext.surgery.experts.carve.refit import PART
from mindformers_ext.surgery.prune.least_squares import LEAST_SQUARES

TRIED = 1024  # size of the product that is measured
REACHED = 0.5  # of its rate, by a whole pass


class Held:
    """What a carving holds beside a layer, as a sink tells it."""

    values: tuple[str, ...] = ("mlp_input", "hidden", "mlp_output")
    gradients: tuple[str, ...] = ()

    def __init__(self, start: Ready, recipe: Recipe) -> None:
        spec, tokens = start.model.spec, start.measured.rows.tokens
        narrow, wide = spec.hidden_size, spec.intermediate_size
        self.nbytes = 4 * tokens * (narrow + wide) + 4 * 4 * narrow * wide
        grouped = tokens * wide + 8 * narrow * narrow
        refit = 8 * (wide * wide + 2 * narrow * wide) + 4 * PART * (wide + narrow)
        self.nbytes += max(grouped, refit if recipe.refit == LEAST_SQUARES else 0)

    def take(self, layer: int, part: object, values: object, gradients: object) -> None:
        """Nothing."""

    def end(self, layer: int) -> None:
        """Nothing."""


def carving_needs(start: Ready, recipe: Recipe) -> Needs:
    """Bytes of memory and of disk, the text that judges and the mixture itself not counted."""
    return needs(start.measured, Held(start, recipe), start.model.spec.num_hidden_layers, backward=False, loss=True)


def layer_pass(start: Ready, tokens: float) -> float:
    """Multiplications and additions of so many tokens through one dense layer."""
    spec = start.model.spec
    heads = spec.num_attention_heads * spec.head_dim
    keys = spec.num_key_value_heads * spec.head_dim
    matrices = 2 * spec.hidden_size * (heads + keys) + 3 * spec.hidden_size * spec.intermediate_size
    return 2.0 * tokens * (matrices + 2 * heads * start.measured.length)


def layer_carving(start: Ready, recipe: Recipe, measured: int) -> float:
    """Multiplications and additions of carving one layer by so many tokens, without their pass; rough."""
    narrow, wide, layer = start.model.spec.hidden_size, start.model.spec.intermediate_size, 0.0
    share = (recipe.shared + recipe.active) / recipe.experts
    if recipe.method in METHODS:
        groups = recipe.experts - recipe.shared
        layer += measured * narrow**2 + narrow**3 / 3 + 2.0 * measured * wide * min(wide // recipe.experts, narrow)
        layer += 4.0 * ROUNDS * measured * wide * (groups + 8)
    if recipe.refit == LEAST_SQUARES:
        layer += share * measured * wide**2 + 2.0 * measured * wide * narrow + wide**3 / 3 * 2 + 4.0 * wide**2 * narrow
    return layer


def products(start: Ready, recipe: Recipe) -> float:
    """Multiplications and additions of one way through all layers, and its loss; rough."""
    spec, measured, judged = start.model.spec, start.measured.rows.tokens, start.judged.rows.tokens
    share = (recipe.shared + recipe.active) / recipe.experts
    outputs = 2.0 * (measured + judged) * share * spec.hidden_size * spec.intermediate_size
    layer = layer_pass(start, measured + judged) + outputs + layer_carving(start, recipe, measured)
    return layer * spec.num_hidden_layers + 6.0 * judged * spec.hidden_size * spec.vocab_size


def rate() -> float:
    """Multiplications and additions of float32 a second that a pass comes to, here and now."""
    matrix = np.ones((TRIED, TRIED), np.float32)
    started = time.monotonic()
    matrix @ matrix.copy()
    return float(REACHED * 2.0 * TRIED**3 / max(time.monotonic() - started, 1e-6))
