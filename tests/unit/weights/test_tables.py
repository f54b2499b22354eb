# SPDX-License-Identifier: Apache-2.0
"""Each family's table of names against the one table of weights, at any sizes, and round trips of what it names."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.config.hf import hf_config_from_spec, model_spec_from_hf
from mindformers_ext.core.families import FAMILIES as FAMILY_ROWS
from mindformers_ext.core.families import own_families
from mindformers_ext.core.parameters import model_weights
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.weights.convert import rule_set, to_hf, to_mindspore
from mindformers_ext.weights.layouts import DENSE, GMM, Layout
from mindformers_ext.weights.tables import TABLES
from tests.helpers.specs import family_specs

FAMILIES = own_families()


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_table_names_every_weight_once_at_its_shape(family: str, data: st.DataObject) -> None:
    spec = data.draw(family_specs(family))
    wanted = {weight.name: weight.shape for weight in model_weights(spec)}
    for style in TABLES[family].mixtures or ("per_expert",):
        rules = rule_set(spec, style)
        named = [(name, shape) for binding in rules.bindings for name, shape in binding.ms.items()]
        assert sorted(named) == sorted(wanted.items())


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_config_json_says_the_same_model(family: str, data: st.DataObject) -> None:
    spec = data.draw(family_specs(family))
    config = json.loads(json.dumps(hf_config_from_spec(spec)))
    assert config["model_type"] == (FAMILY_ROWS[family].variant_of or family)
    assert model_spec_from_hf(config) == spec


def random_weights(spec: ModelSpec, style: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [item for binding in rule_set(spec, style).bindings for item in binding.hf.items()]
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes}


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_round_trip_moves_every_element_back(family: str, data: st.DataObject) -> None:
    spec = data.draw(family_specs(family))
    style = data.draw(st.sampled_from(sorted(TABLES[family].mixtures or ("per_expert",))))
    weights = random_weights(spec, style)
    back = to_hf(to_mindspore(weights, spec), spec, style)
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("family", [name for name in FAMILIES if TABLES[name].mixtures])
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_every_layout_has_an_inverse(family: str, data: st.DataObject) -> None:
    """Biases, norms of heads, dense layers and shared experts included."""
    spec = data.draw(family_specs(family))
    layout = Layout(data.draw(st.sampled_from([DENSE, GMM])), data.draw(st.booleans()))
    for binding in rule_set(spec, layout=layout).bindings:
        assert {name: view.shape for name, view in binding.hf_views().items()} == dict(binding.hf)
