# SPDX-License-Identifier: Apache-2.0
"""Composer checkpoints of LLM-Shearing: there and back to the bit, its commands by their names, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mindformers_ext.cli.convert import main as convert
from mindformers_ext.cli.shearing import main
from mindformers_ext.core.pruning import LOGA_LIMITS
from mindformers_ext.surgery.prune.cut import full_masks
from mindformers_ext.surgery.prune.hard_concrete import deterministic
from tests.helpers.prune_cases import CASES, MHA, Case, oracle_masks
from tests.helpers.prune_folders import transformers_logits, write_folder
from tests.helpers.prune_oracle import logits

IDS = np.arange(9) * 5 % 23
SIZES = ("hidden_size=12", "num_attention_heads=4", "num_hidden_layers=3", "intermediate_size=10")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_folder(CASES["soft"], tmp_path / "dense")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_there_and_back_to_the_bit(suffix: str, kind: torch.dtype, dense: Path, tmp_path: Path) -> None:
    weights = {name: value.to(kind) for name, value in load_file(dense / "model.safetensors").items()}
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    state, back = tmp_path / f"state{suffix}", tmp_path / "back"
    assert main(["save_hf_to_composer", str(dense), str(state)]) == 0
    if suffix == ".pt":
        held = torch.load(state, weights_only=True)
        assert torch.equal(held["model.transformer.blocks.2.attn.out_proj.weight"],
                           weights["model.layers.2.self_attn.o_proj.weight"])  # fmt: skip
    assert main(["test_composer_hf_eq", str(dense), str(state)]) == 0
    assert main(["save_composer_to_hf", str(state), str(back), "model_class=LlamaForCausalLM", *SIZES]) == 0
    found = load_file(back / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(found[name].dtype == kind and torch.equal(found[name], value) for name, value in weights.items())
    config = json.loads((back / "config.json").read_text())
    assert config["num_key_value_heads"] == 4 and config["head_dim"] == 4


def test_convert_weight_writes_and_reads_the_format(dense: Path, tmp_path: Path) -> None:
    state, ms, again, back = (tmp_path / name for name in ("state.pt", "x.ckpt", "again.pt", "back"))
    form = ["--model", "llama", "--format", "composer"]
    assert convert([*form, "--input_path", str(dense), "--output_path", str(state)]) == 0
    assert convert(["--input_path", str(dense), "--output_path", str(ms)]) == 0
    assert convert([*form, "--input_path", str(ms), "--output_path", str(again)]) == 0
    first, second = (torch.load(path, weights_only=True) for path in (state, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    words = [*form, "--reversed", "--input_path", str(again), "--output_path", str(back), "--config", str(dense)]
    assert convert(words) == 0
    np.testing.assert_allclose(transformers_logits(back, IDS), transformers_logits(dense, IDS), rtol=0, atol=0)


def test_a_masked_checkpoint_is_pruned_and_becomes_a_model(dense: Path, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert main(["save_hf_to_composer", str(dense), str(tmp_path / "plain.pt")]) == 0
    state, rng = torch.load(tmp_path / "plain.pt", weights_only=True), np.random.default_rng(0)
    keep = {"hidden": 8, "head": 2, "intermediate": 6, "layer": 2}
    logas = {}
    for name, count in keep.items():
        loga = rng.uniform(2.0, 4.0, MHA.mask_shape(name)).astype(np.float32)
        for row in np.atleast_2d(loga):
            row[rng.permutation(len(row))[count:]] = LOGA_LIMITS[0]
        logas[name] = loga
        state[f"model.l0_module.masks.{name}.z_loga"] = torch.from_numpy(loga)
    state["model.transformer.blocks.0.attn.rotary_emb.inv_freq"] = torch.ones(2)
    masked = tmp_path / "latest-rank0.pt"
    torch.save({"state": {"model": state}, "rng": []}, masked)
    assert main(["save_composer_to_hf", str(masked), str(tmp_path / "hf"), *SIZES]) == 2
    assert "prune it first" in capsys.readouterr().err and not (tmp_path / "hf").exists()
    target = ("d_model=8", "n_heads=2", "n_layers=2", "intermediate_size=6")
    assert main(["prune_and_save_model", str(masked), *target, "--force"]) == 0
    pruned = tmp_path / "pruned-latest-rank0.pt"
    assert main(["save_composer_to_hf", str(pruned), str(tmp_path / "hf"), "hidden_size=8", "head_dim=4"]) == 0
    values = {name: deterministic(loga, keep[name]).astype(np.float32) for name, loga in logas.items()}
    case = Case(MHA, keep)
    expected = logits(case.weights(), IDS, case.sizes(), oracle_masks(full_masks(values, MHA, False)))
    np.testing.assert_allclose(transformers_logits(tmp_path / "hf", IDS), expected, rtol=0, atol=2e-5)


def test_what_is_refused_leaves_nothing(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, out = tmp_path / "state.pt", tmp_path / "out"
    assert main(["save_hf_to_composer", str(dense), str(state)]) == 0
    held = torch.load(state, weights_only=True)
    torch.save({**held, "model.transformer.blocks.0.attn.bias": torch.ones(1)}, tmp_path / "strange.pt")
    torch.save({k: v for k, v in held.items() if "blocks.1.ln_2" not in k}, tmp_path / "lacking.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    torch.save({**held, "run": replace(MHA)}, tmp_path / "objects.pt")
    qwen = tmp_path / "qwen"
    qwen.mkdir()
    (qwen / "config.json").write_text("{}")
    cases: list[tuple[list[object], str]] = [
        (["save_composer_to_hf", state, out, "num_attention_heads=4", "hidden_size=16"], "hidden_size=16 was given"),
        (["save_composer_to_hf", state, out], "nothing tells how wide a head is"),
        (["save_composer_to_hf", state, out, "hiden_size=12"], "hiden_size=12 is unknown"),
        (["save_composer_to_hf", state, out, "hidden_size=-1"], "is no number above 0"),
        (["save_composer_to_hf", state, out, "model_class=GPT2LMHeadModel"], "becomes a LlamaForCausalLM"),
        (["save_composer_to_hf", tmp_path / "strange.pt", out, *SIZES], "attn.bias' is no tensor of a Composer"),
        (["save_composer_to_hf", tmp_path / "lacking.pt", out, *SIZES], "post_attention_layernorm"),
        (["save_composer_to_hf", tmp_path / "other.pt", out, *SIZES], "it is no Composer checkpoint"),
        (["save_composer_to_hf", tmp_path / "objects.pt", out, *SIZES], "objects.pt"),
        (["save_composer_to_hf", tmp_path / "absent.pt", out, *SIZES], "is no file"),
        (["save_composer_to_hf", state], "give a Composer checkpoint, an output folder"),
        (["save_hf_to_composer", dense, tmp_path / "x.bin"], "must end in .pt"),
        (["save_hf_to_composer", dense, state], "exists"),
        (["prune_and_save_model", state], "has no masks"),
        (["test_composer_hf_eq", dense, state, "7B"], "MODEL_SIZE says 4096"),
        (["test_composer_hf_eq", dense, state, "8B"], "MODEL_SIZE 8B is unknown"),
    ]
    for words, message in cases:
        assert main([str(word) for word in words]) == 2, words
        assert message in capsys.readouterr().err, words
    assert not out.exists() and not (tmp_path / "x.bin").exists()


@pytest.mark.parametrize("module", ["composer_to_hf", "post_pruning_processing", "test_composer_hf_eq"])
def test_the_seeds_modules_start(module: str, repo_root: Path) -> None:
    command = [sys.executable, "-m", f"llmshearing.utils.{module}", "--help"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "prune_and_save_model" in done.stdout
