# SPDX-License-Identifier: Apache-2.0
"""How commands end when nobody reads their output any more, and when they are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cluster import wait_for


def test_a_reader_that_leaves_ends_the_command_without_a_traceback(repo_root: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    config = "research/mixtral/mixtral_8x7b/pretrain_mixtral-8x7b.yaml"
    words = [sys.executable, "tools/dryrun.py", "--config", config, "--suggest", "--memory", "64GB"]
    done = subprocess.run(words, cwd=repo_root, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_dry_run_leaves_no_process(number: int, code: int, repo_root: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "tools/dryrun.py",
        "--config",
        "research/mixtral/mixtral_8x7b/predict_mixtral-8x7b.yaml",
        "--worker_num",
        "8",
        "--ranks",
        "0,1",
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(words, cwd=repo_root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(running(tmp_path / "out")) > 1, 60, "the process that imports")
        process.send_signal(number)
        _, message = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code and "Traceback" not in message, message
    assert message.endswith("interrupted\n" if number == signal.SIGINT else "")
    wait_for(lambda: not running(tmp_path / "out"), 10, "the end of every process")


def running(folder: Path) -> list[str]:
    """Processes whose command line holds ``folder``, zombies left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words:
            found.append(path.parent.name)
    return found
