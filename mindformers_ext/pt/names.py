# SPDX-License-Identifier: Apache-2.0
"""MindFormers' names of a network's tensors, each as a view: checkpoints of both engines hold the same tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mindformers_ext.core.weight_fit import check_weights, fitting


def split_experts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The MindFormers tensors inside one of ours: w1 and w3 lie one above the other in ``gate_up``."""
    if name.endswith(".ffn.gate_up"):
        stem, half = name.removesuffix("gate_up"), tensor.shape[1] // 2
        return {f"{stem}w1.weight": tensor[:, :half], f"{stem}w3.weight": tensor[:, half:]}
    if name.endswith(".ffn.bias"):
        return {name.removesuffix("bias") + "w2.bias": tensor}
    if name.endswith(".ffn.down"):
        return {name.removesuffix("down") + "w2.weight": tensor}
    return {name: tensor}


def named_views(network: nn.Module) -> dict[str, Tensor]:
    """MindFormers' name -> view of the storage, parameters first, then router state."""
    views: dict[str, Tensor] = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        views |= split_experts(name, tensor.detach())
    return views


def shapes(views: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each view."""
    return {name: tuple(view.shape) for name, view in views.items()}


def load(network: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Fill all parameters from ``weights``, cast to their types.

    Raises:
        UserError: lists what is missing, what no parameter wants, and what has another shape.
    """
    views = named_views(network)
    check_weights(shapes(views), weights)
    for name, weight in weights.items():
        set_view(views[name], weight)


def fill(network: nn.Module, weights: Iterable[tuple[str, np.ndarray]], optional: tuple[str, ...] = ()) -> None:
    """As ``load``, one tensor at a time; names that end in ``optional`` need not come.

    Raises:
        UserError: a tensor that no parameter wants, or whose shape differs, where it comes; what is missing, at the
            end.
    """
    views = named_views(network)
    for name, weight in fitting(shapes(views), weights, [name for name in views if name.endswith(optional)]):
        set_view(views[name], weight)
        del weight  # or it lives on while the next one is read


def set_view(view: Tensor, weight: np.ndarray) -> None:
    """Copy a numpy array (any float type) into a view of a parameter."""
    # through float32: numpy's own types do not cover bfloat16; torch warns of what cannot be written to
    plain = np.require(weight, np.float32, ["W"])
    with torch.no_grad():
        view.copy_(torch.from_numpy(plain))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy in main memory; bfloat16 as its bits (uint16), since numpy has no such type."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()
