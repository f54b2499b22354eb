# SPDX-License-Identifier: Apache-2.0
"""Every YAML of configs/ and research/: explained, accepted for its devices, and its network built at tiny sizes."""

import re
from pathlib import Path

import pytest
from mindformers.core.parallel_config import build_parallel_config
from mindformers.models import build_network
from mindformers.tools.register import MindFormerConfig

import mindformers_ext.mf.register  # noqa: F401  puts our classes into MindFormers' registry
from mindformers_ext.core.cluster.cluster_rules import check_network
from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.config.overrides import apply_overrides
from mindformers_ext.core.config.view import network_spec_from_yaml, yaml_notes
from mindformers_ext.jobs.run.sections import check_sections
from mindformers_ext.mf.adapt import adapt

ROOT = Path(__file__).resolve().parents[2]
RESEARCH = sorted((ROOT / "research").rglob("*.yaml"))
# Files that describe a run; recipes for merging and the like have tests of their own
RUNS = [path for path in [*sorted((ROOT / "configs").rglob("*.yaml")), *RESEARCH] if "run_mode:" in path.read_text()]
TINY = {
    "hidden_size": "64",
    "intermediate_size": "96",
    "num_layers": "2",
    "num_heads": "8",
    "n_kv_heads": "8",
    "vocab_size": "128",
    "seq_length": "32",
    "max_position_embedding": "null",
    "bos_token_id": "1",
    "eos_token_id": "2",
    "pad_token_id": "0",
    "compute_dtype": "float32",
    "param_init_type": "float32",
    "rotary_dtype": "float32",
    "softmax_compute_type": "float32",
}


WIDTH = "moe_intermediate_size"
# what only some files say
TINY_PARTS = {WIDTH: "24", "shared_expert_intermediate_size": "40", "dense_layers": "[0, 3]"}


def devices_of(config):
    sizes = config.get("parallel_config") or {}
    dp, mp, pp = (sizes.get(name, 1) for name in ("data_parallel", "model_parallel", "pipeline_stage"))
    return dp * mp * pp if config.get("use_parallel") else 1


def name_of(path):
    return str(path.relative_to(ROOT))


def test_the_files_of_the_seed_are_there():
    names = {path.name for path in RESEARCH}
    for size in ("8x7b", "8x22b"):
        for name in (
            "pretrain_mixtral-{}.yaml",
            "pretrain_mixtral-{}_32k.yaml",
            "finetune_mixtral-{}.yaml",
            "finetune_lora_mixtral-{}.yaml",
            "predict_mixtral-{}.yaml",
        ):
            assert name.format(size) in names


@pytest.mark.parametrize("path", RESEARCH, ids=name_of)
def test_every_key_is_explained(path):
    bare = [
        line
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip() and not re.search(r":( &\w+)?$", line) and "#" not in line
    ]
    assert bare == []
    assert all("default" in line for line in path.read_text(encoding="utf-8").splitlines() if ":  #" in line)


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_a_file_is_accepted_for_its_devices(path):
    config = load_yaml(path)
    check_sections(config, config["run_mode"])
    spec = network_spec_from_yaml(config, devices_of(config))
    warnings = [*yaml_notes(config), *check_network(spec, config["run_mode"])]
    expected = (
        "vocab_emb_dp becomes False",
        "every model-parallel rank routes and exchanges the same tokens",
        "use_fused_ops_topkrouter",
    )
    assert [line for line in warnings if not any(word in line for word in expected)] == []


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_a_network_is_built_from_it(path):
    config = load_yaml(path) | {"use_parallel": False}
    own = config["model"]["model_config"]
    tiny = TINY | {name: value for name, value in TINY_PARTS.items() if name in own}
    tiny |= {"num_layers": "4"} if "dense_layers" in own else {}
    pairs = [(f"model.model_config.{name}", value) for name, value in tiny.items()]
    config = apply_overrides(config, pairs)
    config["model"]["model_config"].pop("l0_module", None)  # our own loop's: tests/pt/test_prune_run.py
    config, _ = adapt(config, "CPU")
    full = MindFormerConfig(**config)
    build_parallel_config(full)
    network = build_network(
        full.model, default_args={"parallel_config": full.parallel_config, "moe_config": full.moe_config}
    )
    shapes = {parameter.name: parameter.shape for parameter in network.get_parameters()}
    experts = (config.get("moe_config") or {}).get("expert_num", 1)
    if experts > 1:
        width = 96 // experts if network.spec.model.family_row.shares_width else int(tiny.get(WIDTH, 96))
        routed = "routed_experts." if network.spec.model.moe.shared_expert else ""
        assert shapes[f"model.layers.1.feed_forward.{routed}ffn.w1.weight"] == (experts, width, 64)
        assert shapes[f"model.layers.1.feed_forward.{routed}router.dense.weight"] == (experts, 64)
    assert shapes["lm_head.weight"] == (128, 64)


def test_the_seed_s_numbers():
    folder = ROOT / "research" / "mixtral" / "mixtral_8x7b"
    pretrain, finetune = (load_yaml(folder / f"{kind}_mixtral-8x7b.yaml") for kind in ("pretrain", "finetune"))
    for config in (pretrain, finetune):
        sizes = config["parallel_config"]
        assert [
            sizes[name]
            for name in ("data_parallel", "model_parallel", "expert_parallel", "pipeline_stage", "micro_batch_num")
        ] == [8, 1, 8, 2, 16]
        assert not sizes["use_seq_parallel"] and sizes["vocab_emb_dp"] and sizes["gradient_aggregation_group"] == 4
        moe = config["moe_config"]
        assert (moe["capacity_factor"], moe["aux_loss_factor"], moe["enable_sdrop"]) == (1.1, 0.05, True)
    assert finetune["optimizer"] == {
        "type": "FP32StateAdamWeightDecay",
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "learning_rate": 3e-4,
    }
    schedule = finetune["lr_schedule"]
    assert (schedule["learning_rate"], schedule["lr_end"], schedule["warmup_ratio"]) == (1e-5, 0, 0.03)
    assert finetune["train_dataset"]["input_columns"] == ["input_ids", "labels"]
