# SPDX-License-Identifier: Apache-2.0
"""A hundred greedy tokens of a LLaMA-MoE v2 are the same in both engines and in the code that is saved with it."""

from __future__ import annotations

import functools
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import torch

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.checkpoint.model_code.configuration_llama_moe_v2 import LlamaMoEV2Config
from mindformers_ext.jobs.checkpoint.model_code.modeling_llama_moe_v2 import LlamaMoEV2ForCausalLM
from mindformers_ext.ms.causal_lm import build_causal_lm as build_mindspore
from mindformers_ext.ms.engine import MindSporeNetwork
from mindformers_ext.pt import names
from mindformers_ext.pt.causal_lm import build_causal_lm as build_torch
from mindformers_ext.pt.generate import PyTorchSession
from mindformers_ext.weights.convert import to_mindspore
from tests.helpers.llama_moe_v2_models import random_tensors, token_ids, v2_words

CASES = ["residual", "attention, residual"]
TOKENS, LENGTHS = 100, np.array([9, 4, 7])
IDS = token_ids(3, 9)


@functools.cache
def judged(case: str) -> tuple[NetworkSpec, dict[str, np.ndarray], list[list[int]]]:
    """Our spec and weights, and what the saved code answers to prompts padded on the left, and to one alone."""
    torch.set_num_threads(1)
    words = v2_words(case, hidden_size=64, num_hidden_layers=3)
    drawn = random_tensors(words, std=0.3)
    told: dict[str, Any] = {key: value for key, value in words.items() if key not in ("architectures", "model_type")}
    model = LlamaMoEV2ForCausalLM(LlamaMoEV2Config(**told, pad_token_id=0)).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in drawn.items()})
    ids, mask = np.zeros_like(IDS), np.zeros_like(IDS)
    for row, length in enumerate(LENGTHS):
        ids[row, 9 - length :], mask[row, 9 - length :] = IDS[row, :length], 1
    asked = {"do_sample": False, "max_new_tokens": TOKENS, "eos_token_id": None}
    given = torch.from_numpy(ids)
    found = model.generate(given, attention_mask=torch.from_numpy(mask), **asked)[:, 9:].tolist()
    alone = model.generate(given[1:2, 5:], attention_mask=torch.ones(1, 4, dtype=torch.int64), **asked)
    assert alone[0, 4:].tolist() == found[1]
    spec = NetworkSpec(model=model_spec_from_hf(words), seq_length=9)
    return spec, to_mindspore(drawn, spec.model), found


def answers(session: Any) -> list[list[int]]:
    """By rows, greedily."""
    session.compile()
    chosen = [session.prompt(IDS, LENGTHS).argmax(-1)]
    for step in range(TOKENS - 1):
        chosen.append(session.token(chosen[-1], LENGTHS + step).argmax(-1))
    return np.stack(chosen, 1).tolist()


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.turn("llama_moe_v2 answers")) for case in CASES])
def test_on_pytorch(case: str) -> None:
    spec, weights, wanted = judged(case)
    network = build_torch(spec)
    names.load(network, weights)
    found = answers(PyTorchSession(network.eval(), 3, 9, 9 + TOKENS, torch.device("cpu")))
    assert found == wanted and len({*found[0]}) > 3


@pytest.mark.long("tests/parity/test_llama_moe_v2.py takes the same steps, fewer of them and not compiled")
@pytest.mark.parametrize("case", CASES)
def test_on_mindspore(case: str) -> None:
    """Compiled."""
    spec, weights, wanted = judged(case)
    ms.set_context(mode=ms.GRAPH_MODE)
    network = MindSporeNetwork(build_mindspore(spec))
    network.load(weights)
    assert answers(network.session(3, 9, 9 + TOKENS)) == wanted
