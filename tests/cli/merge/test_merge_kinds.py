# SPDX-License-Identifier: Apache-2.0
"""Qwen3, Gemma 2 and Granite: transformers loads every merge; mixtures of Qwen3, and of split feed-forwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindformers_ext.cli.merge import main
from tests.helpers.merge_models import family, make_model, tensors_of

pytest.importorskip("torch", reason="merging computes with torch")
SAME = "--i-understand-this-is-not-useful-without-training"


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(command, config, out, *flags):
    Path("config.yml").write_text(yaml.safe_dump(config))
    return main([command, "config.yml", out, "--quiet", *map(str, flags)])


def logits(folder):
    """transformers' answer to a few tokens; every key of the folder must be one of the model."""
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    with torch.no_grad():
        return model.eval()(torch.arange(40).reshape(2, 20) * 3 % 80).logits.numpy()


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "granite"])
def test_every_kind_is_merged_and_loads(kind):
    base, one, _ = family(Path(), kind=kind, dtype="float32")
    parts = [{"model": n, "parameters": {"weight": 0.5, "density": 0.5}} for n in ("ft1", "ft2")]
    assert run("yaml", {"models": parts, "merge_method": "ties", "base_model": "base"}, "out") == 0
    assert set(tensors_of(Path("out"))) == set(tensors_of(base)) and np.isfinite(logits("out")).all()
    slices = [{"sources": [{"model": "ft1", "layer_range": [0, 4]}]}]
    assert run("yaml", {"slices": slices, "merge_method": "passthrough"}, "same") == 0
    np.testing.assert_array_equal(logits("same"), logits(one))


def test_layers_of_a_stack_keep_their_kind_of_attention():
    """Gemma 2's layers take turns in their window; a config.json before transformers 4.53 does not list them."""
    make_model(Path("base"), kind="gemma2")
    slices = [{"sources": [{"model": "base", "layer_range": part}]} for part in ([0, 3], [2, 4])]
    assert run("yaml", {"slices": slices, "merge_method": "passthrough"}, "out") == 0
    written = json.loads(Path("out/config.json").read_text())["layer_types"]
    assert written == [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")]


def test_a_constant_of_a_kind_is_named(capsys):
    make_model(Path("base"), kind="granite")
    make_model(Path("other"), kind="granite", logits_scaling=4.0)
    parts = [{"model": n, "parameters": {"weight": 1}} for n in ("base", "other")]
    Path("c.yml").write_text(yaml.safe_dump({"models": parts, "merge_method": "linear"}))
    assert main(["yaml", "c.yml", "out"]) == 0
    assert "logits_scaling differs ('base' 8.0, 'other' 4.0)" in capsys.readouterr().err


def moe(names, **more):
    experts = [{"source_model": name, "positive_prompts": [f"w{10 * n + 3} w7"]} for n, name in enumerate(names)]
    return {"base_model": "base", "gate_mode": "cheap_embed", "dtype": "float32", "experts": experts} | more


def test_qwen3_models_become_a_qwen3_moe():
    """With equal experts it is the base; the converter takes it and gives it back."""
    from mindformers_ext.cli.convert import main as convert

    family(Path(), kind="qwen3", dtype="float32")
    for more in ({}, {"architecture": "Qwen3 MoE"}):
        assert run("moe", moe(["ft1", "ft2"], **more), "out", "--overwrite", "--to-mindspore", "moe.ckpt") == 0
        assert json.loads(Path("out/config.json").read_text())["model_type"] == "qwen3_moe"
    got, donor = tensors_of(Path("out")), tensors_of(Path("ft2"))
    name = "model.layers.3.mlp.experts.1.up_proj.weight"
    assert np.array_equal(got[name], donor["model.layers.3.mlp.up_proj.weight"])
    assert "model.layers.0.self_attn.q_norm.weight" in got and np.isfinite(logits("out")).all()
    assert convert(["--reversed", "--input_path", "moe.ckpt", "--output_path", "back"]) == 0
    assert all(np.array_equal(array, got[key]) for key, array in tensors_of(Path("back")).items())
    assert run("moe", moe(["base", "base"], gate_mode="random"), "same", SAME) == 0
    np.testing.assert_allclose(logits("same"), logits("base"), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_split_experts_begin_as_the_whole_ones(kind):
    """Segments of one model are chosen together, each with its share: the same function, experts a third as wide."""
    family(Path(), kind=kind, dtype="float32")
    models = moe(["ft1", "ft2"], experts_per_token=1) if kind == "llama" else moe(["ft1", "ft2", "base"])
    assert run("moe", models, "whole") == 0
    per_token = {"experts_per_token": 3 * models["experts_per_token"]} if kind == "llama" else {}
    assert run("moe", models | {"segments": 3} | per_token, "split") == 0
    whole, split = (json.loads(Path(name, "config.json").read_text()) for name in ("whole", "split"))
    assert split["num_experts_per_tok"] == 3 * whole["num_experts_per_tok"]
    key = "num_local_experts" if kind == "llama" else "num_experts"
    width = "intermediate_size" if kind == "llama" else "moe_intermediate_size"
    assert split[key] == 3 * whole[key] and split[width] == 16 and whole[width] == 48
    np.testing.assert_allclose(logits("split"), logits("whole"), atol=2e-5)


def test_every_neuron_of_a_split_model_is_in_one_expert():
    family(Path(), dtype="float32")
    config = moe(["ft1", "ft2"], segments=4)
    config["experts"][1]["residual_scale"] = 0.5
    for flags in ((), ("--moe-layout", "fused")):
        assert run("moe", config, "out", "--overwrite", *flags) == 0
        got, donor = tensors_of(Path("out")), tensors_of(Path("ft2"))
        up, down = (donor[f"model.layers.2.mlp.{name}_proj.weight"] for name in ("up", "down"))
        if flags:
            ups = got["model.layers.2.mlp.experts.gate_up_proj"][4:, 12:].reshape(48, 32)
            downs = np.concatenate(list(got["model.layers.2.mlp.experts.down_proj"][4:]), axis=1)
        else:
            name = "model.layers.2.block_sparse_moe.experts.{}.{}.weight"
            ups = np.concatenate([got[name.format(e, "w3")] for e in range(4, 8)])
            downs = np.concatenate([got[name.format(e, "w2")] for e in range(4, 8)], axis=1)
        assert np.array_equal(ups, up) and np.array_equal(downs, down * 2)  # 4 segments, half of each


def test_a_shared_expert_stays_whole():
    family(Path(), dtype="float32")
    shared = [{"source_model": "ft1", "positive_prompts": ["w60"]}]
    assert run("moe", moe(["ft1", "ft2"], segments=2, shared_experts=shared), "out") == 0
    config, got = json.loads(Path("out/config.json").read_text()), tensors_of(Path("out"))
    assert (config["moe_intermediate_size"], config["shared_expert_intermediate_size"]) == (24, 48)
    assert got["model.layers.0.mlp.gate.weight"].shape[0] == 4 and np.isfinite(logits("out")).all()
    assert got["model.layers.0.mlp.shared_expert_gate.weight"].shape[0] == 1


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (moe(["base", "ft1"], segments=5), "intermediate_size 48 of 'base' is no multiple of segments 5"),
        (moe(["base", "ft1"], segments=0), "segments=0"),
        (moe(["base", "ft1"], segments="2"), "segments='2'"),
        (moe(["base", "ft1"], segments=2, experts_per_token=5), "experts_per_token is 5 with 4 experts"),
        (moe(["base", "qwen"]), "'qwen' is a Qwen3ForCausalLM"),
        (moe(["qwen", "qwen"], base_model="qwen", architecture="mixtral"), "which only a Qwen3-MoE has"),
        (moe(["gemma", "gemma"], base_model="gemma"), "its layers have four norms"),
        (moe(["wrong", "base"], base_model="wrong"), "not [47, 32] as by the config.json"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(config, found, capsys):
    family(Path(), count=1, layers=2)
    for name, kind in (("qwen", "qwen3"), ("gemma", "gemma2")):
        make_model(Path(name), kind=kind, layers=2)
    wrong = make_model(Path("wrong"), layers=2) / "config.json"
    wrong.write_text(json.dumps(json.loads(wrong.read_text()) | {"intermediate_size": 47}))
    assert run("moe", config, "out", SAME) == 2
    said = capsys.readouterr().err
    assert found in said and "Traceback" not in said and not Path("out").exists(), said


def test_segments_that_are_chosen_in_part_are_noted(capsys):
    family(Path(), dtype="float32", layers=2)
    Path("c.yml").write_text(yaml.safe_dump(moe(["ft1", "ft2"], segments=2, experts_per_token=3)))
    assert main(["moe", "c.yml", "out"]) == 0
    assert "experts_per_token 3 is no multiple of segments 2" in capsys.readouterr().err
