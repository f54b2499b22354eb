# SPDX-License-Identifier: Apache-2.0
"""Sampling: draws have the exact distribution, words do what transformers' do, wrong words are named."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mindformers_ext.core.config.sampling import SamplingSpec, sampling_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.predict.sampling import adjusted, choose, generator_of, probabilities

DRAWS = 20_000
LOGITS = np.array([1.0, 3.0, 2.5, -1.0, 2.9, 0.0, 2.5, -4.0], np.float32)
OPEN = SamplingSpec(do_sample=True, top_k=0)


def exact(logits: np.ndarray, temperature: float = 1.0, kept: int | None = None) -> np.ndarray:
    """Softmax over the ``kept`` best, written another way than the code under test."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: kept or len(logits)]
    total = math.fsum(math.exp(logits[i] / temperature) for i in order)
    return np.array([math.exp(logits[i] / temperature) / total if i in order else 0.0 for i in range(len(logits))])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, exact(LOGITS)),
        ({"temperature": 0.5}, exact(LOGITS, 0.5)),
        ({"temperature": 2.0, "top_k": 2}, exact(LOGITS, 2.0, 2)),
        ({"top_k": 3}, exact(LOGITS, 1.0, 4)),  # the third and fourth are equal
        ({"top_p": 0.5}, exact(LOGITS, 1.0, 2)),  # .34 + .31 reaches .5
        ({"top_p": 0.01}, exact(LOGITS, 1.0, 1)),
        ({"top_k": 4, "top_p": 0.75}, exact(LOGITS, 1.0, 3)),
        ({"repetition_penalty": 2.0}, exact(np.array([1.0, 1.5, 2.5, -2.0, 2.9, 0.0, 2.5, -4.0]))),
    ],
    ids=str,
)
def test_draws_have_the_exact_distribution(words, expected):
    """Chi-square over 20 000 draws; 0.1 percent of right samplers would fail, but the seed is fixed."""
    spec = replace(OPEN, seed=3, **words)
    generator = generator_of(spec, 0)
    counts = np.bincount([choose(LOGITS, [1, 3], 2, spec, generator) for _ in range(DRAWS)], minlength=len(LOGITS))
    assert not counts[expected == 0].any()
    alive = expected > 0
    statistic = float(((counts - DRAWS * expected)[alive] ** 2 / (DRAWS * expected[alive])).sum())
    freedom = int(alive.sum()) - 1
    # Wilson and Hilferty 1931: (X / n)^(1/3) is nearly normal; 3.09 standard deviations are 0.1 percent
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-9
    assert statistic < limit


def test_probabilities_follow_transformers():
    """The same warpers, on random logits, written after their documentation with sorting from below."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        logits = generator.normal(0, 3, 40).astype(np.float32)
        spec = replace(OPEN, temperature=0.7, top_k=12, top_p=float(generator.uniform(0.05, 0.99)))
        scaled = logits.astype(np.float64) / 0.7
        scaled[scaled < np.sort(scaled)[-12]] = -np.inf
        order = np.argsort(scaled)
        odds = np.exp(scaled - scaled.max())
        odds /= odds.sum()
        mass = np.cumsum(odds[order])
        gone = order[:-1][mass[:-1] <= 1 - spec.top_p]
        odds[gone] = 0
        np.testing.assert_allclose(probabilities(logits, spec), odds / odds.sum(), atol=1e-12)


def test_a_prompt_draws_the_same_alone_and_beside_others():
    spec = replace(OPEN, seed=11)
    first = [choose(LOGITS, [], 0, spec, generator_of(spec, 2)) for _ in range(3)]
    assert first == [first[0]] * 3
    sources = [generator_of(spec, prompt) for prompt in range(4)]
    streams = {tuple(choose(LOGITS, [], 0, spec, source) for _ in range(20)) for source in sources}
    assert len(streams) == 4


def test_ends_are_banned_until_the_answer_is_long_enough():
    spec = SamplingSpec(do_sample=False, eos_token_ids=(1,), min_new_tokens=2)
    generator = generator_of(spec, 0)
    assert choose(LOGITS, [0, 0, 0], 2, spec, generator) == 4
    assert choose(LOGITS, [0, 0, 0, 0], 2, spec, generator) == 1
    assert adjusted(LOGITS, [0], 1, SamplingSpec()) is LOGITS
    assert spec.longest(3) == 1024 and replace(spec, max_new_tokens=5).longest(3) == 8
    assert replace(spec, min_length=9).shortest(3) == 9


def test_words_of_a_yaml():
    words = {"max_decode_length": 64, "top_k": 3, "do_sample": False, "temperature": 2, "num_beams": 1, "type": "x"}
    spec = sampling_from_yaml(words, [2, -1, 7], 5)
    assert spec == SamplingSpec(do_sample=False, top_k=3, temperature=2.0, max_length=64, eos_token_ids=(2, 7), seed=5)
    assert sampling_from_yaml({"max_length": 32, "max_decode_length": 64, "top_p": None}, [], 0).max_length == 32
    assert sampling_from_yaml({}, [], 0) == SamplingSpec()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"temperature": 0}, "temperature=0.0: give a number above 0"),
        ({"top_k": -1}, "top_k=-1: give 1 or more"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": 0}, "top_p=0.0"),
        ({"repetition_penalty": 0}, "repetition_penalty=0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_length": True}, "max_length=True is no int"),
        ({"do_sample": "yes"}, "do_sample='yes' is no bool"),
        ({"num_beams": 4}, "num_beams=4 is not built"),
        ({"min_length": -1}, "min_length=-1"),
    ],
    ids=str,
)
def test_wrong_words_are_named(words, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        sampling_from_yaml(words, [2], 0)
