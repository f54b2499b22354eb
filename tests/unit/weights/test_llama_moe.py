# SPDX-License-Identifier: Apache-2.0
"""LLaMA-MoE's names, sizes and configuration: the published layout exactly, and a clear error for anything else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mindformers_ext.core.cluster.build import build_spec
from mindformers_ext.core.config.hf import hf_config_from_spec, hf_notes, model_spec_from_hf
from mindformers_ext.core.config.view import network_spec_from_yaml, yaml_from_network_spec, yaml_notes
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.parameters import model_weights
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.weights.convert import rule_set, to_mindspore
from mindformers_ext.weights.views import describe, pad, whole
from tests.helpers.llama_moe_published import PUBLISHED, Published
from tests.helpers.round_trip import check_round_trip

WORDS = {"model_type": "llama_moe", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
TINY = {
    **WORDS,
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 3,
    "num_selects": 2,
}
UNEQUAL = {"size_experts": [[2, 7, 3], [4, 4, 4]]}


def spec_of(**words: Any) -> Any:
    return model_spec_from_hf({**TINY, **words})


def tensors_of(**words: Any) -> dict[str, np.ndarray]:
    """Random tensors of the names that a checkpoint has."""
    random = np.random.default_rng(1)
    bindings = rule_set(spec_of(**words)).bindings
    shapes = {name: shape for binding in bindings for name, shape in binding.hf.items()}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def refusal(**words: Any) -> str:
    with pytest.raises(UserError) as caught:
        spec_of(**words)
    return str(caught.value)


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_the_published_sizes(published: Published) -> None:
    experts, chosen, size, _, total, active = published
    spec = model_spec_from_hf({**WORDS, "num_experts": experts, "num_selects": chosen})
    assert spec.expert_size == size
    sizes = {weight.name: math.prod(weight.shape) for weight in model_weights(spec)}
    routed = sum(size for name, size in sizes.items() if ".ffn." in name)
    assert sum(sizes.values()) == total and total - routed + routed * chosen // experts == active


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_names_are_the_published_ones(kind: str) -> None:
    held, start = tensors_of(gate_network=kind), "model.layers.1.mlp."
    shapes = {n.removeprefix(start): t.shape for n, t in held.items() if n.startswith(start)}
    network = {"0.weight": (3, 8), "2.weight": (3, 3)} if kind == "mlp" else {"weight": (3, 8)}
    wanted = {f"gate.gate_network.{name}": shape for name, shape in network.items()}
    wanted |= {"gate.weight_noise.weight": (3, 8)}
    for expert in range(3):
        wanted |= {f"calculator.experts.weight_{name}.{expert}": (4, 8) for name in ("gate", "up")}
        wanted |= {f"calculator.experts.weight_down.{expert}": (8, 4)}
    assert shapes == wanted


@pytest.mark.parametrize("words", [{}, UNEQUAL, {"gate_network": "linear", "tie_word_embeddings": True}])
def test_weights_make_the_round_trip(words: dict[str, Any]) -> None:
    spec, held = spec_of(**words), tensors_of(**words)
    inside = to_mindspore(held | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}, spec)
    check_round_trip(held, inside, spec)


def test_narrow_experts_are_padded_with_zeros() -> None:
    inside = to_mindspore(tensors_of(**UNEQUAL), spec_of(**UNEQUAL))
    for width, expert in zip((2, 7, 3), range(3), strict=True):
        rows = inside["model.layers.0.feed_forward.ffn.w1.weight"][expert]
        columns = inside["model.layers.0.feed_forward.ffn.w2.weight"][expert]
        assert rows.shape == (7, 8) and rows[:width].all() and not rows[width:].any()
        assert columns.shape == (8, 7) and columns[:, :width].all() and not columns[:, width:].any()


def test_every_tensor_must_be_there_and_no_other() -> None:
    held, expert = tensors_of(), "model.layers.1.mlp.calculator.experts.weight_gate.2"
    spelt = "model.layers.1.mlp.calculator.experts.parametrizations.weight.original0ate.2"
    with pytest.raises(UserError) as caught:
        to_mindspore({spelt if name == expert else name: array for name, array in held.items()}, spec_of())
    assert f"'{expert}' (4, 8) is missing" in str(caught.value) and f"'{spelt}' is unexpected" in str(caught.value)


def test_configurations_that_are_not_built_are_refused_by_name() -> None:
    assert "gate_type='SwitchBalancedGate' is not built" in refusal(gate_type="SwitchBalancedGate")
    assert "calculator_type='SwitchDropTokenCalculator'" in refusal(calculator_type="SwitchDropTokenCalculator")
    assert "add_weight_norm=True" in refusal(add_weight_norm=True)
    assert "gate_network" in refusal(gate_network="cosine")
    assert "num_experts_chosen=4 exceeds" in refusal(num_selects=4)
    assert "score_scale_factor has 3 values" in refusal(score_scale_factor=[1, 2, 3])
    assert "intermediate_size=13 is not a multiple" in refusal(intermediate_size=13)
    for sizes in ([[4, 4, 4]], [[5, 4, 4], [4, 4, 4]], [[0, 8, 4], [4, 4, 4]], [[6, 6], [6, 6]]):
        assert "give a list per layer (2) of 3 sizes whose sum is 12" in refusal(size_experts=sizes)
    assert "size_experts=7 is not a list per layer" in refusal(size_experts=7)
    dropping = {**TINY, "capacity_factor": 2.0, "drop_tokens": True}
    assert [note for note in hf_notes(dropping) if "capacity_factor=2.0" in note]


def test_equal_sizes_go_unsaid_and_others_make_the_round_trip() -> None:
    assert spec_of(size_experts=[[4, 4, 4], [4, 4, 4]]) == spec_of()
    spec = spec_of(**UNEQUAL, score_scale_factor=[2.0, 1.5])
    assert hf_config_from_spec(spec)["size_experts"] == UNEQUAL["size_experts"]
    assert model_spec_from_hf(hf_config_from_spec(spec)) == spec
    network = NetworkSpec(model=spec, seq_length=4)
    assert network_spec_from_yaml(yaml_from_network_spec(network)) == network
    assert [spec.layer(index).moe.score_scale_factor for index in range(2)] == [2.0, 1.5]


def test_words_of_another_gate_are_refused() -> None:
    sections = yaml_from_network_spec(NetworkSpec(model=spec_of(), seq_length=4))
    sections["moe_config"] |= {"z_loss_factor": 0.1, "aux_loss_types": ["expert"], "aux_loss_factors": [0.01]}
    with pytest.raises(UserError) as caught:
        network_spec_from_yaml(sections)
    assert "z_loss_factor=0.1 has no effect on moe_gate 'mlp_noisy'" in str(caught.value)
    assert "aux_losses=(('expert', 0.01),) has no effect" in str(caught.value)


BY_THRESHOLD = {
    "gate_network": "threshold",
    "num_selects": 3,
    "gate_use_softmax": False,
    "gate_use_balance": False,
    "gate_add_noise": False,
    "multiply_gate_scores": False,
}


def test_a_threshold_makes_the_round_trip() -> None:
    spec = spec_of(**BY_THRESHOLD)
    assert model_spec_from_hf(hf_config_from_spec(spec)) == spec
    sections = yaml_from_network_spec(NetworkSpec(model=spec, seq_length=4))
    assert network_spec_from_yaml(sections).model == spec
    gate = "model.layers.1.feed_forward.router.dense."
    shapes = {weight.name.removeprefix(gate): weight.shape for weight in model_weights(spec) if gate in weight.name}
    assert shapes == {"weight": (3, 8), "bias": (3,)}
    told = {**sections, "run_mode": "train", "runner_config": {**sections["runner_config"], "freeze_gate": False}}
    assert any("no gradient reaches the gate" in note for note in yaml_notes(told, spec.moe))
    told["runner_config"]["freeze_gate"] = True
    told["moe_config"] = {"aux_loss_factor": 0.05}
    assert [note for note in yaml_notes(told, spec.moe) if "gate" in note] == [
        "moe_config.aux_loss_factor=0.05 has no effect: a gate by threshold has no loss; set it to 0"
    ]
    alone = {**sections, "runner_config": {"train_gate_only": True}}
    with pytest.raises(UserError, match="train_gate_only: no gradient reaches a gate by threshold"):
        build_spec(NetworkSpec(model=spec, seq_length=4), alone)


def test_words_that_mean_nothing_with_a_threshold_are_refused() -> None:
    words = {"gate_use_softmax": True, "gate_use_balance": True, "gate_add_noise": True, "multiply_gate_scores": True}
    for name, value in {**words, "load_compat": "reference", "score_scale_factor": 2.0}.items():
        assert f"{name}={value!r} with moe_gate 'threshold': set it to" in refusal(**BY_THRESHOLD | {name: value})
    assert "num_experts_chosen=2 (num_selects)" in refusal(**BY_THRESHOLD | {"num_selects": 2})
    sections = yaml_from_network_spec(NetworkSpec(model=spec_of(**BY_THRESHOLD), seq_length=4))
    sections["moe_config"] |= {"aux_loss_types": ["expert"], "aux_loss_factors": [0.01], "capacity_factor": 1.1}
    with pytest.raises(UserError) as caught:
        network_spec_from_yaml(sections)
    assert "aux_losses=(('expert', 0.01),) has no effect on moe_gate 'threshold'" in str(caught.value)
    assert "capacity_factor=1.1 with moe_gate 'threshold': nothing is dropped: set it to -1" in str(caught.value)
    sections["moe_config"] |= {"aux_loss_types": [], "aux_loss_factors": [], "capacity_factor": -1, "use_gmm": True}
    with pytest.raises(UserError, match="use_gmm=True with moe_gate 'threshold'"):
        network_spec_from_yaml(sections)


def test_a_plan_says_what_is_padded() -> None:
    assert describe(pad(whole("up", (2, 3)), (4, 3))) == "padded up" and describe(whole("up", (2, 3))) == "up"
