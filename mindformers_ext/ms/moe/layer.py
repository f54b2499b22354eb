# SPDX-License-Identifier: Apache-2.0
"""The MoE layer: a gate chooses, a slot rule places, rows move, experts compute, rows move back."""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
from mindspore import Tensor, nn, ops

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.feed_forward import FeedForwardOutput
from mindformers_ext.ms.moe.dropless import dropless
from mindformers_ext.ms.moe.experts import SlotExperts, SortedExperts
from mindformers_ext.ms.moe.gate import build_gate, counted_assignments
from mindformers_ext.ms.moe.rows import CombineRows, DispatchRows
from mindformers_ext.ms.moe.slots import SlotRule, build_slots
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards


class MoE(nn.Cell):
    """Mixture of SwiGLU experts; a ``FeedForward``.

    Outputs (T, D), and per routing group the auxiliary loss (G) and a report (G, E + 1): assignments per expert before
    dropping, and the share dropped.
    """

    def __init__(self, spec: NetworkSpec, moe: MoESpec, operators: Operators) -> None:
        super().__init__()
        hidden, chosen, shards = spec.model.hidden_size, moe.num_experts_per_tok, Shards(spec)
        self.experts, self.chosen, self.is_sorted = moe.num_local_experts, chosen, moe.use_gmm
        self.groups, self.draws = spec.parallel.groups, moe.draws_noise
        self.router = build_gate(spec, moe, operators)
        self.slots = build_slots(spec, moe, operators)
        self.ffn = (SortedExperts if self.is_sorted else SlotExperts)(spec, moe, operators)
        self.dispatch = shards.local(operators.build(DispatchRows, chosen), "dispatch", _dispatched_shape)
        self.combine = shards.local(operators.build(CombineRows, chosen, hidden), "combine", _combined_shape)
        self.join = P.Concat(axis=-1)
        self.is_cut = shards.active
        shapes = _PlaceShapes(self.slots, chosen)
        self.cut_places = shards.region(self.places, "slots", shapes, _place_types)
        self.cut_counted = shards.region(self.places_of_counted, "counted slots", shapes.of_counted, _counted_types)

    def places(self, scores_GNS: Tensor, bias_E: Tensor) -> tuple:
        """What each group decides for itself: ``ms.moe.slots.Slots`` but the last two, with the coefficients (G, N, K),
        0 where dropped, behind ``kept``; the auxiliary loss; the report; assignments (G, E) before dropping."""
        return self.places_of_counted(scores_GNS, bias_E, None)

    def places_of_counted(self, scores_GNS: Tensor, bias_E: Tensor, counted_GN: Tensor | None) -> tuple:
        """The same where some tokens do not count, float32 of 1 and 0: they have no part in loss and report."""
        expert_GNK, weight_GNK, prob_GNE = self.router.choose(scores_GNS, bias_E)
        expert_GNK = ops.stop_gradient(expert_GNK)
        dispatch_GEC, slot_GNK, kept_GNK, assignment_GEC, counts_GE, dropped_G = self.slots(expert_GNK)
        told_GE = counts_GE
        if counted_GN is not None:
            told_GE = counted_assignments(expert_GNK, counted_GN, self.experts)
        aux_loss_G = self.router.loss(scores_GNS, prob_GNE, told_GE, counted_GN)
        report_GE = self.join((told_GE, ops.expand_dims(dropped_G, 1)))
        coeff_GNK = weight_GNK * kept_GNK
        return dispatch_GEC, slot_GNK, kept_GNK, coeff_GNK, assignment_GEC, aux_loss_G, report_GE, counts_GE

    def scores(self, x_TD: Tensor, noise_TE: Tensor | None) -> Tensor:
        """The gate's (T, S); noise is added in training alone."""
        if not self.draws or not self.training:
            return self.router.scores(x_TD)
        if noise_TE is None:
            raise ValueError("a gate that adds noise is trained with noise: give it, or call set_train(False)")
        return self.router.noisy_scores(x_TD, noise_TE)

    def construct(
        self, x_TD: Tensor, noise_TE: Tensor | None = None, counted_T: Tensor | None = None
    ) -> FeedForwardOutput:
        scores_TS, bias_E = self.scores(x_TD, noise_TE), self.router.bias()
        scores_GNS = ops.reshape(scores_TS, (self.groups, -1, scores_TS.shape[1]))
        found = self._found(scores_GNS, bias_E, counted_T)
        dispatch_GEC, slot_GNK, kept_GNK, coeff_GNK, assignment_GEC, aux_loss_G, report_GE, counts_GE = found
        x_GND = ops.reshape(x_TD, (self.groups, -1, x_TD.shape[-1]))
        y_GECD = self.ffn(self.dispatch(x_GND, dispatch_GEC, slot_GNK, kept_GNK), counts_GE)
        out_GND = self.combine(y_GECD, coeff_GNK, slot_GNK, dispatch_GEC, assignment_GEC)
        return ops.reshape(out_GND, x_TD.shape), aux_loss_G, report_GE

    def _found(self, scores_GNS: Tensor, bias_E: Tensor, counted_T: Tensor | None) -> tuple:
        if counted_T is None:
            return self.cut_places(scores_GNS, bias_E) if self.is_cut else self.places(scores_GNS, bias_E)
        counted_GN = ops.reshape(counted_T, (self.groups, -1))
        if self.is_cut:
            return self.cut_counted(scores_GNS, bias_E, counted_GN)
        return self.places_of_counted(scores_GNS, bias_E, counted_GN)

    def for_inference(self, tokens: int) -> nn.Cell:
        """See ``FeedForward``."""
        return dropless(self, tokens)

    def gated_products(self) -> tuple[nn.Cell, ...]:
        """See ``FeedForward``."""
        return (self.ffn.swiglu,)

    def keep_all_in_evaluation(self) -> None:
        """See ``FeedForward``."""
        self.slots.keep_all_in_evaluation()


def _dispatched_shape(x_GND: list, dispatch_GEC: list, slot: list, kept: list) -> list:
    """(G, E, C, D), for MindSpore's cut graph."""
    return [*dispatch_GEC, x_GND[2]]


def _combined_shape(y_GECD: list, coeff_GNK: list, slot: list, dispatch: list, assignment: list) -> list:
    """(G, N, D), for MindSpore's cut graph."""
    return [coeff_GNK[0], coeff_GNK[1], y_GECD[3]]


class _PlaceShapes:
    """Whole shapes of what ``MoE.places`` returns, for MindSpore's cut graph."""

    def __init__(self, rule: SlotRule, chosen: int) -> None:
        self.rule, self.chosen = rule, chosen

    def __call__(self, scores: list, bias: list) -> tuple:
        G, N, _ = scores
        by_slot, by_choice = [G, *self.rule.shape(N)], [G, N, self.chosen]
        return by_slot, by_choice, by_choice, by_choice, by_slot, [G], [G, bias[0] + 1], [G, bias[0]]

    def of_counted(self, scores: list, bias: list, counted: list) -> tuple:
        """The same of ``MoE.places_of_counted``."""
        return self(scores, bias)


def _place_types(scores: ms.Type, bias: ms.Type) -> tuple:
    """Types of what ``MoE.places`` returns."""
    whole, real = ms.TensorType(ms.int32), ms.TensorType(ms.float32)
    return whole, whole, real, real, whole, real, real, real


def _counted_types(scores: ms.Type, bias: ms.Type, counted: ms.Type) -> tuple:
    """Types of what ``MoE.places_of_counted`` returns."""
    return _place_types(scores, bias)
