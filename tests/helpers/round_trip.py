# SPDX-License-Identifier: Apache-2.0
"""Weights that go from Hugging Face to MindSpore, into the grouped layout and out of it, and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mindformers_ext.core.parameters import model_weights
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.tensors import MappingReader
from mindformers_ext.weights.convert import plan_relayout, to_hf
from mindformers_ext.weights.layouts import GMM, Layout


def check_round_trip(held: Mapping[str, np.ndarray], inside: Mapping[str, np.ndarray], spec: ModelSpec) -> None:
    """``inside``: MindSpore's of ``held``; they have the names and shapes of ``spec``, and come back bit for bit."""
    assert {name: array.shape for name, array in inside.items()} == {w.name: w.shape for w in model_weights(spec)}
    gmm = Layout(GMM)
    turned = dict(plan_relayout(MappingReader(inside), spec, Layout(), gmm).run(MappingReader(inside)))
    again = dict(plan_relayout(MappingReader(turned), spec, gmm, Layout()).run(MappingReader(turned)))
    for found in (inside, again):
        back = to_hf(found, spec)
        assert back.keys() == held.keys() and all(np.array_equal(back[name], held[name]) for name in held)
