# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts layers for inference: no token is ever dropped, whatever the load, and padding is not computed.

Four forms of one function, on the parameters of a trained ``MoE``, chosen by the number of tokens of a graph and the
bytes that each moves:

- ``SlicedExperts`` for prompts, and for a few tokens of large experts: tokens sorted by expert, each expert multiplies
  its own and no other;
- ``EveryExpert`` for a few tokens: every expert computes all of them. A batched product reads each weight once however
  few its columns are, so this costs what reading the weights costs, and nothing is sorted;
- ``ChosenExperts`` for a single token: copies the weights of its experts only;
- ``SortedRows`` for prompts where the network has grouped experts (``use_gmm``, for Ascend's GroupedMatmul), which turn
  all weights around first: for a few tokens that would cost more than all the products.

In the first two, weights stand on the left of every product and tokens are columns: on CPU that is up to three times as
fast as rows on the left while an expert has less than a hundred tokens, and never slower.
"""

from __future__ import annotations

from typing import Protocol

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.common.initializer import initializer
from mindspore.ops.auto_generate import TensorToScalar, select_ext_view_op

from mindformers_ext.ms.feed_forward import FeedForwardOutput
from mindformers_ext.ms.moe.experts import Experts
from mindformers_ext.ms.moe.gate import Gate
from mindformers_ext.ms.moe.order import ExpertOrder
from mindformers_ext.ms.moe.rows import WeightedRows

EVERY_EXPERT_UP_TO = 32  # tokens; above it the products computed in vain outweigh the sorting
# Of a few tokens reading weights is the cost. In reads of what is read, as two cores measure it (NOTES of Mixtral):
COPY = 3  # reading, writing and reading again a weight that is copied
UNEVEN = 1.15  # an expert's product by itself, where one product of all is 1
LAUNCH = 8_000_000  # bytes that could be read while the operators of one expert by itself are launched


class Mixture(Protocol):
    """What is read of a trained ``MoE``: its gate, its experts, how many there are and a token has, whether slots
    are sorted."""

    router: Gate
    ffn: Experts
    experts: int
    chosen: int
    is_sorted: bool

    def __call__(self, x_TD: Tensor) -> FeedForwardOutput:
        """Rows (T, D)."""


def dropless(moe: Mixture, tokens: int) -> nn.Cell:
    """The cheapest of the forms for graphs of ``tokens`` rows; see ``SlicedExperts`` for inputs and output."""
    if tokens > EVERY_EXPERT_UP_TO:
        return SortedRows(moe) if moe.is_sorted else SlicedExperts(moe)
    experts = moe.experts
    expert = sum(w.weight.size * w.weight.itemsize for w in (moe.ffn.w1, moe.ffn.w2, moe.ffn.w3)) / experts
    costs: dict[type[_Routed], float] = {}
    if tokens == 1:
        costs[ChosenExperts] = COPY * moe.chosen * expert
    costs[EveryExpert] = experts * expert
    if has_parts():
        used = experts * (1 - (1 - moe.chosen / experts) ** tokens)  # expected, were all equally likely
        costs[SlicedExperts] = UNEVEN * used * expert + LAUNCH * experts
    return min(costs, key=lambda form: costs[form])(moe)


def has_parts() -> bool:
    """Whether experts' matrices can be parameters of their own (``shared_parts``); elsewhere sizes that follow the
    data are no gain for a few tokens."""
    return bool(ms.get_context("device_target") == "CPU" and ms.get_context("mode") == ms.GRAPH_MODE)


class _Routed(nn.Cell):
    """Routing and weights of a trained ``MoE``, whose parameters keep their names."""

    def __init__(self, moe: Mixture) -> None:
        super().__init__(auto_prefix=False)
        self.router, self.ffn = moe.router, moe.ffn
        self.experts, self.chosen = moe.experts, moe.chosen
        self.number_E = Tensor(np.arange(moe.experts, dtype=np.int32)[None, None])
        self.has_bias, self.of_biases = moe.ffn.w2.has_bias, P.MatMul()

    def _choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts (T, K) of each token."""
        scores_GTS = ops.expand_dims(self.router.scores(x_TD), 0)
        expert_GTK, weight_GTK, _ = self.router.choose(scores_GTS, self.router.bias())
        return ops.squeeze(weight_GTK, 0), ops.cast(ops.squeeze(expert_GTK, 0), ms.int32)

    def _with_bias(self, y_TD: Tensor, gate_TK: Tensor, index_TK: Tensor) -> Tensor:
        """The experts' weighed sum, with that of their biases where they have any."""
        if not self.has_bias:
            return y_TD
        chosen_TKE = ops.cast(ops.expand_dims(index_TK, -1) == self.number_E, y_TD.dtype)
        weight_TE = (ops.expand_dims(ops.cast(gate_TK, y_TD.dtype), -1) * chosen_TKE).sum(1)
        return y_TD + self.of_biases(weight_TE, ops.cast(self.ffn.w2.bias, y_TD.dtype))


class ChosenExperts(_Routed):
    """As ``SlicedExperts``, for one token."""

    def __init__(self, moe: Mixture) -> None:
        super().__init__(moe)
        self.gather, self.batched_nt, self.product = P.Gather(), P.BatchMatMul(transpose_b=True), P.MatMul()

    def _multiply(self, x_KTD: Tensor, weight: Tensor, index_K: Tensor) -> Tensor:
        """(K, 1, in) times the weights (out, in) of K experts."""
        return self.batched_nt(x_KTD, ops.cast(self.gather(weight, index_K, 0), x_KTD.dtype))

    def construct(self, x_TD: Tensor, valid_T: Tensor) -> Tensor:
        gate_TK, index_TK = self._choose(x_TD)
        index_K = ops.reshape(index_TK, (-1,))
        x_KTD = ops.expand_dims(ops.broadcast_to(x_TD, (self.chosen, x_TD.shape[1])), 1)
        hidden_KTF = self.ffn.swiglu(
            self._multiply(x_KTD, self.ffn.w1.weight, index_K), self._multiply(x_KTD, self.ffn.w3.weight, index_K)
        )
        y_KTD = self._multiply(hidden_KTF, self.ffn.w2.weight, index_K)
        y_TD = self.product(ops.cast(gate_TK, x_TD.dtype), ops.reshape(y_KTD, (self.chosen, -1)))
        return self._with_bias(y_TD, gate_TK, index_TK)


class EveryExpert(_Routed):
    """As ``SlicedExperts``."""

    def __init__(self, moe: Mixture) -> None:
        super().__init__(moe)
        self.batched, self.transpose = P.BatchMatMul(), P.Transpose()

    def construct(self, x_TD: Tensor, valid_T: Tensor) -> Tensor:
        gate_TK, index_TK = self._choose(x_TD)
        T, D = x_TD.shape
        kind, ffn = x_TD.dtype, self.ffn
        chosen_TKE = ops.cast(ops.expand_dims(index_TK, -1) == self.number_E, kind)
        weight_TE = self.batched(ops.expand_dims(ops.cast(gate_TK, kind), 1), chosen_TKE)
        x_EDT = ops.broadcast_to(ops.expand_dims(self.transpose(x_TD, (1, 0)), 0), (self.experts, D, T))
        hidden_EFT = ffn.swiglu(
            self.batched(ops.cast(ffn.w1.weight, kind), x_EDT), self.batched(ops.cast(ffn.w3.weight, kind), x_EDT)
        )
        y_TED = self.transpose(self.batched(ops.cast(ffn.w2.weight, kind), hidden_EFT), (2, 0, 1))
        return self._with_bias(ops.squeeze(self.batched(weight_TE, y_TED), 1), gate_TK, index_TK)


class SortedRows(nn.Cell):
    """As ``SlicedExperts``."""

    def __init__(self, moe: Mixture) -> None:
        super().__init__(auto_prefix=False)
        self.moe = moe

    def construct(self, x_TD: Tensor, valid_T: Tensor) -> Tensor:
        y_TD, _, _ = self.moe(x_TD)
        return y_TD


class SlicedExperts(_Routed):
    """Sum over a token's experts of gate times expert.

    Inputs: x (T, D), valid (T) int32 of 1 or 0; a row of 0 is padding: no expert computes it and its result is 0 (the
    other forms, where rows cannot disturb each other, let it through). Output (T, D).
    """

    def __init__(self, moe: Mixture) -> None:
        super().__init__(moe)
        self.order = ExpertOrder(self.experts + 1)  # padding goes to one behind the last, which computes nothing
        self.weighted_rows = WeightedRows(self.chosen)
        self.gather, self.slice, self.concat = P.Gather(), P.Slice(), P.Concat(axis=1)
        self.split = P.Split(axis=0, output_num=self.experts + 1)
        self.product, self.product_nt = P.MatMul(), P.MatMul(transpose_b=True)
        self.to_scalar, self.transpose = TensorToScalar(), P.Transpose()
        self.has_parts = has_parts()
        if self.has_parts:
            self.w1, self.w2, self.w3 = (shared_parts(w.weight) for w in (moe.ffn.w1, moe.ffn.w2, moe.ffn.w3))

    def _matrices(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """w1, w3 (F, D) and w2 (D, F)."""
        if self.has_parts:
            return self.w1[expert], self.w3[expert], self.w2[expert]
        ffn = self.ffn
        return (
            select_ext_view_op(ffn.w1.weight, 0, expert),
            select_ext_view_op(ffn.w3.weight, 0, expert),
            select_ext_view_op(ffn.w2.weight, 0, expert),
        )

    def _expert(self, x_TD: Tensor, expert: int) -> Tensor:
        """(T, D) through one expert, (D, T)."""
        w1, w3, w2 = self._matrices(expert)
        kind = x_TD.dtype
        gate_FT = self.product_nt(ops.cast(w1, kind), x_TD)
        up_FT = self.product_nt(ops.cast(w3, kind), x_TD)
        return self.product(ops.cast(w2, kind), self.ffn.swiglu(gate_FT, up_FT))

    def _by_choice(self, x_TK: Tensor) -> Tensor:
        """(T, K) -> (K*T): all first choices, then all second."""
        return ops.reshape(self.transpose(x_TK, (1, 0)), (-1,))

    def construct(self, x_TD: Tensor, valid_T: Tensor) -> Tensor:
        gate_TK, index_TK = self._choose(x_TD)
        T, D = x_TD.shape
        valid_TK = ops.broadcast_to(ops.expand_dims(valid_T, 1), (T, self.chosen))
        expert_T = self._by_choice(index_TK * valid_TK + self.experts * (1 - valid_TK))
        sorted_GT, position_GT, _, start_GE = self.order(ops.expand_dims(expert_T, 0))
        start_E = ops.squeeze(start_GE, 0)
        x_sorted = self.gather(x_TD, ops.squeeze(sorted_GT, 0) % T, 0)
        starts = self.split(ops.cast(start_E, ms.int64))
        first = 0
        y: tuple = ()
        for expert in range(self.experts):
            behind = self.to_scalar(ops.reshape(starts[expert + 1], ()))
            y = y + (self._expert(self.slice(x_sorted, (first, 0), (behind - first, D)), expert),)
            first = behind
        # Padding reads the column behind the last. One transposition of all: that of an idle expert's empty result
        # would leave MindSpore's kernel without effect in every later call.
        rows = self.transpose(self.concat((*y, ops.zeros((D, 1), x_TD.dtype))), (1, 0))
        place_T = ops.squeeze(position_GT, 0) + self.gather(start_E, expert_T, 0)
        place_T = ops.minimum(place_T, ops.squeeze(start_GE[:, self.experts :], 0))
        place_TK = self.transpose(ops.reshape(place_T, (self.chosen, -1)), (1, 0))
        out = self.weighted_rows(ops.expand_dims(rows, 0), ops.expand_dims(place_TK, 0), ops.expand_dims(gate_TK, 0))
        return self._with_bias(ops.reshape(out, (T, D)), gate_TK * ops.expand_dims(valid_T, 1), index_TK)


def shared_parts(weight: Parameter) -> ParameterTuple:
    """One parameter for each matrix of ``weight`` (E, out, in), in the same memory: on CPU a view of a part would be
    copied before every product. Values that ``weight`` gets later by other memory are not seen."""
    weight.init_data()  # does nothing where the weights were loaded
    whole = weight.asnumpy()
    parts = []
    for number in range(len(whole)):
        empty = initializer("zeros", whole.shape[1:], weight.dtype)  # takes no memory until it is used
        part = Parameter(empty, name=f"{weight.name}.{number}", requires_grad=False)
        part.set_data(Tensor.from_numpy(whole[number]))
        parts.append(part)
    return ParameterTuple(parts)
