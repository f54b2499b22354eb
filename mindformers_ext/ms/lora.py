# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters beside the linear layers of a built network."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, Zero, initializer

from mindformers_ext.core.config.lora import DROPOUT_SEED, LORA_A, LORA_B, LoraSpec
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.attention import Linear
from mindformers_ext.ms.ops.select import select_operators
from mindformers_ext.ms.strategies import Shards

# How the tensors of an adapter lie beside those of its layer (the words of ``ms.strategies``): x and y as the layer has
# them, the narrow one whole along its rank.
LAYOUTS: dict[str, dict[str, str]] = {
    "in": {"x": "dp -", "a": "- -", "narrow": "dp -", "middle": "dp -", "b": "mp -", "y": "dp mp"},
    "out": {"x": "dp mp", "a": "- mp", "narrow": "dp -", "middle": "tok -", "b": "- -", "y": "tok -"},
    "head": {"x": "rest -", "a": "- -", "narrow": "rest -", "middle": "rest -", "b": "head -", "y": "rest head"},
}
KINDS = {"wo": "out", "w2": "out", "lm_head": "head"}
INIT_STD = 0.01  # of A, as MindFormers' 'normal'; B starts at zero, so that training starts from the base network


@dataclass(frozen=True)
class Seeds:
    """``held``: of every adapted layer's dropout (layers), int32. ``dropout`` makes the operator that takes one."""

    held: Parameter
    dropout: Callable[[float], nn.Cell]


class LoraLinear(nn.Cell):
    """W x + scale * B A dropout(x). Input (T, in), output (T, out); W is the adapted layer's own, and stays as it is.

    Args:
        linear: the layer that is adapted.
        name: its name in the network.
        lora: rank, scale, dropout.
        shards: the network's strategies.
        seeds: what dropout follows from, None where MindSpore's own is taken; ``place``: which seed is this one's.
    """

    def __init__(
        self, linear: Linear, name: str, lora: LoraSpec, shards: Shards, seeds: Seeds | None, place: int
    ) -> None:
        super().__init__(auto_prefix=False)
        self.linear = linear
        width_out, width_in = linear.weight.shape
        kind = linear.weight.dtype
        self.lora_a = Parameter(initializer(Normal(sigma=INIT_STD), (lora.rank, width_in), kind), f"{name}.{LORA_A}")
        self.lora_b = Parameter(initializer(Zero(), (width_out, lora.rank), kind), f"{name}.{LORA_B}")
        self.scale = Tensor(lora.scale, ms.float32)
        self.drops = lora.dropout > 0
        cut = _Cut(shards, LAYOUTS[KINDS.get(name.rpartition(".")[2], "in")])
        self.seeds, self.place = seeds.held if seeds else None, place
        keep = 1.0 - lora.dropout
        self.dropout = seeds.dropout(keep) if seeds else cut.rows(P.Dropout(keep_prob=keep), "x")
        self.narrow = cut(P.MatMul(transpose_b=True), "x a", "narrow")
        self.times = cut.rows(P.Mul(), "narrow", scalars=1)
        self.wide = cut(P.MatMul(transpose_b=True), "middle b", "y")
        self.add = cut(P.Add(), "y y")

    def construct(self, x_TD: Tensor) -> Tensor:
        base = self.linear(x_TD)
        if self.drops and self.training:
            x_TD = self.dropped(x_TD)
        narrow = self.narrow(x_TD, ops.cast(self.lora_a, x_TD.dtype))
        narrow = self.times(narrow, ops.cast(self.scale, narrow.dtype))
        return self.add(base, self.wide(narrow, ops.cast(self.lora_b, narrow.dtype)))

    def dropped(self, x_TD: Tensor) -> Tensor:
        """The input with some of its elements zero."""
        if self.seeds is None:
            return self.dropout(x_TD)[0]
        return self.dropout(x_TD, self.seeds[self.place])


class _Cut:
    """Gives operators the layouts of one kind of layer; on one device it leaves them alone."""

    def __init__(self, shards: Shards, layouts: dict[str, str]) -> None:
        self.shards, self.layouts = shards, layouts

    def __call__(self, primitive: P.Primitive, inputs: str, output: str = "") -> P.Primitive:
        """``primitive`` with the layouts of these tensors; without ``output`` MindSpore derives its own."""
        if not self.shards.active:
            return primitive
        layouts = tuple(self.shards.layout(self.layouts[name]) for name in inputs.split())
        if not output:
            return primitive.shard(layouts)
        return primitive.shard(layouts, (self.shards.layout(self.layouts[output]),))

    def rows(self, primitive: P.Primitive, name: str, scalars: int = 0) -> P.Primitive:
        """``primitive`` of one tensor, and scalars, which MindSpore takes as a strategy of counts only."""
        if not self.shards.active:
            return primitive
        sizes = {"outer": self.shards.outer, "ep": self.shards.ep, "mp": self.shards.mp}
        counts = tuple(
            math.prod(sizes[axis] for axis in self.shards.words[word]) for word in self.layouts[name].split()
        )
        return primitive.shard((counts,) + ((),) * scalars)


def add_lora(network: nn.Cell, lora: LoraSpec, spec: NetworkSpec | None = None) -> list[str]:
    """Adapt every linear layer that ``lora`` wants; freeze all other parameters. Returns the layers' names.

    ``spec``: the network's, for its strategies on many devices; None on one device.

    Raises:
        UserError: no layer's name matches, or one that matches is no linear layer (experts, router, embedding).
    """
    layers = {name: cell for name, cell in network.cells_and_names() if isinstance(cell, Linear)}
    wanted = [name for name in layers if lora.wants(name)]
    owners = {parameter.name.rpartition(".")[0] for parameter in network.get_parameters()}
    other = sorted(name for name in owners - set(layers) if name and lora.wants(name))
    if other:
        raise UserError(
            f"pet_config.target_modules={lora.targets!r} matches {_some(other)}: only linear "
            f"layers are adapted, here {_kinds(layers)}; name those, or list the others in "
            "exclude_layers"
        )
    if not wanted:
        raise UserError(
            f"pet_config.target_modules={lora.targets!r} matches no layer: the linear layers are {_kinds(layers)}"
        )
    for parameter in network.get_parameters():
        parameter.requires_grad = False
    cells, shards = dict(network.cells_and_names()), Shards(spec)
    dropout = select_operators().dropout if lora.dropout else None
    held = Parameter(Tensor(np.zeros(len(wanted)), ms.int32), DROPOUT_SEED, requires_grad=False)
    seeds = Seeds(held, dropout) if dropout else None
    for place, name in enumerate(wanted):
        parent, _, child = name.rpartition(".")
        adapted = LoraLinear(layers[name], name, lora, shards, seeds, place)
        names = [(parameter, parameter.name) for parameter in adapted.get_parameters()]
        setattr(cells[parent], child, adapted)
        for parameter, right in names:  # the parent put its own prefix before them
            parameter.name = right
    return wanted


def adapter_parameters(network: nn.Cell) -> list[Parameter]:
    """The adapters' parameters, which alone are trained; empty without LoRA."""
    return [parameter for parameter in network.get_parameters() if parameter.name.endswith((LORA_A, LORA_B))]


def _kinds(layers: dict[str, Linear]) -> str:
    return ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in layers}))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
