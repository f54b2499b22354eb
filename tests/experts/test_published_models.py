# SPDX-License-Identifier: Apache-2.0
"""The three published LLaMA-MoE models: names, shapes and counts of their weights at full size, and tiny ones of the
same names loaded as they are saved, in several files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.checkpoint.convert import ConvertRequest, convert
from mindformers_ext.jobs.checkpoint.hf_code import save_code
from mindformers_ext.jobs.checkpoint.model_code.modeling_llama_moe import LlamaMoEForCausalLM
from mindformers_ext.weights.convert import rule_set
from tests.helpers.llama_moe_models import assert_same_model, config_of, randomise
from tests.helpers.llama_moe_published import PUBLISHED

# What their config.json says; position embeddings and eps are LLaMA-2's.
WORDS = {
    "model_type": "llama_moe",
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "gate_type": "TopKBalancedNoisyGate",
    "gate_network": "mlp",
    "gate_use_softmax": True,
    "gate_use_balance": True,
    "gate_balance_loss_weight": 0.01,
    "gate_add_noise": True,
    "gate_noise_epsilon": 0.01,
    "calculator_type": "UniversalCalculator",
    "multiply_gate_scores": True,
    "add_weight_norm": False,
    "drop_tokens": True,
    "dropped_padding": "zero",
    "capacity_factor": 1.25,
}


def published(name: str, hidden: int, size: int, layers: int, heads: int, vocab: int) -> dict:
    """A config.json as the published one, at other sizes."""
    model = PUBLISHED[name]
    return {
        **WORDS,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": model.experts * size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "num_experts": model.experts,
        "num_selects": model.chosen,
        "size_experts": [[size] * model.experts] * layers,
        "score_scale_factor": [model.factor] * layers,
    }


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every weight of a published checkpoint, written from the spec's table of names."""
    hidden, vocab, experts = config["hidden_size"], config["vocab_size"], config["num_experts"]
    found = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        found |= {f"{at}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        found |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        found[f"{at}mlp.gate.gate_network.0.weight"] = (experts, hidden)
        found[f"{at}mlp.gate.gate_network.2.weight"] = (experts, experts)
        found[f"{at}mlp.gate.weight_noise.weight"] = (experts, hidden)
        for expert, size in enumerate(config["size_experts"][layer]):
            found[f"{at}mlp.calculator.experts.weight_gate.{expert}"] = (size, hidden)
            found[f"{at}mlp.calculator.experts.weight_up.{expert}"] = (size, hidden)
            found[f"{at}mlp.calculator.experts.weight_down.{expert}"] = (hidden, size)
    return found


def count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_these_weights(name: str) -> None:
    experts, chosen, size, _, total, active = PUBLISHED[name]
    config = published(name, 4096, size, 32, 32, 32000)
    with torch.device("meta"):
        model = LlamaMoEForCausalLM(config_of(**config))
    made = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    assert made == shapes(config)
    assert sum(map(count, made.values())) == total
    idle = sum(count(shape) for key, shape in made.items() if ".experts.weight_" in key) * (experts - chosen) // experts
    assert total - idle == active


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_conversion_knows_these_weights(name: str) -> None:
    """Every name and shape at full size, and none beside them: what a plan is made of."""
    config = published(name, 4096, PUBLISHED[name].size, 32, 32, 32000)
    spec = model_spec_from_hf(config)
    assert {key: shape for rule in rule_set(spec).bindings for key, shape in rule.hf.items()} == shapes(config)
    scales = {spec.moe.scale_of(layer) for layer in range(32)}
    assert (spec.moe.num_experts_per_tok, scales) == (PUBLISHED[name].chosen, {PUBLISHED[name].factor})


def tiny(name: str, folder: Path) -> tuple[dict, LlamaMoEForCausalLM, dict[str, torch.Tensor]]:
    """A folder of three files as on the hub: a config.json without code of ours, weights, an old version's buffers."""
    config = published(name, 32, 6, 2, 4, 50)
    model = LlamaMoEForCausalLM(config_of(**config)).eval()
    randomise(model)
    tensors = dict(model.state_dict())
    assert {key: tuple(weight.shape) for key, weight in tensors.items()} == shapes(config)
    files = tensors | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    weight_map = {}
    folder.mkdir()
    for number in range(3):
        part = {key: files[key] for key in sorted(files)[number::3]}
        weight_map |= dict.fromkeys(part, f"model-0000{number + 1}-of-00003.safetensors")
        save_file(part, folder / f"model-0000{number + 1}-of-00003.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    hub = {"AutoModelForCausalLM": "modeling_llama_moe_hf.LlamaMoEForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": hub}), "utf-8")
    return config, model, tensors


def assert_loads(folder: Path, wanted: LlamaMoEForCausalLM) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    x = torch.randint(3, 50, (2, 9))
    assert_same_model(model, wanted, x)
    assert wanted(x).logits.abs().max() > 0.1


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.usefixtures("remote_code")
def test_a_model_of_the_published_names_loads_and_comes_back_from_mindspore(name: str, tmp_path: Path) -> None:
    hub, loads = tmp_path / "hub", tmp_path / f"model-{name}"
    config, model, _ = tiny(name, hub)
    shutil.copytree(hub, loads)
    (loads / "config.json").write_text(json.dumps(save_code(loads, config)), "utf-8")
    assert_loads(loads, model)
    middle, back = tmp_path / "model.safetensors", tmp_path / f"back-{name}"
    convert(ConvertRequest(input_path=hub, output_path=middle))
    convert(ConvertRequest(input_path=middle, output_path=back, direction="to_hf", config=hub))
    assert_loads(back, model)


@pytest.mark.parametrize("fault", ["missing", "left over"])
def test_a_conversion_refuses_a_weight_missing_or_left_over(fault: str, tmp_path: Path) -> None:
    _, _, tensors = tiny("3_5B-2_8", tmp_path / "hub")
    (tmp_path / "hub" / "model.safetensors.index.json").unlink()
    for file in (tmp_path / "hub").glob("*.safetensors"):
        file.unlink()
    key = "model.layers.1.mlp.calculator.experts.weight_gate.3"
    if fault == "left over":
        tensors["model.layers.1.mlp.calculator.experts.weight_gate.8"] = torch.ones(6, 32)
    else:  # what a version of transformers made of it
        tensors[key.replace("weight_gate", "parametrizations.weight.original0ate")] = tensors.pop(key)
    save_file(tensors, tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weight_gate\.[38]"):
        convert(ConvertRequest(input_path=tmp_path / "hub", output_path=tmp_path / "out.safetensors"))
    assert not (tmp_path / "out.safetensors").exists()
