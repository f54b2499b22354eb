# SPDX-License-Identifier: Apache-2.0
"""A started process ends with the one that started it, also when that one has no time to say so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers.cluster import wait_for

STARTER = """
import os, signal, subprocess, sys
from mindformers_ext.jobs.launch.supervise import ended_with_us
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    preexec_fn=ended_with_us(signal.SIGKILL))
print(started.pid, flush=True)
os._exit(0)
"""


def test_it_ends_though_nobody_ends_it(repo_root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STARTER], cwd=repo_root, capture_output=True, text=True, check=True)
    wait_for(lambda: not Path(f"/proc/{int(done.stdout)}").exists(), 10, "the end of the process")
