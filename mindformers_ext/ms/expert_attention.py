# SPDX-License-Identifier: Apache-2.0
"""Attention whose key/value heads, each with its query heads, are experts (LLaMA-MoE v2, arXiv:2411.15708).

A token is routed to some of them; there it asks, and there alone it is found by those that come later. All heads are
computed for all tokens, so that shapes are fixed: what a token does not pass is hidden as a key, and weighs nothing as
a query (spec of LLaMA-MoE v2, section 5).
"""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindformers_ext.core.layers import AttentionSpec, MoESpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.attention import Attention
from mindformers_ext.ms.cache import LayerCache, PromptAttention, TokenAttention, hidden_addend
from mindformers_ext.ms.moe.gate import LinearGate
from mindformers_ext.ms.ops.dtypes import mindspore_dtype
from mindformers_ext.ms.ops.portable_attention import causal_mask
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards


class PassExperts(nn.Cell):
    """What each group decides for itself. Input: logits (G, N, E) float32. Outputs: (G, N, E) what an expert's output
    is multiplied by, 0 where a token does not pass it; (G, N, E) 1 where it does; the loss that balances (G)."""

    def __init__(self, router: LinearGate, experts: MoESpec) -> None:
        super().__init__(auto_prefix=False)
        self.router, self.count = router, experts.num_local_experts
        self.one_hot = P.OneHot()
        self.one, self.zero = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)

    def construct(self, logits_GNE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.of_counted(logits_GNE, None)

    def of_counted(self, logits_GNE: Tensor, counted_GN: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same where some tokens do not count (1 or 0): they have no part in the loss."""
        expert_GNK, weight_GNK, prob_GNE = self.router.choose(logits_GNE, self.router.bias())
        chosen_GNKE = self.one_hot(ops.stop_gradient(expert_GNK), self.count, self.one, self.zero)
        seen_GNE = chosen_GNKE.sum(2)
        weight_GNE = (chosen_GNKE * ops.expand_dims(weight_GNK, 3)).sum(2)
        told_GNE = seen_GNE if counted_GN is None else seen_GNE * ops.expand_dims(counted_GN, -1)
        return weight_GNE, seen_GNE, self.router.loss(logits_GNE, prob_GNE, told_GNE.sum(1), counted_GN)


class AttendExperts(nn.Cell):
    """Causal attention within each expert. Inputs: q (B, S, H*P), k and v (B, S, E*P), weight and seen (B, S, E), and
    of packed rows their documents (B, S), within which it stays; output (B, S, H*P), each expert's heads weighed. S is
    the length it was built for."""

    def __init__(self, heads: int, experts: int, head_dim: int, length: int, softmax_dtype: ms.Type) -> None:
        super().__init__()
        self.times, self.experts, self.head_dim, self.length = heads // experts, experts, head_dim, length
        self.dtype, self.scale, self.hidden = softmax_dtype, head_dim**-0.5, hidden_addend(softmax_dtype)
        self.mask = causal_mask(0, length, softmax_dtype)
        self.transpose, self.softmax = P.Transpose(), P.Softmax(axis=-1)
        self.product, self.product_nt = P.BatchMatMul(), P.BatchMatMul(transpose_b=True)

    def _apart(self, x: Tensor, times: int) -> Tensor:
        """(B, S, A*times*P) -> (B*A, times*S, P)."""
        x = ops.reshape(x, (-1, self.length, self.experts, times, self.head_dim))
        return ops.reshape(self.transpose(x, (0, 2, 3, 1, 4)), (-1, times * self.length, self.head_dim))

    def construct(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight_BSE: Tensor,
        seen_BSE: Tensor,
        documents_BS: Tensor | None = None,
    ) -> Tensor:
        A, R, S = self.experts, self.times, self.length
        q, k, v = self._apart(q * self.scale, R), self._apart(k, 1), self._apart(v, 1)
        seen = ops.reshape(self.transpose(seen_BSE, (0, 2, 1)), (-1, 1, 1, S))
        unseen = ops.cast(1.0 - seen, self.dtype) * self.hidden  # (B*A, 1, 1, S)
        if documents_BS is not None:
            apart_BSS = ops.expand_dims(documents_BS, 2) != ops.expand_dims(documents_BS, 1)
            apart = ops.repeat_elements(ops.cast(apart_BSS, self.dtype), A, 0) if A > 1 else apart_BSS
            unseen = unseen + ops.stop_gradient(ops.expand_dims(ops.cast(apart, self.dtype), 1) * self.hidden)
        scores = ops.reshape(ops.cast(self.product_nt(q, k), self.dtype), (-1, R, S, S))
        weights = self.softmax(ops.maximum(scores + self.mask + unseen, Tensor(self.hidden, self.dtype)))
        mixed = self.product(ops.reshape(ops.cast(weights, v.dtype), (-1, R * S, S)), v)
        mixed = ops.reshape(mixed, (-1, A, R, S, self.head_dim))
        weight = ops.reshape(self.transpose(weight_BSE, (0, 2, 1)), (-1, A, 1, S, 1))
        mixed = mixed * ops.cast(weight, mixed.dtype)
        return ops.reshape(self.transpose(mixed, (0, 3, 1, 2, 4)), (-1, S, A * R * self.head_dim))


class ExpertAttention(Attention):
    """See the module. The gate's weight is ``router.dense.weight`` (A, D), the experts' biases, where they have any,
    ``expert_bias`` (A, D). Output: (B*S, D), and the loss (G)."""

    def __init__(self, spec: NetworkSpec, attention: AttentionSpec, operators: Operators) -> None:
        super().__init__(spec, attention, operators)
        if attention.experts is None:
            raise ValueError("an attention without experts")
        shards, self.groups, self.length = Shards(spec), spec.parallel.groups, spec.seq_length
        self.router = LinearGate(spec, attention.experts, operators)
        self.choose = PassExperts(self.router, attention.experts)
        self.is_cut = shards.active
        self.choose_cut = shards.region(self.choose.construct, "pass experts", _passed_shapes, _passed_types)
        self.choose_counted = shards.region(
            self.choose.of_counted, "pass counted experts", _counted_shapes, _counted_types
        )
        sizes = self.heads // shards.mp, self.kv_heads // shards.mp, self.head_dim, spec.seq_length
        attend = operators.build(AttendExperts, *sizes, self.softmax_dtype)
        self.attend = shards.local(attend, "attend experts")
        self.attend_packed = shards.local(attend, "attend experts in documents")
        self.has_bias = attention.experts.expert_bias
        if self.has_bias:
            shape, dtype = (self.kv_heads, spec.model.hidden_size), mindspore_dtype(spec.numerics.param_dtype)
            self.expert_bias = Parameter(initializer("zeros", shape, dtype), name="expert_bias")
            self.of_biases = shards.shard(P.MatMul(), "passed biases")
            self.add_biases = shards.shard(P.Add(), "residual")

    def project_out(self, mixed_TF: Tensor, weight_BSE: Tensor) -> Tensor:
        """(T, D) of the experts' heads, already weighed; with their biases, weighed too, where they have any."""
        out_TD = self.wo(mixed_TF)
        if not self.has_bias:
            return out_TD
        weight_TE = ops.cast(ops.reshape(weight_BSE, (-1, self.kv_heads)), out_TD.dtype)
        return self.add_biases(out_TD, self.of_biases(weight_TE, ops.cast(self.expert_bias, out_TD.dtype)))

    def passed(
        self, x_TD: Tensor, groups: int, length: int, counted_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """weight and seen (B, S, E), and the loss (G), of rows of ``length`` S tokens."""
        logits_GNE = ops.reshape(self.router.scores(x_TD), (groups, -1, self.kv_heads))
        if counted_T is None:
            weight, seen, loss_G = self.choose_cut(logits_GNE) if self.is_cut else self.choose(logits_GNE)
        else:
            counted_GN = ops.reshape(counted_T, (groups, -1))
            choose = self.choose_counted if self.is_cut else self.choose.of_counted
            weight, seen, loss_G = choose(logits_GNE, counted_GN)
        shape = (-1, length, self.kv_heads)
        return ops.reshape(weight, shape), ops.reshape(seen, shape), loss_G

    def construct(
        self,
        x_TD: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents_BS: Tensor | None = None,
        counted_T: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        S = cos.shape[1]
        weight_BSE, seen_BSE, loss_G = self.passed(x_TD, self.groups, S, counted_T)
        rotary = self.rotary if documents_BS is None else self.packed_rotary
        q = ops.reshape(rotary(self.query(x_TD, S), cos, sin), (-1, S, self.heads * self.head_dim))
        k = ops.reshape(rotary(self.key(x_TD, S), cos, sin), (-1, S, self.kv_heads * self.head_dim))
        v = ops.reshape(self.wv(x_TD), (-1, S, self.kv_heads * self.head_dim))
        if documents_BS is None:
            mixed = self.attend(q, k, v, weight_BSE, seen_BSE)
        else:
            mixed = self.attend_packed(q, k, v, weight_BSE, seen_BSE, documents_BS)
        return self.project_out(ops.reshape(mixed, (-1, self.heads * self.head_dim)), weight_BSE), loss_G


class PromptExpertAttention(PromptAttention):
    """Of experts: whether a token passes one stands behind its values in the cache, as one more number."""

    def __init__(self, attention: Attention, cache: LayerCache, shape: tuple[int, int], operators: Operators) -> None:
        super().__init__(attention, cache, shape, operators)
        sizes = self.heads, self.kv_heads, self.head_dim, self.length
        self.attend = operators.build(AttendExperts, *sizes, attention.softmax_dtype)
        self.join = P.Concat(axis=3)

    def construct(self, x_TD: Tensor, cos_SP: Tensor, sin_SP: Tensor, places: Tensor, sources: Tensor | None) -> Tensor:
        B, S, own = self.rows, self.length, self.attention
        weight_BSE, seen_BSE, _ = own.passed(x_TD, 1, S)
        q = own.rotary(own.query(x_TD, S), cos_SP, sin_SP)
        k = own.rotary(own.key(x_TD, S), cos_SP, sin_SP)
        v = ops.reshape(own.wv(x_TD), (B, S, self.kv_heads, self.head_dim))
        with_seen = self.join((v, ops.cast(ops.expand_dims(seen_BSE, 3), v.dtype)))
        with_seen = ops.reshape(self.transpose(with_seen, (0, 2, 1, 3)), (-1, self.head_dim + 1))
        self.update(self.cache.key, places, self._laid_out(k))
        self.update(self.cache.value, places, with_seen)
        q, k, v = ops.reshape(q, (B, S, -1)), ops.reshape(k, (B, S, -1)), ops.reshape(v, (B, S, -1))
        return own.project_out(ops.reshape(self.attend(q, k, v, weight_BSE, seen_BSE), (B * S, -1)), weight_BSE)


class TokenExpertAttention(TokenAttention):
    """Of experts, over the same cache."""

    def __init__(self, attention: Attention, cache: LayerCache, positions: int) -> None:
        super().__init__(attention, cache, positions)
        self.hidden, self.join = hidden_addend(attention.softmax_dtype), P.Concat(axis=2)

    def construct(self, x_BD: Tensor, tables: tuple[Tensor, Tensor], places: Tensor, mask_BS: Tensor) -> Tensor:
        own, M, A = self.attention, self.positions, self.kv_heads
        B = x_BD.shape[0]
        weight_B1E, seen_B1E, _ = own.passed(x_BD, 1, 1)
        q, k = self._rotated(x_BD, tables)
        v = ops.reshape(own.wv(x_BD), (B, A, self.head_dim))
        with_seen = self.join((v, ops.cast(ops.reshape(seen_B1E, (B, A, 1)), v.dtype)))
        keys = self.update(self.cache.key, places, ops.reshape(k, (-1, self.head_dim)))
        values = self.update(self.cache.value, places, ops.reshape(with_seen, (-1, self.head_dim + 1)))
        keys = ops.reshape(keys, (-1, M, self.head_dim))
        values = ops.reshape(values, (-1, M, self.head_dim + 1))
        unseen = ops.cast(1.0 - values[:, :, self.head_dim], self.softmax_dtype) * self.hidden
        scores = self.product_nt(ops.reshape(q, (B * A, -1, self.head_dim)), keys)
        masked = ops.reshape(ops.cast(scores, self.softmax_dtype), (B, A, -1, M)) + ops.expand_dims(mask_BS, 1)
        masked = masked + ops.reshape(unseen, (B, A, 1, M))
        weights = ops.reshape(ops.cast(self.softmax(masked), q.dtype), scores.shape)
        mixed = self.product(weights, values)[:, :, : self.head_dim]
        mixed = ops.reshape(mixed, (B, A, -1, self.head_dim)) * ops.cast(
            ops.reshape(weight_B1E, (B, A, 1, 1)), mixed.dtype
        )
        return own.project_out(ops.reshape(mixed, (B, -1)), weight_B1E)


def build_attention(spec: NetworkSpec, attention: AttentionSpec, operators: Operators) -> Attention:
    """Plain, or with experts; with fresh random weights."""
    return (ExpertAttention if attention.experts else Attention)(spec, attention, operators)


def _passed_shapes(logits: list) -> tuple:
    """Of ``PassExperts``, for MindSpore's cut graph."""
    return logits, logits, [logits[0]]


def _passed_types(logits: ms.Type) -> tuple:
    return logits, logits, logits


def _counted_shapes(logits: list, counted: list) -> tuple:
    return _passed_shapes(logits)


def _counted_types(logits: ms.Type, counted: ms.Type) -> tuple:
    return _passed_types(logits)
