# SPDX-License-Identifier: Apache-2.0
"""Jobs of several processes, on one machine or on two machines that are network namespaces."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.tiny_run import ROOT, environment

LAUNCHER = ROOT / "scripts" / "msrun_launcher.sh"
IP = shutil.which("ip") or "/usr/sbin/ip"
MASTER = "10.77.0.1"

# A job without MindFormers: joins the cluster and adds a number over the ranks STEPS times.
SUM_SCRIPT = """
import sys, time
import mindspore as ms, numpy as np
from mindspore import ops
from mindspore.communication import get_group_size, get_rank, init
ms.set_device("CPU")
init()
class Sum(ms.nn.Cell):
    def __init__(self):
        super().__init__()
        self.all_reduce = ops.AllReduce()
    def construct(self, x):
        return self.all_reduce(x)
cell = Sum()
for step in range(int(sys.argv[1])):
    total = cell(ms.Tensor(np.float32(get_rank() + step)))
    print(f"rank {get_rank()} of {get_group_size()} step {step} sum {float(total):g} {sys.argv[2:]}", flush=True)
    time.sleep(0.2)
"""


def free_port() -> int:
    """A port nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def default_port() -> Iterator[None]:
    """The launcher's port where none is given: one test at a time has it."""
    with (Path(tempfile.gettempdir()) / "mindformers_ext_port_8118").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def launcher(*arguments: object, namespace: str = "") -> list[str]:
    """The launcher's command line, inside a namespace if one is named."""
    inside = [IP, "netns", "exec", namespace] if namespace else []
    return [*inside, "bash", str(LAUNCHER), *map(str, arguments)]


def launch_environment() -> dict[str, str]:
    """As for a single process, and without what a launcher around this test may have set."""
    gone = ("MS_ROLE", "MS_WORKER_NUM", "RANK_ID", "RANK_SIZE", "MF_LOG_SUFFIX", "LOG_MF_PATH", "MSRUN_DRY_RUN")
    return {name: value for name, value in environment().items() if name not in gone} | {"MSRUN_BIND_CORE": "False"}


def launch(*arguments: object, cwd: Path, namespace: str = "", timeout: float = 280, **more: str) -> str:
    """Run the launcher to its end; returns ``exit code + newline + output``."""
    result = subprocess.run(
        launcher(*arguments, namespace=namespace),
        cwd=cwd,
        env=launch_environment() | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return f"{result.returncode}\n{result.stdout}"


def start(*arguments: object, cwd: Path, log: Path, namespace: str = "") -> subprocess.Popen:
    """Start the launcher with its output in ``log``."""
    with log.open("w") as file:
        return subprocess.Popen(
            launcher(*arguments, namespace=namespace),
            cwd=cwd,
            env=launch_environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def workers(mark: str) -> dict[int, int]:
    """Rank -> pid of the running workers whose command line holds ``mark``."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().decode(errors="replace")
            pairs = (place / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        variables = dict(pair.partition("=")[::2] for pair in pairs)
        if mark in words and variables.get("MS_ROLE") == "MS_WORKER" and "msrun" not in words:
            found[int(variables["RANK_ID"])] = int(place.name)
    return found


def wait_for(condition, seconds: float, what: str):
    """The first true value of ``condition()``."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s for {what}")


def end(process: subprocess.Popen) -> None:
    """Stop a launcher that a failed test left behind."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def namespaces_missing() -> str:
    """Why network namespaces cannot be made here; '' when they can."""
    if not Path(IP).exists():
        return "iproute2 (ip) is not installed"
    name = f"mfx{os.getpid()}t"
    made = subprocess.run([IP, "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not permitted: {made.stderr.strip()}"
    subprocess.run([IP, "netns", "del", name], check=False)
    return ""


@contextmanager
def two_machines() -> Iterator[tuple[str, str]]:
    """Two namespaces with addresses 10.77.0.1 and 10.77.0.2, joined by a cable."""
    names = [f"mfx{os.getpid()}n{number}" for number in range(2)]
    cables = [f"mfx{os.getpid()}v{number}"[-15:] for number in range(2)]
    try:
        for name in names:
            subprocess.run([IP, "netns", "add", name], check=True)
        subprocess.run(
            [
                IP,
                "link",
                "add",
                cables[0],
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                cables[1],
                "netns",
                names[1],
            ],
            check=True,
        )
        for number, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
            for words in (
                ["addr", "add", f"10.77.0.{number}/24", "dev", cable],
                ["link", "set", cable, "up"],
                ["link", "set", "lo", "up"],
            ):
                subprocess.run([IP, "-n", name, *words], check=True)
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run([IP, "netns", "del", name], check=False)
