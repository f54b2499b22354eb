# SPDX-License-Identifier: Apache-2.0
"""MindSpore behind the interface that jobs see (``jobs.engine``): specs and numpy arrays in, numpy arrays out."""

from __future__ import annotations

from collections.abc import Mapping

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from mindformers_ext.core.errors import Problems
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.models import build_causal_lm

STATE = ("topk_bias", "expert_load")  # router state with sensible start values; a weight file need not hold it
LISTED = 10


class MindSporeNetwork:
    """A causal language model on MindSpore."""

    def __init__(self, cell: nn.Cell) -> None:
        self.cell = cell
        cell.set_train(False)

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Fill the parameters from ``weights``, cast to the parameters' types.

        Raises:
            UserError: lists what is missing, what no parameter wants, and what has another shape.
        """
        parameters = {parameter.name: parameter for parameter in self.cell.get_parameters()}
        _check(parameters, weights)
        for name, parameter in parameters.items():
            if name in weights:
                # through float32: numpy's own types cover neither side's bfloat16
                parameter.set_data(Tensor(weights[name].astype(np.float32)).astype(parameter.dtype))

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 logits of shape (B, S, V) for token ids of shape (B, S); compiled once per shape."""
        return self.cell(Tensor(ids.astype(np.int32))).asnumpy().astype(np.float32)


class MindSporeEngine:
    """Builds networks that run on MindSpore's current device, in graph mode: the mode that trains."""

    name = "ms"

    def build(self, spec: NetworkSpec) -> MindSporeNetwork:
        """A network with fresh random weights."""
        ms.set_context(mode=ms.GRAPH_MODE)
        return MindSporeNetwork(build_causal_lm(spec))


def _check(parameters: Mapping[str, Parameter], weights: Mapping[str, np.ndarray]) -> None:
    held = {name: weight.shape for name, weight in weights.items()}
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    problems = Problems("weights for the network")
    _list(problems, "missing", [f"'{n}'" for n in wanted if n not in held and n.split(".")[-1] not in STATE])
    _list(problems, "unwanted", [f"'{name}'" for name in held if name not in wanted])
    wrong = [name for name in wanted if name in held and held[name] != wanted[name]]
    _list(problems, "misshaped", [f"'{name}' {held[name]} instead of {wanted[name]}" for name in wrong])
    problems.raise_if_any()


def _list(problems: Problems, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        problems.add(
            f"{len(names)} tensors are {what}: {', '.join(names[:LISTED])}{more}",
            "the checkpoint was made for another model or other sizes",
        )
