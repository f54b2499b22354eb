# SPDX-License-Identifier: Apache-2.0
"""Pairs of answers as a batch source, with what the reference thinks of them (``core.preferences``)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.log import get_logger
from mindformers_ext.jobs.engine.protocols import Trainer
from mindformers_ext.jobs.run.display import current
from mindformers_ext.jobs.train.token_data import TokenData

REFERENCE = "reference_logps"  # in a checkpoint


class PairData(TokenData):
    """``TokenData`` of ``core.preferences.PAIR_COLUMNS``, and a fifth column: the reference's log-probabilities
    (rows, 2) float32 of the chosen and the rejected answers, measured before the first step and kept in every
    checkpoint."""

    reference: np.ndarray | None = None

    def batch(self, step: int, part: slice) -> tuple[np.ndarray, ...]:
        """As ``TokenData``."""
        assert self.reference is not None
        numbers = self.numbers(step, part)
        return (*self.read(numbers), self.reference[numbers])

    def measure(self, trainer: Trainer, rows: int) -> None:
        """Keep what the network of ``trainer`` thinks of every answer as it stands; ``rows`` of one process at once.
        Nothing where a checkpoint has told."""
        if self.reference is not None:
            return
        current().begin("measuring the reference's log-probabilities")
        size, rank, count = trainer.ranks.size, trainer.ranks.rank, len(self.records)
        found = np.zeros((count, 2), np.float64)
        for first in range(0, count, rows * size):
            own = np.arange(first + rank * rows, first + (rank + 1) * rows)
            columns = self.read(np.minimum(own, count - 1))
            sides = [trainer.row_log_probabilities(columns[2 * side], columns[2 * side + 1]) for side in range(2)]
            held = own < count
            found[own[held]] = np.stack(sides, 1)[held]
        self.reference = trainer.ranks.sum(found).astype(np.float32)
        get_logger(__name__).info(
            "Reference: log-probabilities of %d pairs, mean of the chosen %.3f, of the rejected %.3f",
            count,
            *self.reference.mean(0),
        )
        current().done()

    def state(self) -> dict[str, np.ndarray]:
        """The reference."""
        assert self.reference is not None
        return {REFERENCE: self.reference}

    def restore(self, state: Mapping[str, np.ndarray], step: int, where: str) -> None:
        """The reference of the checkpoint ``where``; it is the same behind every step.

        Raises:
            UserError: it has none, or one of another number of pairs.
        """
        held = state.get(REFERENCE)
        if held is None or held.shape != (len(self.records), 2):
            what = "no reference" if held is None else f"a reference of {len(held)} pairs"
            raise UserError(
                f"cannot resume: {where} holds {what}, the data {len(self.records)}: give the data that the run began "
                "with, or start anew from its weights without --resume_training"
            )
        self.reference = np.asarray(held, np.float32)
