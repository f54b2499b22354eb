# SPDX-License-Identifier: Apache-2.0
"""LLaMA-MoE v2 in both engines beside a float64 oracle: logits, loss with balance, every gradient.

``pytest -s`` prints figures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.causal_lm import build_causal_lm as build_mindspore
from mindformers_ext.ms.engine import MindSporeNetwork
from mindformers_ext.ms.generate import MindSporeSession
from mindformers_ext.ms.step import LossNetwork
from mindformers_ext.pt import names
from mindformers_ext.pt.causal_lm import build_causal_lm as build_torch
from mindformers_ext.pt.generate import PyTorchSession
from mindformers_ext.weights.convert import to_mindspore
from tests.helpers import llama_moe_v2_oracle as oracle
from tests.helpers.llama_moe_v2_models import random_tensors, token_ids, v2_words

SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3}
ATTENTION = ["attention", "attention, finer, contract", "attention, residual", "aligned"]
BALANCES = ["switch", "legacy_constant"]  # the third one, layerwise, is that of the others
IDS = token_ids(2, 12)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The oracle's products are tiny."""
    torch.set_num_threads(1)


def words_of(case: str) -> dict[str, Any]:
    """A case, or a form of the loss of balance in a model that has both kinds of gate."""
    if case not in BALANCES:
        return v2_words(case, **SMALL)
    more: dict[str, Any] = {"num_moe_contract_layers": 0, "num_experts_per_tok": 2, "top_k_attn": 2}
    return v2_words("attention, residual", **SMALL, **more, aux_loss_type=case)


@functools.cache
def judged(case: str) -> tuple[NetworkSpec, dict[str, np.ndarray], np.ndarray, float, dict[str, np.ndarray]]:
    """Our spec and weights; the oracle's logits, loss and gradients."""
    words = words_of(case)
    drawn = random_tensors(words, std=0.3)
    tensors = {name: torch.from_numpy(array).double().requires_grad_() for name, array in drawn.items()}
    loss = oracle.loss(words, tensors, torch.from_numpy(IDS))
    loss.backward()
    gradients = {n: (torch.zeros_like(t) if t.grad is None else t.grad).float().numpy() for n, t in tensors.items()}
    with torch.no_grad():
        logits = oracle.logits(words, tensors, torch.from_numpy(IDS[:, :-1])).numpy()
    spec = NetworkSpec(model=model_spec_from_hf(words), seq_length=IDS.shape[1] - 1, batch_size=2)
    return spec, to_mindspore(drawn, spec.model), logits, loss.item(), to_mindspore(gradients, spec.model)


def assert_same(case: str, engine: str, logits: np.ndarray, loss: float, gradients: dict[str, np.ndarray]) -> None:
    _, _, wanted_logits, wanted_loss, wanted = judged(case)
    assert gradients.keys() == wanted.keys()
    largest = max(float(np.abs(g).max()) for g in wanted.values())
    sizes = {n: float(np.abs(g).max()) for n, g in wanted.items()}  # of one chosen expert, the gate's is rounding
    scales = {n: size if size > 1e-6 * largest else largest for n, size in sizes.items()}
    worst = {n: float(np.abs(gradients[n] - g).max()) / scales[n] for n, g in wanted.items()}
    name = max(worst, key=lambda name: worst[name])
    difference = float(np.abs(logits - wanted_logits).max())
    print(f"\n{case} {engine}: logits {difference:.1e} loss {abs(loss - wanted_loss):.1e} gradient {worst[name]:.1e}")
    assert 1 <= np.abs(wanted_logits).max() <= 30
    assert difference <= 1e-4 and abs(loss - wanted_loss) <= 1e-5 and worst[name] <= 1e-3, name


@pytest.mark.parametrize("case", ["vanilla", "contract", "residual", *ATTENTION, *BALANCES])
def test_torch_equals_the_oracle(case: str) -> None:
    spec, weights, *_ = judged(case)
    network = build_torch(spec)
    names.load(network, weights)
    with torch.no_grad():
        logits = network.eval()(torch.from_numpy(IDS[:, :-1])).numpy()
    terms = network.train()(torch.from_numpy(IDS), losses=True)
    terms.loss.backward()
    gradients = {}
    for name, parameter in network.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients |= {part: view.numpy() for part, view in names.split_experts(name, grad).items()}
    assert_same(case, "PyTorch", logits, terms.loss.item(), gradients)


def test_the_forms_of_the_loss_of_balance_differ() -> None:
    """With balance alone: E/k of both gates is a constant, and a product of means is no mean of products."""
    found = {}
    for shape in ("layerwise", *BALANCES):
        spec, weights, *_ = judged("switch")
        moe = replace(spec.model.routing, aux_loss_type=shape)
        network = build_torch(replace(spec, model=replace(spec.model, moe=moe)))
        names.load(network, weights)
        found[shape] = network.train()(torch.from_numpy(IDS), losses=True).aux_loss
    assert (
        found["legacy_constant"].item() == pytest.approx(0.05 * (7 / 2 + 4 / 2))
        and not found["legacy_constant"].requires_grad
    )
    assert abs(found["switch"].item() - found["layerwise"].item()) > 1e-3


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("residual", marks=pytest.mark.turn("llama_moe_v2")),
        pytest.param(ATTENTION[1], marks=pytest.mark.turn("llama_moe_v2")),
        pytest.param(ATTENTION[2], marks=pytest.mark.turn("llama_moe_v2")),
        ATTENTION[3],
        BALANCES[0],
        pytest.param(BALANCES[1], marks=pytest.mark.turn("llama_moe_v2")),
    ],
)
def test_mindspore_equals_the_oracle(case: str) -> None:
    spec, weights, *_ = judged(case)
    ms.set_context(mode=ms.PYNATIVE_MODE)  # compiled: the same cells in tests/parity/test_mixtral.py, test_qwen_moe.py
    network = build_mindspore(spec)
    MindSporeNetwork(network).load(weights)
    logits = network(Tensor(IDS[:, :-1].astype(np.int32))).asnumpy()
    parameters = network.trainable_params()
    step = ms.value_and_grad(LossNetwork(network).set_train(), None, parameters, has_aux=True)
    terms, gradients = step(Tensor(IDS.astype(np.int32)))
    named = {item.name: gradient.asnumpy() for item, gradient in zip(parameters, gradients, strict=True)}
    assert_same(case, "MindSpore", logits, float(terms[0].asnumpy()), named)


@pytest.mark.parametrize("tokens", [1, 24, 40])  # chosen experts, every expert, experts' slices
@pytest.mark.parametrize("sorted_rows", [False, True])
def test_every_form_of_experts_adds_their_biases(tokens: int, sorted_rows: bool) -> None:
    """MindSpore's slots and sorted rows, and what inference has of both, beside the definition."""
    spec, weights, *_ = judged("aligned")
    moe = replace(spec.model.routing, use_gmm=sorted_rows)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    network = build_mindspore(replace(spec, model=replace(spec.model, moe=moe)))
    MindSporeNetwork(network).load(weights)
    layer = network.model.layers[1].feed_forward
    x = np.random.default_rng(0).normal(size=(tokens, SMALL["hidden_size"])).astype(np.float32)
    words, start = v2_words("aligned", **SMALL), "model.layers.1."
    drawn = random_tensors(words, std=0.3)
    own = {n.removeprefix(start): torch.from_numpy(a).double() for n, a in drawn.items() if n.startswith(start)}
    wanted = oracle.feed_forward(words, own, torch.from_numpy(x).double()).numpy()
    valid = Tensor(np.ones(tokens, np.int32))
    np.testing.assert_allclose(layer(Tensor(x))[0].asnumpy(), wanted, atol=2e-4)
    np.testing.assert_allclose(layer.for_inference(tokens)(Tensor(x), valid).asnumpy(), wanted, atol=2e-4)


def torch_session(spec: NetworkSpec, weights: dict[str, np.ndarray]) -> PyTorchSession:
    network = build_torch(spec)
    names.load(network, weights)
    return PyTorchSession(network.eval(), 2, 9, 20, torch.device("cpu"))


def mindspore_session(spec: NetworkSpec, weights: dict[str, np.ndarray]) -> MindSporeSession:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    network = MindSporeNetwork(build_mindspore(spec))
    network.load(weights)
    return network.session(2, 9, 20)


@pytest.mark.parametrize(
    ("open_session", "case"),
    [
        (torch_session, ATTENTION[1]),
        (mindspore_session, ATTENTION[1]),
        (torch_session, ATTENTION[3]),
        (mindspore_session, ATTENTION[3]),
    ],
)
def test_step_by_step_with_a_cache_it_is_the_whole_text(open_session: Callable, case: str) -> None:
    """Two prompts of different lengths, then two tokens each; the oracle knows no cache and no padding."""
    spec, weights, *_ = judged(case)
    words = v2_words(case, **SMALL)
    tensors = {name: torch.from_numpy(array).double() for name, array in random_tensors(words, std=0.3).items()}
    if open_session is mindspore_session and case == ATTENTION[1]:
        with pytest.raises(UserError, match="use the PyTorch engine"):
            open_session(spec, weights)
        return
    session = open_session(spec, weights)
    session.compile()
    ids, lengths = IDS[:, :9], np.array([9, 6])
    texts = [ids[row, :length].tolist() for row, length in enumerate(lengths)]
    found = session.prompt(ids, lengths)
    for step in range(3):
        for row, text in enumerate(texts):
            wanted = oracle.logits(words, tensors, torch.tensor([text]))[0, -1].numpy()
            assert np.abs(found[row] - wanted).max() <= 1e-4, (step, row)
            text.append(int(wanted.argmax()))
        found = session.token(np.array([text[-1] for text in texts]), lengths + step)
