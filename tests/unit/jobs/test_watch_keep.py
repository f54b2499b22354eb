# SPDX-License-Identifier: Apache-2.0
"""What both training loops say about a step, when they give up, and which files they leave."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.figures import StepFigures
from mindformers_ext.jobs.run.keep import is_finite, surplus
from mindformers_ext.jobs.run.metrics_file import MetricsFile, StepRecord, record_of
from mindformers_ext.jobs.run.watch import PATIENCE, SHORT_PATIENCE, Watch

LOAD = np.array([[3.0, 1.0]])


def figures(loss: float = 1.5, overflow: bool = False, scale: float = 2.0, **extra: float) -> StepFigures:
    return StepFigures(loss, overflow, scale, 0.1, 0.5, loss - 0.25, 0.25, LOAD, np.array([0.5]), extra)


def record(step: int, loss: float = 1.5, overflow: bool = False, scale: float = 2.0) -> StepRecord:
    return record_of(figures(loss, overflow, scale), step, 10, 0.5, 100)


def watch(folder: Path | None = None, **options: int) -> tuple[Watch, list[str]]:
    """A watch of a run of 20 steps, 10 an epoch, and the lines it has logged."""
    lines: list[str] = []
    return Watch(lambda text, *values: lines.append(text % values), folder, 10, 20, **options), lines


def test_a_line_every_n_steps_of_this_process() -> None:
    eyes, lines = watch(first=9, every=3)
    for step in range(10, 17):
        eyes.see(record(step))
    places = ["Epoch:[  1/  2], step:[   10/   10]", "Epoch:[  2/  2], step:[    3/   10]", "step:[    6/   10]"]
    assert len(lines) == 3 and all(place in line for place, line in zip(places, lines, strict=True))
    assert "loss: 1.500000, lm_loss: 1.250000, aux_loss: 0.250000, drop_rate: 50.00%, per_step_time: 500ms" in lines[0]
    assert "tokens/s: 200, remaining: 0:00:02 }" in lines[2]  # four steps of half a second


def test_a_loss_that_is_no_number_stops_the_run_and_sets_its_weights_aside(tmp_path: Path) -> None:
    for name in ("x_rank_0-1_3.ckpt", "x_rank_0-1_4.ckpt"):
        (tmp_path / name).write_bytes(b"")
    eyes, lines = watch(tmp_path)
    os.utime(tmp_path / "x_rank_0-1_4.ckpt", (eyes.began + 1, eyes.began + 1))
    with pytest.raises(UserError, match=r"step 5: the loss is nan .*x_rank_0-1_4.ckpt.unusable holds the weights"):
        eyes.see(record(5, float("nan")))
    assert len(lines) == 1 and (tmp_path / "x_rank_0-1_3.ckpt").exists()


def test_overflows_in_a_row_stop_the_run_sooner_while_the_scale_stands_still() -> None:
    eyes, _ = watch()
    for step in range(1, SHORT_PATIENCE):
        eyes.see(record(step, overflow=True))
    eyes.see(record(SHORT_PATIENCE))  # one good step, and the count begins anew
    for step in range(SHORT_PATIENCE + 1, 2 * SHORT_PATIENCE):
        eyes.see(record(step, overflow=True))
    with pytest.raises(UserError, match=f"overflowed {SHORT_PATIENCE} steps in a row.*No checkpoint exists"):
        eyes.see(record(2 * SHORT_PATIENCE, overflow=True))
    eyes, _ = watch()
    with pytest.raises(UserError, match=f"step {PATIENCE}: gradients overflowed {PATIENCE} steps in a row"):
        for step in range(1, PATIENCE + 2):
            eyes.see(record(step, overflow=True, scale=2.0 ** (100 - step)))


def test_weights_older_than_a_streak_of_overflows_are_the_failing_ones(tmp_path: Path) -> None:
    """Steps 4 and 5 changed nothing, so the weights that overflow are those after step 3."""
    eyes, _ = watch(tmp_path)
    for name in ("x_rank_0-1_2.ckpt", "x_rank_0-1_3.ckpt"):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (eyes.began + 1, eyes.began + 1))
    with pytest.raises(UserError):
        for step in range(4, 4 + SHORT_PATIENCE):
            eyes.see(record(step, overflow=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x_rank_0-1_2.ckpt", "x_rank_0-1_3.ckpt.unusable"]


def test_the_oldest_files_go_and_never_the_newest(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("c", "a", "b")]
    for age, path in enumerate(files):
        path.write_bytes(b"")
        os.utime(path, (age, age))
    assert surplus(files, 2, files[2]) == files[:1]
    assert surplus(files, 0, files[2]) == [] and surplus(files, 5, files[2]) == []
    os.utime(files[2], (-1, -1))  # a clock set back
    assert surplus(files, 1, files[2]) == files[:1]


def test_one_sum_tells_infinities_and_nans() -> None:
    assert is_finite(np.full(1000, 3e38, np.float32))
    assert not is_finite(np.array([1.0, np.inf], np.float32)) and not is_finite(np.array([np.inf, -np.inf]))


def test_a_resumed_metrics_file_reads_as_one_run(tmp_path: Path) -> None:
    first = MetricsFile(str(tmp_path), 0, 0)
    for step in range(1, 6):
        first.append(record(step))
    with first.path.open("a") as file:
        file.write('{"step": 6, "los')  # a killed run
    second = MetricsFile(str(tmp_path), 0, 3)
    second.append(record_of(figures(), 4, 10, 0.25, 100))
    lines = second.path.read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [f'{{"step": {step}' for step in (1, 2, 3, 4)]
    assert '"tokens_per_second": 400.0' in lines[-1] and '"drop_rate": 0.5' in lines[-1]
    MetricsFile(str(tmp_path), 0, 0)
    assert not second.path.exists() and second.path.with_name("rank_0.jsonl.previous").exists()


def test_further_figures_stand_in_the_row_by_their_names() -> None:
    row = json.loads(record_of(figures(sparsity=0.75), 3, 10, 0.5, 100).line())
    assert row["sparsity"] == 0.75 and row["epoch"] == 1 and "extra" not in row


@pytest.mark.parametrize(("last", "warns"), [(9.0, True), (1.6, False), (0.4, False)])
def test_a_run_that_ends_far_above_its_beginning_is_told_so(last: float, warns: bool) -> None:
    eyes, lines = watch(every=100)
    for step in range(1, 21):
        eyes.see(record(step, loss=1.5 if step < 15 else last))
    assert (
        any("it has not learned: the LM loss of its last steps is 8.75, of its first 1.25" in x for x in lines) == warns
    )


def test_a_run_whose_last_steps_changed_nothing_is_told_so() -> None:
    eyes, lines = watch(every=100)
    for step in range(1, 21):
        eyes.see(record(step, overflow=step > 13, scale=2.0**-step))
    assert "gradients overflowed in its last 7 steps, which changed no weights" in lines[-1]
