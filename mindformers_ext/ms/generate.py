# SPDX-License-Identifier: Apache-2.0
"""Two graphs that generate: one for the prompts, one for the next token of every row. Shapes are fixed.

They run on the parameters of a ``CausalLM``, which stays as it is; what they have of their own is the cache. Prompts
are read a few rows at a time, so that the memory for it does not grow with the batch.
"""

from __future__ import annotations

from functools import partial

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Tensor, nn, ops

from mindformers_ext.core.capacity import last_at_each_place, rows_at_once
from mindformers_ext.core.cluster.tensor_parallel import head_parts
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.attention import rotary_tables
from mindformers_ext.ms.cache import (
    LayerCache,
    PromptAttention,
    TokenAttention,
    TokenTables,
    hidden_addend,
    positions_tensor,
)
from mindformers_ext.ms.causal_lm import CausalLM
from mindformers_ext.ms.expert_attention import PromptExpertAttention, TokenExpertAttention
from mindformers_ext.ms.kept_graphs import compile_kept
from mindformers_ext.ms.layer import Layer
from mindformers_ext.ms.ops.select import Operators, select_operators


class _SecondHalf(nn.Cell):
    """Of a layer. Inputs: x (T, D), valid (T) int32 (0 = padding); output (T, D), without the residual."""

    def __init__(self, layer: Layer, tokens: int) -> None:
        super().__init__(auto_prefix=False)
        self.norm, self.feed_forward = layer.ffn_norm, layer.feed_forward.for_inference(tokens)

    def construct(self, x_TD: Tensor, valid_T: Tensor) -> Tensor:
        return self.feed_forward(self.norm(x_TD), valid_T)


class _Graph(nn.Cell):
    """What both graphs share. ``shape``: rows B, tokens per row S, positions of the cache M.

    ``count``: processes that hold the network together; what a layer adds is then summed over them.
    """

    def __init__(self, network: CausalLM, shape: tuple[int, int, int], operators: Operators, count: int) -> None:
        super().__init__(auto_prefix=False)
        spec = network.spec
        rows, length, positions = shape
        self.rows, self.length, self.positions = shape
        self.network, self.decoder = network, network.model
        self.layers = range(len(network.model.layers))
        self.norms = nn.CellList([layer.attention_norm for layer in self.decoder.layers], auto_prefix=False)
        self.feed_forwards = nn.CellList(
            [_SecondHalf(layer, rows * length) for layer in self.decoder.layers], auto_prefix=False
        )
        self.rotary_dtype = operators.dtype(spec.numerics.rotary_dtype)
        self.gather = P.Gather()
        self.is_part, self.count = count > 1, count
        self.head_is_part = head_parts(spec, count) > 1
        if self.is_part:
            self.sum, self.gather_all, self.transpose = P.AllReduce(), P.AllGather(), P.Transpose()
        self.set_train(False)
        self.phase = "increment"  # compiled once, then called without looking at every cell again

    def _embedded(self, ids_T: Tensor) -> Tensor:
        return ops.cast(self.decoder.tok_embeddings(ids_T), self.decoder.compute_dtype)

    def _added(self, x_TD: Tensor, more_TD: Tensor) -> Tensor:
        """The residual and what a layer adds to it."""
        if self.is_part:
            return x_TD + self.sum(more_TD)
        return x_TD + more_TD

    def _logits(self, x_BD: Tensor) -> Tensor:
        logits_BV = self.network.head(self.decoder.norm_out(x_BD))
        if self.head_is_part:  # process after process, each with its part of the vocabulary
            B = logits_BV.shape[0]
            logits_BV = ops.reshape(self.gather_all(logits_BV), (self.count, B, -1))
            logits_BV = ops.reshape(self.transpose(logits_BV, (1, 0, 2)), (B, -1))
        return ops.cast(logits_BV, ms.float32)


class PromptGraph(_Graph):
    """Reads whole prompts.

    Inputs, int32: ids (B, S) padded on the right, lengths (B), and places (B*N*S), the cache rows to write; where a
    layer rolls, its places and sources too (``PromptAttention``); where rotary frequencies follow the length, those of
    each row (B, P) float32. Output: logits (B, V) behind each last token. B are a few of the cache's rows.
    """

    def __init__(
        self,
        network: CausalLM,
        caches: list[LayerCache],
        shape: tuple[int, int, int],
        operators: Operators,
        count: int = 1,
    ) -> None:
        super().__init__(network, shape, operators, count)
        layers = zip(self.decoder.layers, caches, strict=True)
        self.attentions = nn.CellList(
            [
                (PromptExpertAttention if layer.attends_by_experts else PromptAttention)(
                    layer.attention, cache, shape[:2], operators
                )
                for layer, cache in layers
            ],
            auto_prefix=False,
        )
        self.rolls = [cache.rolls for cache in caches]
        rope = network.spec.model.rope
        self.follows_length, self.any_rolls = rope.follows_length, any(self.rolls)
        self.cos, self.sin = rotary_tables(rope.tables(self.length), self.rotary_dtype)
        self.place_S = Tensor(np.arange(self.length, dtype=np.int32)[None])
        self.turn_S = Tensor(np.arange(self.length, dtype=np.float32)[None, :, None, None])
        self.first_B = Tensor(np.arange(self.rows, dtype=np.int32) * self.length)

    def _tables(self, more: tuple) -> tuple[Tensor, Tensor]:
        """cos and sin (1, S, 1, P), or (B, S, 1, P)."""
        if not self.follows_length:
            return self.cos, self.sin
        angle = self.turn_S * ops.reshape(more[-1], (self.rows, 1, 1, -1))
        return ops.cast(ops.cos(angle), self.rotary_dtype), ops.cast(ops.sin(angle), self.rotary_dtype)

    def construct(self, ids_BS: Tensor, length_B: Tensor, places: Tensor, *more: Tensor) -> Tensor:
        valid_BS = ops.cast(self.place_S < ops.expand_dims(length_B, 1), ms.int32)
        valid_T = ops.reshape(valid_BS, (-1,))
        cos_SP, sin_SP = self._tables(more)
        x_TD = self._embedded(ops.reshape(ids_BS, (-1,)))
        for i in self.layers:
            where = (more[0], more[1]) if self.rolls[i] else (places, None)
            x_TD = self._added(x_TD, self.attentions[i](self.norms[i](x_TD), cos_SP, sin_SP, where[0], where[1]))
            x_TD = self._added(x_TD, self.feed_forwards[i](x_TD, valid_T))
        return self._logits(self.gather(x_TD, self.first_B + length_B - 1, 0))


class TokenGraph(_Graph):
    """Inputs: tokens (B) and their positions (B), int32, and where a layer rolls their places in its cache (B). Output:
    logits (B, V) behind them."""

    def __init__(
        self,
        network: CausalLM,
        caches: list[LayerCache],
        shape: tuple[int, int, int],
        operators: Operators,
        count: int = 1,
    ) -> None:
        super().__init__(network, shape, operators, count)
        spec, positions = network.spec, self.positions
        layers = zip(self.decoder.layers, caches, strict=True)
        self.attentions = nn.CellList(
            [
                (TokenExpertAttention if layer.attends_by_experts else TokenAttention)(
                    layer.attention, cache, cache.positions
                )
                for layer, cache in layers
            ],
            auto_prefix=False,
        )
        self.rolls = [cache.rolls for cache in caches]
        self.any_rolls, self.all_roll = any(self.rolls), all(self.rolls)
        heads = np.arange(self.rows * spec.model.num_key_value_heads, dtype=np.int32).reshape(self.rows, -1)
        self.first_BN = Tensor(heads * positions)
        if self.any_rolls:
            window = next(cache.positions for cache in caches if cache.rolls)
            self.first_rolling_BN = Tensor(heads * window)
            self.place_W = positions_tensor(window)
        self.cos, self.sin = rotary_tables(spec.model.rope.growing_tables(positions), self.rotary_dtype)
        self.mask_dtype = operators.dtype(spec.numerics.softmax_dtype)
        self.hidden = hidden_addend(self.mask_dtype)
        self.place_S = positions_tensor(positions)
        self.valid_B = Tensor(np.ones(self.rows, np.int32))
        self.tables = TokenTables(spec.model.head_dim, operators.dtype(spec.numerics.rotary_dtype))

    def _mask(self, place_S: Tensor, position_B: Tensor) -> Tensor:
        """(B, 1, S) addend that hides what no token stands at yet: of a rolling cache nothing, once it is full."""
        behind_BS = place_S > ops.reshape(position_B, (-1, 1, 1))
        return ops.cast(behind_BS, self.mask_dtype) * self.hidden

    def construct(self, token_B: Tensor, position_B: Tensor, *rolling: Tensor) -> Tensor:
        places = ops.reshape(self.first_BN + ops.expand_dims(position_B, 1), (-1,))
        seen = (places, self._mask(self.place_S, position_B))
        rolled = seen
        if self.any_rolls:
            there = ops.reshape(self.first_rolling_BN + ops.expand_dims(rolling[0], 1), (-1,))
            rolled = (there, self._mask(self.place_W, position_B))
        cos_BP = ops.reshape(self.gather(self.cos, position_B, 1), (self.rows, 1, 1, -1))
        sin_BP = ops.reshape(self.gather(self.sin, position_B, 1), (self.rows, 1, 1, -1))
        tables = self.tables(cos_BP, sin_BP)
        x_BD = self._embedded(token_B)
        for i in self.layers:
            where = rolled if self.rolls[i] else seen
            x_BD = self._added(x_BD, self.attentions[i](self.norms[i](x_BD), tables, where[0], where[1]))
            x_BD = self._added(x_BD, self.feed_forwards[i](x_BD, self.valid_B))
        return self._logits(x_BD)


class MindSporeSession:
    """Generation for ``rows`` rows of prompts up to ``length`` tokens in a cache of ``positions`` tokens.

    The graphs compile when first called (seconds) and serve every batch of this shape. The weights have to be loaded
    before: what ``network`` gets later is not seen (``dropless.shared_parts``). ``count``: processes of which
    ``network`` is one's part; all make the same calls.
    """

    def __init__(self, network: CausalLM, rows: int, length: int, positions: int, count: int = 1) -> None:
        spec: NetworkSpec = network.spec
        operators = select_operators().for_network(spec)
        network.set_train(False)
        _check_heads(spec)
        self.rows, self.length, self.positions = rows, length, positions
        self._vocab_size = spec.model.vocab_size
        caches = [LayerCache(layer, rows, positions, spec) for layer in range(spec.model.num_hidden_layers)]
        self._group = rows_at_once(rows, length)
        # rows of the cache that a group of prompts fills, counted from the first of its first prompt
        heads = np.arange(self._group * spec.model.num_key_value_heads, dtype=np.int32)
        self._places = (heads[:, None] * positions + np.arange(length, dtype=np.int32)).reshape(-1)
        self._heads = spec.model.num_key_value_heads
        self._rope = spec.model.rope
        self._window = next((cache.positions for cache in caches if cache.rolls), 0)
        self._prompts = PromptGraph(network, caches, (self._group, length, positions), operators, count)
        self._tokens = TokenGraph(network, caches, (rows, 1, positions), operators, count)

    def compile(self, use_cache: bool = True) -> None:
        """Compile the prompt graph, and with ``use_cache`` the token graph; PYNATIVE has nothing to compile."""
        if ms.get_context("mode") != ms.GRAPH_MODE:
            return

        inputs = [(self._prompts, self._group_of(np.zeros((self.rows, self.length)), np.ones(self.rows), 0))]
        if use_cache:
            inputs.append((self._tokens, self._step_of(np.ones(self.rows), np.ones(self.rows))))
        graphs = [partial(graph.compile, *values) for graph, values in inputs]
        if self._prompts.is_part:
            for compile_one in graphs:
                compile_one()
        else:
            about = (self._prompts.network.spec, self.rows, self.length, self.positions, use_cache)
            compile_kept(self._tokens, about, graphs)

    def _group_of(self, ids: np.ndarray, lengths: np.ndarray, first: int) -> tuple[Tensor, ...]:
        """The prompt graph's inputs for the rows from ``first`` on."""
        end = first + self._group
        places = self._places + first * self._heads * self.positions
        found: tuple[Tensor, ...] = (_int32(ids[first:end]), _int32(lengths[first:end]), _int32(places))
        if self._window:
            rows = np.arange(first * self._heads, end * self._heads)
            place = rows[:, None] * self._window + np.arange(self._window)
            sources = np.arange(len(rows))[:, None] * self.length + np.repeat(
                last_at_each_place(lengths[first:end], self._window), self._heads, axis=0
            )
            found += (_int32(place.reshape(-1)), _int32(sources.reshape(-1)))
        if self._rope.follows_length:
            turned = [self._rope.frequencies(int(length))[0] for length in lengths[first:end]]
            found += (Tensor(np.stack([np.concatenate([row, row]) for row in turned])),)
        return found

    def _step_of(self, tokens: np.ndarray, positions: np.ndarray) -> tuple[Tensor, ...]:
        """The token graph's inputs."""
        found = (_int32(tokens), _int32(positions))
        return (*found, _int32(np.asarray(positions) % self._window)) if self._window else found

    def prompt(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """float32 logits (B, V) behind the last token of each row of ``ids`` (B, S), padded on the right."""
        logits_BV = np.empty((self.rows, self._vocab_size), np.float32)
        for start in range(0, self.rows, self._group):
            first = min(start, self.rows - self._group)  # the last group reads some rows again, to the same effect
            logits_BV[first : first + self._group] = self._prompts(*self._group_of(ids, lengths, first)).asnumpy()
        return logits_BV

    def token(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """float32 logits (B, V) behind one more token per row, which stands at its position from then on."""
        return self._tokens(*self._step_of(tokens, positions)).asnumpy()


def _check_heads(spec: NetworkSpec) -> None:
    """Every layer's cache has as many heads; ``UserError`` where attention experts are finer."""
    if spec.model.attn_experts not in (0, spec.model.num_key_value_heads):
        raise UserError(
            f"attn_experts={spec.model.attn_experts} of {spec.model.num_key_value_heads} key/value heads: MindSpore "
            "generates with one expert per head alone; use the PyTorch engine (engine: pt)"
        )


def _int32(array: np.ndarray) -> Tensor:
    return Tensor(np.ascontiguousarray(array, dtype=np.int32))
