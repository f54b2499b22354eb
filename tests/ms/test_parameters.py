# SPDX-License-Identifier: Apache-2.0
"""A built network has exactly the weights of ``core.parameters``: names, shapes, order, types, initial values."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.layers import MoESpec, SharedExpertSpec
from mindformers_ext.core.parameters import ROUTED, model_weights
from mindformers_ext.core.spec import ModelSpec, NetworkSpec, NumericsSpec
from mindformers_ext.jobs.train.hooks import BIAS
from mindformers_ext.ms.causal_lm import build_causal_lm


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    """Any mixture of attention, dense layers, experts and shared experts; no two widths alike."""
    layers, width, kv_heads = draw(st.integers(1, 3)), st.sampled_from([6, 9, 14]), draw(st.integers(1, 2))
    shared = st.builds(
        SharedExpertSpec, intermediate_size=st.just(11), gated=st.booleans(), scale=st.sampled_from([1.0, 0.5])
    )
    experts = st.builds(
        MoESpec,
        num_local_experts=st.just(5),
        num_experts_per_tok=st.just(2),
        intermediate_size=st.none() | width,
        shared_expert=st.none() | shared,
        use_gmm=st.booleans(),
        capacity_factor=st.just(0.0),
    )
    moe = draw(st.none() | experts)
    dense = draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1)) if moe else ()
    return ModelSpec(
        vocab_size=20,
        hidden_size=12,
        intermediate_size=10,
        num_hidden_layers=layers,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=4,
        tie_word_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        moe=moe,
        dense_layers=tuple(sorted(dense)),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(models())
def test_parameters_are_the_table_of_weights(model: ModelSpec) -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    spec = NetworkSpec(model=model, seq_length=4, numerics=NumericsSpec(param_dtype="float16"))
    parameters, weights = list(build_causal_lm(spec).get_parameters()), list(model_weights(model))
    assert [(p.name, tuple(p.shape)) for p in parameters] == [(w.name, w.shape) for w in weights]
    for parameter, weight in zip(parameters, weights, strict=True):
        assert parameter.dtype == (ms.float32 if weight.row.fixed else ms.float16), weight.name
        assert parameter.requires_grad and parameter.parallel_optimizer != weight.row.fixed, weight.name
        value = parameter.init_data().asnumpy()
        expected = {"ones": value == 1, "zeros": value == 0, "normal": np.abs(value) < 0.2}[weight.row.init]
        assert expected.all() and (weight.row.init != "normal" or np.ptp(value) > 0), weight.name


@pytest.mark.parametrize("shared", [None, SharedExpertSpec(intermediate_size=11)], ids=["routed", "shared"])
def test_a_bias_of_the_choice_stands_beside_them(shared: SharedExpertSpec | None) -> None:
    """In every mixture, under MindFormers' name and where training looks for it, and with no gradient."""
    moe = MoESpec(num_local_experts=4, num_experts_per_tok=2, balance_via_topk_bias=True, shared_expert=shared)
    model = ModelSpec(
        vocab_size=20,
        hidden_size=12,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        moe=moe,
        dense_layers=(0,),
    )
    network = build_causal_lm(NetworkSpec(model=model, seq_length=4))
    listed = {weight.name for weight in model_weights(model)}
    more = [parameter for parameter in network.get_parameters() if parameter.name not in listed]
    start = f"model.layers.1.feed_forward.{ROUTED if shared else ''}"
    assert [p.name for p in more] == [f"{start}router.router.topk_bias"] and more[0].name.endswith(BIAS)
    assert tuple(more[0].shape) == (4,) and not more[0].requires_grad
