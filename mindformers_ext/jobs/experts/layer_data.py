# SPDX-License-Identifier: Apache-2.0
"""One layer's tokens for a gate, out of shards of features: as many as memory allows, spread evenly."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.experts.dense_model import DenseModel
from mindformers_ext.jobs.experts.feature_files import LayerFeatures
from mindformers_ext.surgery.experts.split import LayerSplit
from mindformers_ext.surgery.experts.words import OUTPUT_NORM

TRAIN_SHARE = 0.95
FILES = 20  # from which on whole files are kept for validation, else the last tokens
FEWEST = 40  # tokens of a layer that a gate is fitted to


@dataclass(frozen=True)
class Gathered:
    """x (T, D), scores (T, E), and targets (T, E) where they were asked for; the first ``train`` are to train on.
    ``there``: tokens of the shards."""

    x: np.ndarray
    scores: np.ndarray
    targets: np.ndarray | None
    train: int
    there: int


def gather(
    features: LayerFeatures,
    model: DenseModel,
    layer: int,
    split: LayerSplit,
    kind: str,
    criterion: str,
    ridge: bool,
    limit: int,
) -> Gathered:
    """Read every shard once, and keep every n-th token where there are more than ``limit``.

    ``ridge``: the lengths of what experts add are wanted beside the scores; with the criterion "output_norm" they are
    the scores.

    Raises:
        UserError: features of another width than the model's, or too few tokens.
    """
    from mindformers_ext.surgery.experts.gate_layer import hidden_of, norms_of, scores_of

    spec = model.spec
    norms = ridge or criterion == OUTPUT_NORM
    down = model.matrix("down_proj", layer) if norms else None
    up = model.matrix("up_proj", layer) if norms and kind == "gate_proj" else None
    xs: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    there, step, marks = 0, 0, [0]
    for number, (x, a) in enumerate(features):
        _check_widths(features, number, x, a, (spec.hidden_size, spec.intermediate_size))
        step = step or max(1, ceil(len(x) * len(features.inputs) / limit))
        first = -there % step
        there += len(x)
        x, a = x[first::step], a[first::step]
        xs.append(x)
        if criterion != OUTPUT_NORM:
            scores.append(scores_of(a, split, criterion))
        if down is not None:
            targets.append(norms_of(a if up is None else hidden_of(a, x, up), down, split))
        marks.append(marks[-1] + len(x))
    if marks[-1] < FEWEST:
        raise UserError(f"layer {layer} has features of {there} tokens, a gate needs {FEWEST} at least: write more")
    return Gathered(
        np.concatenate(xs),
        np.concatenate(scores or targets),
        np.concatenate(targets) if targets else None,
        train_count(marks),
        there,
    )


def train_count(marks: list[int]) -> int:
    """Tokens to train on, given where the shards begin and the last one ends: of few shards, all but the last rows."""
    files = len(marks) - 1
    return marks[int(TRAIN_SHARE * files)] if files >= FILES else int(TRAIN_SHARE * marks[-1])


def _check_widths(features: LayerFeatures, number: int, x: np.ndarray, a: np.ndarray, widths: tuple[int, int]) -> None:
    for path, array, width in ((features.inputs[number], x, widths[0]), (features.outputs[number], a, widths[1])):
        if array.shape[1] != width:
            raise UserError(f"'{path}' is {array.shape[1]} wide, the model's layer {width}: it is of another model")
