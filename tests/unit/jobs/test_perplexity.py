# SPDX-License-Identifier: Apache-2.0
"""Windows of a text, and perplexity from logits, against values written down otherwise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.predict.evaluate import Window, score, text_windows

VOCAB = 7


@pytest.mark.parametrize(
    ("tokens", "window", "stride"), [(20, 8, 8), (20, 8, 3), (9, 8, 1), (17, 8, 8), (2, 8, 4), (18, 8, 8)]
)
def test_each_token_counts_once_with_as_much_context_as_fits(tokens: int, window: int, stride: int) -> None:
    text = np.arange(100, 100 + tokens)
    counted: dict[int, int] = {}
    for part, marks in text_windows(text, window, stride):
        assert len(part) <= window + 1 and len(marks) == len(part) - 1
        for place in np.flatnonzero(marks) + 1:
            assert part[place] not in counted
            counted[int(part[place])] = place  # tokens before it
    assert sorted(counted) == list(range(101, 100 + tokens))
    for token, context in counted.items():
        assert context >= min(token - 100, window - stride + 1)
    assert not list(text_windows(text[:1], window, stride))


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    """Logits that depend on the token and its place only; two batches, the last one part full."""
    generator = np.random.default_rng(0)
    table = generator.normal(0, 4, (VOCAB, VOCAB)).astype(np.float32)
    windows = [Window(generator.integers(0, VOCAB, size), generator.random(size - 1) < 0.7) for size in (5, 3, 5, 4, 2)]
    found = score(lambda ids: table[ids], iter(windows), 1024)
    nats, tokens = 0.0, 0
    for part, marks in windows:
        for before, after, counts in zip(part, part[1:], marks, strict=False):
            if counts:
                odds = [math.exp(float(value)) for value in table[before]]
                nats, tokens = nats - math.log(odds[after] / math.fsum(odds)), tokens + 1
    assert (found.tokens, found.windows) == (tokens, 5)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-12)


def test_nothing_to_count_is_an_error() -> None:
    with pytest.raises(UserError, match="no token of the data counts"):
        score(lambda ids: np.zeros((*ids.shape, VOCAB)), iter([Window(np.ones(3, int), np.zeros(2, bool))]), 4)
