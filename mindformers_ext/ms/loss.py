# SPDX-License-Identifier: Apache-2.0
"""Next-token cross entropy over the tokens that count."""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
from mindspore import Tensor, nn, ops

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.ops.portable import SoftplusOp
from mindformers_ext.ms.strategies import Shards


class ShiftedTokens(nn.Cell):
    """All tokens but the last, (B, S) of ids (B, S+1): what the network reads."""

    def construct(self, ids_BT: Tensor) -> Tensor:
        return ids_BT[:, :-1]


class ShiftedTargets(nn.Cell):
    """What the network is to predict.

    Inputs: ids and labels (B, S+1) int32. Outputs: target (B*S) int32 and weight (B*S) float32: 0 where the token is
    padding or the target is to be ignored, else 1.
    """

    def __init__(self, pad_token_id: int, ignore_token_id: int) -> None:
        super().__init__()
        self.pad_token_id, self.ignore_token_id = pad_token_id, ignore_token_id

    def construct(self, ids_BT: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        tokens_BS, target_BS = ids_BT[:, :-1], labels_BT[:, 1:]
        counted = ops.logical_and(tokens_BS != self.pad_token_id, target_BS != self.ignore_token_id)
        return ops.reshape(target_BS, (-1,)), ops.cast(ops.reshape(counted, (-1,)), ms.float32)


class OwnTargets(nn.Cell):
    """``ShiftedTargets`` of ids that are their own labels."""

    def __init__(self, pad_token_id: int, ignore_token_id: int) -> None:
        super().__init__()
        self.shift = ShiftedTargets(pad_token_id, ignore_token_id)

    def construct(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        return self.shift(ids_BT, ids_BT)


class Targets(nn.Cell):
    """Inputs: ids (B, S+1) int32 and labels (B, S+1) or None. Outputs: see ``ShiftedTargets``."""

    def __init__(self, spec: NetworkSpec, shards: Shards) -> None:
        super().__init__()
        numbers = (spec.model.pad_token_id, spec.model.ignore_token_id)
        self.own = shards.local(OwnTargets(*numbers), "own targets", _own_shapes, _own_types)
        self.labelled = shards.local(ShiftedTargets(*numbers), "targets", _target_shapes, _target_types)

    def construct(self, ids_BT: Tensor, labels_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        if labels_BT is None:
            return self.own(ids_BT)
        return self.labelled(ids_BT, labels_BT)


def token_shape(ids: list) -> list:
    """The shape that ``ShiftedTokens`` gives, for MindSpore's cut graph."""
    return [ids[0], ids[1] - 1]


def _own_shapes(ids: list) -> tuple:
    return [ids[0] * (ids[1] - 1)], [ids[0] * (ids[1] - 1)]


def _own_types(ids: ms.Type) -> tuple:
    return ids, ms.TensorType(ms.float32)


def _target_shapes(ids: list, labels: list) -> tuple:
    return [ids[0] * (ids[1] - 1)], [ids[0] * (ids[1] - 1)]


def _target_types(ids: ms.Type, labels: ms.Type) -> tuple:
    return labels, ms.TensorType(ms.float32)


class CrossEntropyRows(nn.Cell):
    """-log softmax(logits)[label] per row. Inputs: logits (T, V) float32, label (T) int32. Output (T, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_softmax = P.LogSoftmax(axis=-1)
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)
        self.one_hot = P.OneHot()

    def construct(self, logits_TV: Tensor, label_T: Tensor) -> Tensor:
        return -ops.gather_elements(self.log_softmax(logits_TV), 1, ops.expand_dims(label_T, 1))

    def bprop(self, logits_TV: Tensor, label_T: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        target_TV = self.one_hot(label_T, logits_TV.shape[1], self.on, self.off)
        return (ops.softmax(logits_TV, -1) - target_TV) * dout, ops.zeros_like(label_T)


class WeightedLosses(nn.Cell):
    """Loss of each row (T) times its weight. Inputs as ``NextTokenLoss``."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = CrossEntropyRows()

    def construct(self, logits_TV: Tensor, label_T: Tensor, weight_T: Tensor) -> Tensor:
        label_T = label_T * ops.cast(weight_T > 0, ms.int32)
        losses = self.rows(ops.cast(logits_TV, ms.float32), label_T)
        return ops.reshape(losses, (-1,)) * weight_T


class PreferenceLoss(nn.Cell):
    """The loss () of ``core.preferences`` and ``core.figures.MEASURED`` (2), all float32.

    Inputs: log-probabilities of all chosen answers, then of the rejected ones (2R), and the reference's (R, 2).
    """

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.softplus = SoftplusOp()
        self.halves = P.Split(axis=0, output_num=2)

    def construct(self, logp_B: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.halves(logp_B)
        margin = self.beta * ((chosen - reference[:, 0]) - (rejected - reference[:, 1]))
        accuracy = ops.cast(margin > 0, ms.float32).mean()
        measured = ops.stop_gradient(ops.stack((accuracy, margin.mean())))
        return self.softplus(-margin).mean(), measured


def _row_shape(logits: list, label: list, weight: list) -> list:
    return label


def _row_type(logits: ms.Type, label: ms.Type, weight: ms.Type) -> ms.Type:
    return weight


class NextTokenLoss(nn.Cell):
    """Mean cross entropy over counted tokens, in float32.

    Inputs: logits (T, V), label (T) int32, weight (T) float32 of 0 or 1. Output (). A row of weight 0 may carry any
    label; no counted token at all gives 0. On many devices losses and counts are summed in one exchange.
    """

    def __init__(self, shards: Shards | None = None) -> None:
        super().__init__()
        shards = shards or Shards()
        self.rows = shards.local(WeightedLosses(), "rows", _row_shape, _row_type)
        self.sum = P.ReduceSum()
        self.together = shards.active
        self.stack = shards.shard_list(P.Stack(), "rest", 2)
        self.sums = shards.shard(P.ReduceSum(), "row sums")
        self.split = shards.shard(P.Split(axis=0, output_num=2), "total")
        self.largest = shards.shard(P.Maximum(), "total and scalar")
        self.divide = shards.shard(P.RealDiv(), "totals")

    def construct(self, logits_TV: Tensor, label_T: Tensor, weight_T: Tensor) -> Tensor:
        losses_T = self.rows(logits_TV, label_T, weight_T)
        if self.together:
            total, counted = self.split(self.sums(self.stack((losses_T, weight_T)), 1))
            return ops.reshape(self.divide(total, self.largest(counted, 1.0)), ())
        return self.divide(self.sum(losses_T), self.largest(self.sum(weight_T), 1.0))
