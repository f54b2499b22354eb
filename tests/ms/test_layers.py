# SPDX-License-Identifier: Apache-2.0
"""A network with everything a layer may have, in parts and with adapters."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindformers_ext.core.cluster.tensor_parallel import own_part, parted_parameters
from mindformers_ext.core.config.lora import DROPOUT_SEED, LoraSpec
from mindformers_ext.core.layers import MoESpec, SharedExpertSpec
from mindformers_ext.core.parameters import model_weights
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.ms.attention import rotary_tables
from mindformers_ext.ms.causal_lm import CausalLM, build_causal_lm
from mindformers_ext.ms.lora import add_lora
from mindformers_ext.ms.tensor_parallel import build_part

LENGTH, COUNT = 5, 2
MODEL = ModelSpec(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=18,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    qkv_bias=True,
    qk_norm=True,
    out_bias=True,
    mlp_bias=True,
    sliding_window=3,
    full_attention_layers=(0,),
    moe=MoESpec(
        num_local_experts=4,
        num_experts_per_tok=2,
        capacity_factor=0.0,
        intermediate_size=10,
        shared_expert=SharedExpertSpec(intermediate_size=14, gated=True, scale=0.5),
    ),
    dense_layers=(1,),
)
SPEC = NetworkSpec(model=MODEL, seq_length=LENGTH)
# of three shared experts the first process holds one and a part of the second, the other one the rest
RESIDUAL = replace(
    MODEL.routing,
    gate="linear_noisy",
    norm_topk_prob=False,
    shared_expert=SharedExpertSpec(
        intermediate_size=14,
        weighs_each=True,
        num_experts=3,
        expert_sizes=((5, 8, 1),) * 2,
        scale=1.5,
        use_weighting=True,
    ),
)
SPECS = {"gated": SPEC, "residual": replace(SPEC, model=replace(MODEL, moe=RESIDUAL))}


@pytest.fixture(autouse=True)
def pynative() -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)


def weights(model: ModelSpec = MODEL) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {w.name: generator.normal(0, 0.4, w.shape).astype(np.float32) for w in model_weights(model)}


def filled(network: CausalLM, values: dict[str, np.ndarray]) -> CausalLM:
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(values[parameter.name]))
    network.set_train(False)
    return network


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_what_two_processes_compute_adds_up(spec: NetworkSpec) -> None:
    """Attention and feed-forward of every layer: the sum that ``ms.generate`` takes over the processes."""
    values, placed = weights(spec.model), parted_parameters(spec, COUNT)
    whole = filled(build_causal_lm(spec), values)
    parts = [
        filled(build_part(spec, COUNT, rank), {p.name: np.array(own_part(values[p.name], p, rank)) for p in placed})
        for rank in range(COUNT)
    ]
    x = Tensor(np.random.default_rng(2).normal(size=(LENGTH, MODEL.hidden_size)).astype(np.float32))
    tables = rotary_tables(MODEL.rope.tables(LENGTH), ms.float32)
    valid = Tensor(np.ones(LENGTH, np.int32))
    for index in range(MODEL.num_hidden_layers):
        halves = [
            lambda layer: layer.attention(x, *tables),
            lambda layer: layer.feed_forward(x)[0],
            lambda layer: layer.feed_forward.for_inference(LENGTH)(x, valid),
        ]
        for half in halves:
            expected = half(whole.model.layers[index]).asnumpy()
            found = sum(half(part.model.layers[index]).asnumpy() for part in parts)
            assert np.abs(expected).max() > 0.1
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_adapters_leave_a_layer_its_bias() -> None:
    """Fresh ones change nothing; frozen parameters keep their names, and a layer's bias works on."""
    values, ids = weights(), Tensor(np.arange(LENGTH)[None].astype(np.int32))
    plain = filled(build_causal_lm(SPEC), values)
    expected = plain(ids).asnumpy()
    adapted = add_lora(plain, LoraSpec(rank=2, targets=r".*\.wq|.*shared_experts\.w2"), SPEC)
    assert len(adapted) == 3  # of two layers, and of the one with a shared expert
    assert {p.name for p in plain.get_parameters() if not p.requires_grad} - {DROPOUT_SEED} == set(values)
    np.testing.assert_array_equal(plain(ids).asnumpy(), expected)
    bias = plain.model.layers[1].attention.wq.linear.bias
    bias.set_data(bias + 1.0)
    assert np.abs(plain(ids).asnumpy() - expected).max() > 1e-3
