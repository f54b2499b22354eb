# SPDX-License-Identifier: Apache-2.0
"""A dense LLaMA split by importance into routed and residual experts: ours beside the dense model, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mindformers_ext.cli.experts import main
from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.formats.ms_file import open_checkpoint
from mindformers_ext.jobs.checkpoint.convert import ConvertRequest, convert
from mindformers_ext.jobs.engine.door import write_plain
from mindformers_ext.pt import names
from mindformers_ext.pt.causal_lm import build_causal_lm
from tests.helpers.tiny_llama import LAYERS, WIDTH, make_llama

pytestmark = pytest.mark.slow  # more than 10 seconds

NAME = "layers.{}.mlp.up_proj.weight"
ROUTED, RESIDUAL, SIZE = 6, 2, WIDTH // 8
# what makes it the dense model: all are chosen and added up, and residual experts of equal scores count in full
EXACT = {"score_scale_factor_residual": float(RESIDUAL), "multiply_gate_scores_residual": True}


def command(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, remote_code: Path) -> Path:
    """The dense model, its split by importance, the mixture in which all experts are chosen, and its checkpoint."""
    folder = tmp_path_factory.mktemp("residual")
    make_llama(folder / "dense")
    scores = np.random.default_rng(2).random((ROUTED, LAYERS, WIDTH)).astype(np.float32)
    for cluster, layer in np.ndindex(ROUTED, LAYERS):
        place = folder / "scores" / str(cluster)
        place.mkdir(parents=True, exist_ok=True)
        write_plain(place / f"{NAME.format(layer)}.change", scores[cluster, layer])
    model = ("--model_path", folder / "dense", "--templates", NAME, "--quiet")
    counts = ("--expert_num_moe", ROUTED, "--expert_num_residual", RESIDUAL, "--expert_size", SIZE)
    command(
        "split", *model, "--save_path", folder, "--method", "gradient", "--score_file_path", folder / "scores", *counts
    )
    (split,) = folder.glob("*Gradient*/*Residuals*")
    gating = ("--num_experts", ROUTED, "--num_selects", ROUTED, "--preset", "moefication", "--split_file_path", split)
    command("convert", *model, "--save_path", folder / "moe", *gating, "--to_mindspore", folder / "moe.ckpt")
    config = json.loads((folder / "moe" / "config.json").read_text("utf-8"))
    (folder / "moe" / "config.json").write_text(json.dumps(config | EXACT), "utf-8")
    return folder


def weights(path: Path) -> dict[str, Any]:
    reader = open_checkpoint(path)
    return {name: reader.read(name) for name in reader.infos}


def test_with_all_experts_our_network_is_the_dense_model(made: Path) -> None:
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 300, (2, 24)))
    spec = model_spec_from_hf(json.loads((made / "moe" / "config.json").read_text("utf-8")))
    assert spec.model_type == "llama_moe_residual" and spec.expert_size == SIZE
    network = build_causal_lm(NetworkSpec(model=spec, seq_length=24)).eval()
    names.load(network, weights(made / "moe.ckpt"))
    dense = LlamaForCausalLM.from_pretrained(made / "dense").eval()
    saved = AutoModelForCausalLM.from_pretrained(made / "moe", trust_remote_code=True).eval()
    with torch.no_grad():
        wanted, found, carried = dense(ids).logits, network(ids), saved(ids).logits
    assert wanted.abs().max() > 0.1
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (found - carried).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_checkpoint_comes_back_bit_for_bit(made: Path, tmp_path: Path) -> None:
    convert(
        ConvertRequest(
            input_path=made / "moe.ckpt", output_path=tmp_path / "back", direction="to_hf", config=made / "moe"
        )
    )
    first, last = (load_file(path / "model.safetensors") for path in (made / "moe", tmp_path / "back"))
    assert set(first) == set(last) and all(torch.equal(first[name], last[name]) for name in first)
    assert "model.layers.2.mlp.residual_block.calculator.experts.weight_down.1" in last
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=True)
    assert type(again.model.layers[0].mlp).__name__ == "LlamaMoEResidualMixture"
