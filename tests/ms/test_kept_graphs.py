# SPDX-License-Identifier: Apache-2.0
"""Graphs that another process compiled: the answers are those of this model's weights, whatever lies in the folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
import numpy as np
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import DeviceSpec, ModelSpec, NetworkSpec
from mindformers_ext.jobs.engine.door import open_engine
from mindformers_ext.ms import kept_graphs

moe = MoESpec(num_local_experts=2, num_experts_per_tok=1, capacity_factor=0.0)
sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
SPEC = NetworkSpec(model=ModelSpec(**sizes, num_key_value_heads=1, head_dim=4, moe=moe), seq_length=16)
kept = []
keep, kept_graphs._keep = kept_graphs._keep, lambda own, made, place: (kept.append(place.name), keep(own, made, place))
engine = open_engine("ms")
engine.use(DeviceSpec("CPU"))
found = []
for seed in map(int, sys.argv[1:]):
    network = engine.build(SPEC, empty=True)
    rng = np.random.default_rng(seed)
    names = [(item.name, item.shape) for item in network.cell.get_parameters()]
    network.fill((name, rng.normal(0, 0.3, shape).astype(np.float32)) for name, shape in names)
    session = network.session(1, 8, 12)
    prompt = session.prompt(np.arange(8)[None], np.array([6]))
    found.append([prompt.tolist(), session.token(np.array([3]), np.array([6])).tolist()])
print(json.dumps({"kept": kept, "found": found}))
"""


def run(folder: Path, home: Path, *seeds: int) -> tuple[list[str], list[object]]:
    """Names of the folders that a process has kept, and the logits of its models."""
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name != "MS_COMPILER_CACHE_ENABLE"}
    env |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(home)}
    words = [sys.executable, str(script), *map(str, seeds)]
    told = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-3000:]
    result = json.loads(told.stdout.splitlines()[-1])
    return result["kept"], result["found"]


@pytest.mark.slow
def test_a_second_process_finds_the_graphs_and_answers_with_its_own_weights(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first, compiled = run(tmp_path, home, 1, 2)
    assert len(set(first)) == 2
    again, turned = run(tmp_path, home, 2, 1)
    assert not again and turned == compiled[::-1]
    files = sorted(home.rglob("*.mindir"))
    assert len(files) == 4
    files[0].write_bytes(files[0].read_bytes()[:-40])
    files[3].write_bytes(files[0].read_bytes())
    mended, found = run(tmp_path, home, 1, 2)
    assert sorted(mended) == sorted(first) and found == compiled
