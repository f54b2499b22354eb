# SPDX-License-Identifier: Apache-2.0
"""The MoE layer as a loop over tokens in float64, differentiated by torch; and ours with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mindspore as ms
import numpy as np
import torch
from mindspore import Tensor, nn

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec, ParallelSpec
from mindformers_ext.ms.layer import build_feed_forward
from mindformers_ext.ms.ops.select import select_operators
from tests.helpers.routing import Routing, route

TOKENS, HIDDEN, FFN = 18, 10, 7
GATE, W1, W2, W3 = "router.dense.weight", "ffn.w1.weight", "ffn.w2.weight", "ffn.w3.weight"


@dataclass(frozen=True)
class Result:
    """Output (T, D), what the layer reports, and the gradients of sum(output * weight) by name, ``x`` included."""

    output: np.ndarray
    gradients: dict[str, np.ndarray]
    load: np.ndarray | None = None
    dropped: float = 0.0


def random_weights(experts: int, seed: int = 0, ffn: int = FFN) -> dict[str, np.ndarray]:
    """Weights large enough that the experts differ and the gate prefers."""
    generator = np.random.default_rng(seed)
    shapes = {
        GATE: (experts, HIDDEN),
        W1: (experts, ffn, HIDDEN),
        W2: (experts, HIDDEN, ffn),
        W3: (experts, ffn, HIDDEN),
    }
    return {name: generator.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def random_rows(seed: int, tokens: int = TOKENS) -> np.ndarray:
    """(T, D) float32."""
    return np.random.default_rng(seed).normal(size=(tokens, HIDDEN)).astype(np.float32)


def expert(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, w3: torch.Tensor) -> torch.Tensor:
    """w2(silu(w1 x) * w3 x)."""
    return (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def loop(x: torch.Tensor, w: dict[str, torch.Tensor], moe: MoESpec, groups: int) -> tuple[torch.Tensor, Routing]:
    """Token by token: the experts that kept it, weighted."""
    prob = torch.softmax((x @ w[GATE].T).reshape(groups, -1, moe.num_local_experts), -1)
    routing = route(prob.detach().numpy(), moe)
    chosen = torch.from_numpy(routing.combine // (routing.capacity + 1))
    gate = prob.gather(-1, chosen)
    if moe.num_experts_per_tok > 1:
        gate = gate / gate.sum(-1, keepdim=True)
    gate = (gate * torch.from_numpy(routing.coeff > 0)).reshape(-1, moe.num_experts_per_tok)
    chosen = chosen.reshape(gate.shape)
    rows = [
        sum(gate[t, j] * expert(x[t], *(w[name][e] for name in (W1, W2, W3))) for j, e in enumerate(chosen[t]))
        for t in range(len(x))
    ]
    return torch.stack(rows), routing


def dense_mixture(x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """Every expert on every token, weighted by its probability."""
    prob = torch.softmax(x @ w[GATE].T, -1)
    return sum(prob[:, e : e + 1] * expert(x, w[W1][e], w[W2][e], w[W3][e]) for e in range(prob.shape[1]))


def differentiated(function, x: np.ndarray, weights: dict[str, np.ndarray], weight: np.ndarray) -> Result:
    """``function(x, weights) -> output, routing or None`` in float64, with the gradients."""
    leaves = {name: torch.from_numpy(value.astype(np.float64)).requires_grad_() for name, value in weights.items()}
    leaf = torch.from_numpy(x.astype(np.float64)).requires_grad_()
    found = function(leaf, leaves)
    output, routing = found if isinstance(found, tuple) else (found, None)
    (output * torch.from_numpy(weight)).sum().backward()
    gradients = {
        name: (each.grad if each.grad is not None else torch.zeros_like(each)).numpy()
        for name, each in {**leaves, "x": leaf}.items()
    }
    if routing is None:
        return Result(output.detach().numpy(), gradients)
    return Result(output.detach().numpy(), gradients, routing.load, routing.dropped)


class Projected(nn.Cell):
    """sum(output * weight) of a layer, and what else it returns."""

    def __init__(self, layer: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, x_TD: Tensor, weight_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y_TD, _, report_GE = self.layer(x_TD)
        return (y_TD * weight_TD).sum(), y_TD, report_GE[:, :-1].sum(0), report_GE[:, -1].mean()


class ProjectedDense(nn.Cell):
    """The same of a layer without experts."""

    def __init__(self, layer: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, x_TD: Tensor, weight_TD: Tensor) -> tuple[Tensor, Tensor]:
        y_TD, _, _ = self.layer(x_TD)
        return (y_TD * weight_TD).sum(), y_TD


def spec_of(moe: MoESpec | None, groups: int = 1) -> NetworkSpec:
    """A network whose feed-forward layer has the sizes above."""
    model = ModelSpec(
        vocab_size=8,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        moe=moe,
    )
    return NetworkSpec(model=model, seq_length=TOKENS, parallel=ParallelSpec(data_parallel=groups))


def layer_of(moe: MoESpec | None, groups: int = 1) -> nn.Cell:
    """Our layer with fresh weights."""
    spec = spec_of(moe, groups)
    return build_feed_forward(spec, spec.model.layer(0), select_operators())


Run = Callable[[np.ndarray, np.ndarray], Result]


def layer_runner(moe: MoESpec, weights: dict[str, np.ndarray], groups: int = 1) -> Run:
    """Our layer in the current mode, as a function of x and weight; one graph per shape."""
    layer = layer_of(moe, groups)
    step = _step(layer, Projected(layer), weights)

    def run(x: np.ndarray, weight: np.ndarray) -> Result:
        (_, output, load, dropped), gradients = step(x, weight)
        return Result(output.asnumpy(), gradients, load.asnumpy(), float(dropped.asnumpy()))

    return run


def run_dense(x: np.ndarray, weights: dict[str, np.ndarray], weight: np.ndarray) -> Result:
    """LLaMA's dense feed-forward layer, named as ``w1.weight``, ..."""
    layer = layer_of(None)
    (_, output), gradients = _step(layer, ProjectedDense(layer), weights)(x, weight)
    return Result(output.asnumpy(), gradients)


def _step(layer: nn.Cell, projected: nn.Cell, weights: dict[str, np.ndarray]) -> Callable:
    parameters = {parameter.name: parameter for parameter in layer.trainable_params()}
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():  # before anything compiles
        parameter.set_data(Tensor(weights[name]))
    differentiate = ms.value_and_grad(projected, 0, list(parameters.values()), has_aux=True)

    def step(x: np.ndarray, weight: np.ndarray) -> tuple[tuple, dict[str, np.ndarray]]:
        outputs, (dx, gradients) = differentiate(Tensor(x), Tensor(weight))
        named = {name: gradient.asnumpy() for name, gradient in zip(parameters, gradients, strict=True)}
        return outputs, {**named, "x": dx.asnumpy()}

    return step


def assert_close(found: Result, expected: Result, atol: float = 2e-5) -> None:
    """Output, every gradient, load and dropped share."""
    np.testing.assert_allclose(found.output, expected.output, rtol=0, atol=atol)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        np.testing.assert_allclose(found.gradients[name], gradient, rtol=0, atol=atol, err_msg=name)
    if found.load is not None and expected.load is not None:
        np.testing.assert_array_equal(found.load, expected.load)
        assert abs(found.dropped - expected.dropped) < 1e-6
