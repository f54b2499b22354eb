# SPDX-License-Identifier: Apache-2.0
"""One training in a folder: a second one is refused while the first lives, and only then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.run.lock import LOCK, is_first_rank, training_lock

HOLD = """
import sys, time
from pathlib import Path
from mindformers_ext.jobs.run.lock import training_lock
with training_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_training_is_refused_until_the_first_has_died(tmp_path: Path, repo_root: Path) -> None:
    folder = tmp_path / "output"
    words = [sys.executable, "-c", HOLD, str(folder)]
    other = subprocess.Popen(words, cwd=repo_root, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {other.pid}.*give another --output_dir"), training_lock(folder):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert (folder / LOCK).exists()  # a dead process has left it
        with training_lock(folder):
            assert (folder / LOCK).read_text() == f"{os.getpid()}\n"
    finally:
        other.kill()
    assert not (folder / LOCK).exists()


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), training_lock(tmp_path / "new"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    with training_lock(tmp_path / "old"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "old"]


def test_a_link_under_the_locks_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="a link, which is not followed"), training_lock(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_the_first_rank_holds_the_folder_for_its_job() -> None:
    assert is_first_rank({}) and is_first_rank({"RANK": "0"}) and is_first_rank({"RANK_ID": "0"})
    assert not is_first_rank({"RANK": "1"}) and not is_first_rank({"RANK_ID": "3", "RANK": "0"})
    assert not is_first_rank({"MS_ROLE": "MS_SCHED", "RANK_ID": "0"})  # it runs the same script
