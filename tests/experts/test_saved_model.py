# SPDX-License-Identifier: Apache-2.0
"""The model saved with its weights: beside transformers' LLaMA, loaded by Auto classes, generation, training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from mindformers_ext.jobs.checkpoint.hf_code import code_files
from tests.helpers.llama_moe_models import SIZES, UNEQUAL, assert_same_model, folder_of, model_of, token_ids

DENSE = {"num_experts": 4, "num_selects": 4, "multiply_gate_scores": False}
ROPES = {
    "plain": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


pytestmark = pytest.mark.usefixtures("remote_code")


def dense_of(model) -> transformers.LlamaForCausalLM:
    """transformers' LLaMA with the experts put side by side."""
    config = model.config
    words = {name: SIZES[name] for name in SIZES if not name.startswith(("num_experts", "num_selects"))}
    words |= {"rms_norm_eps": config.rms_norm_eps, "tie_word_embeddings": config.tie_word_embeddings}
    words |= {"attention_bias": config.attention_bias, "pad_token_id": 0}
    rope = dict(config.rope_parameters)
    words["max_position_embeddings"] = config.max_position_embeddings
    if transformers.__version__ < "5":
        theta = rope.pop("rope_theta")
        words |= {"rope_theta": theta, "rope_scaling": rope if rope["rope_type"] != "default" else None}
    else:
        words["rope_parameters"] = rope
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**words)).eval()
    tensors = {key: value for key, value in model.state_dict().items() if ".mlp." not in key}
    for number, layer in enumerate(model.model.layers):
        experts = layer.mlp.calculator.experts
        parts = {"gate": (experts.weight_gate, 0), "up": (experts.weight_up, 0), "down": (experts.weight_down, 1)}
        for name, (weights, axis) in parts.items():
            tensors[f"model.layers.{number}.mlp.{name}_proj.weight"] = torch.cat(list(weights), axis).detach()
    dense.load_state_dict(tensors)
    return dense


@pytest.mark.parametrize("rope", ROPES)
def test_all_experts_summed_are_transformers_llama(rope: str) -> None:
    model = model_of(rope_theta=5000.0, rope_scaling=ROPES[rope], max_position_embeddings=32, **DENSE)
    dense, x = dense_of(model), token_ids(length=40)
    got, wanted = model(x).logits, dense(x).logits
    assert wanted.abs().max() > 0.5
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("words", [{"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
def test_loss_and_gradients_are_those_of_transformers_llama(words: dict) -> None:
    sizes = [[3, 17, 10, 10], [10] * 4, [22, 6, 6, 6]]
    model = model_of(gate_use_balance=False, size_experts=sizes, **DENSE, **words)
    dense, x = dense_of(model), token_ids()
    labels = x.clone()
    labels[:, :3] = -100
    got, wanted = model(x, labels=labels).loss, dense(x, labels=labels).loss
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    got.backward(), wanted.backward()
    theirs = dict(dense.named_parameters())
    for name, weight in model.named_parameters():
        if ".mlp." not in name:
            torch.testing.assert_close(weight.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)
    down = torch.cat([weight.grad for weight in model.model.layers[0].mlp.calculator.experts.weight_down], 1)
    torch.testing.assert_close(down, theirs["model.layers.0.mlp.down_proj.weight"].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_and_outputs_are_those_of_transformers_llama(attention: str) -> None:
    model = model_of(**DENSE)
    dense, x = dense_of(model), token_ids()
    model.set_attn_implementation(attention)
    dense.set_attn_implementation("eager")
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    words = {"attention_mask": mask, "output_hidden_states": True, "output_attentions": True}
    got, wanted = model(x, **words), dense(x, **words)
    torch.testing.assert_close(got.logits[0, 5:], wanted.logits[0, 5:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.logits[1], wanted.logits[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x, attention_mask=mask).logits[0, 5:], got.logits[0, 5:], rtol=1e-5, atol=1e-5)
    assert len(got.hidden_states) == len(wanted.hidden_states) == 4
    for ours, theirs in zip(
        (*got.hidden_states, *got.attentions), (*wanted.hidden_states, *wanted.attentions), strict=True
    ):
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)


def test_auto_classes_load_a_folder_of_ours_and_what_they_save(tmp_path: Path) -> None:
    words = {"size_experts": UNEQUAL, "score_scale_factor": [1.0, 2.0, 3.0], "rope_scaling": ROPES["llama3"]}
    model, x = model_of(**words), token_ids()
    first = folder_of(model, tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(first, trust_remote_code=True)
    assert type(loaded).__name__ == "LlamaMoEForCausalLM" and type(loaded) is not type(model)
    assert loaded.model.layers[0].mlp.calculator.experts.weight_gate[0].shape == (5, 24)
    assert_same_model(loaded, model, x)
    assert not loaded.training and list(loaded.state_dict()) == list(model.state_dict())
    loaded.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} >= {*code_files(), "config.json"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert_same_model(again, model, x)
    config = AutoConfig.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert config.model_type == "llama_moe" and config.size_experts == UNEQUAL
    bare = AutoModel.from_pretrained(first, trust_remote_code=True)
    assert_same_model(bare, model.model, x)


def test_tied_embeddings_and_bfloat16_survive_a_folder(tmp_path: Path) -> None:
    model = model_of(tie_word_embeddings=True).to(torch.bfloat16)
    folder = folder_of(model, tmp_path / "tied")
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    assert_same_model(loaded, model, token_ids())
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True, dtype="auto")
    assert_same_model(again, model, token_ids())


EXPERT, NOISE = "model.layers.1.mlp.calculator.experts.weight_gate.3", "model.layers.0.mlp.gate.weight_noise.weight"


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({EXPERT: None}, {}, f"1 missing ({EXPERT})"),
        ({"lm_head.weight": None}, {}, "1 missing (lm_head.weight)"),
        ({NOISE: None}, {}, f"1 missing ({NOISE})"),
        ({NOISE: None}, {"gate_add_noise": False}, ""),
        ({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}, {}, ""),
        ({EXPERT.replace("weight_gate.3", "parametrizations.weight.original0ate.3"): torch.ones(3)}, {}, "not of this"),
        ({EXPERT.replace(".3", ".5"): torch.ones(8, 24)}, {}, "1 not of this model"),
    ],
    ids=range(7),
)
def test_a_weight_missing_or_left_over_is_an_error(changes: dict, words: dict, said: str, tmp_path: Path) -> None:
    folder = folder_of(model_of(**words), tmp_path, **changes)
    if not said:
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert loaded.model.layers[0].mlp.gate.weight_noise.weight.any() == (NOISE not in changes)
        return
    with pytest.raises(ValueError, match="do not hold") as failure:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert said in str(failure.value)


def test_a_weight_of_another_shape_is_an_error(tmp_path: Path) -> None:
    folder = folder_of(model_of(), tmp_path, **{EXPERT: torch.ones(9, 24)})
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_a_classifier_starts_from_a_causal_model(tmp_path: Path) -> None:
    model = model_of()
    folder = folder_of(model, tmp_path / "causal")
    made = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
    x = token_ids()
    x[0, 8:] = 0  # padding
    got = made(x, labels=torch.tensor([0, 2]))
    states = model.model(x).last_hidden_state[[0, 1], [7, 11]]
    torch.testing.assert_close(got.logits, states @ made.score.weight.T)
    wanted = torch.nn.functional.cross_entropy(got.logits, torch.tensor([0, 2]))
    torch.testing.assert_close(got.loss, wanted + got.balance_loss)
    assert made.score.weight.any()
    made.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier", trust_remote_code=True)
    assert_same_model(again, made, x)


@pytest.mark.parametrize(
    "words", [{}, {"rope_scaling": ROPES["llama3"]}, {"calculator_type": "SwitchDropTokenCalculator"}]
)
def test_generation_with_a_cache_is_that_without(words: dict) -> None:
    model, x = model_of(**words), token_ids(length=7)
    told = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(x)
    x[0, :3], mask[0, :3] = 0, 0  # padded on the left
    with_cache = model.generate(x, attention_mask=mask, use_cache=True, **told)
    assert torch.equal(with_cache, model.generate(x, attention_mask=mask, use_cache=False, **told))
    assert torch.equal(with_cache[:1, 3:], model.generate(x[:1, 3:], **told))
    beams = model.generate(x, attention_mask=mask, num_beams=3, **told)
    assert torch.equal(beams, model.generate(x, attention_mask=mask, num_beams=3, use_cache=False, **told))
    fixed = model.generate(x, attention_mask=mask, cache_implementation="static", disable_compile=True, **told)
    assert torch.equal(with_cache, fixed)


def test_a_cache_continues_a_text_in_parts() -> None:
    model, x = model_of(), token_ids()
    whole = model(x).logits
    first = model(x[:, :5], use_cache=True)
    second = model(x[:, 5:], past_key_values=first.past_key_values, logits_to_keep=3)
    torch.testing.assert_close(second.logits, whole[:, -3:], rtol=1e-5, atol=1e-5)


def test_config_json_says_everything(tmp_path: Path) -> None:
    folder = folder_of(model_of(), tmp_path)
    said = json.loads((folder / "config.json").read_text())
    assert said["architectures"] == ["LlamaMoEForCausalLM"]
    assert said["auto_map"]["AutoConfig"] == "configuration_llama_moe.LlamaMoEConfig"
    assert all(f"{value.split('.')[0]}.py" in code_files() for value in said["auto_map"].values())
