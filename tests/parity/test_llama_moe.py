# SPDX-License-Identifier: Apache-2.0
"""Both engines beside the LLaMA-MoE code that is saved with a model: logits, loss with balance, every gradient.

Training steps with the same noise; ``pytest -s`` prints what was measured.
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

from mindformers_ext.core.config.hf import hf_config_from_spec, model_spec_from_hf
from mindformers_ext.core.config.schedule import Schedule
from mindformers_ext.core.config.train import OptimizerSpec, TrainSpec
from mindformers_ext.core.philox import noise_keys
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.causal_lm import build_causal_lm as build_mindspore
from mindformers_ext.ms.engine import MindSporeNetwork
from mindformers_ext.ms.generate import MindSporeSession
from mindformers_ext.ms.step import LossNetwork
from mindformers_ext.ms.trainer import DataParallel, MindSporeTrainer
from mindformers_ext.pt import names
from mindformers_ext.pt.causal_lm import build_causal_lm as build_torch
from mindformers_ext.pt.generate import PyTorchSession
from mindformers_ext.pt.trainer import TorchTrainer
from mindformers_ext.weights.convert import to_hf, to_mindspore
from tests.helpers.llama_moe_models import UNEQUAL, model_of, token_ids
from tests.helpers.noise import mixture_noise

pytestmark = pytest.mark.slow  # all together more than 30 seconds

WORDS = {"gate_balance_loss_weight": 0.1, "score_scale_factor": [2.5, 1.0, 2.0], "gate_network": "mlp"}
OTHERS = {"gate_network": "linear", "gate_use_softmax": False, "load_compat": "reference", "tie_word_embeddings": True}
RESIDUAL = {"num_experts": 6, "num_experts_residual": 2, "intermediate_size": 40}
RESIDUAL |= {"intermediate_size_moe": 30, "intermediate_size_residual": 10}
EVERYTHING = {
    "size_experts": [[5, 7, 3, 5, 5, 5]] * 3,
    "size_experts_residual": [[3, 7], [5, 5], [9, 1]],
    "score_scale_factor_residual": [2.0, 1.0, 0.5],
    "use_weighting": True,
}
RESIDUAL_UNEQUAL = "residual, unequal, weighed against the routed"
THRESHOLD = {"gate_network": "threshold", "gate_use_softmax": False, "multiply_gate_scores": False}
THRESHOLD |= {"gate_use_balance": False, "gate_add_noise": False}
RESIDUAL_THRESHOLD = "residual, by threshold"
CASES: dict[str, dict[str, Any]] = {
    "two layers": WORDS,
    "linear, logits, as released, tied": WORDS | OTHERS,
    "unequal": WORDS | {"size_experts": UNEQUAL},
    RESIDUAL_UNEQUAL: WORDS | RESIDUAL | EVERYTHING,
    "residual, logits": WORDS | RESIDUAL | {"gate_use_softmax_residual": False},
    "residual, plain sum": WORDS | RESIDUAL | {"multiply_gate_scores_residual": False},
    "by threshold, unequal": THRESHOLD | {"num_selects": 5, "size_experts": UNEQUAL},
    RESIDUAL_THRESHOLD: THRESHOLD | RESIDUAL | {"num_selects": 6},
}
SEED, UPDATES, BATCH, LENGTH = 9, 3, 2, 11
FIGURES = ("lm_loss", "aux_loss", "global_norm")
KEYS = noise_keys(SEED, UPDATES, range(BATCH))


def ids() -> np.ndarray:
    """(B, S+1)."""
    return token_ids(BATCH, LENGTH + 1).numpy()


@functools.cache
def theirs(case: str) -> tuple[NetworkSpec, dict[str, np.ndarray], np.ndarray, float, dict[str, np.ndarray]]:
    """Our spec of the saved model and its weights; logits of evaluation, loss and gradients of a training step."""
    model = model_of(**CASES[case])
    spec = NetworkSpec(
        model=model_spec_from_hf(model.config.to_dict() | {"model_type": "llama_moe"}), seq_length=LENGTH
    )
    weights = to_mindspore({n: p for n, p in model.state_dict().items()}, spec.model)
    tokens = torch.from_numpy(ids()).long()
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.numpy()
    model.train()
    for place, layer in enumerate(model.model.layers if spec.noise_shape else ()):
        noise = torch.from_numpy(mixture_noise(KEYS, place, spec.noise_shape)).flatten(0, 1)
        getattr(layer.mlp, "moe_layer", layer.mlp).gate.draw = lambda logits, noise=noise: noise
    found = model(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), tokens[:, 1:].flatten()) + found.balance_loss
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return spec, weights, logits, loss.item(), to_mindspore(gradients, spec.model)


def assert_same(case: str, engine: str, logits: np.ndarray, loss: float, gradients: dict[str, np.ndarray]) -> None:
    _, _, wanted_logits, wanted_loss, wanted = theirs(case)
    assert gradients.keys() == wanted.keys()
    worst = {n: float(np.abs(gradients[n] - g).max() / (np.abs(g).max() + 1e-9)) for n, g in wanted.items()}
    name = max(worst, key=lambda name: worst[name])
    difference = float(np.abs(logits - wanted_logits).max())
    print(f"\n{case} {engine}: logits {difference:.1e} loss {abs(loss - wanted_loss):.1e} gradient {worst[name]:.1e}")
    assert 0.5 <= np.abs(wanted_logits).max() <= 20
    assert difference <= 1e-4 and abs(loss - wanted_loss) <= 1e-5 and worst[name] <= 1e-3


@pytest.mark.parametrize("case", CASES)
def test_torch_equals_the_saved_code(case: str) -> None:
    spec, weights, *_ = theirs(case)
    network = build_torch(spec)
    names.load(network, weights)
    network.eval()
    with torch.no_grad():
        logits = network(torch.from_numpy(ids()[:, :-1]).long()).numpy()
    terms = network.train()(torch.from_numpy(ids()).long(), losses=True, keys=torch.from_numpy(KEYS))
    terms.loss.backward()
    gradients = {}
    for name, parameter in network.named_parameters():
        gradients |= {part: view.numpy() for part, view in names.split_experts(name, parameter.grad).items()}
    assert_same(case, "PyTorch", logits, terms.loss.item(), gradients)


@pytest.mark.parametrize("case", ["two layers", RESIDUAL_UNEQUAL, RESIDUAL_THRESHOLD])
def test_mindspore_equals_the_saved_code(case: str) -> None:
    spec, weights, *_ = theirs(case)
    ms.set_context(mode=ms.PYNATIVE_MODE)  # compiled: tests/ms/test_llama_moe.py, tests/mf/test_noise.py
    network = build_mindspore(spec)
    MindSporeNetwork(network).load(weights)
    logits = network(Tensor(ids()[:, :-1].astype(np.int32))).asnumpy()
    parameters = network.trainable_params()
    step = ms.value_and_grad(LossNetwork(network).set_train(), None, parameters, has_aux=True)
    keys = (Tensor(KEYS),) if spec.noise_shape else ()
    terms, gradients = step(Tensor(ids().astype(np.int32)), *keys)
    named = {item.name: gradient.asnumpy() for item, gradient in zip(parameters, gradients, strict=True)}
    assert_same(case, "MindSpore", logits, float(terms[0].asnumpy()), named)


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_the_saved_code_reads(case: str) -> None:
    """Names and sizes of every tensor, and every word of the configuration."""
    spec, weights, *_ = theirs(case)
    model = model_of(**CASES[case])
    back, held = to_hf(weights, spec.model), model.state_dict()
    assert back.keys() == held.keys() - ({"lm_head.weight"} if spec.model.tie_word_embeddings else set())
    assert all(np.array_equal(back[name], held[name].numpy()) for name in back)
    config = type(model.config)(**hf_config_from_spec(spec.model)).to_dict()
    known = {**model.config.to_dict(), "architectures": config["architectures"]}
    same = {name for name in known if name not in ("transformers_version", "torch_dtype", "dtype")}
    assert {name: config.get(name) for name in same} == {name: known[name] for name in same}


@pytest.mark.turn("noise")
def test_both_trainers_add_the_same_noise_and_go_on_with_it() -> None:
    """Three steps of two micro batches; then each engine takes the last one again from its state before it: PyTorch in
    another trainer, MindSpore in the compiled one."""
    ms.set_context(mode=ms.GRAPH_MODE)
    spec = theirs("two layers")[0]
    factors = {"score_scale_factor": 2.0, "capacity_factor": 1.5}
    model = replace(spec.model, num_hidden_layers=1, moe=replace(spec.model.routing, **factors))
    spec = replace(spec, model=model, batch_size=4)
    schedule = Schedule(kind="ConstantWarmUpLR", learning_rate=1e-2, total_steps=3)
    train = TrainSpec(optimizer=OptimizerSpec(), schedule=schedule, steps=3, seed=5, micro_batches=2)
    asked = spec, train, torch.device("cpu")
    trainers = MindSporeTrainer(spec, train, DataParallel()), TorchTrainer(*asked)
    rows = [token_ids(4, LENGTH + 1, seed).numpy() for seed in range(3)]
    states: list[dict[str, np.ndarray]] = []
    for trainer in trainers:
        trainer.open()
    for number, ids_BT in enumerate(rows):
        if number == 2:
            states = [{n: np.copy(a) for n, a in trainer.state(adapters=False)} for trainer in trainers]
        figures = [trainer.step((ids_BT,)) for trainer in trainers]
        for name in FIGURES:
            assert getattr(figures[0], name) == pytest.approx(getattr(figures[1], name), rel=2e-4), (number, name)
    for trainer, state, last in zip((trainers[0], TorchTrainer(*asked)), states, figures, strict=True):
        trainer.fill((name, array) for name, array in state.items() if name.startswith(("model.", "lm_head.")))
        if trainer is not trainers[0]:
            trainer.open()
        trainer.restore(state)
        again = trainer.step((rows[2],))
        assert [getattr(again, name) for name in FIGURES] == [getattr(last, name) for name in FIGURES]


def torch_session(spec: NetworkSpec, weights: dict[str, np.ndarray]) -> PyTorchSession:
    network = build_torch(spec)
    names.load(network, weights)
    return PyTorchSession(network.eval(), 2, 9, 20, torch.device("cpu"))


def mindspore_session(spec: NetworkSpec, weights: dict[str, np.ndarray]) -> MindSporeSession:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    network = MindSporeNetwork(build_mindspore(spec))
    network.load(weights)
    return network.session(2, 9, 20)


SESSIONS = [torch_session, pytest.param(mindspore_session, marks=pytest.mark.turn("noise"))]  # graphs: 15 s


@pytest.mark.parametrize("open_session", SESSIONS)
@pytest.mark.parametrize("case", [RESIDUAL_UNEQUAL, RESIDUAL_THRESHOLD])
def test_generates_with_a_cache_what_the_saved_code_does_without(open_session: Callable, case: str) -> None:
    """Two prompts of different lengths at once."""
    spec, weights, *_ = theirs(case)
    model = model_of(**CASES[case])
    session = open_session(spec, weights)
    session.compile()
    tokens, lengths = ids()[:, :9], np.array([9, 5])
    chosen = [session.prompt(tokens, lengths).argmax(-1)]
    for step in range(7):
        chosen.append(session.token(chosen[-1], lengths + step).argmax(-1))
    for row, length in enumerate(lengths):
        text = torch.from_numpy(tokens[row : row + 1, :length]).long()
        for _ in range(8):
            with torch.no_grad():
                text = torch.cat((text, model(text, use_cache=False).logits[:, -1:].argmax(-1)), 1)
        assert text[0, length:].tolist() == [int(step[row]) for step in chosen]
