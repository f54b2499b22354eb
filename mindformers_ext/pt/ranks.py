# SPDX-License-Identifier: Apache-2.0
"""The processes of a job: who holds which rows, experts and slices. One process needs nothing of this."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.pt.causal_lm import CausalLM, Terms


class Ranks:
    """One process alone; ``pt.sharded`` has several."""

    rank, size = 0, 1

    def device_id(self, asked: int) -> int:
        """The number of this process's device."""
        return asked

    def share(self, rows: int) -> slice:
        """This process's rows among those of a step."""
        return slice(None)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """float64 values of all ranks added up."""
        return values

    def rest(self, network: nn.Module) -> None:
        """Behind a pass without a gradient: no rank keeps more than its slices."""

    def close(self) -> None:
        """Leave the job."""

    def local(self, spec: NetworkSpec) -> NetworkSpec:
        """The network of one rank, which routes its own groups of tokens."""
        return spec

    def cut(self, network: CausalLM, device: torch.device) -> CausalLM:
        """A network that all ranks have whole, on the device, every rank with its slices."""
        return network.to(device)

    def own(self, tensor: Tensor) -> Tensor:
        """This rank's slice, sharing storage."""
        return tensor

    def gradient(self, name: str, gradient: Tensor) -> Tensor:
        """This rank's slice of a parameter's gradient, averaged over ranks."""
        return gradient

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter of all ranks together."""
        return tensor

    def like(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """``tensor``, this rank's slice, laid out as ``parameter``."""
        return tensor

    def blank(self, name: str, parameter: Tensor) -> Tensor:
        """An empty tensor of a parameter's whole shape, float32, in main memory."""
        return torch.empty(parameter.shape, dtype=torch.float32)

    def take(self, moment: Tensor, whole: Tensor, name: str, parameter: Tensor) -> None:
        """Copy this rank's slice of ``whole`` into ``moment``."""
        moment.copy_(whole)

    def last_micro_batch(self, network: nn.Module, last: bool) -> None:
        """Gradients need to be exchanged behind the last micro batch only."""

    def counted(self, ids_BT: Tensor, labels_BT: Tensor | None, model: ModelSpec) -> Tensor | None:
        """Tokens that count, as the mean over ranks; None: those at hand."""
        return None

    def norm(self, gradients: list[Tensor]) -> float:
        """Euclidean norm of all gradients together."""
        return float(torch.stack(torch._foreach_norm(gradients)).norm())

    def average(self, terms: list[Terms]) -> tuple[float, float, float, np.ndarray, np.ndarray]:
        """(loss, lm_loss, aux_loss, expert_load, dropped): means over micro batches and ranks, the load their sum."""
        count = len(terms)
        total = Terms(*(sum(values[1:], values[0]) for values in zip(*terms, strict=True)))
        loss, lm_loss, aux_loss = (float(value) / count for value in (total.loss, total.lm_loss, total.aux_loss))
        return loss, lm_loss, aux_loss, total.expert_load.cpu().numpy(), total.dropped.cpu().numpy() / count
