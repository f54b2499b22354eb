# SPDX-License-Identifier: Apache-2.0
"""Measures one job in several engines: each in its own process, one call at a time in turn, medians reported.

A worker is any command that prints one line of JSON when it is ready (facts about itself) and then, for every line
``NAME`` on its standard input, runs that measurement once and prints ``{"wall": s, "cpu": s}``.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

THREADS = 2
PAUSE = 0.05  # seconds before each call: the threads of the engine that ran before spin for a while, then sleep


def serve(facts: dict, measurements: dict[str, Callable[[], None]], warm: int = 3) -> None:
    """Be a worker: every measurement runs ``warm`` times unmeasured first (compilation, allocation)."""
    for run in measurements.values():
        for _ in range(warm):
            run()
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        measurements[line.strip()]()
        print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}), flush=True)


class Worker:
    """A worker process; ``facts`` is what it said of itself when it was ready."""

    def __init__(self, command: Sequence[str], threads: int = THREADS) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), GLOG_v="3")
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.facts = self._read()

    def _read(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"worker {self.process.args} ended with code {self.process.wait()} before it answered")

    def measure(self, name: str) -> dict:
        """Run one measurement."""
        time.sleep(PAUSE)
        assert self.process.stdin is not None
        print(name, file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(workers: dict[str, Sequence[str]], names: Sequence[str], rounds: int, threads: int = THREADS) -> dict:
    """{measurement: {worker: {"wall": median s, "cpu": median s}}} and each worker's facts under "facts"."""
    running = {key: Worker(command, threads) for key, command in workers.items()}
    samples: dict = {name: {key: [] for key in running} for name in names}
    for _ in range(rounds):
        for name in names:
            for key, worker in running.items():
                samples[name][key].append(worker.measure(name))
    for worker in running.values():
        worker.close()
    medians = {
        name: {
            key: {kind: statistics.median(sample[kind] for sample in taken) for kind in ("wall", "cpu")}
            for key, taken in by_worker.items()
        }
        for name, by_worker in samples.items()
    }
    return {"facts": {key: worker.facts for key, worker in running.items()}, **medians}


def report(title: str, result: dict, names: Sequence[str], ours: str, peer: str) -> None:
    """One line per measurement: milliseconds of both and the ratio peer / ours (above 1: ours is faster)."""
    for name in names:
        mine, theirs = result[name][ours], result[name][peer]
        print(
            f"{title:<24} {name:<16} {ours} {mine['wall'] * 1e3:8.1f} ms  {peer} {theirs['wall'] * 1e3:8.1f} ms  "
            f"ratio wall {theirs['wall'] / mine['wall']:.2f}  CPU {theirs['cpu'] / mine['cpu']:.2f}"
        )


def machine(threads: int = THREADS) -> str:
    """What was measured on, for the record."""
    load = os.getloadavg()[0]
    return (
        f"machine: {platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at the start, {threads} thread(s) each"
    )
