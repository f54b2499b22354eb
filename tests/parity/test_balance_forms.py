# SPDX-License-Identifier: Apache-2.0
"""The loss that balances experts, in its three forms and both engines, beside its closed form in float64."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn

from mindformers_ext.core.layers import BALANCES, LEGACY_CONSTANT, SWITCH, MoESpec
from mindformers_ext.ms.moe import aux_loss as mindspore
from mindformers_ext.pt.moe import aux_loss as pytorch

Engine = Callable[..., tuple[float, np.ndarray]]
EXPERTS, CHOSEN, TOKENS, LAYERS, FACTOR = 6, 2, 12, 3, 0.4


def spec(shape: str) -> MoESpec:
    """With a factor of k, the loss is that of the published words: k where all experts are used alike."""
    losses = (("expert", FACTOR * CHOSEN),)
    return MoESpec(
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        aux_losses=losses,
        aux_loss_type=shape,
        aux_loss_reduce="mean",
    )


def of_torch(shape: str, logits: np.ndarray, taken: np.ndarray, counted: np.ndarray | None) -> tuple[float, np.ndarray]:
    """Value and gradient at the logits (layers, tokens, E)."""
    leaf, moe = torch.from_numpy(logits).requires_grad_(), spec(shape)
    loss, mask = pytorch.AuxiliaryLoss(moe), None if counted is None else torch.from_numpy(counted)[None] > 0
    weight = np.ones(TOKENS, np.float32) if counted is None else counted
    sums = sum(
        loss(
            leaf[n][None], leaf[n][None].softmax(-1), torch.from_numpy((taken[n] * weight[:, None]).sum(0))[None], mask
        )
        for n in range(LAYERS)
    )
    assert isinstance(sums, torch.Tensor)
    value = pytorch.JointLoss([moe], LAYERS)(sums) if moe.joins_layers else sums.mean() / LAYERS
    if not value.requires_grad:
        return value.item(), np.zeros_like(logits)
    value.backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad.numpy()


class Whole(nn.Cell):
    """All layers' loss of logits (L, T, E), the assignments (L, T, E) and which tokens count (T)."""

    def __init__(self, moe: MoESpec) -> None:
        super().__init__()
        self.loss, self.joint, self.joins = (
            mindspore.AuxiliaryLoss(moe),
            mindspore.JointLoss([moe], LAYERS),
            moe.joins_layers,
        )

    def construct(self, logits: Tensor, taken: Tensor, counted: Tensor) -> Tensor:
        sums = None
        for n in range(LAYERS):
            layer = logits[n : n + 1]
            counts = (taken[n : n + 1] * counted.reshape((1, -1, 1))).sum(1)
            found = self.loss.per_group(layer, ms.ops.softmax(layer, -1), counts, counted.reshape((1, -1)))
            sums = found if sums is None else sums + found
        return self.joint(sums) if self.joins else sums.mean() / LAYERS


def of_mindspore(
    shape: str, logits: np.ndarray, taken: np.ndarray, counted: np.ndarray | None
) -> tuple[float, np.ndarray]:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    weight = np.ones(TOKENS, np.float32) if counted is None else counted
    value, gradient = ms.value_and_grad(Whole(spec(shape)), 0)(Tensor(logits), Tensor(taken), Tensor(weight))
    return float(value.asnumpy()), gradient.asnumpy()


def closed_form(
    shape: str, logits: np.ndarray, taken: np.ndarray, counted: np.ndarray | None
) -> tuple[float, np.ndarray]:
    """coefficient * E * sum of f_e P_e, f summing to k; the mean over layers, or once of all tokens."""
    keep = np.ones(TOKENS, bool) if counted is None else counted > 0
    leaf = torch.from_numpy(logits.astype(np.float64)).requires_grad_()
    if shape == LEGACY_CONSTANT:
        return FACTOR * EXPERTS / CHOSEN, np.zeros_like(logits)
    chance, share = leaf.softmax(-1)[:, keep], torch.from_numpy(taken.astype(np.float64))[:, keep]
    if shape == SWITCH:
        chance, share = chance.flatten(0, 1)[None], share.flatten(0, 1)[None]
    value = FACTOR * EXPERTS * (share.mean(1) * chance.mean(1)).sum(1).mean()
    value.backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad.numpy()


def chosen_of(logits: np.ndarray) -> np.ndarray:
    taken = np.zeros_like(logits)
    np.put_along_axis(taken, np.argsort(-logits, -1)[..., :CHOSEN], 1, -1)
    return taken


@pytest.mark.parametrize("engine", [of_torch, of_mindspore])
@pytest.mark.parametrize("shape", BALANCES)
def test_value_and_gradient(shape: str, engine: Engine) -> None:
    logits = np.random.default_rng(1).normal(size=(LAYERS, TOKENS, EXPERTS)).astype(np.float32)
    taken, padded = chosen_of(logits), (np.arange(TOKENS) < 9).astype(np.float32)
    values = []
    for counted in (None, padded):
        (value, gradient), (wanted, wanted_gradient) = (f(shape, logits, taken, counted) for f in (engine, closed_form))
        assert value == pytest.approx(wanted, abs=1e-6)
        np.testing.assert_allclose(gradient, wanted_gradient, atol=1e-7)
        assert (np.abs(gradient).max() > 1e-4) == (shape != LEGACY_CONSTANT)
        values.append(value)
    other = logits.copy()
    other[:, 9:] = 7.0  # what padding holds changes nothing
    assert engine(shape, other, taken, padded)[0] == pytest.approx(values[1], abs=1e-6)


@pytest.mark.parametrize("engine", [of_torch, of_mindspore])
def test_from_balance_to_collapse(engine: Engine) -> None:
    """k where experts are used alike, E where all tokens want the same; the published constant sees neither."""
    even = np.zeros((LAYERS, TOKENS, EXPERTS), np.float32)
    alike = np.tile(np.eye(EXPERTS, dtype=np.float32)[np.arange(TOKENS) % EXPERTS], (LAYERS, 1, 1))
    alike += np.roll(alike, 1, -1)
    one = even.copy()
    one[..., :CHOSEN] = 30.0
    for shape in BALANCES[:2]:
        assert engine(shape, even, alike, None)[0] == pytest.approx(FACTOR * CHOSEN, abs=1e-5)
        assert engine(shape, one, chosen_of(one), None)[0] == pytest.approx(FACTOR * EXPERTS, abs=1e-5)
    assert engine(LEGACY_CONSTANT, one, chosen_of(one), None)[0] == pytest.approx(FACTOR * EXPERTS / CHOSEN)
