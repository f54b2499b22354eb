# SPDX-License-Identifier: Apache-2.0
"""Every command that writes, killed twenty times: no reader is given a half output, and a rerun is as undisturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.kill_experts import WHOLE

pytestmark = pytest.mark.slow  # all together more than 40 seconds

KILLS = 20


def campaign(name: str, kills: int, folder: Path, root: Path) -> dict:
    """What ``tests.helpers.kills`` has found, nothing wrong among it."""
    words = [sys.executable, "-m", "tests.helpers.kills", name, str(folder), str(kills)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{name}: {result['kills']} kills, {result['held']}")
    assert not result["wrong"], "\n".join(result["wrong"])
    assert result["kills"] == kills
    return result


@pytest.mark.parametrize(
    "name",
    [
        *("merge", "mixture", "convert", "convert back", "transform"),
        pytest.param("preprocess", marks=pytest.mark.turn("killed jobs")),  # a process writes its file
    ],
)
def test_a_reader_takes_the_old_output_or_the_new_and_a_rerun_is_as_undisturbed(
    name: str, tmp_path: Path, repo_root: Path
) -> None:
    held = campaign(name, KILLS, tmp_path, repo_root)["held"]
    assert held["nothing"] and held["old"], "kills that come early, and late enough"


@pytest.mark.turn("killed jobs")
def test_a_corpus_by_domain_goes_on_with_its_finished_parts(tmp_path: Path, repo_root: Path) -> None:
    """The prepared folder is the old one, the new one or none; a rerun writes the bytes of an undisturbed run."""
    assert campaign("domains", 4, tmp_path, repo_root)["held"]["old"]


PRUNED = pytest.mark.long("tests/cli/test_killed.py kills the first stage on PyTorch")
SHORT = pytest.mark.long("tests/cli/test_killed.py kills all of them in one run")
STAGES = ("split", "features", "importance", "select", "stream", "convert", "report", "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kills"),
    [
        pytest.param("run", 3, marks=pytest.mark.turn("killed jobs")),
        *(pytest.param(name, KILLS, marks=SHORT) for name in STAGES),
    ],
)
def test_a_stage_of_experts_goes_on_where_it_was_killed(
    stage: str, kills: int, tmp_path: Path, repo_root: Path
) -> None:
    gone_on = campaign(f"experts {stage}", kills, tmp_path, repo_root)["held"]["gone on"]
    # a whole folder that is there is refused: of half of the kills another request's, of others that of the killed run
    assert gone_on >= (kills // 4 if stage in WHOLE else kills // 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "kills"),
    [
        *(pytest.param(what, 6, marks=pytest.mark.turn("killed runs")) for what in ("pt", "pt mixture", "pt prune")),
        *(pytest.param(what, 6, marks=PRUNED) for what in ("pt cut", "ms prune", "ms cut")),
        pytest.param("ms mixture", 6, marks=pytest.mark.long("tests/cli/test_killed.py kills it on PyTorch")),
        pytest.param("pt", KILLS, marks=pytest.mark.long("tests/cli/test_killed.py kills the same six times")),
        pytest.param("ms", KILLS, marks=pytest.mark.long("tests/cli/run/test_trainer_own.py kills one run")),
    ],
)
def test_training_goes_on_as_if_it_had_not_been_killed(what: str, kills: int, tmp_path: Path, repo_root: Path) -> None:
    held = campaign(f"train {what}", kills, tmp_path, repo_root)["held"]
    assert held["resumed"] >= kills // 2 and held["runs to the end"]
