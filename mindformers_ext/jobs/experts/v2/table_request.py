# SPDX-License-Identifier: Apache-2.0
"""What is asked of a stage that runs texts through a dense model and writes a file of a value per layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mindformers_ext.core.errors import Problems
from mindformers_ext.jobs.experts.calibration import Calibration
from mindformers_ext.jobs.experts.v2.layer_tables import FORMATS


@dataclass(frozen=True, kw_only=True)
class TableRequest:
    """``KIND``: of the table, after which the file is called; ``fmt``: of the file."""

    KIND: ClassVar[str]
    calibration: Calibration
    save_path: Path
    fmt: str = "pt"
    overwrite: bool = False
    dry_run: bool = False

    def collect(self, problems: Problems) -> None:
        """Add options that do not fit."""
        problems.one_of("--format", self.fmt, FORMATS)

    def check(self) -> None:
        """``UserError`` lists options that do not fit."""
        problems = Problems("options")
        self.collect(problems)
        problems.raise_if_any()
        self.calibration.check()

    @property
    def path(self) -> Path:
        """The file that is written."""
        return self.save_path / f"{self.KIND}.{self.fmt}"
