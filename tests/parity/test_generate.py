# SPDX-License-Identifier: Apache-2.0
"""Greedy answers equal transformers' generate token for token: alone, in batches of mixed lengths, cached or not."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import mindspore as ms
import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet

from mindformers_ext.core import capacity
from mindformers_ext.core.config.sampling import SamplingSpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.predict.generate import Generation
from mindformers_ext.ms.causal_lm import build_causal_lm
from mindformers_ext.ms.engine import MindSporeNetwork
from mindformers_ext.weights.convert import to_mindspore
from tests.helpers.parity import Case, reference_model

CASES = {
    "mixtral": Case(
        "mixtral",
        heads=4,
        kv_heads=2,
        hidden=32,
        head_dim=8,
        ffn=53,
        vocab=101,
        seq_length=2,
        tied=False,
        experts=8,
        chosen=2,
    ),
    "llama": Case(
        "llama", heads=6, kv_heads=3, hidden=36, head_dim=6, ffn=53, vocab=64, seq_length=2, tied=True, std=0.25
    ),
}
# Their layers differ from the two above and among themselves; what is long to generate is asked of those alone.
MIXED = {
    "qwen2_moe": Case(
        "qwen2_moe",
        heads=4,
        kv_heads=2,
        hidden=32,
        head_dim=8,
        ffn=53,
        vocab=101,
        seq_length=2,
        tied=False,
        experts=12,
        chosen=3,
        expert=20,
        shared=28,
        dense_layers=(0,),
        std=0.25,
        family="qwen2_moe",
    ),
    "qwen3_moe": Case(
        "qwen3_moe",
        heads=6,
        kv_heads=3,
        hidden=36,
        head_dim=10,
        ffn=40,
        vocab=64,
        seq_length=2,
        tied=True,
        experts=6,
        chosen=2,
        expert=24,
        dense_layers=(1,),
        normalised=False,
        std=0.25,
        family="qwen3_moe",
    ),
}
PROMPTS, NEW, FEW = 20, 200, 50
LENGTHS = (5, 1, 17, 9, 33, 2, 12, 26, 3, 40)


@dataclass(frozen=True)
class Twins:
    """Our network and transformers', the prompts, and what transformers answers to each alone."""

    case: Case
    network: MindSporeNetwork
    model: torch.nn.Module
    prompts: tuple[tuple[int, ...], ...]


@functools.cache
def twins(kind: str) -> Twins:
    case = (CASES | MIXED)[kind]
    model = reference_model(case)
    network = MindSporeNetwork(build_causal_lm(NetworkSpec(model=case.model(), seq_length=2)))
    network.load(to_mindspore(model.state_dict(), case.model()))
    generator = np.random.default_rng(1)
    prompts = tuple(
        tuple(int(t) for t in generator.integers(3, case.vocab, LENGTHS[i % len(LENGTHS)])) for i in range(PROMPTS)
    )
    return Twins(case, network, model, prompts)


def generated(twin: Twins, prompt: tuple[int, ...], new: int) -> tuple[int, ...]:
    """What transformers' generate answers to a prompt alone: no padding on their side."""
    with torch.no_grad():
        out = twin.model.generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return tuple(out[0, len(prompt) :].tolist())


def is_greedy(twin: Twins, prompt: tuple[int, ...], answer: tuple[int, ...]) -> bool:
    """Whether transformers prefers each token of ``answer`` behind those before it: generate's answer, by induction,
    at the cost of one step."""
    with torch.no_grad():
        best = twin.model(torch.tensor([prompt + answer]), use_cache=False).logits[0].argmax(-1).tolist()
    return tuple(best[len(prompt) - 1 : -1]) == answer


@functools.cache
def ours(kind: str, mode: int, batch: int, new: int, prompts: int = PROMPTS, use_cache: bool = True) -> tuple:
    ms.set_context(mode=mode)
    twin = twins(kind)
    sampling = SamplingSpec(do_sample=False, max_new_tokens=new)
    job = Generation(twin.network, sampling, 256, batch, use_cache)
    answers = list(job.answers(twin.prompts[:prompts]))
    assert [a.prompt for a in answers] == list(range(prompts)) and {a.finish for a in answers} == {"length"}
    assert job.timing.new_tokens == prompts * new
    return tuple(answer.tokens for answer in answers)


@pytest.mark.slow
@pytest.mark.turn("greedy")
@pytest.mark.parametrize("kind", CASES)
def test_greedy_equals_transformers(kind: str) -> None:
    twin, answers = twins(kind), ours(kind, ms.GRAPH_MODE, 8, NEW)
    assert len(set(answers)) == PROMPTS  # no two alike: the network listens to its prompt
    assert all(is_greedy(twin, prompt, answer) for prompt, answer in zip(twin.prompts, answers, strict=True))
    for prompt, answer in list(zip(twin.prompts, answers, strict=True))[:2]:
        assert generated(twin, prompt, NEW) == answer


@pytest.mark.slow
@pytest.mark.turn("batch and cache")
@pytest.mark.parametrize(("batch", "prompts", "cached"), [(1, 6, True), (3, 20, True), (1, 2, False), (3, 3, False)])
@pytest.mark.parametrize("kind", CASES)
def test_neither_batch_nor_cache_changes_a_token(
    kind: str, batch: int, prompts: int, cached: bool, commit: str | None
) -> None:
    """Fewer tokens than above, but for --all: a greedy answer begins as the longer one does."""
    new = FEW if commit else NEW
    found = ours(kind, ms.GRAPH_MODE, batch, new, prompts, cached)
    assert found == tuple(answer[:new] for answer in ours(kind, ms.GRAPH_MODE, 8, NEW)[:prompts])


def in_both_modes(kinds: Iterable[str]) -> list[ParameterSet]:
    """Each kind as a graph and operator by operator: of each mode one takes its turn."""
    graph, turn = pytest.mark.turn("short answers"), pytest.mark.turn("short answers")
    return [
        *(pytest.param(kind, ms.GRAPH_MODE, id=f"{kind}-GRAPH", marks=graph) for kind in kinds),
        *(pytest.param(kind, ms.PYNATIVE_MODE, id=f"{kind}-PYNATIVE", marks=turn) for kind in kinds),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "current"), in_both_modes(CASES | MIXED))
def test_a_short_answer_in_both_modes(kind: str, current: int) -> None:
    twin = twins(kind)
    answers = ours(kind, current, 3, 12, 4)
    assert all(is_greedy(twin, *pair) for pair in zip(twin.prompts, answers, strict=False))
    assert generated(twin, twin.prompts[0], 12) == answers[0]
    assert ours(kind, current, 4, 4, 4, use_cache=False) == tuple(answer[:4] for answer in answers)


@pytest.mark.slow
@pytest.mark.turn("cached logits")
@pytest.mark.parametrize("kind", CASES | MIXED)
def test_logits_with_cache_equal_logits_without(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of random tokens one after the other, rows of different lengths side by side, prompts read two and two."""
    ms.set_context(mode=ms.GRAPH_MODE)
    monkeypatch.setattr(capacity, "PROMPT_TOKENS", 100)
    twin, rows, steps = twins(kind), 5, 40
    generator = np.random.default_rng(2)
    texts = [p + tuple(generator.integers(3, twin.case.vocab, steps).tolist()) for p in twin.prompts[:rows]]
    lengths = np.array([len(p) for p in twin.prompts[:rows]])
    full = []
    for text in texts:
        with torch.no_grad():
            full.append(twin.model(torch.tensor([text])).logits[0].numpy())
    session = twin.network.session(rows, 40, 80)
    assert capacity.rows_at_once(rows, 40) == 2  # and so three groups, of which the last reads a row again
    ids = np.zeros((rows, 40), np.int32)
    for row, prompt in enumerate(twin.prompts[:rows]):
        ids[row, : len(prompt)] = prompt
    worst = 0.0
    logits = session.prompt(ids, lengths)
    for step in range(steps):
        found = np.stack([full[row][lengths[row] + step - 1] for row in range(rows)])
        worst = max(worst, float(np.abs(logits - found).max()))
        at = lengths + step
        logits = session.token(np.array([texts[row][at[row]] for row in range(rows)]), at)
    print(f"\n{kind}: logits with cache differ by {worst:.1e} at most", end="")
    assert worst <= 1e-4 and max(float(np.abs(f).max()) for f in full) > 1.0


@pytest.mark.slow
def test_tokens_end_at_the_models_length_and_at_eos() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    twin = twins("mixtral")
    expected = generated(twin, twin.prompts[0], 24)
    end = expected[7]
    sampling = SamplingSpec(do_sample=False, max_new_tokens=30, eos_token_ids=(end,))
    answer = next(Generation(twin.network, sampling, 64, 1).answers(twin.prompts[:1]))
    assert answer.finish == "eos" and answer.tokens == expected[: expected.index(end) + 1]
    plain = SamplingSpec(do_sample=False, max_new_tokens=300)
    answer = next(Generation(twin.network, plain, 24, 1).answers(twin.prompts[:1]))
    assert answer.finish == "length" and answer.tokens == expected[: 24 - len(twin.prompts[0])]
