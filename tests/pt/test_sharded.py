# SPDX-License-Identifier: Apache-2.0
"""Two processes (gloo): FSDP2, expert parallel, and both equal one process; they resume exactly."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.pt.ranks_worker import rows, trainer_of

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def launched(words: list[object], size: int = 2, cwd: Path | None = None) -> list[str]:
    """Run a script in ``size`` processes as torchrun would; returns their errors."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = dict(
        os.environ,
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(ROOT),
    )
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=cwd,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    errors = [process.communicate(timeout=280)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * size, errors[0][-2000:] + errors[-1][-2000:]
    return errors


def state_of(trainer) -> dict[str, np.ndarray]:  # noqa: ANN001
    return dict(trainer.state(adapters=False))


def largest(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert set(a) == set(b)
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


CASES = [(1, "capacity"), (2, "capacity"), (2, "one"), (2, "empty"), (2, "qwen"), (2, "noisy")]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Path]:
    """What two processes have computed, all cases in one job."""
    folder = tmp_path_factory.mktemp("pairs")
    outputs = {case: folder / f"{case[0]}-{case[1]}.npz" for case in CASES}
    words = [word for case, output in outputs.items() for word in (*case, output)]
    launched([ROOT / "tests" / "pt" / "ranks_worker.py", 3, *words])
    return outputs


@pytest.mark.parametrize(("ep", "routing"), CASES)
def test_two_processes_equal_one(pairs: dict[tuple[int, str], Path], ep: int, routing: str) -> None:
    """Moments are sums of gradients, so equal state is equal gradients; capacity drops per rank."""
    output = pairs[ep, routing]
    one = trainer_of(2, ep, routing, alone=True)
    one.open()
    figures = [one.step((rows(step),)) for step in range(3)]
    found = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    expected = [[f.loss, f.lm_loss, f.aux_loss, f.global_norm] for f in figures]
    np.testing.assert_allclose(found["figures"], expected, rtol=1e-5)
    difference = largest(dict(np.load(output)), state_of(one))
    print(f"\nep {ep}, {routing}: weights, moments differ by {difference:.1e} at most", end="")
    assert difference <= 1e-5 and found["load"] == figures[-1].expert_load.tolist()
    if routing in ("one", "empty"):
        idle = slice(2, 4) if routing == "one" else slice(0, 2)
        assert all(not np.any(np.array(layer)[idle]) for layer in found["load"])


@pytest.mark.long("tests/cli/run/test_engine_pt.py resumes two killed processes")
def test_two_processes_resume_exactly(tmp_path: Path) -> None:
    worker = ROOT / "tests" / "pt" / "ranks_worker.py"
    launched([worker, 2, 2, "capacity", tmp_path / "half.npz"])
    launched([worker, 4, 2, "capacity", tmp_path / "rest.npz", tmp_path / "half.npz"])
    launched([worker, 4, 2, "capacity", tmp_path / "whole.npz"])
    assert largest(dict(np.load(tmp_path / "rest.npz")), dict(np.load(tmp_path / "whole.npz"))) == 0.0
