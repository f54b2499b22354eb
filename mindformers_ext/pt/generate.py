# SPDX-License-Identifier: Apache-2.0
"""Generation with a static cache of keys and values: prompts at once, then one token of every row at a time.

On a GPU the step of a token is captured as a CUDA graph when the experts' back end never asks the host, so that the
processor launches one graph instead of some hundred kernels. Rows do not see each other, and no token is dropped.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from mindformers_ext.core.capacity import last_at_each_place, rows_at_once
from mindformers_ext.core.log import get_logger
from mindformers_ext.pt.attention import rotary_tables
from mindformers_ext.pt.causal_lm import CausalLM
from mindformers_ext.pt.expert_attention import ExpertAttention
from mindformers_ext.pt.ops.products import one_thread

WARM_UP = 3  # steps before a capture: libraries allocate and choose kernels in them


class PyTorchSession:
    """Generation for ``rows`` rows of prompts up to ``length`` tokens in a cache of ``positions`` tokens."""

    def __init__(self, network: CausalLM, rows: int, length: int, positions: int, device: torch.device) -> None:
        self.network, self.device = network, device
        self.rows, self.length, self.positions = rows, length, positions
        kind, attentions = network.model.compute_dtype, [layer.attention for layer in network.model.layers]
        self.windows = [min(attention.window or positions, positions) for attention in attentions]
        shapes = [
            (rows, attention.kv_heads, window, attention.head_dim)
            for attention, window in zip(attentions, self.windows, strict=True)
        ]
        self.keys = [torch.zeros(shape, dtype=kind, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=kind, device=device) for shape in shapes]
        # where heads are experts: which tokens of the cache each has
        self.seen = [torch.zeros(shape[:3], dtype=torch.bool, device=device) for shape in shapes]
        decoder = network.model
        self.tables = rotary_tables(decoder.rope.growing_tables(positions), decoder.rotary_dtype, device)
        self.place = torch.arange(positions, device=device)
        self.row = torch.arange(rows, device=device)
        self.token_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    def compile(self, use_cache: bool = True) -> None:
        """Capture the step of a token where that is possible."""
        if self.device.type != "cuda" or not use_cache:
            return
        decoder = self.network.model
        asked = self.rows, decoder.compute_dtype, self.device
        if not all(layer.feed_forward.capturable(*asked) for layer in decoder.layers):
            get_logger(__name__).info("no CUDA graph: the experts' back end reads counts on the host")
            return
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(WARM_UP):
                self._step(self.positions)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self.graph):
            self.logits = self._step(self.positions)

    def prompt(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """float32 logits (B, V) behind the last token of each row of ``ids`` (B, S), padded on the right."""
        together = rows_at_once(*ids.shape) if self.device.type == "cpu" else len(ids)
        groups = [slice(start, start + together) for start in range(0, len(ids), together)]
        return np.concatenate([self._read(ids[rows], lengths[rows], rows) for rows in groups])

    def _read(self, ids: np.ndarray, lengths: np.ndarray, rows: slice) -> np.ndarray:
        """``prompt`` of some rows."""
        ids_BS = torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64)).to(self.device)
        last_B = torch.from_numpy(np.asarray(lengths, dtype=np.int64)).to(self.device) - 1
        with torch.inference_mode():
            decoder, (B, S) = self.network.model, ids_BS.shape
            cos_SP, sin_SP = self._prompt_tables(S, lengths)
            x_TD = decoder.tok_embeddings(ids_BS.reshape(-1)).to(decoder.compute_dtype)
            for index, layer in enumerate(decoder.layers):
                attention, before_TD = layer.attention, layer.attention_norm(x_TD)
                q, k, v = attention.project(before_TD, S, cos_SP, sin_SP)
                self._keep(index, rows, k, v, lengths)
                if isinstance(attention, ExpertAttention):
                    passed = attention.passed(before_TD, S)
                    self.seen[index][rows, :, :S] = passed.seen_BES
                    mixed_TD = attention.mix_passed(q, k, v, passed, passed.seen_BES)
                else:
                    mixed_TD = attention.mix(q, k, v)
                x_TD = self._fed(layer, x_TD + mixed_TD)
            return self._scores(x_TD.view(B, S, -1)[self.row[:B], last_B]).cpu().numpy()

    def _prompt_tables(self, length: int, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tables that broadcast to (B, H, S, P): one for all rows, or where they follow the length one a row."""
        decoder = self.network.model
        if not decoder.rope.follows_length:
            return decoder.tables(length, self.device)
        turned = [decoder.rope.tables_in(length, int(whole)) for whole in lengths]
        cos, sin = (np.stack(tables)[:, None] for tables in zip(*turned, strict=True))
        return rotary_tables((cos, sin), decoder.rotary_dtype, self.device)

    def _keep(self, index: int, rows: slice, k: Tensor, v: Tensor, lengths: np.ndarray) -> None:
        """Put the keys and values (B, N, S, P) of prompts into their rows of layer ``index``'s cache."""
        keys, values, window = self.keys[index][rows], self.values[index][rows], self.windows[index]
        if k.shape[2] <= window:
            keys[:, :, : k.shape[2]], values[:, :, : k.shape[2]] = k, v
            return
        source = torch.from_numpy(last_at_each_place(lengths, window)).to(self.device)
        source = source[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        keys.copy_(k.gather(2, source)), values.copy_(v.gather(2, source))

    def token(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """float32 logits (B, V) behind one more token per row, which stands at its position from then on."""
        self.token_B.copy_(torch.from_numpy(np.asarray(tokens, dtype=np.int64)))
        self.position_B.copy_(torch.from_numpy(np.asarray(positions, dtype=np.int64)))
        if self.graph is not None and self.logits is not None:
            self.graph.replay()
            return self.logits.cpu().numpy()
        with torch.inference_mode(), one_thread() if self.rows == 1 and self.network.by_numpy else nullcontext():
            filled = int(positions.max()) + 1 if self.device.type == "cpu" else self.positions
            return self._step(filled).cpu().numpy()

    def _step(self, filled: int) -> Tensor:
        """Logits (B, V) behind ``token_B`` at ``position_B``, below ``filled``: what lies behind is not read."""
        decoder = self.network.model
        cos, sin = (table[self.position_B][:, None, None] for table in self.tables)
        mask: Tensor | None = None
        if self.rows > 1 or self.device.type != "cpu":
            mask = (self.place[:filled] <= self.position_B[:, None])[:, None, None]
        x_BD = decoder.tok_embeddings(self.token_B).to(decoder.compute_dtype)
        for index, layer in enumerate(decoder.layers):
            attention, before_BD = layer.attention, layer.attention_norm(x_BD)
            q, k, v = attention.project(before_BD, 1, cos, sin)
            keys, values, window = self.keys[index], self.values[index], self.windows[index]
            place_B = self.position_B % window  # a cache that is full rolls
            keys[self.row, :, place_B], values[self.row, :, place_B] = k[:, :, 0], v[:, :, 0]
            keys, values = keys[:, :, :filled], values[:, :, :filled]
            if isinstance(attention, ExpertAttention):
                passed, seen = attention.passed(before_BD, 1), self.seen[index]
                seen[self.row, :, place_B] = passed.seen_BES[:, :, 0]
                mixed_BD = attention.mix_passed(q, keys, values, passed, seen[:, :, :filled], mask)
            else:
                mixed_BD = attention.mix(q, keys, values, None if mask is None else mask[..., :window])
            x_BD = self._fed(layer, x_BD + mixed_BD)
        return self._scores(x_BD)

    def _fed(self, layer: torch.nn.Module, x_TD: Tensor) -> Tensor:
        return x_TD + layer.feed_forward.dropless(layer.ffn_norm(x_TD))

    def _scores(self, x_BD: Tensor) -> Tensor:
        return self.network.head(self.network.model.norm_out(x_BD)).float()
