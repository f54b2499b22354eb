# SPDX-License-Identifier: Apache-2.0
"""Wrong cluster configurations end before anything is compiled, with the rule that they break and a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mindformers_ext.core.byte_sizes import read_size, size_text
from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.dryrun.plan import plan_dry_run
from tests.helpers.pretrain import changed

IL = "parallel.pipeline_config.pipeline_interleave"
PC, MC, ME = "parallel_config.", "model.model_config.", "moe_config."
R17 = {PC + "data_parallel": 2, PC + "model_parallel": 4, PC + "expert_parallel": 2, PC + "use_seq_parallel": True}

# (name, what is changed, devices, what the message says of the rule, what it says of the way out)
WRONG: list[tuple[str, dict[str, Any], int, str, str]] = [
    (
        "no exchange",
        {"parallel.enable_alltoall": False},
        16,
        "enable_alltoall=False with expert_parallel=8",
        "set parallel.enable_alltoall: True",
    ),
    (
        "too few devices",
        {},
        8,
        "8*1*2*1 = 16 is not the device count 8",
        "data_parallel=8, model_parallel=1, pipeline_stage=1",
    ),
    (
        "too many devices",
        {},
        32,
        "= 16 is not the device count 32",
        "data_parallel=16, model_parallel=1, pipeline_stage=2",
    ),
    ("odd devices", {}, 15, "is not the device count 15", "the nearest choice is data_parallel="),
    ("no devices", {}, 0, "--worker_num 0", "1 or more"),
    ("dp 0", {PC + "data_parallel": 0}, 16, "data_parallel=0", "a whole number above 0"),
    ("dp negative", {PC + "data_parallel": -8}, 16, "data_parallel=-8", "above 0"),
    ("dp as text", {PC + "data_parallel": "eight"}, 16, "data_parallel='eight'", "whole number"),
    ("stages 0", {PC + "pipeline_stage": 0}, 16, "pipeline_stage=0", "above 0"),
    (
        "context parallel",
        {PC + "context_parallel": 2, PC + "data_parallel": 4, PC + "expert_parallel": 4},
        16,
        "context_parallel=2",
        "set context_parallel: 1",
    ),
    (
        "ep above dp",
        {PC + "expert_parallel": 16, ME + "expert_num": 16},
        16,
        "expert_parallel=16 exceeds data_parallel=8",
        "the nearest expert_parallel that fits is 8",
    ),
    (
        "dropless slots in a cut graph",
        {ME + "capacity_factor": -1},
        16,
        "capacity_factor=-1 (dropless) in semi_auto_parallel mode",
        "set use_gmm: True, a capacity_factor above 0",
    ),
    (
        "dp over ep",
        {PC + "expert_parallel": 3, ME + "expert_num": 9},
        16,
        "data_parallel=8 is not a multiple of expert_parallel=3",
        "that fits is 1",
    ),
    (
        "experts over ep",
        {ME + "expert_num": 12},
        16,
        "expert_num=12 is not a multiple of expert_parallel=8",
        "that fits is 4",
    ),
    ("ep 0", {PC + "expert_parallel": 0}, 16, "expert_parallel=0", "above 0"),
    (
        "heads over mp",
        {**R17, PC + "model_parallel": 3, PC + "pipeline_stage": 1},
        6,
        "num_heads=32 is not a multiple of model_parallel=3",
        "the nearest model_parallel that divides every width is 2",
    ),
    (
        "key heads over mp",
        {
            **R17,
            PC + "model_parallel": 16,
            PC + "data_parallel": 1,
            PC + "expert_parallel": 1,
            PC + "pipeline_stage": 1,
        },
        16,
        "n_kv_heads=8 is not a multiple of model_parallel=16",
        "is 8",
    ),
    (
        "ffn over mp",
        {**R17, MC + "intermediate_size": 14338},
        16,
        "intermediate_size=14338 is not a multiple of model_parallel=4",
        "is 2",
    ),
    (
        "sequence over mp",
        {**R17, MC + "seq_length": 4094},
        16,
        "seq_length=4094 is not a multiple of model_parallel",
        "use 4092 or 4096",
    ),
    (
        "few micro batches",
        {PC + "micro_batch_num": 1},
        16,
        "micro_batch_num=1 is below pipeline_stage=2",
        "use at least 2",
    ),
    ("micro batches 0", {PC + "micro_batch_num": 0}, 16, "micro_batch_num=0", "above 0"),
    (
        "parts without their schedule",
        {MC + "pp_interleave_num": 2},
        16,
        "pp_interleave_num=2 without MindSpore's schedule",
        "set parallel.pipeline_config.pipeline_interleave: True",
    ),
    (
        "more parts than layers",
        {MC + "pp_interleave_num": 3, MC + "num_layers": 5, IL: True},
        16,
        "pipeline_stage*pp_interleave_num = 2*3 = 6 exceeds num_layers=5",
        "a pp_interleave_num up to 2",
    ),
    ("parts 0", {MC + "pp_interleave_num": 0, IL: True}, 16, "pp_interleave_num=0", "above 0"),
    ("schedule", {IL.replace("interleave", "scheduler"): "gpipe"}, 16, "pipeline_scheduler='gpipe'", "'1f1b'"),
    (
        "schedule's key",
        {IL + "d": True},
        16,
        "unknown key 'parallel.pipeline_config.pipeline_interleaved'",
        "pipeline_interleave",
    ),
    ("interleave 0", {"micro_batch_interleave_num": 0}, 16, "micro_batch_interleave_num=0", "above 0"),
    (
        "more stages than layers",
        {PC + "pipeline_stage": 4, PC + "data_parallel": 4, PC + "expert_parallel": 4, MC + "num_layers": 2},
        16,
        "pipeline_stage=4 exceeds num_layers=2",
        "use at most 2 stages",
    ),
    (
        "sequence too long",
        {MC + "max_position_embedding": 2048},
        16,
        "seq_length=4096 exceeds max_position_embedding=2048",
        "use a seq_length up to 2048",
    ),
    ("router load", {MC + "seq_length": 131072}, 16, "exceeds max_router_load=131072", "use at most 65536 tokens"),
    (
        "more chosen than experts",
        {ME + "num_experts_chosen": 9},
        16,
        "num_experts_chosen=9 exceeds expert_num=8",
        "choose at most 8",
    ),
    (
        "capacity above experts",
        {ME + "capacity_factor": 9.0},
        16,
        "capacity_factor=9.0 is out of range",
        "<= 0 means dropless",
    ),
    ("aux loss 1", {ME + "aux_loss_factor": 1.0}, 16, "aux", "below 1"),
    ("router type", {ME + "router_dense_type": "int8"}, 16, "router_dense_type", "float32, float16, bfloat16"),
    ("routing policy", {ME + "routing_policy": "TopkRouterV1"}, 16, "TopkRouterV1", "TopkRouterV2"),
    ("heads over key heads", {MC + "n_kv_heads": 5}, 16, "num_attention_heads=32 is not a multiple of", "use 30 or 35"),
    ("width over heads", {MC + "num_heads": 30, MC + "n_kv_heads": 6}, 16, "4096", "30"),
    (
        "token id",
        {MC + "eos_token_id": 32000},
        16,
        "eos_token_id=32000 is outside the vocabulary of 32000",
        "correct the id",
    ),
    ("compute type", {MC + "compute_dtype": "int8"}, 16, "compute_dtype", "float16"),
    ("no vocabulary", {MC + "vocab_size": 0}, 16, "vocab_size=0", "above 0"),
    (
        "missing network",
        {"model": {"model_config": {}, "arch": {"type": "LlamaForCausalLM"}}},
        16,
        "model.model_config is missing or empty",
        "describe the network there",
    ),
    ("missing optimizer", {"optimizer": None}, 16, "the section optimizer is missing", "add it"),
    (
        "unknown key",
        {PC + "data_paralel": 8},
        16,
        "unknown key 'parallel_config.data_paralel'",
        "did you mean 'data_parallel'?",
    ),
    ("eval", {"run_mode": "eval"}, 16, "run_mode='eval'", "choose train, finetune or predict"),
    (
        "split of training in predict",
        {"run_mode": "predict"},
        16,
        "cuts the network over all 16 devices by model_parallel, here data_parallel=8, model_parallel=1",
        "set data_parallel: 1, model_parallel: 16, expert_parallel: 1, pipeline_stage: 1",
    ),
    (
        "predict on more devices than heads",
        {
            "run_mode": "predict",
            PC + "data_parallel": 1,
            PC + "expert_parallel": 1,
            PC + "pipeline_stage": 1,
            PC + "model_parallel": 16,
        },
        16,
        "n_kv_heads=8 is not a multiple of model_parallel=16",
        "the nearest model_parallel that divides every width is 8",
    ),
    ("pynative", {"context.mode": 1}, 16, "context.mode is 1", "--mode 0"),
    (
        "recompute list",
        {"recompute_config.recompute": [1, 2, 3]},
        16,
        "recompute=[1, 2, 3] has 3 entries, pipeline_stage=2",
        "one number of layers per pipeline stage",
    ),
    (
        "recompute part",
        {"recompute_config.select_recompute": ["feed_forward.w3"]},
        16,
        "'feed_forward.w3' is no part of a layer here",
        "choose among attention_norm, attention_norm.norm, attention, ",
    ),
    (
        "recompute parts together",
        {
            "recompute_config.recompute": [1],
            "recompute_config.select_recompute": [".*norm", "attention", "feed_forward.mul"],
        },
        16,
        "names attention, its norm and the gated product of one layer",
        "leave attention_norm out",
    ),
    (
        "recompute word",
        {"recompute_config.recompute": "some"},
        16,
        "recompute='some' is not understood",
        "write True, False",
    ),
    (
        "accumulation 0",
        {"runner_config.gradient_accumulation_steps": -1},
        16,
        "gradient_accumulation_steps=-1",
        "above 0",
    ),
]


def refusal(changes: dict[str, Any], devices: int, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        plan_dry_run(changed(changes), "job.yaml", devices, more.pop("ranks", "stages"), Path("out"), **more)
    return str(caught.value)


def test_the_seed_is_accepted() -> None:
    plan = plan_dry_run(changed({}), "job.yaml", 16, "stages", Path("out"))
    assert plan.ranks == (0, 8) and plan.rows == 128
    assert "follows the load" not in "".join(plan.notes)


def test_grouped_experts_are_told_with_the_worst_load() -> None:
    """All layers are computed again, one at a time: of 8 devices 4096 rows each to one expert for 2 x 4096 in all."""
    plan = plan_dry_run(changed({ME + "use_gmm": True, ME + "capacity_factor": -1}), "job.yaml", 16, "0", Path("out"))
    equal, rows = max(stage.total for stage in plan.memory), (8 - 2) * 4096
    (note,) = [note for note in plan.notes if "follows the load" in note]
    assert size_text(equal) in note and size_text(equal + rows * (4096 + 3 * 14336) * 2) in note


def test_r17s_split_is_accepted() -> None:
    plan = plan_dry_run(changed(R17), "job.yaml", 16, "all", Path("out"))
    assert plan.ranks == tuple(range(16)) and plan.rows == 32


@pytest.mark.parametrize("changes, devices, rule, way_out", [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_refused(changes: dict[str, Any], devices: int, rule: str, way_out: str) -> None:
    text = refusal(changes, devices)
    assert rule in text and way_out in text, text


def test_there_are_forty() -> None:
    assert len({row[0] for row in WRONG}) >= 40


def test_every_broken_rule_is_told_at_once() -> None:
    text = refusal({PC + "model_parallel": 3, PC + "micro_batch_num": 1, MC + "seq_length": 4097}, 16)
    assert "8*3*2*1 = 48 is not the device count 16" in text
    assert "micro_batch_num=1" in text and "num_heads=32" in text


@pytest.mark.parametrize(
    "ranks, message", [("0,16", "the ranks 0 to 15"), ("first", "write all, stages"), ("", "write all")]
)
def test_ranks(ranks: str, message: str) -> None:
    assert message in refusal({}, 16, ranks=ranks)


def test_memory_too_small_names_a_split_that_fits() -> None:
    text = refusal({}, 16, memory="52GB")
    assert "stage 1 needs" in text and "weights" in text and "activations about" in text and "--memory is 52GB" in text
    found = text.split("the cheapest split that fits is ")[1].split(", ")
    sizes = dict(part.split("=") for part in found)
    steps = {PC + name: yaml.safe_load(sizes[name]) for name in sizes if name != "gradient_accumulation_steps"}
    steps["runner_config.gradient_accumulation_steps"] = int(sizes["gradient_accumulation_steps"])
    assert plan_dry_run(changed(steps), "job.yaml", 16, "stages", Path("out"), "52GB").rows == 128


def test_memory_that_no_split_fits() -> None:
    assert "no split of 16 devices fits (the least is" in refusal({}, 16, memory="8GB")
    text = refusal({"recompute_config.recompute": False}, 16, memory="8GB")
    assert "use more devices, or set recompute_config.recompute: True" in text


def test_the_yamls_own_limit_only_warns() -> None:
    plan = plan_dry_run(changed({"context.max_device_memory": "40GB"}), "job.yaml", 16, "stages", Path("out"))
    assert any("context.max_device_memory is 40GB" in note for note in plan.notes)


@pytest.mark.parametrize("text, nbytes", [("64GB", 64 * 10**9), ("64GiB", 64 * 2**30), ("512 MB", 512 * 10**6)])
def test_amounts(text: str, nbytes: int) -> None:
    assert read_size(text, "--memory") == nbytes


@pytest.mark.parametrize("text", ["64", "GB", "-1GB", "0GB", "lots"])
def test_wrong_amounts(text: str) -> None:
    with pytest.raises(UserError, match="for example 64GB"):
        read_size(text, "--memory")
