# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies and tables against transformers' own functions, over many parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.config.rope_words import read_extension, written_extension
from mindformers_ext.core.errors import Problems
from mindformers_ext.core.rope import Rope, RopeScaling
from tests.helpers.specs import rope_scalings

transformers = pytest.importorskip("transformers")


@settings(max_examples=150, deadline=None)
@given(rope_scalings(), st.sampled_from([8, 64, 128]), st.sampled_from([1e4, 5e5, 1e6]), st.integers(1, 300))
def test_frequencies_are_transformers(scaling: RopeScaling, head_dim: int, theta: float, length: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    trained = 64
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        rope_theta=theta,
        max_position_embeddings=trained,
        rope_scaling=scaling.said(),
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling.rope_type](config, "cpu", seq_len=length)
    found, own = Rope(head_dim, theta, trained, scaling).frequencies(length)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=3e-6)
    assert own == pytest.approx(factor, rel=1e-12)


def test_a_token_of_a_growing_text_is_turned_as_its_last() -> None:
    rope = Rope(16, 1e4, 8, RopeScaling(rope_type="dynamic", factor=2.0))
    assert rope.follows_length
    cos, sin = rope.growing_tables(12)
    for length in range(1, 13):
        last = [table[length - 1] for table in rope.tables(length)]
        np.testing.assert_array_equal([cos[length - 1], sin[length - 1]], last)
    still = replace(rope, scaling=None)
    np.testing.assert_array_equal(still.growing_tables(12), still.tables(12))


@settings(max_examples=80, deadline=None)
@given(rope_scalings())
def test_mindformers_words_say_the_same(scaling: RopeScaling) -> None:
    problems = Problems("words")
    theta, found = read_extension(written_extension(scaling), 1e4, problems)
    problems.raise_if_any()
    assert theta == 1e4 and found is not None
    tables = [Rope(32, 1e4, 64, method).tables(200) for method in (scaling, found)]
    np.testing.assert_array_equal(tables[0], tables[1])


@pytest.mark.parametrize(
    ("words", "theta", "scaling"),
    [
        ({"extend_method": "None", "scaling_factor": 1.0}, 1e4, None),
        ({"extend_method": "PI", "scaling_factor": 4.0}, 1e4, RopeScaling(rope_type="linear", factor=4.0)),
        ({"extend_method": "NTK", "scaling_factor": 2.0}, 2e4, None),
        (
            {"extend_method": "linear", "scaling_factor": {"factor": 2.0}},
            1e4,
            RopeScaling(rope_type="linear", factor=2.0),
        ),
    ],
)
def test_mindformers_older_words(words: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    problems = Problems("words")
    assert read_extension(words, 1e4, problems) == (theta, scaling)
    problems.raise_if_any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"extend_method": "DYNAMIC_NTK", "scaling_factor": {"factor": 2.0}}, "is not built"),
        ({"extend_method": "LLAMA3", "scaling_factor": 8.0}, "is not built"),
        ({"extend_method": "LLAMA3", "scaling_factor": {"factor": 8.0}}, "lacks low_freq_factor"),
        ({"extend_method": "YARN", "scaling_factor": {"factor": 8.0, "beta_quick": 1}}, "beta_quick"),
        ({"scaling_factor": 8.0}, "without extend_method"),
    ],
)
def test_mindformers_words_that_are_refused(words: dict[str, Any], message: str) -> None:
    problems = Problems("words")
    read_extension(words, 1e4, problems)
    with pytest.raises(Exception, match=message):
        problems.raise_if_any()
