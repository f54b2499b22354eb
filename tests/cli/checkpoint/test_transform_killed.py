# SPDX-License-Identifier: Apache-2.0
"""``tools/transform_ckpt.py`` being killed, interrupted, short of memory and of disk."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.formats.strategy import read_strategy
from tests.helpers.sliced import (
    cut,
    write_file,
    write_ranks,
    write_strategy,
)
from tests.helpers.transform import TOOLS, holds, merge, run, shell, tree


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """60 MB in 16 ranks: long enough to be killed in the middle."""
    folder = tmp_path_factory.mktemp("large")
    rows = {f"model.layers.{n}.w": dict(matrix=[2, 8], tensor_map=[-1, 0], step=8, size=2) for n in range(30)}
    write_strategy(folder / "strategy" / "s.ckpt", rows)
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 255, (1024, 512), np.int32) for name in rows}
    write_ranks(folder / "checkpoint", cut(read_strategy(folder / "strategy"), arrays))
    write_strategy(folder / "other.ckpt", {name: dict(matrix=[2, 4], tensor_map=[0, 1]) for name in rows})
    return folder, arrays


def test_two_processes_killed_at_any_moment_go_on_and_leave_nothing_wrong(large, tmp_path):
    """One process: tests/cli/test_killed.py."""
    folder, arrays = large
    words = merge(
        folder,
        tmp_path / "out",
        "--dst_ckpt_strategy",
        folder / "other.ckpt",
        "--prefix",
        "m_",
        "--transform_process_num",
        2,
    )
    command = [sys.executable, "transform_ckpt.py", *map(str, words)]
    expected = cut(read_strategy(folder / "other.ckpt"), arrays)
    moments, in_the_middle = random.Random(2), 0
    for _ in range(10):
        process = subprocess.Popen(
            command, cwd=TOOLS, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None and not list((tmp_path / "out").glob("rank_*/.m_*")):
            time.sleep(0.001)  # until it writes
        time.sleep(moments.uniform(0, 0.12))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        finished = sorted((tmp_path / "out").glob("rank_*/m_*.ckpt"))
        for path in finished:
            holds(path, expected[int(path.parent.name.removeprefix("rank_"))])
        in_the_middle += len(finished) < 8 and bool(list((tmp_path / "out").glob("rank_*/.m_*")))
        if len(finished) == 8:
            shutil.rmtree(tmp_path / "out")
    assert in_the_middle > 2
    result = shell(*words, *(["--overwrite"] if len(list((tmp_path / "out").glob("rank_*/m_*.ckpt"))) == 8 else []))
    assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "out") == [f"rank_{rank}/m_{rank}.ckpt" for rank in range(8)]
    for path in (tmp_path / "out").rglob("*.ckpt"):
        holds(path, expected[int(path.parent.name.removeprefix("rank_"))])


def test_an_interrupted_run_keeps_what_it_finished_and_nothing_older(large, tmp_path, capsys):
    """The note of an interrupted run makes its own files count, not those that stood there before it."""
    folder, arrays = large
    words = merge(folder, tmp_path / "out", "--dst_ckpt_strategy", folder / "other.ckpt", "--overwrite")
    assert run(*words) == 0
    out = tmp_path / "out"
    for rank in (2, 3):
        write_file(out / f"rank_{rank}" / f"checkpoint_{rank}.ckpt", {"old": np.float32([1])})
    process = subprocess.Popen([sys.executable, "transform_ckpt.py", *map(str, words)], cwd=TOOLS)
    while not (out / ".transform_ckpt.json").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    before = json.loads((out / ".transform_ckpt.json").read_text())["before"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(before) == 8
    capsys.readouterr()
    assert run(*words) == 0
    for rank, expected in enumerate(cut(read_strategy(folder / "other.ckpt"), arrays)):
        holds(out / f"rank_{rank}" / f"checkpoint_{rank}.ckpt", expected)
    assert not (out / ".transform_ckpt.json").exists()


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    """One tensor of 268 MB, cut by columns: the process stays below its size. tools/bench/reshard.py has 3 GB."""
    write_strategy(tmp_path / "s.ckpt", {"model.w": dict(matrix=[4], tensor_map=[-1, 0])})
    block = np.arange(8192 * 2048, dtype=np.int32).reshape(8192, 2048)
    for rank in range(4):
        write_file(tmp_path / "src" / f"rank_{rank}" / "x.ckpt", {"model.w": block})
    script = (
        "import sys; from mindformers_ext.cli.transform_ckpt import main; code = main(sys.argv[1:]); "
        "print(*[line for line in open('/proc/self/status') if 'VmHWM' in line]); sys.exit(code)"
    )
    for words in (
        ["--src_ckpt_dir", "src", "--src_ckpt_strategy", "s.ckpt", "--dst_ckpt_dir", "a"],
        ["--src_ckpt_dir", "a", "--dst_ckpt_strategy", "s.ckpt", "--dst_ckpt_dir", "b"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        peak = int(done.stdout.split("VmHWM:")[1].split()[0])  # kB; ru_maxrss would count the parent before exec
        assert peak < 200_000, (words, peak)
    for rank in range(4):
        target = tmp_path / "b" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"
        assert target.read_bytes() == (tmp_path / "src" / f"rank_{rank}" / "x.ckpt").read_bytes()


def test_a_disk_that_fills_up_is_a_message(saved, tmp_path):
    """A limit on the size of files stands for a full disk: the system refuses to write on."""
    folder, _ = saved
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    result = shell(*merge(folder, tmp_path / "out"), preexec_fn=limit)
    assert result.returncode == 2 and "the system refused" in result.stderr and "Traceback" not in result.stderr
    assert not list((tmp_path / "out").rglob("*.ckpt*"))


def workers_of(process, count):
    """The ids of the command's worker processes, once there are ``count``."""
    children, workers = Path(f"/proc/{process.pid}/task/{process.pid}/children"), []
    while len(workers) < count and process.poll() is None:
        pids = children.read_text().split() if children.exists() else []
        workers = [int(pid) for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return workers


def test_workers_end_with_the_command(large, tmp_path):
    folder, _ = large
    words = merge(folder, tmp_path / "out", "--dst_ckpt_strategy", folder / "other.ckpt", "--process_num", 2)
    process = subprocess.Popen(
        [sys.executable, "transform_ckpt.py", *map(str, words)], cwd=TOOLS, stderr=subprocess.DEVNULL
    )
    workers = workers_of(process, 2)
    process.kill()
    process.wait()
    limit = time.monotonic() + 10
    while alive := [pid for pid in workers if running(pid)]:
        assert time.monotonic() < limit, alive
        time.sleep(0.1)
    assert len(workers) == 2


def running(pid):
    """Whether the process is there and has not ended (a zombie waits for whoever inherited it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_killed_worker_is_a_message(large, tmp_path):
    """As when the system kills a process for its memory."""
    folder, _ = large
    words = merge(folder, tmp_path / "out", "--dst_ckpt_strategy", folder / "other.ckpt", "--process_num", 2)
    process = subprocess.Popen(
        [sys.executable, "transform_ckpt.py", *map(str, words)], cwd=TOOLS, text=True, stderr=subprocess.PIPE
    )
    os.kill(workers_of(process, 2)[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "smaller --transform_process_num" in err and "Traceback" not in err
    assert shell(*words).returncode == 0
