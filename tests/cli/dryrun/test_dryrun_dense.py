# SPDX-License-Identifier: Apache-2.0
"""``tools/dryrun.py`` for a dense base with all that bases bring: yarn, a window in some layers, biases, head norms."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mindformers_ext.core.cluster.memory import stage_memory
from mindformers_ext.core.cluster.placement import placed_parameters
from mindformers_ext.core.config.from_model import FirstTry, yaml_from_model
from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.config.run import ASCEND
from tests.cli.dryrun.test_dryrun import SEED, grouped_as_counted
from tests.helpers.dryrun import RESEARCH, dry_run

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "attention_bias": True,
    "use_sliding_window": True,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.mark.slow
@pytest.mark.dryrun
@pytest.mark.turn("jobs")
def test_a_dense_base_compiles_for_data_2_by_model_2(tmp_path: Path) -> None:
    words = yaml.safe_load((RESEARCH / SEED).read_text(encoding="utf-8"))
    del words["moe_config"]
    asked = FirstTry(job="train", load="", device=ASCEND, stored="bfloat16")
    words["model"] = yaml_from_model(model_spec_from_hf(QWEN3), asked)["model"]
    words["model"]["model_config"]["use_flash_attention"] = True
    file = tmp_path / "qwen3.yaml"
    file.write_text(yaml.safe_dump(words), encoding="utf-8")
    split = {"data_parallel": 2, "model_parallel": 2, "expert_parallel": 1, "pipeline_stage": 1}
    run = dry_run(tmp_path / "out", str(file), 4, "1", 1, layers=2, use_seq_parallel=True, **split)
    assert run.code == 0, run.text
    (facts,) = run.facts()
    first, second = (run.spec().model.layer(layer).attention for layer in range(2))
    assert first.window == 9 and not second.window and first.qkv_bias and first.qk_norm
    assert facts.operators["FlashAttentionScore"] == 2 * 2  # of each layer, and again in the backward pass
    assert facts.unplanned == ()
    spec, settings = run.spec(), run.settings()
    held = {item.name: (item.whole, item.local) for item in facts.parameters if item.kind == "weight"}
    assert held == {item.name: (item.whole, item.local) for item in placed_parameters(spec, settings.threshold)}
    memory = stage_memory(spec, settings)[0]
    assert (facts.nbytes("weight"), facts.nbytes("optimizer")) == (memory.weights, memory.optimizer)
    grouped_as_counted(run, facts)
    assert {row.purpose for row in facts.traffic} == {"layout", "partial sums", "weights", "gradients", "norm"}
