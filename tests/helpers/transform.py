# SPDX-License-Identifier: Apache-2.0
"""``tools/transform_ckpt.py`` for tests: run here or as a process, and what it has written."""

import subprocess
import sys
from pathlib import Path

from mindformers_ext.cli.transform_ckpt import main
from mindformers_ext.formats.ms_file import open_checkpoint
from tests.helpers.sliced import (
    assert_holds,
)

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def run(*words):
    """The command in this process; argparse's own exit is an exit code too."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


def shell(*words, **options):
    command = [sys.executable, "transform_ckpt.py", *map(str, words)]
    return subprocess.run(command, cwd=TOOLS, capture_output=True, text=True, timeout=120, check=False, **options)


def merge(folder, out, *more):
    return [
        "--src_ckpt_strategy",
        folder / "strategy",
        "--src_ckpt_dir",
        folder / "checkpoint",
        "--dst_ckpt_dir",
        out,
        *more,
    ]


def holds(path, arrays):
    reader = open_checkpoint(path)
    assert_holds(reader, arrays)
    reader.close()


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
