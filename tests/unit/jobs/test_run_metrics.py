# SPDX-License-Identifier: Apache-2.0
"""Reading a run's metrics: ranks joined, killed lines left out, wrong ones named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.run.metrics import read_metrics, smoothed
from mindformers_ext.jobs.run.metrics_file import MetricsFile, StageLoad


def record(step: int, **changed: Any) -> dict[str, Any]:
    load = [[6.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]
    row = {
        "step": step,
        "loss": 8.0 - step,
        "lm_loss": 7.5 - step,
        "aux_loss": 0.5,
        "dropped": [0.25, 0.0],
        "expert_load": load,
        "learning_rate": 1e-3,
        "tokens_per_second": 100.0 * step,
    }
    return row | changed


def write(folder: Path, records: list[dict[str, Any]], rank: int = 0, end: str = "\n") -> None:
    (folder / "metrics").mkdir(exist_ok=True)
    text = "\n".join(json.dumps(row) for row in records) + end
    (folder / "metrics" / f"rank_{rank}.jsonl").write_text(text, encoding="utf-8")


def test_figures_of_one_rank(tmp_path: Path) -> None:
    write(tmp_path, [record(step) for step in (2, 1, 3, 4)])
    metrics = read_metrics(tmp_path)
    assert metrics.step.tolist() == [1, 2, 3, 4]
    assert metrics.expert_load.shape == (4, 2, 4)
    np.testing.assert_allclose(metrics.load_share(0, 2), [[0.75, 0.25, 0, 0], [0.25] * 4])
    np.testing.assert_allclose(metrics.load_cv()[0], [np.sqrt(6) / 2, 0.0])  # of 6, 2, 0, 0
    assert metrics.loss_ratio(20) == (6.5, 4.5, 4.5 / 6.5)  # 20 is more than half of 4
    assert metrics.typical_tokens_per_second() == 300.0  # the first step compiles and does not count
    assert metrics.has_experts


def test_a_step_recorded_again_counts_once_and_null_is_nan(tmp_path: Path) -> None:
    write(tmp_path, [record(1), record(2), record(2, loss=3.0, learning_rate=None)])
    metrics = read_metrics(tmp_path)
    assert metrics.loss.tolist() == [7.0, 3.0]
    assert np.isnan(metrics.learning_rate[1])


def test_the_loads_of_a_pipelines_stages_are_no_rank(tmp_path: Path) -> None:
    write(tmp_path, [record(1), record(2)])
    MetricsFile(str(tmp_path), 0, 0, "load_").append(StageLoad(1, 0, [0], [[1.0, 3.0]], [0.0]))
    assert read_metrics(tmp_path).step.tolist() == [1, 2]


def test_ranks_become_one_run(tmp_path: Path) -> None:
    write(tmp_path, [record(1), record(2), record(3)])
    write(tmp_path, [record(1, loss=9.0), record(2, loss=8.0)], rank=1)
    metrics = read_metrics(tmp_path)
    assert metrics.step.tolist() == [1, 2]
    assert metrics.loss.tolist() == [8.0, 7.0]  # the mean
    assert metrics.tokens_per_second.tolist() == [200.0, 400.0]  # the sum
    assert metrics.expert_load[0, 0].tolist() == [12.0, 4.0, 0.0, 0.0]
    assert metrics.dropped[0].tolist() == [0.25, 0.0]


def test_the_line_of_a_killed_run_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, [record(1), record(2)], end='\n{"step": 3, "lo')
    assert read_metrics(tmp_path).step.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([record(1), {"step": 2}], r"rank_0\.jsonl, line 2: no loss, lm_loss"),
        ([record(1), record(2, expert_load=[[1.0, 2.0]])], "expert_load of different shapes"),
        ([], "line 1: not JSON"),
    ],
)
def test_wrong_records_are_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    write(tmp_path, rows)
    with pytest.raises(UserError, match=message):
        read_metrics(tmp_path)


def test_no_metrics_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no metrics in"):
        read_metrics(tmp_path)


def test_smoothing_keeps_the_ends_and_the_mean_of_a_line() -> None:
    values = np.stack([np.arange(9.0), np.full(9, 2.0)], axis=1)
    result = smoothed(values, 3)
    np.testing.assert_allclose(result[1:-1], values[1:-1])
    np.testing.assert_allclose(result[0], [0.5, 2.0])
    np.testing.assert_allclose(smoothed(values, 1), values)
