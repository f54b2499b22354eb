# SPDX-License-Identifier: Apache-2.0
"""LLaMA-MoE with residual experts: names, sizes and configuration, and a clear error for anything else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mindformers_ext.core.config.hf import hf_config_from_spec, model_spec_from_hf
from mindformers_ext.core.config.view import network_spec_from_yaml, yaml_from_network_spec
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.parameters import model_weights
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.jobs.checkpoint.source import check_model
from mindformers_ext.weights.convert import rule_set, to_mindspore
from tests.helpers.round_trip import check_round_trip

TINY = {
    "model_type": "llama_moe",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 3,
    "num_selects": 2,
    "num_experts_residual": 2,
    "intermediate_size_moe": 15,
    "intermediate_size_residual": 6,
}
UNLIKE = {"size_experts": [[2, 10, 3], [5, 5, 5]], "size_experts_residual": [[1, 5], [4, 2]], "use_weighting": True}
# the released class's, at full size
RELEASED = {
    "model_type": "llama_moe_residual",
    "architectures": ["LlamaMoEResidualForCausalLM"],
    "rms_norm_eps": 1e-5,
    "intermediate_size_moe": 9632,
    "intermediate_size_residual": 1376,
    "size_experts_residual": None,
}


def spec_of(**words: Any) -> ModelSpec:
    return model_spec_from_hf({**TINY, **words})


def tensors_of(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Random tensors of the names that a checkpoint has."""
    random = np.random.default_rng(1)
    shapes = {name: shape for binding in rule_set(spec).bindings for name, shape in binding.hf.items()}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def refusal(**words: Any) -> str:
    with pytest.raises(UserError) as caught:
        spec_of(**words)
    return str(caught.value)


def test_the_released_sizes_hold_as_many_weights_as_the_dense_model_and_its_gates() -> None:
    spec = model_spec_from_hf(RELEASED)
    assert (spec.routing.num_local_experts, spec.routing.num_experts_per_tok, spec.expert_size) == (14, 2, 688)
    assert spec.routing.shared_expert and spec.routing.shared_expert.sizes_of(31) == (688, 688)
    gates = 32 * (14 * 4096 + 14 * 14 + 14 * 4096 + 2 * 4096)
    assert sum(math.prod(weight.shape) for weight in model_weights(spec)) == 6_738_415_616 + gates
    assert hf_config_from_spec(spec)["model_type"] == "llama_moe"  # the class that a folder of ours carries
    assert model_spec_from_hf(hf_config_from_spec(spec)) == spec


@pytest.mark.parametrize("words", [{}, UNLIKE], ids=["alike", "unlike"])
def test_names_are_those_of_the_residual_layer(words: dict[str, Any]) -> None:
    start = "model.layers.0.mlp."
    found = {n.removeprefix(start): t.shape for n, t in tensors_of(spec_of(**words)).items() if n.startswith(start)}
    sizes = {"moe_layer": words.get("size_experts", [[5, 5, 5]])[0]}
    sizes["residual_block"] = words.get("size_experts_residual", [[3, 3]])[0]
    wanted = {
        "moe_layer.gate.gate_network.0.weight": (3, 8),
        "moe_layer.gate.gate_network.2.weight": (3, 3),
        "moe_layer.gate.weight_noise.weight": (3, 8),
        "residual_block.gate.gate_network.weight": (2, 8),
        **({"weighting_network.0.weight": (2, 8)} if words else {}),
    }
    for place, widths in sizes.items():
        for expert, width in enumerate(widths):
            wanted |= {f"{place}.calculator.experts.weight_{name}.{expert}": (width, 8) for name in ("gate", "up")}
            wanted[f"{place}.calculator.experts.weight_down.{expert}"] = (8, width)
    assert found == wanted


@pytest.mark.parametrize("words", [{}, UNLIKE, {"gate_network": "linear", "num_experts_residual": 1}])
def test_weights_make_the_round_trip(words: dict[str, Any]) -> None:
    spec = spec_of(**words)
    held = tensors_of(spec)
    inside = to_mindspore(held, spec)
    check_round_trip(held, inside, spec)


def test_residual_experts_lie_one_after_the_other_in_a_shared_one() -> None:
    spec = spec_of(**UNLIKE)
    held = tensors_of(spec)
    inside, start = to_mindspore(held, spec), "model.layers.0.mlp.residual_block.calculator.experts.weight_"
    for name, letter, axis in (("gate", "w1", 0), ("up", "w3", 0), ("down", "w2", 1)):
        whole = inside[f"model.layers.0.feed_forward.shared_experts.{letter}.weight"]
        assert np.array_equal(whole, np.concatenate([held[f"{start}{name}.{r}"] for r in range(2)], axis))


def test_every_word_makes_the_round_trip() -> None:
    spec = spec_of(
        **UNLIKE,
        gate_use_softmax_residual=False,
        multiply_gate_scores_residual=False,
        score_scale_factor_residual=[2.0, 0.5],
    )
    assert model_spec_from_hf(hf_config_from_spec(spec)) == spec
    network = NetworkSpec(model=spec, seq_length=4)
    assert network_spec_from_yaml(yaml_from_network_spec(network)) == network
    first = spec.layer(1).moe
    assert first and first.shared_expert and first.shared_expert.sizes_of(0) == (4, 2)
    assert first.shared_expert.scale == 0.5


def test_either_width_may_go_unsaid_and_sizes_that_are_alike_too() -> None:
    assert spec_of(intermediate_size_residual=None) == spec_of() == spec_of(intermediate_size_moe=None)
    assert spec_of(size_experts=[[5] * 3] * 2, size_experts_residual=[[3, 3]] * 2) == spec_of()


def test_a_file_without_residual_experts_may_hold_their_words() -> None:
    """The class that a folder carries writes them all."""
    bare = {key: TINY[key] for key in TINY if "residual" not in key and key != "intermediate_size_moe"}
    idle = {"num_experts_residual": 0, "intermediate_size_moe": None, "gate_use_softmax_residual": True}
    assert model_spec_from_hf({**bare, **idle, "use_weighting": False}) == model_spec_from_hf(bare)


def test_what_does_not_fit_together_is_refused() -> None:
    assert "intermediate_size=21 is not intermediate_size_moe=14" in refusal(intermediate_size_moe=14)
    assert "no intermediate_size_residual" in refusal(intermediate_size_moe=None, intermediate_size_residual=None)
    assert "leave some to the routed" in refusal(intermediate_size_moe=None, intermediate_size_residual=21)
    assert "intermediate_size without the shared experts=15 is not a multiple" in refusal(num_experts=4)
    assert "shared_expert_intermediate_size=6 is not a multiple" in refusal(num_experts_residual=4)
    assert "(2) of 2 sizes whose sum is 6" in refusal(size_experts_residual=[[3, 3], [3, 2]])
    assert "score_scale_factor_residual) has 3 values" in refusal(score_scale_factor_residual=[1, 2, 3])
    assert "experts of all layers together" in refusal(num_experts_residual=10**9)
    assert "add_weight_norm=True" in refusal(add_weight_norm=True)


def test_words_of_residual_experts_mean_nothing_elsewhere() -> None:
    words = yaml_from_network_spec(NetworkSpec(model=spec_of(), seq_length=4))
    words["model"]["model_config"] |= {"type": "LlamaMoEConfig", "use_weighting": True}
    words["model"]["arch"]["type"] = "LlamaMoEForCausalLM"
    with pytest.raises(UserError, match="use_weighting=True of a shared expert has no effect"):
        network_spec_from_yaml(words)
    words["model"]["model_config"]["num_experts_residual"] = 2
    with pytest.raises(UserError, match=r"write 'moe_config\.shared_expert_num'"):
        network_spec_from_yaml(words)


def test_a_variant_is_named_by_its_family_too() -> None:
    check_model(spec_of(), "llama_moe")
    check_model(spec_of(), "llama_moe_residual")
    with pytest.raises(UserError, match="describes a llama_moe_residual"):
        check_model(spec_of(), "llama")
