# SPDX-License-Identifier: Apache-2.0
"""Where results in 16 bits are not the peer's, bit by bit, ours are nearer to the merge in float32.

Run as ``test_merge_peer.py`` is; ``-s`` prints the shares and distances that research/mixtral/NOTES.md has.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindformers_ext.cli.merge import main
from tests.cli.merge.test_merge_peer import BRAIN, HALF, PEER, RUN_PEER, SINGLE, between, pair, read, tuned, weighted
from tests.helpers.merge_models import family

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PEER, reason="MERGEKIT_PYTHON does not name a Python with mergekit==0.1.5"),
]
TWO = {"models": [{"model": "ft1"}, {"model": "ft2"}]}
METHODS = {
    "linear": lambda d: weighted("linear", d),
    "task_arithmetic": lambda d: tuned("task_arithmetic", d, None, {"lambda": 0.9}),
    "slerp": between,
    "nuslerp": lambda d: weighted("nuslerp", d, base_model="base"),
    "multislerp": lambda d: weighted("multislerp", d, base_model="base"),
    "karcher": lambda d: TWO | {"merge_method": "karcher", "dtype": d},
    "model_stock": lambda d: tuned("model_stock", d, None) | TWO,
    "sce": lambda d: tuned("sce", d, None, {"select_topk": 0.4}) | TWO,
    "ties": lambda d: tuned("ties", d),
    "breadcrumbs": lambda d: tuned("breadcrumbs", d, 0.6, {"gamma": 0.05}),
    "nearswap": lambda d: pair("nearswap", d, {"t": 0.01}),
    "arcee_fusion": lambda d: pair("arcee_fusion", d),
    "ram": lambda d: tuned("ram", d, None, {"epsilon": 0.01}),
    "ramplus_tl": lambda d: tuned("ramplus_tl", d, None, {"epsilon": 0.01}),
}
EQUAL = ("linear", "task_arithmetic", "nearswap", "ram")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models of bfloat16 merged in three types by both."""
    folder = tmp_path_factory.mktemp("near")
    family(folder)
    names = [f"{method}_{dtype}" for method in METHODS for dtype in (HALF, SINGLE, BRAIN)]
    before = os.getcwd()
    os.chdir(folder)
    try:
        for name in names:
            method, _, dtype = name.rpartition("_")
            Path(f"{name}.yml").write_text(yaml.safe_dump(METHODS[method](dtype), sort_keys=False))
            assert main(["yaml", f"{name}.yml", f"ours_{name}", "--quiet"]) == 0
        done = subprocess.run([str(PEER), "-c", RUN_PEER, *names], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        yield folder
    finally:
        os.chdir(before)


def flat(folder):
    return np.concatenate([array.astype(np.float64).ravel() for _, array in sorted(read(folder).items())])


@pytest.mark.parametrize("dtype", [BRAIN, HALF])
@pytest.mark.parametrize("method", METHODS)
def test_ours_is_equal_or_nearer(method, dtype, place):
    ours, theirs = (flat(place / f"{who}_{method}_{dtype}") for who in ("ours", "peer"))
    exact = flat(place / f"ours_{method}_{SINGLE}")
    apart = np.mean(ours != theirs)
    far, peer = (float(np.sqrt(np.mean((got - exact) ** 2))) for got in (ours, theirs))
    print(f"{method} {dtype}: {apart:.2%} differ, distance to float32 {far:.3g}, mergekit's {peer:.3g}")
    if method in EQUAL:
        assert apart == 0
    elif method != "ramplus_tl":  # mergekit writes that one as float32, whatever dtype says
        assert far <= peer * 1.01
