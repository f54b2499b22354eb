# SPDX-License-Identifier: Apache-2.0
"""The rows of a data mixture, batch by batch, and where it stands in a checkpoint.

Rows are read by this process when their step comes: there are no workers whose number could matter, and nothing is
fetched before its window's proportions are known.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.mixture.schedule import DomainSchedule
from mindformers_ext.jobs.run.mixture import Mixture
from mindformers_ext.jobs.run.mixture_checks import continued, state_arrays, steps_of_epoch
from mindformers_ext.jobs.train.token_data import RecordRows, stacked


class MixtureData:
    """Batches drawn from several domains; see ``jobs.train.token_data.BatchSource``.

    Args:
        mixture: what is drawn, checked.
        seed: of the draws and of every domain's order.
        rows: of one step, of all processes together.
        columns: read of each row.
        vocab: ids of a row must be below.

    Raises:
        UserError: an epoch is shorter than a step.
    """

    def __init__(
        self, mixture: Mixture, seed: int, rows: int, columns: tuple[str, ...], vocab: int | None = None
    ) -> None:
        self.mixture, self.rows = mixture, rows
        self.schedule = DomainSchedule(mixture.state(seed, rows), mixture.on_exhausted)
        self.domains = [RecordRows(paths, columns, vocab) for paths in mixture.files]
        self.per_epoch = steps_of_epoch(mixture, rows)

    def batch(self, step: int, part: slice) -> tuple[np.ndarray, ...]:
        """Columns (rows, width) int32 of step ``step`` (from 0), which follows the last one asked for."""
        standing = self.schedule.step
        if step != standing:
            raise ValueError(f"step {step} of a mixture that stands before step {standing}")
        domains, rows = self.schedule.draw(part)
        return stacked([(self.domains[d], n) for d, n in zip(domains, rows, strict=True)])

    def state(self) -> dict[str, np.ndarray]:
        """Where the mixture stands, behind the last step asked for."""
        return state_arrays(self.schedule.state)

    def restore(self, state: Mapping[str, np.ndarray], step: int, where: str) -> None:
        """Continue behind ``step`` from the state of the checkpoint ``where``.

        Raises:
            UserError: it holds none, or that of another mixture or step.
        """
        found = continued(state, self.schedule.state, self.mixture, where)
        if found.step != step:
            raise UserError(
                f"cannot resume from {where}: it is of step {step}, its data mixture of step {found.step}: choose "
                "another checkpoint"
            )
        self.schedule.state = found

    def close(self) -> None:
        """Let go of the files."""
        for rows in self.domains:
            rows.close()
