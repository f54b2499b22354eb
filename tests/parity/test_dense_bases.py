# SPDX-License-Identifier: Apache-2.0
"""Llama 3, Mistral, Qwen2 and Qwen3 with rope scalings, windows and biases: MindSpore's network equals transformers'.

tests/pt/test_dense_bases.py has each of them alone; here several are in one network, which compiles long.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.causal_lm import build_causal_lm
from mindformers_ext.ms.engine import MindSporeNetwork
from mindformers_ext.weights.convert import to_mindspore
from tests.helpers.dense_bases import BASES, PROMPTS, Base, answers, reference, transformers_model
from tests.helpers.parity import Outcome, compare, run_ours

MODES = {name: "GRAPH" for name in BASES} | {"llama3, biases": "PYNATIVE"}


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_equals_transformers(name: str) -> None:
    case, expected = Base(name), Outcome(*reference(name))
    weights = to_mindspore(transformers_model(name).state_dict(), case.model())
    found = compare(run_ours(case, weights, MODES[name]), expected)
    print(f"\n{name:<40} logits {found.logits:.1e}  loss {found.loss:.1e}  gradient {found.gradient:.1e}", end="")
    assert 1.0 <= found.largest_logit <= 20.0
    assert found.logits <= 1e-4 and found.loss <= 1e-5 and found.gradient <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynamic, window", "yarn, qwen2, a window above"])
def test_generates_the_tokens_of_transformers(name: str) -> None:
    """Two prompts at once from caches of which some roll; windows and positions are passed."""
    ms.set_context(mode=ms.GRAPH_MODE)
    new, lengths = 20, np.array(PROMPTS)
    model = Base(name).model()
    network = MindSporeNetwork(build_causal_lm(NetworkSpec(model=model, seq_length=2)))
    network.load(to_mindspore(transformers_model(name).state_dict(), model))
    session = network.session(2, max(PROMPTS), max(PROMPTS) + new)
    chosen = [session.prompt(Base(name).ids()[:, : max(PROMPTS)], lengths).argmax(-1)]
    for step in range(new - 1):
        chosen.append(session.token(chosen[-1], lengths + step).argmax(-1))
    assert [[int(tokens[row]) for tokens in chosen] for row in range(2)] == answers(name, new)
