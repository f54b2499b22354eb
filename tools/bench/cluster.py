# SPDX-License-Identifier: Apache-2.0
"""Balanced clustering of a layer's neurons, against k-means-constrained 0.9.1 (what the reference splits with).

One thread, processor seconds, both in this process in turn on the same matrix. Rows are Zipf-sized groups, a part of
low rank and noise, with lognormal lengths, then of length 1; "flat" has no structure at all. starts are k-means'
n_init. The peer wants numpy 2, so it lives in an environment of its own; elsewhere ours is measured alone:

    python -m venv peer && peer/bin/pip install k-means-constrained==0.9.1
    PYTHONPATH=. peer/bin/python tools/bench/cluster.py [--rounds 3] [--only 2048x512]
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("k_means_constrained") is None:  # the peer's environment has its packages alone
    import set_up  # noqa: F401 (first)

# isort: split
import argparse
import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import numpy as np  # noqa: E402 (reads its threads when it is imported)

from mindformers_ext.surgery.experts.cluster import balanced_clusters  # noqa: E402

# name: rows, width, clusters, our starts, the peer's, grouped
CASES = {
    "2048x512": (2048, 512, 8, 10, 10, True),
    "4096x512": (4096, 512, 8, 10, 10, True),
    "flat 2048x512": (2048, 512, 8, 10, 10, False),
    "2048x512, one start": (2048, 512, 8, 1, 1, True),
    "4096x512, one start": (4096, 512, 8, 1, 1, True),
    "11008x4096, ten starts beside one": (11008, 4096, 16, 10, 1, True),  # ten of the peer's take a quarter of an hour
    "256x64": (256, 64, 8, 2, 2, True),  # to see that it runs
}


def make(rows: int, width: int, grouped: bool, seed: int = 0) -> np.ndarray:
    """float32 rows of length 1."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width), dtype=np.float32)
    if grouped:
        groups = 1 / np.arange(1, 41) ** 1.1
        label = rng.choice(40, rows, p=groups / groups.sum())
        x += 0.35 * rng.standard_normal((40, width), dtype=np.float32)[label]
        x += rng.standard_normal((rows, 48), dtype=np.float32) @ (
            rng.standard_normal((48, width), dtype=np.float32) * np.float32(0.1)
        )
        x *= rng.lognormal(0, 0.3, (rows, 1)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def ours(x: np.ndarray, clusters: int, starts: int) -> np.ndarray:
    """Labels of this package."""
    return balanced_clusters(x, clusters, starts=starts).labels


def theirs(x: np.ndarray, clusters: int, starts: int) -> np.ndarray:
    """Labels with the reference's settings; n_jobs=1, because others fail with today's joblib."""
    from k_means_constrained import KMeansConstrained

    size = len(x) // clusters
    peer = KMeansConstrained(
        n_clusters=clusters, size_min=size, size_max=size, max_iter=500, random_state=0, n_jobs=1, n_init=starts
    )
    return peer.fit_predict(x.astype(np.float64))


def inertia(x: np.ndarray, labels: np.ndarray) -> float:
    """Sum of squared distances to the mean of the own cluster."""
    parts = [x[labels == label].astype(np.float64) for label in np.unique(labels)]
    return float(sum(((part - part.mean(0)) ** 2).sum() for part in parts))


def timed(run: Callable[..., np.ndarray], *given: object) -> tuple[float, np.ndarray]:
    """Processor seconds and labels."""
    start = time.process_time()
    labels = run(*given)
    return time.process_time() - start, labels


def held(run: Callable[..., np.ndarray], *given: object) -> float:
    """MB of arrays that a run, one of its own, holds at most beside what it is given."""
    tracemalloc.start()
    try:
        run(*given)
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of each case but the largest, which has one")
    parser.add_argument("--only", nargs="*", default=list(CASES)[:-1])
    words = parser.parse_args()
    has_peer = importlib.util.find_spec("k_means_constrained") is not None
    print(f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}, one thread, processor seconds")
    for name in words.only:
        rows, width, clusters, starts, peers, grouped = CASES[name]
        x = make(rows, width, grouped)
        times: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(1 if rows > 10000 else words.rounds):
            seconds, labels = timed(ours, x, clusters, starts)
            times["ours"].append(seconds)
            text = f"{name}: ours {inertia(x, labels):.3f}"
            if has_peer:
                seconds, judged = timed(theirs, x, clusters, peers)
                times["peer"].append(seconds)
                text += f", peer {inertia(x, judged):.3f}, inertia ratio {inertia(x, labels) / inertia(x, judged):.5f}"
        middle = {who: statistics.median(found) for who, found in times.items() if found}
        text += "".join(f", {who} {seconds:.3f} s" for who, seconds in middle.items())
        if has_peer:
            text += f", time ratio {middle['ours'] / middle['peer']:.3f}"
        memory = held(ours, x, clusters, starts)
        print(f"{text}, memory +{memory:.0f} MB for a matrix of {x.nbytes / 2**20:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
