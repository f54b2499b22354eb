# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts layers for inference: no token is ever dropped, whatever the load, and padding has no slot.

Four forms of one function, on the parameters of a trained ``MoE``, chosen by the number of tokens of a graph:

- ``SlottedExperts`` for prompts: sorted tokens in slots, as many per expert as the fullest one needs in this step;
- ``EveryExpert`` for a few tokens: every expert computes all of them. A batched product reads each weight once however
  few its rows are, so this costs what reading the weights costs, and nothing is sorted;
- ``ChosenExperts`` for a single token: copies the weights of its experts only;
- ``SortedRows`` where the network has grouped experts (``use_gmm``, for Ascend's GroupedMatmul): theirs, always.
"""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.auto_generate import TensorToScalar

from mindformers_ext.ms.grouped import GroupedMoE
from mindformers_ext.ms.moe import MoE, WeightedRows
from mindformers_ext.ms.router import ExpertOrder

EVERY_EXPERT_UP_TO = 32  # tokens; above it the rows computed in vain outweigh the sorting
COPY_COST = 3  # reading, writing and reading again a weight that is copied


def dropless(moe: MoE, tokens: int) -> nn.Cell:
    """The cheapest of the forms for graphs of ``tokens`` rows; see ``SlottedExperts`` for inputs and output."""
    if isinstance(moe, GroupedMoE):
        return SortedRows(moe)
    experts, chosen = moe.router.experts, moe.router.router.chosen
    if COPY_COST * tokens * chosen <= experts:
        return ChosenExperts(moe)
    return EveryExpert(moe) if tokens <= EVERY_EXPERT_UP_TO else SlottedExperts(moe)


class _Routed(nn.Cell):
    """Routing of a trained ``MoE``, whose parameters keep their names."""

    def __init__(self, moe: MoE) -> None:
        super().__init__(auto_prefix=False)
        self.gate, self.router, self.ffn = moe.router.dense, moe.router.router, moe.ffn
        self.experts, self.chosen = moe.router.experts, moe.router.router.chosen

    def _choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts (T, K) of each token."""
        gate_GTK, index_GTK = self.router.choose(ops.expand_dims(self.gate(x_TD), 0))
        return ops.squeeze(gate_GTK, 0), ops.cast(ops.squeeze(index_GTK, 0), ms.int32)


class ChosenExperts(_Routed):
    """As ``SlottedExperts``."""

    def __init__(self, moe: MoE) -> None:
        super().__init__(moe)
        self.gather = P.Gather()
        self.product_nt, self.product = P.BatchMatMul(transpose_b=True), P.BatchMatMul()

    def _multiply(self, rows: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        """(Z, 1, in) times the weights (out, in) of Z experts."""
        return self.product_nt(rows, ops.cast(self.gather(weight, index, 0), rows.dtype))

    def construct(self, x_TD: Tensor, valid_T: Tensor) -> Tensor:
        gate_TK, index_TK = self._choose(x_TD)
        T, D = x_TD.shape
        index = ops.reshape(index_TK, (-1,))
        rows = ops.reshape(ops.broadcast_to(ops.expand_dims(x_TD, 1), (T, self.chosen, D)), (-1, 1, D))
        hidden = self.ffn.swiglu(self._multiply(rows, self.ffn.w1.weight, index),
                                 self._multiply(rows, self.ffn.w3.weight, index))  # fmt: skip
        y_TKD = ops.reshape(self._multiply(hidden, self.ffn.w2.weight, index), (T, self.chosen, D))
        return ops.squeeze(self.product(ops.expand_dims(ops.cast(gate_TK, y_TKD.dtype), 1), y_TKD), 1)


class EveryExpert(_Routed):
    """As ``SlottedExperts``."""

    def __init__(self, moe: MoE) -> None:
        super().__init__(moe)
        self.expert_E = Tensor(np.arange(self.experts, dtype=np.int32)[None, None])
        self.product = P.BatchMatMul()
        self.transpose = P.Transpose()

    def construct(self, x_TD: Tensor, valid_T: Tensor) -> Tensor:
        gate_TK, index_TK = self._choose(x_TD)
        T, D = x_TD.shape
        chosen_TKE = ops.cast(ops.expand_dims(index_TK, -1) == self.expert_E, x_TD.dtype)
        weight_TE = self.product(ops.expand_dims(ops.cast(gate_TK, x_TD.dtype), 1), chosen_TKE)
        y_GETD = self.ffn(ops.broadcast_to(ops.reshape(x_TD, (1, 1, T, D)), (1, self.experts, T, D)))
        y_TED = self.transpose(ops.squeeze(y_GETD, 0), (1, 0, 2))
        return ops.squeeze(self.product(weight_TE, y_TED), 1)


class SortedRows(nn.Cell):
    """As ``SlottedExperts``."""

    def __init__(self, moe: GroupedMoE) -> None:
        super().__init__(auto_prefix=False)
        self.moe = moe

    def construct(self, x_TD: Tensor, valid_T: Tensor) -> Tensor:
        y_TD, _, _ = self.moe(x_TD)
        return y_TD


class SlottedExperts(_Routed):
    """Sum over a token's experts of gate times expert, with as many slots per expert as the fullest one needs.

    Inputs: x (T, D), valid (T) int32 of 1 or 0; a row of 0 is padding: it takes no slot and its result is 0 (the
    other forms, where rows cannot disturb each other, let it through). Output (T, D).
    """

    def __init__(self, moe: MoE) -> None:
        super().__init__(moe)
        self.order = ExpertOrder(self.experts + 1)  # padding goes to one behind the last, and no slots are made there
        self.weighted_rows = WeightedRows(self.chosen)
        self.to_scalar = TensorToScalar()
        self.gather = P.Gather()
        self.transpose = P.Transpose()

    def _by_choice(self, x_TK: Tensor) -> Tensor:
        """(T, K) -> (1, K*T): all first choices, then all second."""
        return ops.reshape(self.transpose(x_TK, (1, 0)), (1, -1))

    def construct(self, x_TD: Tensor, valid_T: Tensor) -> Tensor:
        gate_TK, index_TK = self._choose(x_TD)
        T, D = x_TD.shape
        valid_TK = ops.broadcast_to(ops.expand_dims(valid_T, 1), (T, self.chosen))
        expert_T = self._by_choice(index_TK * valid_TK + self.experts * (1 - valid_TK))
        sorted_T, position_T, count_E, start_E = self.order(expert_T)
        fullest = ops.maximum(count_E[:, : self.experts].max(), 1)  # a gather of no rows at all is an error
        capacity = self.to_scalar(ops.cast(fullest, ms.int64))
        place_C = ops.reshape(ops.arange(0, capacity, 1, dtype=ms.int32), (1, -1))
        rank_EC = ops.minimum(ops.reshape(start_E[:, : self.experts], (-1, 1)) + place_C, self.chosen * T - 1)
        # An empty slot holds a neighbour's row; nothing reads its result.
        token_EC = self.gather(ops.squeeze(sorted_T, 0), rank_EC, 0) % T
        y_GECD = self.ffn(ops.expand_dims(self.gather(x_TD, token_EC, 0), 0))
        slot_TK = self.transpose(ops.reshape(expert_T * capacity + position_T, (self.chosen, -1)), (1, 0)) * valid_TK
        weight_TK = gate_TK * ops.cast(valid_TK, gate_TK.dtype)
        rows = ops.reshape(y_GECD, (1, -1, D))
        out = self.weighted_rows(rows, ops.expand_dims(slot_TK, 0), ops.expand_dims(weight_TK, 0))
        return ops.reshape(out, (T, D))
