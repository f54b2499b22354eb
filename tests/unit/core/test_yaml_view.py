# SPDX-License-Identifier: Apache-2.0
"""MindFormers YAML <-> NetworkSpec: real keys, derived values, round trip, and every refusal."""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.config.keys import (
    COMPOSED,
    KEYS,
    MODEL,
    NOTED,
    OUR_SECTIONS,
    PASSED,
    UNBUILT,
    defaults,
    known_keys,
)
from mindformers_ext.core.config.other_words import OTHER_WORDS
from mindformers_ext.core.config.view import network_spec_from_yaml, yaml_from_network_spec, yaml_notes
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import FAMILIES, own_families
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import NetworkSpec
from tests.helpers.pretrain import changed
from tests.helpers.specs import family_specs, network_specs


def pretrain(**changes: Any) -> dict[str, Any]:
    """The sample with dotted keys (``__`` for the dot) changed."""
    return changed({path.replace("__", "."): value for path, value in changes.items()})


def in_model(**changes: Any) -> dict[str, Any]:
    return pretrain(**{f"model__model_config__{name}": value for name, value in changes.items()})


def in_moe(**changes: Any) -> dict[str, Any]:
    return pretrain(**{f"moe_config__{name}": value for name, value in changes.items()})


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        network_spec_from_yaml(config, 16)
    return str(caught.value)


def test_the_pretrain_file() -> None:
    spec = network_spec_from_yaml(pretrain(), 16)
    model, moe, parallel = spec.model, spec.model.moe, spec.parallel
    assert (model.hidden_size, model.intermediate_size, model.num_hidden_layers) == (4096, 14336, 32)
    assert (model.num_key_value_heads, model.head_dim, model.max_position_embeddings) == (8, 128, 4096)
    assert (model.rope_theta, model.initializer_range, model.model_type) == (1e6, 0.01, "mixtral")
    assert moe == MoESpec(
        num_local_experts=8,
        num_experts_per_tok=2,
        capacity_factor=1.1,
        enable_sdrop=True,
        aux_losses=(("expert", 0.05),),
        topk_bias_update_rate=0.001,
    )
    assert (parallel.data_parallel, parallel.expert_parallel, parallel.pipeline_stage) == (8, 8, 2)
    assert (parallel.parallel_mode, parallel.device_num, parallel.enable_alltoall) == ("semi_auto_parallel", 16, True)
    assert (spec.numerics.compute_dtype, spec.numerics.param_dtype, spec.seq_length) == ("float16", "float32", 4096)
    assert spec.return_extra_loss and yaml_notes(pretrain()) == []


def test_an_almost_empty_file_takes_mindformers_defaults() -> None:
    spec = network_spec_from_yaml({"model": {"model_config": {"type": "LlamaConfig"}}})
    assert (spec.model.hidden_size, spec.model.num_hidden_layers, spec.seq_length) == (4096, 32, 2048)
    assert (spec.model.num_key_value_heads, spec.model.intermediate_size, spec.model.moe) == (32, 11008, None)
    assert (spec.model.max_position_embeddings, spec.numerics.compute_dtype) == (2048, "float16")
    assert spec.parallel.parallel_mode == "stand_alone"


@pytest.mark.parametrize(
    ("hidden", "multiple", "factor", "width"),
    [(4096, 256, None, 11008), (8192, 4096, 1.3, 28672), (5120, 256, None, 13824), (104, 1, None, 277)],
)
def test_feed_forward_width_as_llama_computes_it(hidden: int, multiple: int, factor: float | None, width: int) -> None:
    config = in_model(
        intermediate_size=None,
        hidden_size=hidden,
        multiple_of=multiple,
        ffn_dim_multiplier=factor,
        num_heads=4,
        n_kv_heads=4,
    )
    assert network_spec_from_yaml(config, 16).model.intermediate_size == width


@settings(max_examples=80, deadline=None)
@given(network_specs())
def test_round_trip(spec: NetworkSpec) -> None:
    config = yaml.safe_load(yaml.safe_dump(yaml_from_network_spec(spec)))
    if spec.parallel.parallel_mode == "stand_alone":
        config["use_parallel"] = False
    assert network_spec_from_yaml(config, spec.parallel.device_num) == spec


@pytest.mark.parametrize("family", [name for name in own_families() if not FAMILIES[name].implied])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_named_family_makes_the_round_trip(family: str, data: st.DataObject) -> None:
    spec = NetworkSpec(model=data.draw(family_specs(family)), seq_length=8)
    config = yaml.safe_load(yaml.safe_dump(yaml_from_network_spec(spec)))
    assert network_spec_from_yaml(config) == spec
    several = any(word.means for word in spec.model.family_row.words)
    for key in (
        ("qk_layernorm",) if several else ("qk_layernorm", "moe_gate")
    ):  # what the name fixes need not be written
        config["model"]["model_config"].pop(key, None)
    assert network_spec_from_yaml(config) == spec


def test_a_word_against_the_family_is_named() -> None:
    config = in_model(type="Qwen2MoeConfig", qk_layernorm=True, theta=1e4)
    config["model"]["arch"]["type"] = "Qwen2MoeForCausalLM"
    with pytest.raises(UserError, match=r"qk_norm=True of a qwen2_moe"):
        network_spec_from_yaml(config, 16)


def test_what_yaml_cannot_say_is_refused() -> None:
    spec = network_spec_from_yaml(pretrain(), 16)
    one = replace(spec.model, moe=MoESpec(num_local_experts=1, num_experts_per_tok=1))
    half = replace(spec.model, moe=MoESpec(num_local_experts=2, num_experts_per_tok=1, router_dtype="float16"))
    for model, words in ((one, "one expert"), (half, "router_dtype")):
        with pytest.raises(UserError, match=words):
            yaml_from_network_spec(replace(spec, model=model))


@pytest.mark.parametrize(
    ("words", "losses"),
    [
        ({"aux_loss_factor": 0.02}, (("expert", 0.02),)),
        ({"aux_loss_factor": 0}, ()),
        ({"aux_loss_types": None}, (("expert", 0.05),)),
        ({"aux_loss_types": [], "aux_loss_factors": []}, ()),
        ({"aux_loss_types": ["expert", "comm"], "aux_loss_factors": [0.1, 1]}, None),
        ({"aux_loss_types": ["comm"], "aux_loss_factors": [0.1]}, (("comm", 0.1),)),
        ({"aux_loss_types": ["expert"], "aux_loss_factors": ["1e-3"]}, (("expert", 0.001),)),
    ],
)
def test_routing_losses(words: dict[str, Any], losses: tuple[tuple[str, float], ...] | None) -> None:
    if losses is None:
        assert "aux loss factor 1.0 of 'comm' is out of range" in refusal(in_moe(**words))
    else:
        moe = network_spec_from_yaml(in_moe(**words), 16).model.moe
        assert moe is not None and moe.aux_losses == losses


def test_our_own_keys() -> None:
    words = {"head_dim": 64, "return_extra_loss": False, "aux_loss_reduce": "mean", "norm_single_choice": True}
    spec = network_spec_from_yaml(in_model(**words), 16)
    assert spec.model.moe is not None and spec.model.moe.norm_single_choice
    assert (spec.model.head_dim, spec.return_extra_loss, spec.model.moe.aux_loss_reduce) == (64, False, "mean")
    assert spec.model.moe.aux_losses == (("expert", 0.05),)
    moe = network_spec_from_yaml(in_model(aux_loss_reduce="mean", aux_loss_type="switch"), 16).model.moe
    assert moe is not None and moe.joins_layers
    assert "aux_loss_type='all'" in refusal(in_model(aux_loss_type="all"))


def test_moe_config_may_stand_in_model_config() -> None:
    config = pretrain()
    config["model"]["model_config"]["moe_config"] = config.pop("moe_config")
    assert network_spec_from_yaml(config, 16) == network_spec_from_yaml(pretrain(), 16)
    config["moe_config"] = {name: value for name, value in defaults("moe_config").items()}  # as the template fills it
    assert network_spec_from_yaml(config, 16) == network_spec_from_yaml(pretrain(), 16)
    config["moe_config"]["expert_num"] = 4
    assert "they differ" in refusal(config)


def test_mindformers_own_config_objects_are_unfolded() -> None:
    class Built:
        def to_dict(self) -> dict[str, Any]:
            changed = {"aux_loss_types": [], "aux_loss_factors": [], "router_dense_type": Shout()}
            return pretrain()["moe_config"] | changed

    class Shout:
        def __str__(self) -> str:
            return "Float32"

    config = pretrain(moe_config=Built())
    assert network_spec_from_yaml(config, 16) == network_spec_from_yaml(pretrain(), 16)


def test_batch_size_by_run_mode() -> None:
    config = in_model(batch_size=3)
    config["runner_config"]["batch_size"] = 5
    assert network_spec_from_yaml(config, 16).batch_size == 5
    config["runner_config"] |= {"batch_size": 640, "mini_batch_size": 5}  # what the trainer leaves behind
    assert network_spec_from_yaml(config, 16).batch_size == 5
    assert network_spec_from_yaml(config | {"run_mode": "predict"}, 16).batch_size == 3


def test_llama_3_has_three_ends_of_text() -> None:
    model = network_spec_from_yaml(in_model(eos_token_id=[7, 8, 9]), 16).model
    assert (model.eos_token_id, model.more_eos_token_ids) == (7, (8, 9))


@pytest.mark.parametrize(
    ("mode", "name"),
    [(0, "data_parallel"), (1, "semi_auto_parallel"), ("1", "semi_auto_parallel"), ("auto_parallel", "auto_parallel")],
)
def test_parallel_modes(mode: object, name: str) -> None:
    assert network_spec_from_yaml(pretrain(parallel__parallel_mode=mode), 16).parallel.parallel_mode == name


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (in_moe(capcity_factor=1.0), ["unknown key 'moe_config.capcity_factor'", "did you mean 'capacity_factor'?"]),
        (in_moe(num_moe_experts=8), ["'moe_config.num_moe_experts'", "write 'moe_config.expert_num'"]),
        (in_moe(num_experts=8), ["'moe_config.num_experts'", "write 'moe_config.expert_num'"]),
        (in_model(num_attention_heads=8), ["write 'model.model_config.num_heads'"]),
        (in_model(expert_num=8), ["unknown key 'model.model_config.expert_num'", "it belongs to 'moe_config'"]),
        (pretrain(parallel_config__data_paralel=2), ["'parallel_config.data_paralel'", "'data_parallel'"]),
        (pretrain(parallel_config__expert_model_parallel_size=2), ["write 'parallel_config.expert_parallel'"]),
        (pretrain(parallel__paralel_mode=1), ["'parallel.paralel_mode'"]),
        (pretrain(recompute_config__recompte=True), ["'recompute_config.recompte'", "'recompute'"]),
        (pretrain(runner_config__epoch=1), ["'runner_config.epoch'", "'epochs'"]),
        (pretrain(moe_confg={}), ["unknown key 'moe_confg'", "'moe_config'"]),
        (in_moe(routing_policy="TopkRouterV1"), ["routing_policy='TopkRouterV1'", "TopkRouterV2"]),
        (in_moe(router_dense_type="fp8"), ["router_dense_type='fp8'", "float32, float16, bfloat16"]),
        (in_moe(num_experts_chosen=9), ["num_experts_chosen=9 exceeds expert_num=8"]),
        (in_moe(aux_loss_factor=1), ["aux_loss_factor=1.0 is out of range"]),
        (in_moe(aux_loss_types=["expert"], aux_loss_factors=[0.1, 0.2]), ["1 entries", "2"]),
        (in_moe(aux_loss_types=["device"], aux_loss_factors=[0.1]), ["expert_group_size is not set"]),
        (in_moe(aux_loss_types="expert", aux_loss_factors=0.1), ["both must be lists"]),
        (in_moe(aux_loss_factors=[0.1]), ["without aux_loss_types"]),
        (in_moe(use_gmm=True), ["use_gmm=True drops no token", "set capacity_factor: -1"]),
        (in_moe(shared_expert_num=1), ["shared_expert=True of a mixtral", "that family has False"]),
        (in_model(qkv_concat=True), ["qkv_concat=True is not built yet"]),
        (in_model(extend_method="DYNAMIC_NTK"), ["extend_method='DYNAMIC_NTK'", "is not built"]),
        (in_model(residual_dtype="float32"), ["residual_dtype=float32 is not built yet"]),
        (in_model(num_layers="32"), ["num_layers='32' is not a whole number"]),
        (in_model(tie_word_embeddings="Flase"), ["tie_word_embeddings='Flase' is not True or False"]),
        (in_model(theta="big"), ["theta='big' is not a finite number"]),
        (in_model(num_heads=5, n_kv_heads=5), ["hidden_size=4096 is not a multiple of num_heads=5"]),
        (pretrain(use_parallel="Flase"), ["use_parallel='Flase'"]),
        (pretrain(use_legacy=False), ["use_legacy=False is not built yet"]),
        (pretrain(parallel__parallel_mode=7), ["parallel.parallel_mode=7"]),
        (pretrain(run_mode="trian"), ["run_mode='trian'"]),
        (pretrain(moe_config="experts"), ["moe_config='experts' is not a section"]),
        ({"model": {}}, ["model.model_config is missing"]),
    ],
)
def test_refusals(config: dict[str, Any], words: list[str]) -> None:
    text = refusal(config)
    for word in words:
        assert word in text


def test_everything_wrong_stands_in_one_message() -> None:
    text = refusal(in_model(qkv_concat=True, num_layers=2.5, hiden_size=3))
    assert "3 problems" in text


def test_a_value_without_effect_is_noted() -> None:
    notes = yaml_notes(in_moe(group_wise_a2a=True, router_dense_type="float16"))
    assert len(notes) == 2 and "moe_config.group_wise_a2a=True" in notes[0] and "float32" in notes[1]
    moe = network_spec_from_yaml(in_moe(router_dense_type="float16"), 16).model.moe
    assert moe is not None and moe.router_dtype == "float32"


@pytest.mark.parametrize(
    ("gate", "words", "mode", "note"),
    [
        ("linear", {"aux_loss_factor": 0.05}, "train", ""),
        ("linear", {"aux_loss_factor": 0}, "train", ""),
        ("linear", {}, "predict", ""),
        ("linear", {"aux_loss_types": []}, "train", ""),
        ("linear", {}, "train", "aux_loss_factor is not set: .* 0.05"),
        ("mlp_noisy", {"aux_loss_factor": 0.05}, "train", "aux_loss_factor=0.05 has no effect"),
        ("mlp_noisy", {}, "train", ""),
    ],
)
def test_what_becomes_of_the_factor_of_a_loss_is_said(gate: str, words: dict[str, Any], mode: str, note: str) -> None:
    kept = {key: value for key, value in pretrain()["moe_config"].items() if key != "aux_loss_factor"}
    config = pretrain(moe_config=kept | words, run_mode=mode)
    moe = network_spec_from_yaml(config, 16).model.moe
    assert moe is not None
    if gate != "linear":
        moe = MoESpec(num_local_experts=8, num_experts_per_tok=2, gate=gate)
    assert [bool(re.search(note, line)) for line in yaml_notes(config, moe)] == [True] * bool(note)


def test_words_that_another_word_or_a_dense_model_makes_idle_are_said() -> None:
    dense = {"expert_num": 1, "aux_loss_type": "switch"}
    (note,) = yaml_notes(pretrain(moe_config=dense))
    assert "aux_loss_type has no effect: a dense model" in note
    config = pretrain(moe_config={"expert_num": 1})
    assert not yaml_notes(config)
    config["model"]["model_config"]["l0_module"] = {"target_model": {"n_layers": 1}, "target_sparsity": 0.3}
    (note,) = yaml_notes(config)
    assert "target_sparsity has no effect beside target_model" in note


def test_every_key_stands_in_one_table() -> None:
    for section in OUR_SECTIONS:
        tables = [
            {key.name for key in KEYS if key.section == section},
            set(NOTED.get(section, {})),
            set(UNBUILT.get(section, {})),
            COMPOSED.get(section, set()),
            PASSED.get(section, set()),
        ]
        names = [name for table in tables for name in table]
        assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


def test_every_translation_leads_to_a_known_key() -> None:
    for word, path in OTHER_WORDS.items():
        section, _, name = path.rpartition(".")
        assert name in known_keys(section), path
        assert word not in known_keys(section)


def signature(file: str, owner: str) -> dict[str, Any]:
    """Arguments and defaults of ``owner.__init__`` in the installed MindFormers, read without importing it."""
    found = importlib.util.find_spec("mindformers")
    if found is None or found.origin is None:
        pytest.skip("MindFormers is not installed")
    tree = ast.parse((Path(found.origin).parent / file).read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner).body
    args = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__").args
    values = [eval_default(node) for node in args.defaults]
    return dict(zip([arg.arg for arg in args.args][-len(values) :], values, strict=True))


def eval_default(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return eval_default(node.left) * eval_default(node.right)
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


@pytest.mark.parametrize(
    ("section", "file", "owner"),
    [
        (MODEL, "models/llama/llama_config.py", "LlamaConfig"),
        ("moe_config", "modules/transformer/moe.py", "MoEConfig"),
        ("parallel_config", "modules/transformer/transformer.py", "TransformerOpParallelConfig"),
        ("recompute_config", "modules/transformer/transformer.py", "TransformerRecomputeConfig"),
    ],
)
def test_keys_and_defaults_are_mindformers(section: str, file: str, owner: str) -> None:
    theirs = signature(file, owner)
    assert len(theirs) > 5
    assert not set(theirs) - set(known_keys(section))
    for name, default in defaults(section).items():
        if name in theirs:
            assert theirs[name] == default, name
    for name, neutral in (NOTED.get(section, {}) | UNBUILT.get(section, {})).items():
        if name in theirs:
            assert theirs[name] in neutral, name
