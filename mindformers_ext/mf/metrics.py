# SPDX-License-Identifier: Apache-2.0
"""From a MindSpore train step's outputs to the record that ``jobs.run.metrics_file`` keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mindformers_ext.jobs.run.metrics_file import MetricsFile, StepRecord

__all__ = ["MetricsFile", "StepRecord", "record_of"]


def record_of(outputs: Sequence[Any], step: int, epoch: int, seconds: float, tokens: int) -> StepRecord:
    """The record of a train step's outputs (``ms.step.StepOutput`` order; five outputs are MindFormers' own step's)."""
    values = [_array(value) for value in outputs]
    loss = float(values[0].mean())
    has_terms = len(values) >= 9
    dropped = values[8].reshape(-1) if has_terms else np.zeros(1)
    return StepRecord(
        step=step,
        epoch=epoch,
        loss=loss,
        lm_loss=float(values[5].mean()) if has_terms else loss,
        aux_loss=float(values[6].mean()) if has_terms else 0.0,
        drop_rate=float(dropped.mean()),
        learning_rate=float(values[3].reshape(-1)[-1]),
        global_norm=float(values[4].reshape(-1)[0]),
        loss_scale=float(values[2].reshape(-1)[0]),
        overflow=bool(values[1].any()),
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
        dropped=[float(share) for share in dropped],
        expert_load=values[7].astype(float).tolist() if has_terms else [[0.0]],
    )


def _array(value: Any) -> np.ndarray:
    if value is None:
        return np.full((1,), np.nan)
    return np.atleast_1d(value.asnumpy() if hasattr(value, "asnumpy") else np.asarray(value))
