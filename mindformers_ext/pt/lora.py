# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters beside the linear layers of a built network; names and start values are those of ``ms.lora``."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindformers_ext.core.config.lora import LoraSpec
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.philox import normal
from mindformers_ext.pt.linear import Linear

INIT_STD = 0.01  # of A; B starts at zero, so that training starts from the base network


class LoraLinear(nn.Module):
    """W x + b + scale * B A dropout(x). Input (T, in), output (T, out); W and b are the layer's own, and stay."""

    def __init__(self, linear: Linear, lora: LoraSpec, seed: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        rows, width = linear.weight.shape
        drawn = torch.from_numpy(normal(seed, lora.rank * width, INIT_STD)).view(lora.rank, width)
        self.mindpet_delta_lora_a = nn.Parameter(drawn.to(linear.weight))
        self.mindpet_delta_lora_b = nn.Parameter(torch.zeros(rows, lora.rank).to(linear.weight))
        self.scale, self.dropout = lora.scale, lora.dropout

    def forward(self, x_TD: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x_TD.dtype)
        base = F.linear(x_TD, self.weight.to(x_TD.dtype), bias)
        x_TD = F.dropout(x_TD, self.dropout, self.training)
        narrow = F.linear(x_TD, self.mindpet_delta_lora_a.to(x_TD.dtype)) * self.scale
        return base + F.linear(narrow, self.mindpet_delta_lora_b.to(x_TD.dtype))


def add_lora(network: nn.Module, lora: LoraSpec, seeds: Iterator[int]) -> list[str]:
    """Adapt every linear layer that ``lora`` wants; freeze all other parameters. Returns the layers' names.

    Raises:
        UserError: no layer's name matches, or one that matches is no linear layer (experts, router, embedding).
    """
    layers = {name: module for name, module in network.named_modules() if isinstance(module, Linear)}
    wanted = [name for name in layers if lora.wants(name)]
    owners = {name.rpartition(".")[0] for name, _ in network.named_parameters()}
    other = sorted(name for name in owners - set(layers) if name and lora.wants(name))
    kinds = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in layers}))
    if other:
        raise UserError(
            f"pet_config.target_modules={lora.targets!r} matches {', '.join(other[:3])}: only linear "
            f"layers are adapted, here {kinds}; name those, or list the others in exclude_layers"
        )
    if not wanted:
        raise UserError(f"pet_config.target_modules={lora.targets!r} matches no layer: the linear layers are {kinds}")
    network.requires_grad_(False)
    for name in wanted:
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, LoraLinear(layers[name], lora, next(seeds)))
    return wanted
