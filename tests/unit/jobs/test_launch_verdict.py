# SPDX-License-Identifier: Apache-2.0
"""What a launcher shows of its workers, and why it says a job failed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from mindformers_ext.jobs.launch.arguments import Launch, read_launch
from mindformers_ext.jobs.launch.program import MSRUN, TORCHRUN, Program
from mindformers_ext.jobs.launch.screen import Follower, Screen
from mindformers_ext.jobs.launch.torchrun import torchrun_environment
from mindformers_ext.jobs.launch.verdict import WHOLE, reason
from mindformers_ext.jobs.run.display import Lines, MarkedLive, Terminal

FAR = "x" * 300


def launch(folder: Path, workers: int = 3) -> Launch:
    return read_launch(["run_mindformer.py", str(workers), "8118", str(folder), "True", "60"], {})


@pytest.mark.parametrize("program", [MSRUN, TORCHRUN])
def test_an_error_is_shown_to_its_end_and_only_logs_that_exist_are_named(program: Program, tmp_path: Path) -> None:
    job = launch(tmp_path)
    remedy = f"{FAR} what was found {FAR}: set model_parallel to 2"
    text = f"[WARNING] noise\nsteps\nerror: job.yaml: 2 problems\n  - {remedy}\n  - last: do that\n[WARNING] more\n"
    job.log_of(1).write_text(text)
    found = reason(job, program, (1, 2), 1)
    assert found.startswith("error: the job failed.\nWorker 1 ended with exit code 2. Its log: ")
    assert f"  |   - {remedy}\n  |   - last: do that" in found and "noise" not in found and "more" not in found
    assert "worker_0.log" not in found and "worker_2.log" not in found and "The other workers" not in found
    job.log_of(2).write_text("")
    assert f"their logs: {job.log_of(2)}" in reason(job, program, (1, 2), 1)
    assert "Worker 1 ended with an error" in reason(job, program, None, 1)


def test_a_long_list_of_problems_is_cut_behind_its_head(tmp_path: Path) -> None:
    job = launch(tmp_path, 1)
    job.log_of(0).write_text("error: head\n" + "".join(f"  - problem {place}\n" for place in range(100)))
    found = reason(job, MSRUN, None, 2)
    assert "head" in found and "problem 50" in found and f"... and {101 - WHOLE} more lines" in found


def test_where_no_worker_has_started_the_programs_own_words_are_shown(tmp_path: Path) -> None:
    job = launch(tmp_path)
    assert reason(job, TORCHRUN, None, 1) == "error: the job failed.\nNothing started."
    TORCHRUN.log(job).write_text("Traceback (most recent call last):\n  File\nValueError: no such option\n")
    found = reason(job, TORCHRUN, None, 1)
    assert f"No worker has started. What torchrun said: {tmp_path / 'torchrun.log'}" in found
    assert found.endswith("  | ValueError: no such option")
    TORCHRUN.log(job).write_text("The server socket has failed to listen on [::]:8118 (errno: 98 - EADDRINUSE)\n")
    assert "Port 8118 was taken by another program: give another PORT" in reason(job, TORCHRUN, None, 1)


def test_machines_that_share_a_log_folder_keep_each_others_files(tmp_path: Path) -> None:
    for program in (MSRUN, TORCHRUN):
        words = ["16", "8", "127.0.0.1", "8118"]
        files = [
            program.logs(read_launch(["run_mindformer.py", *words, str(node), str(tmp_path), "True", "9"], {}))
            for node in range(2)
        ]
        assert not set(files[0]) & set(files[1]) and tmp_path / f"{program.name}_1.log" in files[1]
        assert len(files[0]) == 8 + 1 + (program is MSRUN) and len(files[1]) == 9


def test_torchruns_words_are_understood() -> None:
    prefix = torchrun_environment({})["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"]
    line = TORCHRUN.mark.match(prefix.replace("${rank}", "12") + "loss 1\n")
    assert (line["rank"], line["text"]) == ("12", "loss 1\n")
    died = TORCHRUN.died.search("E1 api.py:986] failed (exitcode: -9) local_rank: 1 (pid: 321) of binary: python")
    assert (died["pid"], died["code"]) == ("321", "-9")
    assert (
        TORCHRUN.rank_of({"TORCHELASTIC_RUN_ID": "none", "RANK": "9"}) == 9 and TORCHRUN.rank_of({"RANK": "9"}) is None
    )
    assert MSRUN.rank_of({"MS_ROLE": "MS_SCHED", "RANK_ID": "0"}) is None


def test_all_lines_are_shown_until_a_display_speaks() -> None:
    worker, seen = io.StringIO(), io.StringIO()
    worker.write("a script's own line\n")
    display = MarkedLive(worker)
    display.line("step 1/3  loss 5")
    worker.write("[WARNING] MindSpore\n")
    display.live("step 2/3  loss 4")
    display.line("step 3/3  loss 3")
    screen = Screen(Lines(seen))
    for line in worker.getvalue().splitlines(keepends=True):
        screen.take(line)
    assert seen.getvalue() == "a script's own line\nstep 1/3  loss 5\nstep 3/3  loss 3\n"
    screen = Screen(Terminal(terminal := io.StringIO()))
    for line in worker.getvalue().splitlines(keepends=True):
        screen.take(line)
    assert "MindSpore" not in terminal.getvalue() and "\r\x1b[Kstep 2/3  loss 4" in terminal.getvalue()


def test_whole_lines_are_followed(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "log")
    assert follower.lines() == []
    with (tmp_path / "log").open("wb") as file:
        for piece, found in ((b"one\ntw", ["one"]), (b"o\n\xff\n", ["two", "\ufffd"]), (b"", [])):
            file.write(piece)
            file.flush()
            assert follower.lines() == found
