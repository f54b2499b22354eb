# SPDX-License-Identifier: Apache-2.0
"""Llama 3, Mistral, Qwen2, Qwen3 and every rope scaling: PyTorch's network equals transformers', trained and cached."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt import names
from mindformers_ext.pt.causal_lm import CausalLM, build_causal_lm
from mindformers_ext.pt.generate import PyTorchSession
from mindformers_ext.pt.hf_reference import HuggingFaceReference
from mindformers_ext.weights.convert import to_mindspore
from tests.helpers.dense_bases import CASES, LENGTH, PROMPTS, Base, answers, reference, transformers_model


def ours(name: str) -> CausalLM:
    model = Base(name).model()
    network = build_causal_lm(NetworkSpec(model=model, seq_length=LENGTH))
    names.load(network, to_mindspore(transformers_model(name).state_dict(), model))
    return network.eval()


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str) -> None:
    logits, loss, wanted = reference(name)
    network, ids = ours(name), torch.from_numpy(Base(name).ids().astype(np.int64))
    terms = network(ids, losses=True)
    terms.lm_loss.backward()
    found = {}
    for parameter_name, parameter in network.named_parameters():
        found |= {part: view.numpy() for part, view in names.split_experts(parameter_name, parameter.grad).items()}
    assert found.keys() == wanted.keys()
    largest = max(float(np.abs(g).max()) for g in wanted.values())
    worst = max(
        float(np.abs(found[n] - g).max()) / max(float(np.abs(g).max()), 1e-6 * largest) for n, g in wanted.items()
    )
    with torch.no_grad():
        difference = np.abs(network(ids[:, :-1]).numpy() - logits).max()
    print(f"\n{name:<40} logits {difference:.1e}  gradient {worst:.1e}", end="")
    assert 1.0 <= np.abs(logits).max() <= 20.0
    assert difference <= 1e-4 and abs(terms.lm_loss.item() - loss) <= 1e-5 and worst <= 1e-3


@pytest.mark.parametrize("name", CASES)
def test_generates_the_tokens_of_transformers(name: str) -> None:
    """Two prompts at once, from a cache that rolls; one beyond all windows, both beyond the positions before long."""
    new = 20
    expected = answers(name, new)
    session = PyTorchSession(ours(name), 2, max(PROMPTS), max(PROMPTS) + new, torch.device("cpu"))
    session.compile()
    lengths = np.array(PROMPTS)
    chosen = [session.prompt(Base(name).ids()[:, : max(PROMPTS)], lengths).argmax(-1)]
    for step in range(new - 1):
        chosen.append(session.token(chosen[-1], lengths + step).argmax(-1))
    assert [[int(tokens[row]) for tokens in chosen] for row in range(2)] == expected
    windows = [layer.attention.window for layer in session.network.model.layers]
    assert [keys.shape[2] for keys in session.keys] == [window or max(PROMPTS) + new for window in windows]


def test_the_judge_reads_rotary_settings_in_either_spelling(tmp_path: Path) -> None:
    """transformers 5 writes ``rope_parameters`` alone, of which transformers 4 knows nothing."""
    model = transformers_model("yarn")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    scaling = {"rope_theta": config.pop("rope_theta"), **config.pop("rope_scaling")}
    path.write_text(json.dumps(config | {"rope_parameters": scaling}), encoding="utf-8")
    ids = Base("yarn").ids()
    with torch.no_grad():
        expected = model(torch.from_numpy(ids.astype(np.int64)), use_cache=False).logits.numpy()
    np.testing.assert_array_equal(HuggingFaceReference(tmp_path).logits(ids), expected)
