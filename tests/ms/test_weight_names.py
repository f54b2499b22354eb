# SPDX-License-Identifier: Apache-2.0
"""The weight tables name exactly the parameters that the networks have, at exactly their shapes."""

import json

import numpy as np
import pytest

from mindformers_ext.core.config.hf import hf_config_from_spec
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.ms.causal_lm import build_causal_lm
from mindformers_ext.weights.convert import rule_set


def spec_of(experts, tied, bias=False):
    moe = MoESpec(num_local_experts=experts, num_experts_per_tok=2, balance_via_topk_bias=bias) if experts else None
    return ModelSpec(
        vocab_size=20,
        hidden_size=12,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=4,
        tie_word_embeddings=tied,
        moe=moe,
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("experts, bias", [(0, False), (5, False), (4, True)])
def test_tables_equal_networks(experts, tied, bias):
    spec = spec_of(experts, tied, bias)
    rules = rule_set(spec)
    table = {name: shape for binding in rules.bindings for name, shape in binding.ms.items()}
    network = {p.name: tuple(p.shape) for p in build_causal_lm(NetworkSpec(model=spec, seq_length=4)).get_parameters()}
    state = {name for name in network if rules.ms_extras.reason_to_ignore(name)}
    assert bool(state) == bias  # the router's bias and statistics, and nothing else
    assert {name: shape for name, shape in network.items() if name not in state} == table


@pytest.mark.slow
@pytest.mark.parametrize("experts, tied, kind", [(5, False, "float32"), (4, True, "bfloat16"), (0, True, "float16")])
def test_transformers_reads_what_came_back(tmp_path, experts, tied, kind):
    """transformers saves, we convert there and back, transformers loads: every tensor has the same bits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mindformers_ext.jobs.checkpoint.convert import ConvertRequest, convert

    (tmp_path / "config.json").write_text(json.dumps(hf_config_from_spec(spec_of(experts, tied))))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=getattr(torch, kind))
    model.save_pretrained(tmp_path / "hf", max_shard_size="4KB")
    ckpt, back = tmp_path / "m.ckpt", tmp_path / "back"
    convert(ConvertRequest(input_path=tmp_path / "hf", output_path=ckpt))
    convert(ConvertRequest(input_path=ckpt, output_path=back, direction="to_hf", max_shard_bytes=5000))
    again = AutoModelForCausalLM.from_pretrained(back, dtype="auto")
    assert again.dtype == model.dtype
    theirs, ours = model.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(tensor.view(torch.uint8).numpy(), ours[name].view(torch.uint8).numpy())
