# SPDX-License-Identifier: Apache-2.0
"""CPU seconds and memory of carving one layer of a 7B LLaMA (4096 wide, 11008 neurons), after a pass measured it.

    python tools/bench/carve_layer.py

The answers are drawn, in blocks that topics switch on and off; no model is needed. Limits (LIMITS) are printed beside
what was measured, with the machine's own rate of float32 products: it is CPU time of one thread, so a busy machine
changes it little.
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mindformers_ext.jobs.experts.carve.cost import REACHED, rate
from mindformers_ext.surgery.experts.carve.carved import file_rows
from mindformers_ext.surgery.experts.carve.choose import linear_choice, output_lengths
from mindformers_ext.surgery.experts.carve.grouping import InputFit, by_prediction
from mindformers_ext.surgery.experts.carve.markers import Markers
from mindformers_ext.surgery.experts.carve.refit import refit_sums
from mindformers_ext.surgery.experts.carve.sample import LayerSample, top

LIMITS = {"grouping": 15.0, "router and refit": 60.0}  # CPU seconds
MOST_MEMORY = 4.0  # GB
TOPICS = 64


def options() -> argparse.ArgumentParser:
    """The bench's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for name, value in (("tokens", 16384), ("hidden", 4096), ("width", 11008), ("experts", 8), ("shared", 2)):
        add(f"--{name}", type=int, default=value)
    add("--active", type=int, default=2)
    return parser


def drawn(words: argparse.Namespace) -> LayerSample:
    """A layer's sample; gate and up, which this recipe does not read, are not made."""
    rng = np.random.default_rng(0)
    topics = rng.integers(0, TOPICS, words.tokens)
    centres = rng.standard_normal((TOPICS, words.hidden), np.float32)
    x = rng.standard_normal((words.tokens, words.hidden), np.float32)
    x += centres[topics]
    hidden = rng.standard_normal((words.tokens, words.width), np.float32)
    loud = rng.standard_normal((TOPICS, words.width), np.float32)
    np.exp(loud, out=loud)
    for start in range(0, words.tokens, 1024):
        hidden[start : start + 1024] *= loud[topics[start : start + 1024]]
    down = 0.02 * rng.standard_normal((words.hidden, words.width), np.float32)
    nothing = np.zeros((0, words.hidden), np.float32)
    return LayerSample(x, hidden, 1 / rng.uniform(50, 500, words.tokens), topics, nothing, nothing, down)


class Clock:
    """CPU seconds of named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def of(self, name: str, work: Callable[..., Any], *given: Any) -> Any:
        """What ``work`` gives; its time is added to ``name``."""
        started = time.process_time()
        found = work(*given)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started
        return found


def main() -> None:
    """Print each part's seconds and the limits."""
    words = options().parse_args()
    torch.set_num_threads(1)
    sample, clock = drawn(words), Clock()
    size, groups = words.width // words.experts, words.experts - words.shared
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    energies = clock.of("energies", sample.energies)
    always = top(energies, words.shared * size)
    rest = np.setdiff1d(np.arange(words.width), always)
    fit = clock.of("squares of the inputs", InputFit.of, sample.x)
    markers = clock.of("markers", Markers, sample)
    labels = clock.of("first groups", markers.groups, rest, groups)
    del markers
    labels = clock.of("groups by prediction", by_prediction, sample, fit, rest, labels, words.active)
    experts = [rest[labels == place] for place in range(groups)]
    lengths = clock.of("lengths of the outputs", output_lengths, sample.hidden, sample.down, experts)
    lengths *= np.sqrt(sample.weights)[:, None].astype(np.float32)
    rows = file_rows(clock.of("router", fit.rows, lengths), sample.x)
    del fit
    chosen = linear_choice(sample.x, rows, words.active)
    sums = clock.of("sums of the refit", refit_sums, sample, always, experts, chosen)
    found = clock.of("solution of the refit", sums.solve, sample.down)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    for name, seconds in clock.seconds.items():
        print(f"{name:24} {seconds:6.1f} s")
    grouping = ("energies", "markers", "first groups", "groups by prediction")
    parts = {"grouping": sum(clock.seconds[name] for name in grouping)}
    parts["router and refit"] = sum(clock.seconds.values()) - parts["grouping"]
    for name, limit in LIMITS.items():
        print(f"{name:24} {parts[name]:6.1f} s of CPU, limit {limit:.0f}")
    print(f"peak memory {peak:.2f} GB, limit {MOST_MEMORY:.0f}; {begun:.2f} GB of it what was measured")
    print(f"error {found.before:.3e} -> {found.after:.3e}; {rate() / REACHED / 1e9:.0f} GFLOP/s of float32 here")


if __name__ == "__main__":
    main()
