# SPDX-License-Identifier: Apache-2.0
"""LLaMA-MoE v2 cut over devices, compiled: a residual model, and the same whose heads are experts, with biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.dryrun.test_dryrun import R17, SEED, grouped_as_counted, held_as_counted
from tests.helpers.dryrun import dry_run

RESIDUAL: dict[str, Any] = {
    **R17,
    "model.model_config.type": "LlamaMoEV2ResidualConfig",
    "model.arch.type": "LlamaMoEV2ResidualForCausalLM",
    "model.model_config.moe_intermediate_size": 32,
    "model.model_config.shared_expert_intermediate_size": 64,
    "moe_config.shared_expert_num": 1,
    "moe_config.routed_scaling_factor": 2.0,
}
HEADS = {
    "model.model_config.attn_experts": 8,
    "model.model_config.top_k_attn": 3,
    "model.model_config.scale_factor_attn": 2.0,
    "model.model_config.add_rescale_bias": True,
}


@pytest.mark.slow
@pytest.mark.dryrun
@pytest.mark.turn("jobs")
@pytest.mark.parametrize("heads", [{}, HEADS], ids=["plain", "heads are experts"])
def test_it_compiles_in_every_kind_of_parallel(tmp_path: Path, heads: dict[str, Any]) -> None:
    """Data, model, expert, pipeline and sequence parallel at once; no message that nobody has planned."""
    run = dry_run(tmp_path / "out", SEED, 16, "0,3", 2, **RESIDUAL, **heads)
    assert run.code == 0, run.text
    for facts in run.facts():
        assert facts.unplanned == ()
        held_as_counted(run, facts)
        grouped_as_counted(run, facts)
        names = [item.name for item in facts.parameters]
        assert any("attention.router.dense" in name for name in names) == bool(heads)
