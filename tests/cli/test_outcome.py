# SPDX-License-Identifier: Apache-2.0
"""How commands end when nobody reads their output any more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_reader_that_leaves_ends_the_command_without_a_traceback(repo_root: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    config = "research/mixtral/mixtral_8x7b/pretrain_mixtral-8x7b.yaml"
    words = [sys.executable, "tools/dryrun.py", "--config", config, "--suggest", "--memory", "64GB"]
    done = subprocess.run(words, cwd=repo_root, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
