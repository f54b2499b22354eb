# SPDX-License-Identifier: Apache-2.0
"""Rows per second of a data mixture beside one plain data set, and the memory of planning and reading it.

    python tools/bench/mixture.py [--rows 3500] [--width 4097] [--batch 32] [--rounds 101] [--plan 100000000]

The same rows stand once in one MindRecord and once in seven, one for each domain of Sheared-LLaMA. The readers take
turns of ten batches, those that training would take; the ratio is the median over the rounds. Planning computes the
ids of so many rows from domains of as many, in processes of their own, whose peaks are compared with that of a
ten-thousandth of the rows.
"""

import set_up  # noqa: F401 (first)

# isort: split
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mindformers_ext.core.config.mixture_words import MixtureSpec  # noqa: E402
from mindformers_ext.data.mixture.presets import PRESETS  # noqa: E402
from mindformers_ext.data.mixture.schedule import DomainSchedule  # noqa: E402
from mindformers_ext.data.mixture.state import Domain, MixtureState  # noqa: E402
from mindformers_ext.jobs.engine.door import open_records  # noqa: E402
from mindformers_ext.jobs.run.mixture import open_mixture  # noqa: E402
from mindformers_ext.jobs.train.mixture_data import MixtureData  # noqa: E402
from mindformers_ext.jobs.train.token_data import TokenData  # noqa: E402

PRESET = PRESETS["sheared_1.3b"]
STEPS = 10  # of a turn
SMALL = 10_000  # times fewer rows, for comparison


def write(folder, rows, width):
    """Random ids, in one file and in one for each domain by its proportion; returns the paths."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 32000, (rows, width), np.int32)
    store, ends = open_records(), np.round(np.cumsum(PRESET.proportions) * rows).astype(int)
    files = {}
    for name, low, high in zip(PRESET.names, [0, *ends], ends, strict=False):
        files[name] = (folder / f"{name}.mindrecord",)
        store.write(files[name][0], ({"input_ids": row} for row in ids[low:high]), ("input_ids",))
    plain = folder / "plain.mindrecord"
    store.write(plain, ({"input_ids": row} for row in ids), ("input_ids",))
    return plain, tuple(files.items())


def seconds(source, start):
    """Seconds by the clock and of this process that the next batches take."""
    began = time.perf_counter(), time.process_time()
    for step in range(start, start + STEPS):
        source.batch(step, slice(None))
    return time.perf_counter() - began[0], time.process_time() - began[1]


def readers(folder, options):
    """The plain data set and the mixture."""
    plain, files = write(folder, options.rows, options.width)
    loader = {"type": "MindDataset", "dataset_dir": str(plain), "shuffle": True}
    config = {"seed": 1, "train_dataset": {"data_loader": loader, "input_columns": ["input_ids"]}}
    mixture = open_mixture(MixtureSpec(domains=files, proportions=PRESET.proportions))
    one = TokenData(config, "train_dataset", options.batch, vocab=32000)
    return one, MixtureData(mixture, 1, options.batch, ("input_ids",), 32000)


def plan(rows, batch):
    """Draw ``rows`` rows from domains that hold as many together; print seconds and peak memory."""
    domains = tuple(
        Domain(name, max(1, int(rows * share)), "")
        for name, share in zip(PRESET.names, PRESET.proportions, strict=True)
    )
    state = MixtureState(1, batch, 0, domains, PRESET.proportions, (0,) * len(domains))
    schedule, began = DomainSchedule(state), time.perf_counter()
    for _ in range(max(1, rows // batch)):
        schedule.draw()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    found = {
        "seconds": time.perf_counter() - began,
        "peak": int(peak.split()[1]) / 1024,
        "state": len(schedule.state.to_json()),
    }
    print(json.dumps(found))


def planned(rows, batch):
    """``plan`` in a process of its own."""
    command = [sys.executable, __file__, "--worker", "--plan", str(rows), "--batch", str(batch)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Print the ratio and the peaks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=3500)
    parser.add_argument("--width", type=int, default=4097, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=32, help="rows of a step")
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--plan", type=int, default=100_000_000, help="rows whose ids are computed")
    parser.add_argument("--folder", type=Path, help="where to write the rows (default: the system's temporary folder)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        plan(options.plan, options.batch)
        return
    work = Path(tempfile.mkdtemp(dir=options.folder, prefix="mixture_"))
    try:
        one, several = readers(work, options)
        times = []
        for number in range(options.rounds + 1):
            pairs = [(0, one), (1, several)]
            taken = {place: seconds(source, number * STEPS) for place, source in pairs[:: 1 if number % 2 else -1]}
            times.append([taken[0], taken[1]])
        times = np.array(times[1:])  # (rounds, reader, clock or process); the first round warms up
        rates = STEPS * options.batch / np.median(times[:, :, 0], 0)
        wall, cpu = np.median(times[:, 0] / times[:, 1], 0)
        print(
            f"plain {rates[0]:.0f} rows/s, mixture of {len(PRESET.names)} domains {rates[1]:.0f} rows/s: "
            f"ratio wall {wall:.3f}  CPU {cpu:.3f}"
        )
    finally:
        shutil.rmtree(work)
    large, small = planned(options.plan, 1024), planned(max(1024, options.plan // SMALL), 1024)
    print(
        f"planned {options.plan} rows in {large['seconds']:.1f} s, peak {large['peak']:.0f} MB "
        f"({small['peak']:.0f} MB for {SMALL} times fewer), state {large['state']} bytes"
    )


if __name__ == "__main__":
    main()
