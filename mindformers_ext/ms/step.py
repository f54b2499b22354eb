# SPDX-License-Identifier: Apache-2.0
"""One training step in one graph: forward and backward once, overflow check, clipping, update, loss scale.

The overflow check is the finiteness of the global gradient norm: one reduction serves the check and the clipping, and
it needs no device register, so it works on CPU, GPU and Ascend alike (MindFormers' own step reads an Ascend flag).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from mindformers_ext.core.config.lora import DROPOUT_SEED
from mindformers_ext.ms.causal_lm import CausalLM, RowLogProbabilities
from mindformers_ext.ms.loss import PreferenceLoss
from mindformers_ext.ms.ops.select import select_operators

_scaled = ops.MultitypeFuncGraph("scaled")
_add = ops.MultitypeFuncGraph("add")
_float32 = ops.MultitypeFuncGraph("float32")
signed = ops.MultitypeFuncGraph("signed")

SEED_STRIDE = 0x2545F491  # from a micro batch's seed of dropout to the next one's: odd, so that all differ
# Names of the step's own state in a checkpoint; a resumed run must restore them (``mf.trainer`` does).
STEP_STATE = ("scale_sense", "current_iterator_step", "last_overflow_iterator_step")

Batch = tuple[Tensor, ...]
Gradients = tuple[Tensor, ...]
Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # loss, lm_loss, aux_loss, expert_load, dropped


@_scaled.register("Tensor", "Tensor")
def _scaled_by(factor: Tensor, gradient: Tensor) -> Tensor:
    return ops.cast(gradient, ms.float32) * factor


@_add.register("Tensor", "Tensor")
def _add_pair(left: Tensor, right: Tensor) -> Tensor:
    return ops.cast(left, ms.float32) + ops.cast(right, ms.float32)


@signed.register("Float32", "Tensor")
def _with_sign(sign: float, gradient: Tensor) -> Tensor:
    return gradient * sign


@_float32.register("Tensor")
def _as_float32(gradient: Tensor) -> Tensor:
    return ops.cast(gradient, ms.float32)


class TrainStepCell(nn.TrainOneStepWithLossScaleCell):
    """Forward, backward, and one optimizer update of ``network(*batch) -> LossTerms``.

    Inputs are the batch's columns, each (B, T) int32; with ``micro_batches`` n the batch is cut into n equal parts
    along its first axis and the gradients and losses are averaged over them.

    Args:
        network: returns (loss, lm_loss, aux_loss, expert_load (L, E), dropped (L,)), the loss differentiable.
        optimizer: a MindSpore optimizer over the network's trainable parameters.
        scale_sense: fixed loss scale, or a ``DynamicLossScaleUpdateCell``.
        max_grad_norm: clip the global gradient norm to this; None leaves the gradients alone.
        micro_batches: gradient accumulation steps.
        signs: -1 by name for parameters that climb the loss instead of descending.
        copies: devices of a cut graph (semi-auto parallel), each of which has the whole loss: their gradients are
            summed. MindSpore's own step is given a division by their number (``_VirtualDiv``), this one is not.

    In data parallel (one process per slice of the batch) gradients are averaged over the ranks before the norm is
    taken, whatever ``gradients_mean`` says, so every rank clips alike and takes the same step. Each rank's loss weighs
    the same, as in PyTorch's DDP: with labels, ranks that count fewer tokens count them more.

    Outputs: the nine tensors of ``core.figures.StepFigures`` as a plain tuple, which ``figures_of`` reads. In data
    parallel all ranks return the same.
    """

    def __init__(
        self,
        network: nn.Cell,
        optimizer: nn.Optimizer,
        scale_sense: float | nn.Cell = 1.0,
        max_grad_norm: float | None = 1.0,
        micro_batches: int = 1,
        signs: Mapping[str, int] | None = None,
        copies: int = 1,
    ) -> None:
        if isinstance(scale_sense, (int, float)):
            scale_sense = Tensor(float(scale_sense), ms.float32)
        super().__init__(network, optimizer, scale_sense)
        self.clips = max_grad_norm is not None
        self.max_grad_norm = Tensor(max_grad_norm or 1.0, ms.float32)
        self.micro_batches = micro_batches
        self.accumulates = micro_batches > 1
        self.parts = micro_batches * copies  # that a gradient is summed over
        self.has_dynamic_lr = bool(optimizer.dynamic_lr)
        self.has_group_lr = bool(optimizer.is_group_lr)
        self.gradients_of = ops.value_and_grad(self.scaled_loss, None, self.weights, has_aux=True)
        self.all_finite = ops.IsFinite()
        self.square_sum = select_operators().square_sum()
        self.signs = tuple(float((signs or {}).get(parameter.name, 1)) for parameter in self.weights)
        self.climbs = min(self.signs, default=1.0) < 0
        seeds = {parameter.name: parameter for parameter in network.get_parameters()}.get(DROPOUT_SEED)
        self.seeds = seeds if self.accumulates else None
        self.averages = bool(self.reducer_flag)
        if self.averages:
            self.share = 1.0 / self.degree
            self.grad_reducer = nn.DistributedGradReducer(self.weights, mean=True, degree=self.degree)

    def construct(self, *batch: Tensor) -> tuple[Any, ...]:
        """Run the step on one batch; see the class."""
        scale = self.scale_sense
        if self.accumulates:
            terms, gradients = self.accumulated(scale, batch)
        else:
            terms, gradients = self.gradients_of_batch(scale, batch)
        if self.averages:
            # float32: bfloat16 has no AllReduce on a CPU, and a sum of scaled float16 gradients may overflow
            gradients = self.grad_reducer(self.hyper_map(_float32, gradients))
            terms = self.over_ranks(terms)
        loss, lm_loss, aux_loss, load, dropped = terms
        unscale = 1.0 / (scale * self.parts)
        global_norm = self.norm(gradients) * unscale
        overflow = self.process_loss_scale(self.not_finite(global_norm, loss))
        if self.clips:
            # One pass over the gradients undoes the loss scale and clips.
            unscale = unscale * ops.minimum(self.max_grad_norm / (global_norm + 1e-6), 1.0)
        gradients = self.hyper_map(ops.partial(_scaled, unscale), gradients)
        if self.climbs:
            gradients = self.hyper_map(signed, self.signs, gradients)
        learning_rate = self.current_learning_rate()
        if not overflow:
            loss = ops.depend(loss, self.optimizer(gradients))
        scale = ops.depend(self.scale_sense, overflow)
        return loss, overflow, scale, learning_rate, global_norm, lm_loss, aux_loss, load, dropped

    def over_ranks(self, terms: Terms) -> Terms:
        """Losses and dropped shares averaged, expert loads summed over the ranks, in one exchange."""
        loss, lm_loss, aux_loss, load, dropped = terms
        losses = ops.stack((loss, lm_loss, aux_loss)).astype(ms.float32) * self.share
        load, dropped = load.astype(ms.float32), dropped.astype(ms.float32) * self.share
        end = 3 + load.size
        packed = self.allreduce(ops.cat((losses, load.reshape(-1), dropped.reshape(-1))))
        loads, shares = packed[3:end].reshape(load.shape), packed[end:].reshape(dropped.shape)
        return packed[0], packed[1], packed[2], loads, shares

    def norm(self, gradients: Gradients) -> Tensor:
        """Euclidean norm () of all gradients together."""
        return ops.sqrt(ops.addn(self.hyper_map(self.square_sum, gradients))).reshape(())

    def scaled_loss(self, scale: Tensor, *batch: Tensor) -> tuple[Tensor, Terms]:
        """(loss * scale, terms): what is differentiated, and what is only reported."""
        terms = self.network(*batch)
        return terms[0] * ops.cast(scale, terms[0].dtype), terms

    def gradients_of_batch(self, scale: Tensor, batch: Batch) -> tuple[Terms, Gradients]:
        """Terms and scaled gradients of one (micro) batch."""
        (_, terms), gradients = self.gradients_of(scale, *batch)
        return terms, gradients

    def accumulated(self, scale: Tensor, batch: Batch) -> tuple[Terms, Gradients]:
        """Mean terms and summed scaled gradients over the micro batches, one after the other."""
        terms, gradients = self.gradients_of_batch(scale, self.micro_batch(batch, 0))
        for index in range(1, self.micro_batches):
            # without this dependency the executor may keep the activations of several micro batches at once
            scale = ops.depend(scale, gradients)
            if self.seeds is not None:  # of dropout: every micro batch drops others
                scale = ops.depend(scale, ops.assign(self.seeds, self.seeds + SEED_STRIDE))
            more, next_gradients = self.gradients_of_batch(scale, self.micro_batch(batch, index))
            gradients = self.hyper_map(_add, gradients, next_gradients)
            terms = _sums(terms, more)
        share = 1.0 / self.micro_batches
        loss, lm_loss, aux_loss, load, dropped = terms
        return (loss * share, lm_loss * share, aux_loss * share, load, dropped * share), gradients

    def micro_batch(self, batch: Batch, index: int) -> Batch:
        """The rows of micro batch ``index`` of every column."""
        part: Batch = ()
        for column in batch:
            rows = column.shape[0] // self.micro_batches
            part += (column[index * rows : (index + 1) * rows],)
        return part

    def not_finite(self, global_norm: Tensor, loss: Tensor) -> Tensor:
        """True on every rank when any rank's gradient norm or loss is infinite or NaN.

        No rank has to ask the others: in data parallel both are averages over the ranks, and semi-auto parallel sums
        the norm (by ``grad_scale``, see ``ops.portable``) and the loss over all devices.
        """
        finite = ops.logical_and(self.all_finite(global_norm), self.all_finite(ops.cast(loss, ms.float32)))
        return ops.logical_not(finite.reshape(()))

    def current_learning_rate(self) -> Tensor:
        """The learning rate this step uses (of the first group when groups have their own)."""
        rate = self.optimizer.learning_rate
        if self.has_dynamic_lr:
            schedule = rate[0] if self.has_group_lr else rate
            return schedule(self.optimizer.global_step).reshape(())
        if self.has_group_lr:
            return rate[0]
        return rate


def _sums(left: Terms, right: Terms) -> Terms:
    """Each term of both together."""
    loss, lm_loss, aux_loss, load, dropped = left
    more_loss, more_lm_loss, more_aux_loss, more_load, more_dropped = right
    return (
        loss + more_loss,
        lm_loss + more_lm_loss,
        aux_loss + more_aux_loss,
        load + more_load,
        dropped + more_dropped,
    )


class LossNetwork(nn.Cell):
    """Adapts a ``CausalLM`` to the step: ``construct(*batch)`` calls its ``losses``. Parameter names stay."""

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.draws = network.spec.noise_shape is not None

    def construct(self, input_ids: Tensor, *more: Tensor) -> Terms:
        """LossTerms of token ids (B, S+1), optional labels (B, S+1), the documents of packed rows (B, S+1), and where
        gates add noise its keys, last."""
        count = len(more) - 1 if self.draws else len(more)
        labels = more[0] if count > 0 else None
        documents = more[1] if count > 1 else None
        keys = more[count] if self.draws else None
        return self.network.losses(input_ids, labels, keys, documents)


class PreferenceNetwork(nn.Cell):
    """Adapts a ``CausalLM`` to the step over pairs of answers (``core.preferences``). Parameter names stay."""

    def __init__(self, network: CausalLM, beta: float) -> None:
        super().__init__(auto_prefix=False)
        self.rows, self.loss = RowLogProbabilities(network), PreferenceLoss(beta)
        self.adds = network.add_aux_loss
        self.join = ops.Concat(axis=0)

    def construct(
        self,
        chosen: Tensor,
        chosen_labels: Tensor,
        rejected: Tensor,
        rejected_labels: Tensor,
        reference: Tensor,
        keys: Tensor | None = None,
    ) -> Terms:
        """LossTerms of ids and labels (R, S+1), the reference's (R, 2), and where gates add noise the keys of 2R rows;
        what is measured of the pairs stands behind the shares dropped."""
        ids, labels = self.join((chosen, rejected)), self.join((chosen_labels, rejected_labels))
        logp_B, aux_loss, load, dropped = self.rows(ids, labels, keys)
        lm_loss, measured = self.loss(logp_B, reference)
        loss = lm_loss + aux_loss if self.adds else lm_loss
        return loss, lm_loss, aux_loss, load, self.join((dropped, measured))


class LmLoss(nn.Cell):
    """The mean loss of a ``CausalLM`` over the tokens that count of ids, labels and documents (B, S+1). Parameter names
    stay."""

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, input_ids: Tensor, labels: Tensor, documents: Tensor | None = None) -> Tensor:
        """Scalar, float32."""
        return self.network.losses(input_ids, labels, None, documents)[1]


def step_state(cell: TrainStepCell) -> dict[str, Parameter]:
    """The step's own parameters by name: loss scale and, with a dynamic one, its two counters."""
    return {name: parameter for name, parameter in cell.parameters_dict().items() if name in STEP_STATE}
