# SPDX-License-Identifier: Apache-2.0
"""The graphs that generate are accepted by MindSpore's Ascend compiler, with the fused kernels of prompt and token."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mindformers_ext.jobs.dryrun.stubs import ensure_stubs

LAYERS = 2
SCRIPT = f"""
from mindformers_ext.core.spec import DeviceSpec, KernelSpec, ModelSpec, MoESpec, NetworkSpec, NumericsSpec
from mindformers_ext.ms.engine import MindSporeEngine

half = NumericsSpec(compute_dtype="float16", param_dtype="float16", softmax_dtype="float16", rotary_dtype="float16")
model = ModelSpec(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers={LAYERS},
                  num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                  moe=MoESpec(num_local_experts=8, num_experts_per_tok=2, capacity_factor=0.0, use_gmm=True))
kernels = KernelSpec(flash_attention=True, rms_norm=True, rope=True, swiglu=True)
engine = MindSporeEngine()
engine.use(DeviceSpec("Ascend", max_memory="59GB", jit_level="O0"))
engine.build(NetworkSpec(model=model, seq_length=1, numerics=half, kernels=kernels)).session(3, 16, 32)
print("compiled")
"""


@pytest.mark.slow
def test_prompt_and_token_graphs_compile_with_fused_kernels(tmp_path: Path) -> None:
    environment = ensure_stubs().environment(0, 1, os.environ) | {
        "GLOG_v": "3",
        "MS_DEV_SAVE_GRAPHS": "1",
        "MS_DEV_SAVE_GRAPHS_PATH": str(tmp_path / "graphs"),
        "MS_DEV_DUMP_IR_PASSES": "validate",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]
    graphs = [Counter() for _ in range(2)]
    names = ("FlashAttentionScore", "GroupedMatmul", "RmsNorm", "RotaryPositionEmbedding", "Swiglu", "ScatterUpdate")
    files = sorted((tmp_path / "graphs").rglob("*validate*.ir"))
    assert len(files) == 2, "one graph reads prompts, one writes tokens"
    for graph, file in zip(graphs, files, strict=True):
        text = file.read_text()
        for name in names:
            graph[name] = text.count(f"PrimFunc_{name}(") + text.count(f"= {name}(")
    common = {
        "RmsNorm": 2 * LAYERS + 1,
        "RotaryPositionEmbedding": 2 * LAYERS,
        "Swiglu": LAYERS,
        "ScatterUpdate": 2 * LAYERS,
    }
    assert graphs[0] == Counter(common | {"FlashAttentionScore": LAYERS, "GroupedMatmul": 3 * LAYERS})
    # for three tokens turning all weights around would cost more than the products of every expert
    assert graphs[1] == Counter(common | {"FlashAttentionScore": 0, "GroupedMatmul": 0})
