# SPDX-License-Identifier: Apache-2.0
"""What every feed-forward layer answers, and the dense one. ``ms.layer.build_feed_forward`` chooses by the spec."""

from __future__ import annotations

from typing import Protocol

from mindspore import Tensor, nn

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.attention import Linear
from mindformers_ext.ms.ops.dtypes import mindspore_dtype
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards

# (T, D); and of a mixture, per routing group, the auxiliary loss (G) and a report (G, E + 1), see ``ms.moe.layer``;
# None of a dense layer. A plain tuple: MindSpore's graphs know no named ones.
FeedForwardOutput = tuple[Tensor, Tensor | None, Tensor | None]


class FeedForward(Protocol):
    """A layer's second half, whatever is in it."""

    def __call__(
        self, x_TD: Tensor, noise_TE: Tensor | None = None, counted_T: Tensor | None = None
    ) -> FeedForwardOutput:
        """Rows (T, D) in training and evaluation, the noise that a mixture's gate adds in training, and which tokens
        (T) count in its balance (1 or 0), all where it is not told: padding is routed like the others."""

    def for_inference(self, tokens: int) -> nn.Cell:
        """A cell of the same parameters for graphs of ``tokens`` rows that drops none: x (T, D) and valid (T) int32,
        0 where a row is padding, give (T, D)."""

    def gated_products(self) -> tuple[nn.Cell, ...]:
        """The cells of silu(gate) * up, whose outputs recomputation may drop."""

    def keep_all_in_evaluation(self) -> None:
        """From now on tokens are dropped in training only."""


class SwiGlu(nn.Cell):
    """w2(silu(w1 x) * w3 x) of every token (Shazeer 2020); a ``FeedForward``. Input and output (T, D)."""

    def __init__(self, spec: NetworkSpec, width: int, operators: Operators, bias: bool = False) -> None:
        super().__init__()
        model, dtype = spec.model, mindspore_dtype(spec.numerics.param_dtype)
        hidden, std = model.hidden_size, model.initializer_range
        shards = Shards(spec)
        self.w1 = Linear(hidden, width, std, dtype, shards, "project in", bias)
        self.w2 = Linear(width, hidden, std, dtype, shards, "project out", bias)
        self.w3 = Linear(hidden, width, std, dtype, shards, "project in", bias)
        self.swiglu = shards.local(operators.build(operators.swiglu), "feed forward")

    def hidden(self, x_TD: Tensor) -> Tensor:
        """What enters w2 (T, F)."""
        return self.swiglu(self.w1(x_TD), self.w3(x_TD))

    def product(self, x_TD: Tensor) -> Tensor:
        """The output alone."""
        return self.w2(self.hidden(x_TD))

    def construct(
        self, x_TD: Tensor, noise_TE: Tensor | None = None, counted_T: Tensor | None = None
    ) -> FeedForwardOutput:
        return self.product(x_TD), None, None

    def for_inference(self, tokens: int) -> nn.Cell:
        """See ``FeedForward``."""
        return _AllRows(self)

    def gated_products(self) -> tuple[nn.Cell, ...]:
        """See ``FeedForward``."""
        return (self.swiglu,)

    def keep_all_in_evaluation(self) -> None:
        """Nothing is ever dropped."""


class _AllRows(nn.Cell):
    """A dense layer where padding is told apart: it computes that too."""

    def __init__(self, layer: SwiGlu) -> None:
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, x_TD: Tensor, valid_T: Tensor) -> Tensor:
        return self.layer.product(x_TD)
