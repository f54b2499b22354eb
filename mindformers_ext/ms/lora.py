# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters beside the linear layers of a built network."""

from __future__ import annotations

import re

import mindspore.ops.operations as P
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, Zero, initializer

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.lora import LORA_A, LORA_B, LoraSpec
from mindformers_ext.ms.attention import Linear

INIT_STD = 0.01  # of A, as MindFormers' 'normal'; B starts at zero, so that training starts from the base network


class LoraLinear(nn.Cell):
    """W x + scale * B A dropout(x). Input (T, in), output (T, out); W is the adapted layer's own, and stays as it is.

    Args:
        linear: the layer that is adapted.
        name: its name in the network.
        lora: rank, scale, dropout.
    """

    def __init__(self, linear: Linear, name: str, lora: LoraSpec) -> None:
        super().__init__(auto_prefix=False)
        self.linear = linear
        width_out, width_in = linear.weight.shape
        kind = linear.weight.dtype
        self.lora_a = Parameter(initializer(Normal(sigma=INIT_STD), (lora.rank, width_in), kind), f"{name}.{LORA_A}")
        self.lora_b = Parameter(initializer(Zero(), (width_out, lora.rank), kind), f"{name}.{LORA_B}")
        self.product = P.MatMul(transpose_b=True)
        self.scale = lora.scale
        self.drops = lora.dropout > 0
        self.dropout = nn.Dropout(p=lora.dropout)

    def construct(self, x_TD: Tensor) -> Tensor:
        base = self.linear(x_TD)
        if self.drops:
            x_TD = self.dropout(x_TD)
        narrow = self.product(x_TD, ops.cast(self.lora_a, x_TD.dtype))
        return base + self.product(narrow, ops.cast(self.lora_b, narrow.dtype)) * self.scale


def add_lora(network: nn.Cell, lora: LoraSpec) -> list[str]:
    """Adapt every linear layer that ``lora`` wants; freeze all other parameters. Returns the layers' names.

    Raises:
        UserError: no layer's name matches, or one that matches is no linear layer (experts, router, embedding).
    """
    layers = {name: cell for name, cell in network.cells_and_names() if isinstance(cell, Linear)}
    wanted = [name for name in layers if lora.wants(name)]
    owners = {parameter.name.rpartition(".")[0] for parameter in network.get_parameters()}
    other = sorted(name for name in owners - set(layers) if name and lora.wants(name))
    if other:
        raise UserError(f"pet_config.target_modules={lora.targets!r} matches {_some(other)}: only linear "
                        f"layers are adapted, here {_kinds(layers)}; name those, or list the others in "
                        "exclude_layers")  # fmt: skip
    if not wanted:
        raise UserError(f"pet_config.target_modules={lora.targets!r} matches no layer: the linear layers are "
                        f"{_kinds(layers)}")  # fmt: skip
    for parameter in network.get_parameters():
        parameter.requires_grad = False
    cells = dict(network.cells_and_names())
    for name in wanted:
        parent, _, child = name.rpartition(".")
        adapted = LoraLinear(layers[name], name, lora)
        names = [(parameter, parameter.name) for parameter in adapted.get_parameters()]
        setattr(cells[parent], child, adapted)
        for parameter, right in names:  # the parent put its own prefix before them
            parameter.name = right
    return wanted


def adapter_parameters(network: nn.Cell) -> list[Parameter]:
    """The adapters' parameters, which alone are trained; empty without LoRA."""
    return [parameter for parameter in network.get_parameters() if parameter.name.endswith((LORA_A, LORA_B))]


def is_adapter_state(name: str) -> bool:
    """Whether a name in a checkpoint belongs to an adapter: its weights or its optimizer state."""
    return name.endswith((LORA_A, LORA_B))


def _kinds(layers: dict[str, Linear]) -> str:
    return ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in layers}))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
