# SPDX-License-Identifier: Apache-2.0
"""MindFormers' ``generate`` of our network: over our cache it gives what MindFormers' own loop gives."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindformers.generation.streamers import BaseStreamer

from mindformers_ext.core.errors import UserError
from mindformers_ext.mf.networks import PortableLlamaForCausalLM
from mindformers_ext.mf.register import CLASSES

PAD, END = 3, 2
PROMPTS = np.array([[1, 40, 41, 42, 43, 44], [1, 90, 7, PAD, PAD, PAD], [1, 5, 60, 61, PAD, PAD]])


class Heard(BaseStreamer):
    """Keeps what is put."""

    def __init__(self) -> None:
        self.parts: list = []
        self.ended = False

    def put(self, value) -> None:
        """One token, or the prompt."""
        self.parts.append(np.array(value).reshape(-1).tolist())

    def end(self) -> None:
        """The last token was put."""
        self.ended = True


def network(use_past: bool) -> PortableLlamaForCausalLM:
    from mindformers.modules.transformer.moe import MoEConfig

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(3)
    config_class, network_class = CLASSES["mixtral"]
    config = config_class(
        batch_size=1,
        seq_length=24,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        n_kv_heads=2,
        vocab_size=120,
        intermediate_size=48,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=1,
        compute_dtype="float32",
        param_init_type="float32",
        layernorm_compute_type="float32",
        softmax_compute_type="float32",
        rotary_dtype="float32",
        use_past=use_past,
        do_sample=False,
        max_decode_length=24,
        init_method_std=0.4,
        moe_config=MoEConfig(expert_num=4, num_experts_chosen=2, capacity_factor=0.5, routing_policy="TopkRouterV2"),
    )
    model = network_class(config)
    generator = np.random.default_rng(0)
    for parameter in model.get_parameters():
        if len(parameter.shape) > 1:
            weight = generator.normal(0, 0.4, parameter.shape).astype(np.float32)
            parameter.set_data(ms.Tensor(weight, parameter.dtype))
    return model


@pytest.mark.slow
def test_generate_over_a_cache_is_generate() -> None:
    cached, plain = network(True), network(False)
    plain.predicts = True  # what run_mode predict sets
    assert cached.generator is not None and plain.generator is None
    heard, theirs = Heard(), Heard()
    for rows, words in ((PROMPTS, {"max_length": 20}), (PROMPTS[1:], {"max_new_tokens": 5})):
        ours = cached.generate(rows, **words)
        expected = plain.generate(rows, **words)
        assert all(isinstance(row, np.ndarray) and row.dtype == np.int32 for row in ours)
        assert [row.tolist() for row in ours] == [row.tolist() for row in expected]
    end = int(ours[0][4])
    assert (
        cached.generate(PROMPTS[1], streamer=heard, eos_token_id=[end])[0].tolist()
        == plain.generate(PROMPTS[1], streamer=theirs, eos_token_id=[end])[0].tolist()
    )
    assert heard.parts == theirs.parts and heard.ended
    draws = [cached.generate(PROMPTS, do_sample=True, top_k=0, temperature=1.5, seed=seed) for seed in (4, 4, 5)]
    assert [r.tolist() for r in draws[0]] == [r.tolist() for r in draws[1]] != [r.tolist() for r in draws[2]]
    with pytest.raises(UserError, match="prompt 1 has 6 tokens, prompt and answer may have 6"):
        cached.generate(PROMPTS, max_length=6)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        cached.generate(np.full((1, 4), PAD))
