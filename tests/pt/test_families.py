# SPDX-License-Identifier: Apache-2.0
"""Dense layers among mixtures, shared experts, biases and norms of heads: our networks beside those of transformers.

Limits: logits 1e-4, loss 1e-5, gradients 1e-3 relative; `pytest -s` prints what was found.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.config.lora import LoraSpec
from mindformers_ext.core.families import own_families
from mindformers_ext.core.layers import MoESpec, SharedExpertSpec
from mindformers_ext.core.parameters import model_weights
from mindformers_ext.core.philox import normal, seeds
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.pt import names
from mindformers_ext.pt.causal_lm import CausalLM, build_causal_lm
from mindformers_ext.pt.generate import PyTorchSession
from mindformers_ext.pt.init import build_empty, draw_weights
from mindformers_ext.pt.lora import add_lora
from mindformers_ext.weights.convert import to_mindspore
from tests.helpers.specs import family_specs

CPU = torch.device("cpu")
COMMON = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN2 = COMMON | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 40}
QWEN3 = COMMON | {"model_type": "qwen3_moe", "head_dim": 16}
CASES: dict[str, dict[str, Any]] = {
    "qwen2, every second": QWEN2 | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "norm_topk_prob": False},
    "qwen2, listed, tied": QWEN2
    | {"num_hidden_layers": 3, "mlp_only_layers": [0], "norm_topk_prob": True, "tie_word_embeddings": True},
    "qwen3, listed": QWEN3 | {"num_hidden_layers": 3, "mlp_only_layers": [1], "norm_topk_prob": True},
    "qwen3, every second": QWEN3 | {"num_hidden_layers": 2, "decoder_sparse_step": 2, "norm_topk_prob": False},
}
IDS = np.random.default_rng(7).integers(0, 101, (2, 13)).astype(np.int64)


@functools.cache
def pair(case: str) -> tuple[Any, CausalLM]:
    """transformers' model with large random weights, biases included, and ours with the same ones."""
    import transformers

    config = CASES[case]
    kind = {"qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}[config["model_type"]]
    torch.manual_seed(3)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**config, attn_implementation="eager")
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0.0, 0.25)
    model = model_spec_from_hf(config)
    ours = build_causal_lm(NetworkSpec(model=model, seq_length=12))
    names.load(ours, to_mindspore(theirs.float().eval().state_dict(), model))
    return theirs, ours.eval()


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str) -> None:
    theirs, ours = pair(case)
    ids = torch.from_numpy(IDS)
    for network in pair(case):
        network.zero_grad()
    expected = theirs(input_ids=ids, labels=ids, use_cache=False)
    expected.loss.backward()
    terms = ours(ids, losses=True)
    terms.lm_loss.backward()
    model = ours.spec.model
    assert model.dense_layers and terms.expert_load.shape == (len(model.moe_layers), 12)
    # an expert that no token chose has no gradient there, and one of zeros here
    named = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    wanted, found = to_mindspore(named, model), {}
    for name, parameter in ours.named_parameters():
        found |= {part: view.numpy() for part, view in names.split_experts(name, parameter.grad).items()}
    assert found.keys() == wanted.keys()
    worst = {n: float(np.abs(found[n] - g).max() / np.abs(g).max()) for n, g in wanted.items()}
    gradient = max(worst, key=lambda name: worst[name])
    with torch.no_grad():
        difference = (ours(ids) - expected.logits).abs().max().item()
    loss = abs(terms.lm_loss.item() - expected.loss.item())
    print(f"\n{case:<20} logits {difference:.1e}  loss {loss:.1e}  gradient {worst[gradient]:.1e} ({gradient})", end="")
    assert 1.0 <= expected.logits.abs().max().item() <= 15.0
    assert difference <= 1e-4 and loss <= 1e-5 and worst[gradient] <= 1e-3


@pytest.mark.parametrize("case", CASES)
def test_generates_the_tokens_of_transformers(case: str) -> None:
    """Two prompts of different lengths at once, with a cache; transformers has them one after the other."""
    theirs, ours = pair(case)
    lengths, count = np.array([12, 5]), 10
    session = PyTorchSession(ours, 2, 12, 24, CPU)
    session.compile()
    chosen = [session.prompt(IDS[:, :12], lengths).argmax(-1)]
    for step in range(count - 1):
        chosen.append(session.token(chosen[-1], lengths + step).argmax(-1))
    for row, length in enumerate(lengths):
        prompt = torch.from_numpy(IDS[row : row + 1, :length])
        told = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        assert told[0, length:].tolist() == [int(tokens[row]) for tokens in chosen]


@pytest.mark.parametrize("family", own_families())
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_network_holds_the_weights_of_the_table(family: str, data: st.DataObject) -> None:
    model = data.draw(family_specs(family))
    with torch.device("meta"):
        network = build_causal_lm(NetworkSpec(model=model, seq_length=4))
    found = {name: tuple(view.shape) for name, view in names.named_views(network).items()}
    assert found == {weight.name: weight.shape for weight in model_weights(model)}


def test_initial_weights_are_those_of_the_table() -> None:
    """Every matrix takes the next seed in the table's order; norms are 1 and biases 0, which take none."""
    model = model_spec_from_hf(CASES["qwen2, every second"] | {"initializer_range": 0.05})
    network = build_empty(NetworkSpec(model=model, seq_length=4), CPU)
    left, views, own = draw_weights(network, 5), names.named_views(network), seeds(5)
    for weight in model_weights(model):
        found = views[weight.name].numpy()
        if weight.row.init == "normal":
            np.testing.assert_array_equal(found.reshape(-1), normal(next(own), found.size, 0.05), err_msg=weight.name)
        else:
            assert np.all(found == {"ones": 1.0, "zeros": 0.0}[weight.row.init]), weight.name
    assert next(left) == next(own)


SHARED = ModelSpec(
    vocab_size=51,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.3,
    qkv_bias=True,
    dense_layers=(1,),
    moe=MoESpec(
        num_local_experts=4,
        num_experts_per_tok=2,
        capacity_factor=1.0,
        aux_losses=(("expert", 0.1),),
        aux_loss_reduce="mean",
        shared_expert=SharedExpertSpec(intermediate_size=20, scale=0.5),
    ),
)


def test_a_shared_expert_without_a_gate_is_added_at_its_scale() -> None:
    layer = build_causal_lm(NetworkSpec(model=SHARED, seq_length=4)).model.layers[2].feed_forward
    x = torch.randn(8, 16)
    w1, w2, w3 = (getattr(layer.shared_experts, name).weight for name in ("w1", "w2", "w3"))
    shared = (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
    found, routed = layer(x), layer.routed_experts(x)
    torch.testing.assert_close(found.y_TD, routed.y_TD + 0.5 * shared)
    assert torch.equal(found.report_GE, routed.report_GE) and torch.equal(found.aux_loss_G, routed.aux_loss_G)
    torch.testing.assert_close(layer.dropless(x), layer.routed_experts.dropless(x) + 0.5 * shared)


def test_the_mean_of_routing_losses_is_over_the_mixtures() -> None:
    network = build_causal_lm(NetworkSpec(model=SHARED, seq_length=12))
    terms = network(torch.from_numpy(IDS % 51), losses=True)
    losses = []
    for index in SHARED.moe_layers:
        network.model.layers[index].feed_forward.register_forward_hook(lambda _, given, out: losses.append(out[1]))
    network(torch.from_numpy(IDS % 51), losses=True)
    assert len(losses) == 2 and terms.dropped.shape == (2,)
    torch.testing.assert_close(terms.aux_loss, torch.cat(losses).mean())


def test_adapters_keep_biases_and_reach_shared_experts() -> None:
    network = build_causal_lm(NetworkSpec(model=SHARED, seq_length=12))
    with torch.no_grad():
        for layer in network.model.layers:
            layer.attention.wq.bias.normal_()
    ids = torch.from_numpy(IDS % 51)
    before = network(ids)
    adapted = add_lora(network, LoraSpec(rank=2, dropout=0.0, targets=r".*wq|.*shared_experts\.w\d"), seeds(1))
    assert len(adapted) == 3 + 2 * 3 and torch.equal(network(ids), before)
    trained = {name.rpartition(".")[2] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"mindpet_delta_lora_a", "mindpet_delta_lora_b"}
