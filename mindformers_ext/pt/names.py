# SPDX-License-Identifier: Apache-2.0
"""MindFormers' names of a network's tensors, each as a view: checkpoints of both engines hold the same tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mindformers_ext.core.errors import Problems, UserError

STATE = ("topk_bias", "expert_load")  # router state with sensible start values; a weight file need not hold it
LISTED = 10


def split_experts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The MindFormers tensors inside one of ours: w1 and w3 lie one above the other in ``gate_up``."""
    if name.endswith(".ffn.gate_up"):
        stem, half = name.removesuffix("gate_up"), tensor.shape[1] // 2
        return {f"{stem}w1.weight": tensor[:, :half], f"{stem}w3.weight": tensor[:, half:]}
    if name.endswith(".ffn.down"):
        return {name.removesuffix("down") + "w2.weight": tensor}
    return {name: tensor}


def named_views(network: nn.Module) -> dict[str, Tensor]:
    """MindFormers' name -> view of the storage, parameters first, then router state."""
    views: dict[str, Tensor] = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        views |= split_experts(name, tensor.detach())
    return views


def load(network: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Fill all parameters from ``weights``, cast to their types.

    Raises:
        UserError: lists what is missing, what no parameter wants, and what has another shape.
    """
    views = named_views(network)
    problems = Problems("weights for the network")
    _list(problems, "missing", [f"'{n}'" for n in views if n not in weights and not _is_state(n)])
    _list(problems, "unwanted", [f"'{name}'" for name in weights if name not in views])
    wrong = [name for name in views if name in weights and tuple(views[name].shape) != weights[name].shape]
    _list(problems, "misshaped", [f"'{n}' {weights[n].shape} instead of {tuple(views[n].shape)}" for n in wrong])
    problems.raise_if_any()
    for name, weight in weights.items():
        set_view(views[name], weight)


def fill(network: nn.Module, weights: Iterable[tuple[str, np.ndarray]], optional: tuple[str, ...] = ()) -> None:
    """As ``load``, one tensor at a time; names that end in ``optional`` need not come.

    Raises:
        UserError: a tensor that no parameter wants, or whose shape differs, where it comes; what is missing, at the
            end.
    """
    views = named_views(network)
    missing = {name for name in views if not _is_state(name) and not name.endswith(optional)}
    for name, weight in weights:
        if name not in views or tuple(views[name].shape) != weight.shape:
            raise UserError(
                f"weight '{name}' {weight.shape} has no place in the network: the checkpoint was made "
                "for another model or other sizes"
            )
        set_view(views[name], weight)
        missing.discard(name)
    if missing:
        raise UserError(f"the checkpoint lacks {', '.join(sorted(missing)[:LISTED])}: give the whole model")


def _is_state(name: str) -> bool:
    return name.split(".")[-1] in STATE


def set_view(view: Tensor, weight: np.ndarray) -> None:
    """Copy a numpy array (any float type) into a view of a parameter."""
    # through float32: numpy's own types do not cover bfloat16
    with torch.no_grad():
        view.copy_(torch.from_numpy(np.array(weight, dtype=np.float32, copy=True)))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy in main memory; bfloat16 as its bits (uint16), since numpy has no such type."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()


def _list(problems: Problems, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        problems.add(
            f"{len(names)} tensors are {what}: {', '.join(names[:LISTED])}{more}",
            "the checkpoint was made for another model or other sizes",
        )
