# SPDX-License-Identifier: Apache-2.0
"""A carved mixture answers alike in transformers, from its stock file, and in both engines, from one converted."""

from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from mindformers_ext.cli import experts
from mindformers_ext.core.config.hf import hf_config_from_spec, model_spec_from_hf
from mindformers_ext.core.config.view import network_spec_from_yaml, yaml_from_network_spec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.formats.ms_file import open_checkpoint
from mindformers_ext.jobs.checkpoint.source import read_config
from mindformers_ext.jobs.experts.carve.losses import CARVED
from mindformers_ext.jobs.experts.texts import Texts, ready
from mindformers_ext.ms.causal_lm import build_causal_lm as build_mindspore
from mindformers_ext.ms.engine import MindSporeNetwork
from mindformers_ext.pt import names
from mindformers_ext.pt.causal_lm import build_causal_lm as build_torch
from mindformers_ext.pt.generate import PyTorchSession
from mindformers_ext.weights.convert import to_hf
from tests.helpers.tiny_llama import make_llama, sentences

NEW, BLOCK = 50, 32
PROMPT = np.array([[5, 80, 17, 300, 42, 9]], np.int32)
LENGTH = PROMPT.shape[1]


def answers(session: object, *lengths: int, new: int = NEW) -> list[list[int]]:
    """Greedy tokens behind so many of the prompt, a row for each length."""
    session.compile()  # type: ignore[attr-defined]
    places = np.array(lengths)
    chosen = [session.prompt(np.repeat(PROMPT, len(places), 0), places).argmax(-1)]  # type: ignore[attr-defined]
    for step in range(new - 1):
        chosen.append(session.token(chosen[-1], places + step).argmax(-1))  # type: ignore[attr-defined]
    return np.stack(chosen, 1).tolist()


def wanted_answers(folder: Path, *lengths: int, new: int = NEW, **more: bool) -> list[list[int]]:
    """The same of transformers, where short ones are padded on the left."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
    ids, mask = torch.zeros(len(lengths), LENGTH, dtype=torch.int64), torch.zeros(len(lengths), LENGTH)
    for row, length in enumerate(lengths):
        ids[row, LENGTH - length :], mask[row, LENGTH - length :] = torch.from_numpy(PROMPT[0, :length]), 1
    asked = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask.long(), **asked)[:, LENGTH:].tolist()


def carve(place: Path, *words: str) -> tuple[Path, NetworkSpec, dict[str, np.ndarray]]:
    """A tiny LLaMA carved and converted: its folder, its network, MindSpore's tensors."""
    torch.set_num_threads(1)
    make_llama(place / "model")
    (place / "text.txt").write_text(". ".join(sentences(120, 0)), encoding="utf-8")
    out, ckpt = place / "out", place / "out.ckpt"
    argv = ["carve", place / "model", out, "--experts", 8, "--active", 2, "--ladder", "none", "--calibration"]
    argv += [place / "text.txt", "--tokens", 600, "--held_out_tokens", 300, "--block_size", BLOCK, "--quiet"]
    assert experts.main([*map(str, argv), "--to_mindspore", str(ckpt), *words]) == 0
    spec = NetworkSpec(model=model_spec_from_hf(read_config(out)), seq_length=BLOCK)
    reader = open_checkpoint(ckpt)
    weights = {name: reader.read(name) for name in reader.infos}
    reader.close()
    return out, spec, weights


FORMS = {
    "qwen2_moe": ("--format", "qwen2_moe", "--shared", "2"),
    "mixtral": ("--format", "mixtral", "--shared", "0"),
    "ours": ("--format", "ours", "--shared", "2", "--router", "threshold"),
}


@pytest.mark.usefixtures("remote_code")
@pytest.mark.turn("llama_moe_v2 answers")
@pytest.mark.parametrize("form", FORMS)
def test_fifty_greedy_tokens_are_the_same(form: str, tmp_path: Path) -> None:
    out, spec, weights = carve(tmp_path, *FORMS[form])
    wanted = wanted_answers(out, LENGTH, trust_remote_code=form == "ours")
    network = build_torch(spec)
    names.load(network, weights)
    most = LENGTH + NEW
    assert answers(PyTorchSession(network.eval(), 1, LENGTH, most, torch.device("cpu")), LENGTH) == wanted
    ms.set_context(mode=ms.GRAPH_MODE)
    twin = MindSporeNetwork(build_mindspore(spec))
    twin.load(weights)
    assert answers(twin.session(1, LENGTH, most), LENGTH) == wanted
    assert len({*wanted[0]}) > 3


@pytest.mark.usefixtures("remote_code")
def test_a_threshold_loses_in_both_engines_what_was_measured_and_comes_back_as_it_was(tmp_path: Path) -> None:
    """And two prompts, the shorter one padded on the left in transformers, go on alike."""
    out, spec, weights = carve(tmp_path, *FORMS["ours"])
    told = json.loads((out / "ladder.json").read_text(encoding="utf-8"))
    texts = Texts(
        calibration=(tmp_path / "text.txt",), tokens=600, held_out_tokens=300, block_size=BLOCK, seed=0, quiet=True
    )
    with ready(tmp_path / "model", texts) as start:
        rows = [row[:length] for row, length in zip(start.judged.rows.ids, start.judged.rows.lengths, strict=True)]
    network = build_torch(spec)
    names.load(network, weights)
    network.eval()
    ms.set_context(mode=ms.PYNATIVE_MODE)
    other = build_mindspore(spec)
    twin = MindSporeNetwork(other)
    twin.load(weights)
    ids = np.stack([np.pad(row, (0, BLOCK - len(row))) for row in rows]).astype(np.int32)
    with torch.no_grad():
        found = network(torch.from_numpy(ids).long()), torch.from_numpy(other(ms.Tensor(ids)).asnumpy())
    for number, (row, measured) in enumerate(zip(rows, told["ways"][CARVED]["rows"], strict=True)):
        for logits in found:
            own = logits[number, : len(row) - 1]
            loss = F.cross_entropy(own, torch.from_numpy(row[1:].astype(np.int64)), reduction="sum")
            assert float(loss) == pytest.approx(measured, abs=1e-5 * len(row))
    wanted = wanted_answers(out, LENGTH, 4, new=12, trust_remote_code=True)
    for session in (PyTorchSession(network, 2, LENGTH, 18, torch.device("cpu")), twin.session(2, LENGTH, 18)):
        assert answers(session, LENGTH, 4, new=12) == wanted
    held = load_file(out / "model.safetensors")
    back = to_hf(weights, spec.model)
    assert back.keys() == held.keys() and all(np.array_equal(back[name], held[name]) for name in held)
    assert model_spec_from_hf(hf_config_from_spec(spec.model)) == spec.model
    assert network_spec_from_yaml(yaml_from_network_spec(spec)).model == spec.model
