# SPDX-License-Identifier: Apache-2.0
"""llama_preprocess.py ended by force, on a damaged disk and on a text that memory must not hold."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.tokenizers import train_sentencepiece

TOOL = "tools/dataset_preprocess/llama/llama_preprocess.py"
MB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and 20 MB of text."""
    result = tmp_path_factory.mktemp("killed")
    texts = list(standard_library_text(2_000_000))
    train_sentencepiece(texts[:300], result / "tokenizer.model", 600)
    (result / "text.txt").write_text("\n\n".join(texts * 10), encoding="utf-8")
    return result


def start(folder: Path, repo_root: Path, source: Path, output: Path, *more: str) -> subprocess.Popen:
    command = [
        sys.executable,
        str(repo_root / TOOL),
        "--dataset_type",
        "text",
        "--document",
        "paragraph",
        "--model_file",
        str(folder / "tokenizer.model"),
        "--input_glob",
        str(source),
        "--output_file",
        str(output),
        "--workers",
        "2",
        *more,
    ]
    return subprocess.Popen(command, cwd=repo_root, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def family(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [below for child in task.read_text().split() for below in family(int(child))]
        except (FileNotFoundError, ProcessLookupError):
            pass  # it ended meanwhile
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_killed_it_leaves_nothing_to_see_and_no_process(folder: Path, repo_root: Path) -> None:
    """At twenty moments, and run again: tests/cli/test_killed.py."""
    output = folder / "out" / "x.mindrecord"
    output.parent.mkdir()
    process = start(folder, repo_root, folder / "text.txt", output, "--seq_length", "64")
    while process.poll() is None and len(family(process.pid)) < 4:  # itself, two encoders, the writer
        time.sleep(0.02)
    everyone = family(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it had ended before: give it more text"
    assert not [item.name for item in output.parent.iterdir() if not item.name.startswith(".")]
    deadline = time.monotonic() + 10
    while any(map(alive, everyone)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in everyone if alive(pid)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "message"),
    [("spawn_main", "could not be written"), ("llama_preprocess.py", "ended before its work was done")],
    ids=["writer", "encoders"],
)
def test_a_process_that_dies_is_reported(folder: Path, repo_root: Path, victim: str, message: str) -> None:
    output = folder / f"dead {message}" / "x.mindrecord"  # the victim's name here would be on every command line
    process = start(folder, repo_root, folder / "text.txt", output, "--seq_length", "64")
    # once rows are written: a writer that ends before it is ready is started again
    written = f".{output.name}.*.partial/{output.name}"
    while process.poll() is None and not any(file.stat().st_size for file in output.parent.glob(written)):
        time.sleep(0.02)
    children = [pid for pid in family(process.pid)[1:] if victim in Path(f"/proc/{pid}/cmdline").read_text()]
    for pid in children:
        with suppress(ProcessLookupError):  # the first one's end may have ended it
            os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert children and process.returncode == 2
    assert re.search(message, errors) and "Traceback" not in errors, errors
    assert not list(output.parent.iterdir())


@pytest.mark.slow
@pytest.mark.turn("bench")
def test_memory_does_not_grow_with_the_text(folder: Path, repo_root: Path) -> None:
    """The writer's buffers take up to 400 MiB; the others would show a text, or its tokens, that one of them held."""
    text = (folder / "text.txt").read_bytes()
    big = folder / "big.txt"
    with big.open("wb") as file:
        while file.tell() < 100 * MB:
            file.write(text)
    output = folder / "big" / "x.mindrecord"
    process = start(folder, repo_root, big, output, "--seq_length", "512")
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for pid in family(process.pid):
            try:
                found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
            except (FileNotFoundError, ProcessLookupError):
                continue
            peaks[pid] = max(peaks.get(pid, 0), int(found[1]) // 1024 if found else 0)
        time.sleep(0.05)
    assert process.returncode == 0
    *others, writer = sorted(peaks.values())
    assert len(others) >= 3 and max(others) <= 120 and writer <= 400, peaks
    big.unlink()
