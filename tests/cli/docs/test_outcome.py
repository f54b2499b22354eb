# SPDX-License-Identifier: Apache-2.0
"""How commands end when nobody reads their output any more, and when they are stopped."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from mindformers_ext.cli.outcome import exit_code, interruptible
from mindformers_ext.core.errors import UserError
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
    wait_for(lambda: not running(tmp_path / "out"), 60, "the end of every process")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_python_drops_in_a_callback_comes_again(number: int, code: int) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test before may have left MindSpore's: SIGTERM
    class Referred:
        pass

    def stopped_there(_: object) -> None:
        signal.raise_signal(number)
        pytest.fail("the signal is no exception here")

    def run(_: argparse.Namespace) -> int:
        referred = Referred()
        _callback = weakref.ref(referred, stopped_there)
        del referred
        time.sleep(5)
        return 0

    try:
        found: object = exit_code(run, argparse.Namespace())
    except SystemExit as left:
        found = left.code
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)  # None: it was not Python's
    assert found == code


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


def failing(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(_: argparse.Namespace) -> int:
        raise error

    return run


MISHAPS: list[tuple[BaseException, int, str]] = [
    (UserError("correct it"), 2, "error: correct it\n"),
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "error: 'a/b': No space left on device: make room"),
    (PermissionError(errno.EACCES, "Permission denied", b"a"), 2, "error: 'a': Permission denied: choose a place"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), 2, "...': File name too long: choose a shorter"),
    (OSError(errno.EIO, "Input/output error"), 2, "the system refused what was asked (Input/output error): the disk"),
    (OSError("plain text"), 2, "error: plain text\n"),
    (MemoryError(), 2, "error: there is not enough memory: free some"),
    (RecursionError(), 2, "error: the input is nested too deeply"),
    (
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
        2,
        "error: a text cannot be read or written",
    ),
    (ValueError("embedded null byte"), 2, "error: a path holds a character of value 0"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
]


@pytest.mark.parametrize(("error", "code", "text"), MISHAPS, ids=lambda value: type(value).__name__)
def test_a_mishap_is_a_message_and_a_code(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(failing(error), argparse.Namespace()) == code
    assert text in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(failing(ZeroDivisionError()), argparse.Namespace())


def test_real_refusals_of_the_system(tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mindformers_ext.cli.tiny_model import main

    (tmp_path / "file").write_text("")
    words = ["--config", str(repo_root / "configs" / "tiny" / "mixtral_pretrain.yaml"), "--output_dir"]
    for place in (tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        assert main([*words, str(place)]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    done = subprocess.run(
        [sys.executable, "tools/make_tiny_model.py", "--help"],
        cwd=repo_root,
        stdout=open("/dev/full", "w"),  # noqa: SIM115
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr


def test_of_several_processes_the_first_says_that_it_was_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    for rank, text in (("0", "interrupted\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert exit_code(run, argparse.Namespace()) == 130
        assert capsys.readouterr().err == text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_mindspores_answer_to_ctrl_c_ends_as_ctrl_c_does(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: argparse.Namespace) -> int:
        with interruptible():
            os.kill(os.getpid(), number)  # what its handler does while a graph runs
            raise AssertionError("not reached")

    before = signal.getsignal(number)
    assert exit_code(run, argparse.Namespace(), unwinds=False) == 130
    assert capsys.readouterr().err == "interrupted\n" and signal.getsignal(number) is before
