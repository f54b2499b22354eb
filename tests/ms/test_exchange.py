# SPDX-License-Identifier: Apache-2.0
"""Grouped experts on several devices are the experts of one: outputs, loads and every gradient.

The devices' own cells run here, and MindSpore differentiates each by itself; the operators that move rows between
devices (``AlltoAllV`` and ``AlltoAll`` are Ascend's alone) are permutations and sums of what lies on a board
(tests/helpers/many_devices.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.ms.moe.exchange import ExchangedProducts
from mindformers_ext.ms.moe.experts import GroupedProducts
from mindformers_ext.ms.moe.slots import SortedSlots
from mindformers_ext.ms.ops.select import select_operators
from tests.helpers.many_devices import Board, collectives_between
from tests.helpers.moe_twin import (
    GATE,
    HIDDEN,
    W1,
    W2,
    W3,
    Projected,
    Result,
    assert_close,
    differentiated,
    layer_of,
    layer_runner,
    loop,
    random_rows,
    random_weights,
)

EXPERTS, FFN, TOKENS, BIAS = 4, 6, 5, "ffn.w2.bias"  # TOKENS: of one routing group
MOE = MoESpec(
    num_local_experts=EXPERTS, num_experts_per_tok=2, intermediate_size=FFN, capacity_factor=-1.0, use_gmm=True
)


@dataclass(frozen=True)
class Box:
    """Devices in rows of ``mp`` in rows of ``ep``; ``own_rows``: each of ``mp`` has a routing group of its own."""

    outer: int
    ep: int
    mp: int
    own_rows: bool = False

    @property
    def devices(self) -> int:
        return self.outer * self.ep * self.mp

    def group(self, device: int) -> int:
        return device if self.own_rows else device // self.mp

    @property
    def groups(self) -> int:
        return self.devices if self.own_rows else self.outer * self.ep

    def parts(self, device: int) -> tuple[slice, slice]:
        """Experts and columns of a device."""
        e, m = device // self.mp % self.ep, device % self.mp
        experts, columns = EXPERTS // self.ep, FFN // self.mp
        return slice(e * experts, (e + 1) * experts), slice(m * columns, (m + 1) * columns)


@pytest.fixture(autouse=True)
def _operators_one_by_one() -> Iterator[None]:
    """Operators between devices are Python here. In turn MindSpore waits for each, 20 times faster than by spinning."""
    ms.set_context(mode=ms.PYNATIVE_MODE, pynative_synchronize=True)
    yield
    ms.set_context(mode=ms.GRAPH_MODE, pynative_synchronize=False)


def weights_of(seed: int, favoured: tuple[int, ...] = (), bias: bool = False) -> dict[str, np.ndarray]:
    """``favoured`` experts are everybody's choice where the first input is 1."""
    weights = random_weights(EXPERTS, seed, FFN)
    if bias:
        weights[BIAS] = np.random.default_rng(seed).normal(0, 0.5, (EXPERTS, HIDDEN)).astype(np.float32)
    for expert in favoured:
        weights[GATE][expert, 0] += 8.0
    return weights


def sliced(weights: dict[str, np.ndarray], box: Box, device: int) -> dict[str, np.ndarray]:
    experts, columns = box.parts(device)
    cuts = {
        GATE: (),
        W1: (experts, columns),
        W2: (experts, slice(None), columns),
        W3: (experts, columns),
        BIAS: (experts,),
    }
    return {name: value[cuts[name]] for name, value in weights.items()}


def device_layer(box: Box, moe: MoESpec, device: int, board: Board, weights: dict[str, np.ndarray]) -> nn.Cell:
    """The layer of one device: a network's of one, with that device's slots, weights and collectives."""
    layer, operators = layer_of(moe), select_operators()
    first, m = device // (box.mp * box.ep) * box.mp * box.ep, device % box.mp
    over_ep = [first + place * box.mp + m for place in range(box.ep)]
    over_mp = [device - m + place for place in range(box.mp)]
    collectives = (collectives_between(board, members, device, HIDDEN) for members in (over_ep, over_mp))
    layer.slots = SortedSlots(moe, box.ep > 1)
    products = GroupedProducts(operators, EXPERTS // box.ep)
    layer.ffn.grouped = ExchangedProducts(products, HIDDEN, *collectives, box.own_rows)
    values = sliced(weights, box, device)
    for _, cell in layer.cells_and_names():  # new parameters: set_data leaves the old shape to gradients of our own
        for key, parameter in cell.parameters_dict(recurse=False).items():
            setattr(cell, key.rpartition(".")[2], ms.Parameter(Tensor(values[parameter.name]), name=parameter.name))
    return layer


def on_devices(box: Box, moe: MoESpec, weights: dict[str, np.ndarray], x: np.ndarray, weight: np.ndarray) -> Result:
    """What all devices have found together, after checking that those which hold the same agree."""
    board = Board()
    layers = [device_layer(box, moe, device, board, weights) for device in range(box.devices)]
    steps = [ms.value_and_grad(Projected(layer), 0, layer.trainable_params(), has_aux=True) for layer in layers]
    found: dict[int, tuple] = {}
    x_GND, weight_GND = (rows.reshape(box.groups, TOKENS, HIDDEN) for rows in (x, weight))
    alike = 1 if box.own_rows else box.mp  # devices with one group: each has a part of its loss

    def turn(device: int) -> None:
        own = x_GND[box.group(device)], weight_GND[box.group(device)] / alike
        found[device] = steps[device](*map(Tensor, own))

    board.settle(box.devices, turn)
    output, load, dx = np.zeros_like(x_GND), np.zeros((box.groups, EXPERTS)), np.zeros_like(x_GND)
    gradients = {name: np.zeros_like(value) for name, value in weights.items()}
    for device in range(box.devices):
        ((_, y, counts, dropped), (dx_ND, of_weights)), group = found[device], box.group(device)
        if output[group].any():
            np.testing.assert_array_equal(output[group], y.asnumpy())
        output[group], load[group] = y.asnumpy(), counts.asnumpy()
        assert float(dropped) == 0
        dx[group] += dx_ND.asnumpy()
        for parameter, gradient in zip(layers[device].trainable_params(), of_weights, strict=True):
            sliced(gradients, box, device)[parameter.name] += gradient.asnumpy()  # views: adds in place
    gradients["x"] = dx.reshape(x.shape)
    return Result(output.reshape(x.shape), gradients, load.sum(0))


BOXES = [
    Box(2, 2, 1),
    Box(1, 4, 1),
    Box(1, 2, 2),
    Box(1, 2, 3, own_rows=True),
    Box(1, 1, 2),
    Box(1, 1, 2, own_rows=True),
]


@pytest.mark.parametrize("favoured", [(), (0, 1)], ids=["any load", "all to one device"])
@pytest.mark.parametrize("box", BOXES, ids=str)
def test_experts_on_devices_are_those_of_one(box: Box, favoured: tuple[int, ...]) -> None:
    """Capacity without a limit, grouped on one device, and the loop in float64."""
    weights, tokens = weights_of(3, favoured), box.groups * TOKENS
    x, weight = random_rows(1, tokens), random_rows(2, tokens)
    x[:, 0] = 1.0 if favoured else x[:, 0]
    found = on_devices(box, MOE, weights, x, weight)
    if favoured:
        assert found.load.tolist() == [tokens, tokens, 0, 0]
    slots = replace(MOE, use_gmm=False)
    assert_close(found, layer_runner(slots, weights, box.groups)(x, weight), atol=4e-5)
    assert_close(found, layer_runner(MOE, weights)(x, weight), atol=4e-5)  # no limit: one group is as good
    assert_close(found, differentiated(partial(loop, moe=slots, groups=box.groups), x, weights, weight), atol=4e-5)


@pytest.mark.parametrize("own_rows", [False, True])
def test_biases_of_experts_are_added_once(own_rows: bool) -> None:
    box, moe = Box(1, 2, 2, own_rows), replace(MOE, expert_bias=True)
    weights, tokens = weights_of(4, bias=True), box.groups * TOKENS
    x, weight = random_rows(1, tokens), random_rows(2, tokens)
    slots = layer_runner(replace(moe, use_gmm=False), weights, box.groups)
    assert_close(on_devices(box, moe, weights, x, weight), slots(x, weight), atol=4e-5)
