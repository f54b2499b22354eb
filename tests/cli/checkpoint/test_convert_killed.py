# SPDX-License-Identifier: Apache-2.0
"""Full disks, and SIGKILL while data is written (at other moments: tests/cli/test_killed.py)."""

import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from mindformers_ext.formats.ms_file import open_checkpoint
from tests.cli.checkpoint.test_convert import ROOT, hf_folder, run, shell, spec_of


def in_small_tmpfs(size, words, folder):
    """The command with ``folder`` on a tmpfs of ``size`` bytes of its own; skips where that is not allowed."""
    command = " ".join([sys.executable, str(ROOT / "convert_weight.py"), *map(str, words)])
    inside = f"mount -t tmpfs -o size={size} tmpfs {folder} || exit 99; {command}; code=$?; ls -A {folder}; exit $code"
    isolate = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside]
    if not shutil.which("unshare"):
        pytest.skip("no unshare on this machine")
    done = subprocess.run(isolate, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()[-200:]}")
    return done


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(tmp_path):
    hf_folder(tmp_path / "hf")
    (tmp_path / "small").mkdir()
    words = ["--input_path", tmp_path / "hf", "--output_path", tmp_path / "small" / "m.ckpt"]
    done = in_small_tmpfs(8192, words, tmp_path / "small")
    assert done.returncode == 2 and "make room there" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and "converting" not in done.stderr


@pytest.mark.parametrize("reverse", [False, True])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, reverse):
    """The data fit, names and description do not: the write fails near its end."""
    hf_folder(tmp_path / "hf")
    assert run("--input_path", tmp_path / "hf", "--output_path", tmp_path / "m.ckpt") == 0
    (tmp_path / "small").mkdir()
    words = ["--input_path", tmp_path / "hf", "--output_path", tmp_path / "small" / "m.ckpt"]
    if reverse:
        words = ["--reversed", "--input_path", tmp_path / "m.ckpt", "--output_path", tmp_path / "small" / "hf"]
    done = in_small_tmpfs(3 * 4096, words, tmp_path / "small")
    assert done.returncode == 2 and "No space left on device" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_no_room_while_writing(tmp_path, suffix):
    """A limit on file size stands for a full disk: the write fails midway with the same kind of error."""
    hf_folder(tmp_path / "hf")
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (9000, 9000))
    done = shell("--input_path", tmp_path / "hf", "--output_path", tmp_path / f"m{suffix}", preexec_fn=limit)
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["hf"]


def test_killed_while_writing_then_started_again(tmp_path):
    arrays = hf_folder(tmp_path / "hf", spec_of(experts=4, hidden_size=1024, intermediate_size=2048, layers=3))
    out = tmp_path / "out" / "m.ckpt"
    command = [sys.executable, str(ROOT / "convert_weight.py"), "--input_path", str(tmp_path / "hf"), "--output_path"]
    process = subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL)

    def size() -> int:
        return max((item.stat().st_size for item in out.parent.glob(".m.ckpt.*.partial")), default=0)

    deadline = time.monotonic() + 60
    while not size() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(os.listdir(out.parent)) == 1 and size()
    assert run("--input_path", tmp_path / "hf", "--output_path", out) == 0
    assert sorted(os.listdir(out.parent)) == ["m.ckpt", "m.ckpt.json"]
    assert sum(info.nbytes for info in open_checkpoint(out).infos.values()) == sum(a.nbytes for a in arrays.values())
    shutil.rmtree(tmp_path / "hf")
