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

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.formats.ms_file import open_checkpoint
from mindformers_ext.jobs.checkpoint.convert import ConvertRequest, convert
from mindformers_ext.jobs.experts.convert import MixtureRequest
from mindformers_ext.jobs.experts.convert import convert as convert_experts
from mindformers_ext.jobs.experts.gating import Gating, preset
from mindformers_ext.jobs.merge.output import OutputRequest
from mindformers_ext.pt import names
from mindformers_ext.pt.causal_lm import build_causal_lm
from mindformers_ext.surgery.experts.gradient import residual_split
from tests.helpers.tiny_llama import LAYERS, WIDTH, make_llama

ROUTED, RESIDUAL, SIZE = 6, 2, WIDTH // 8
# what makes it the dense model: all are chosen and added up, and residual experts of equal scores count in full
EXACT = {"score_scale_factor_residual": float(RESIDUAL), "multiply_gate_scores_residual": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, remote_code: Path) -> Path:
    """The dense model, split by importance, as the mixture in which all experts are chosen, and its checkpoint."""
    folder = tmp_path_factory.mktemp("residual")
    make_llama(folder / "dense")
    scores = np.random.default_rng(2).random((LAYERS, ROUTED, WIDTH))
    convert_experts(
        MixtureRequest(
            model=folder / "dense",
            splits={layer: residual_split(scores[layer], SIZE, RESIDUAL, share=False) for layer in range(LAYERS)},
            gates=None,
            gating=Gating(chosen=ROUTED, **preset("moefication", ROUTED, ROUTED)),
            output=OutputRequest(
                folder=folder / "moe", shard_bytes=10**8, quiet=True, to_mindspore=folder / "moe.ckpt"
            ),
        )
    )
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
