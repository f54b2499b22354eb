# SPDX-License-Identifier: Apache-2.0
"""A run continued with more epochs says what happens to the learning rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mindformers_ext.core.config.file import parse_yaml
from mindformers_ext.core.config.run import run_spec_from_yaml
from mindformers_ext.core.config.schedule import schedule_from_yaml
from mindformers_ext.core.errors import Problems
from mindformers_ext.core.spec import ParallelSpec
from mindformers_ext.jobs.run import seam
from mindformers_ext.jobs.run.keep import keep_config
from tests.helpers.tiny_run import YAML
from tests.unit.jobs.test_dataset_rows import SPEC

ROWS, BATCH = 40, 4


def notes(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> list[str]:
    monkeypatch.setattr(seam, "dataset_files", lambda data: [Path("a.mindrecord")])
    monkeypatch.setattr(seam, "row_count", lambda path: ROWS)
    config = parse_yaml(YAML, "test") | {"output_dir": str(folder)} | changes
    config["resume_training"] = "tiny_rank_0-2_10.ckpt"
    return seam.seam_notes(config, run_spec_from_yaml(config), SPEC)


def test_more_epochs_name_both_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    former = parse_yaml(YAML, "test")
    keep_config(former, tmp_path)
    assert notes(monkeypatch, tmp_path) == []
    longer = former["runner_config"] | {"epochs": 8}
    (note,) = notes(monkeypatch, tmp_path, runner_config=longer)
    old, new = (schedule_from_yaml(former, steps, ROWS // BATCH, Problems("")) for steps in (20, 80))
    assert f"from {old.rate(19):.3g} to {new.rate(20):.3g}" in note and "(20 steps before, 80 now)" in note
    kept = former["lr_schedule"] | {"total_steps": 20}  # what the note advises
    assert "--lr_schedule.total_steps 20" in note
    assert notes(monkeypatch, tmp_path, runner_config=longer, lr_schedule=kept) == []


def test_nothing_is_said_where_the_former_run_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert notes(monkeypatch, tmp_path) == []
    (tmp_path / "run_config").mkdir()
    (tmp_path / "run_config" / "train.yaml").write_text("]")
    assert notes(monkeypatch, tmp_path) == []


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ({"parallel_mode": "stand_alone"}, 6),
        ({"parallel_mode": "data_parallel", "device_num": 4}, 24),
        ({"parallel_mode": "semi_auto_parallel", "device_num": 8, "data_parallel": 4, "micro_batch_num": 16}, 24),
        ({"parallel_mode": "semi_auto_parallel", "data_parallel": 4, "pipeline_stage": 2, "micro_batch_num": 16}, 128),
    ],
)
def test_rows_of_an_update_are_those_of_mindformers_batch(words: dict[str, Any], rows: int) -> None:
    """Its ``_check_global_batch_size_for_auto_parallel``: micro batches count in a pipeline, accumulation elsewhere."""
    run = replace(run_spec_from_yaml(parse_yaml(YAML, "test")), batch_size=2, accumulation=3)
    assert seam.update_rows(run, replace(SPEC, parallel=ParallelSpec(**words))) == rows
