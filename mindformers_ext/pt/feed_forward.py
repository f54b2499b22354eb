# SPDX-License-Identifier: Apache-2.0
"""What every feed-forward layer answers to, and the dense SwiGLU one of LLaMA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.linear import Linear
from mindformers_ext.pt.ops.dtypes import torch_dtype

if TYPE_CHECKING:
    from mindformers_ext.pt.moe.layer import MoE


class FeedForwardOutput(NamedTuple):
    """y (T, D); of a mixture also aux_loss (G) and report (G, E + 1): assignments per expert before dropping, and the
    share dropped, all float32."""

    y_TD: Tensor
    aux_loss_G: Tensor | None = None
    report_GE: Tensor | None = None


class FeedForward(Protocol):
    """A module that stands behind attention: nobody asks which one it is. Input (T, D), output ``FeedForwardOutput``.

    A mixture takes the tokens of its routing groups one after the other, the noise (T, E) that its gate adds, and which
    tokens (T) bool count in its balance, all where it is not told: padding is routed like the others.
    """

    def __call__(
        self, x_TD: Tensor, noise_TE: Tensor | None = None, counted_T: Tensor | None = None
    ) -> FeedForwardOutput: ...

    def dropless(self, x_TD: Tensor) -> Tensor:
        """y (T, D) without losses, reports and dropping: inference."""

    def mixtures(self) -> Iterator[MoE]:
        """The mixtures inside, whose experts may be spread over ranks."""

    def capturable(self, tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether ``dropless`` of so many tokens never reads on the host: fit for a CUDA graph."""


class SwiGlu(nn.Module):
    """w2(silu(w1 x) * w3 x) (Shazeer 2020, arXiv:2002.05202), ``width`` wide. Input and output (T, D)."""

    def __init__(self, spec: NetworkSpec, width: int, bias: bool = False) -> None:
        super().__init__()
        hidden, std = spec.model.hidden_size, spec.model.initializer_range
        dtype = torch_dtype(spec.numerics.param_dtype)
        self.w1 = Linear(hidden, width, std, dtype, bias)
        self.w2 = Linear(width, hidden, std, dtype, bias)
        self.w3 = Linear(hidden, width, std, dtype, bias)

    def forward(
        self, x_TD: Tensor, noise_TE: Tensor | None = None, counted_T: Tensor | None = None
    ) -> FeedForwardOutput:
        return FeedForwardOutput(self.dropless(x_TD))

    def hidden(self, x_TD: Tensor) -> Tensor:
        """What enters w2 (T, F)."""
        return F.silu(self.w1(x_TD)) * self.w3(x_TD)

    def dropless(self, x_TD: Tensor) -> Tensor:
        """See ``FeedForward``: nothing is dropped anyway."""
        return self.w2(self.hidden(x_TD))

    def mixtures(self) -> Iterator[MoE]:
        """None."""
        return iter(())

    def capturable(self, tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Always."""
        return True
