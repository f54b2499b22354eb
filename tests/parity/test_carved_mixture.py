# SPDX-License-Identifier: Apache-2.0
"""A carved mixture answers alike in transformers, from its stock file, and in both engines, from one converted."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mindformers_ext.cli import experts
from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.formats.ms_file import open_checkpoint
from mindformers_ext.jobs.checkpoint.source import read_config
from mindformers_ext.ms.causal_lm import build_causal_lm as build_mindspore
from mindformers_ext.ms.engine import MindSporeNetwork
from mindformers_ext.pt import names
from mindformers_ext.pt.causal_lm import build_causal_lm as build_torch
from mindformers_ext.pt.generate import PyTorchSession
from tests.helpers.tiny_llama import make_llama, sentences

NEW = 50
PROMPT = np.array([[5, 80, 17, 300, 42, 9]], np.int32)


def answer(session: object) -> list[int]:
    """Greedy tokens."""
    session.compile()  # type: ignore[attr-defined]
    lengths = np.array([PROMPT.shape[1]])
    chosen = [session.prompt(PROMPT, lengths).argmax(-1)]  # type: ignore[attr-defined]
    for step in range(NEW - 1):
        chosen.append(session.token(chosen[-1], lengths + step).argmax(-1))  # type: ignore[attr-defined]
    return [int(token[0]) for token in chosen]


@pytest.mark.turn("llama_moe_v2 answers")
@pytest.mark.parametrize("form", ["qwen2_moe", "mixtral"])
def test_fifty_greedy_tokens_are_the_same(form: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    make_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text(". ".join(sentences(120, 0)), encoding="utf-8")
    out, ckpt = tmp_path / "out", tmp_path / "out.ckpt"
    shared = "0" if form == "mixtral" else "2"
    argv = ["carve", tmp_path / "model", out, "--experts", 8, "--shared", shared, "--active", 2, "--ladder", "none"]
    argv += ["--calibration", tmp_path / "text.txt", "--tokens", 600, "--held_out_tokens", 300, "--block_size", 32]
    assert experts.main([*map(str, argv), "--format", form, "--to_mindspore", str(ckpt), "--quiet"]) == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    asked = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        wanted = model.generate(torch.from_numpy(PROMPT.astype(np.int64)), **asked)[0, PROMPT.shape[1] :].tolist()
    spec = NetworkSpec(model=model_spec_from_hf(read_config(out)), seq_length=PROMPT.shape[1])
    reader = open_checkpoint(ckpt)
    weights = {name: reader.read(name) for name in reader.infos}
    reader.close()
    network = build_torch(spec)
    names.load(network, weights)
    most = PROMPT.shape[1] + NEW
    assert answer(PyTorchSession(network.eval(), 1, PROMPT.shape[1], most, torch.device("cpu"))) == wanted
    ms.set_context(mode=ms.GRAPH_MODE)
    twin = MindSporeNetwork(build_mindspore(spec))
    twin.load(weights)
    assert answer(twin.session(1, PROMPT.shape[1], most)) == wanted
    assert len({*wanted}) > 3
