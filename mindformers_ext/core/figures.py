# SPDX-License-Identifier: Apache-2.0
"""What one training step has measured, by name; an engine's own outputs are decoded here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MEASURED = ("accuracy", "margin")  # of pairs of answers: the share whose margin is above 0, and the mean margin
NOTHING: Mapping[str, float] = MappingProxyType({})


class StepFigures(NamedTuple):
    """Figures of a step over all ranks and micro batches: losses are means, the load is a sum.

    ``loss_scale`` is the one the next step uses, ``expert_load`` (L, E) counts assignments before dropping, ``dropped``
    (L) is the share of them that found no slot; a network without experts has (1, 1) and (1) zeros. ``extra``: further
    figures of a network or a hook. MindFormers' callbacks read the first five by position.
    """

    loss: float
    overflow: bool
    loss_scale: float
    learning_rate: float
    global_norm: float
    lm_loss: float
    aux_loss: float
    expert_load: Array
    dropped: Array
    extra: Mapping[str, float] = NOTHING

    @property
    def has_load(self) -> bool:
        """Whether the step told how its experts are loaded."""
        return bool(self.expert_load.ndim == 2 and self.expert_load.shape[1] > 1)


TERMS = 9  # outputs of our train step; MindFormers' own steps stop after the global norm


def figures_of(outputs: Any) -> StepFigures:
    """Numbers from a MindSpore train step's outputs; reading them waits for the device.

    Args:
        outputs: our step's nine tensors in the order of ``StepFigures``, MindFormers' own five, or a loss alone. What a
            step does not tell: the LM loss is the loss, no loss of routing, no load, and NaN for rate and norm.
    """
    if not isinstance(outputs, (tuple, list)):
        outputs = (outputs, False, 1.0, None, None)
    values = [_array(value) for value in outputs]
    has_terms = len(values) >= TERMS
    loss = float(values[0].mean())
    return StepFigures(
        loss=loss,
        overflow=bool(values[1].any()),
        loss_scale=_first(values, 2, 1.0),
        learning_rate=float(values[3].reshape(-1)[-1]) if len(values) > 3 else float("nan"),
        global_norm=_first(values, 4, float("nan")),
        lm_loss=float(values[5].mean()) if has_terms else loss,
        aux_loss=float(values[6].mean()) if has_terms else 0.0,
        expert_load=values[7] if has_terms else np.zeros((1, 1), np.float32),
        dropped=values[8].reshape(-1) if has_terms else np.zeros(1, np.float32),
    )


def with_preferences(figures: StepFigures) -> StepFigures:
    """Figures of a step over pairs of answers: what it has measured stands behind ``dropped``."""
    count = len(MEASURED)
    extra = dict(zip(MEASURED, map(float, figures.dropped[-count:]), strict=True))
    return figures._replace(dropped=figures.dropped[:-count], extra={**figures.extra, **extra})


def _first(values: Sequence[Array], place: int, absent: float) -> float:
    return float(values[place].reshape(-1)[0]) if len(values) > place else absent


def _array(value: Any) -> Array:
    if value is None:
        return np.full((1,), np.nan)
    array: Array = np.atleast_1d(value.asnumpy() if hasattr(value, "asnumpy") else np.asarray(value))
    return array
