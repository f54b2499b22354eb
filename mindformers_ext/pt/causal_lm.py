# SPDX-License-Identifier: Apache-2.0
"""The decoder-only language model of every family, layer by layer as its spec says. Module names are MindFormers'."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.attention import rotary_tables
from mindformers_ext.pt.layer import Layer
from mindformers_ext.pt.linear import Linear, fill_normal
from mindformers_ext.pt.loss import next_token_loss, preference_loss, targets, token_losses
from mindformers_ext.pt.moe.aux_loss import JointLoss
from mindformers_ext.pt.norm import RmsNorm
from mindformers_ext.pt.ops.dtypes import torch_dtype
from mindformers_ext.pt.ops.noise import mixture_noise
from mindformers_ext.pt.ops.packed import restarted_positions
from mindformers_ext.pt.ops.products import product


class Terms(NamedTuple):
    """What a training step reports, as ``ms.step``: losses (), load (L, E) and dropped (L) of L mixtures; float32."""

    loss: Tensor
    lm_loss: Tensor
    aux_loss: Tensor
    expert_load: Tensor
    dropped: Tensor


class TokenEmbedding(nn.Module):
    """Rows of the embedding table. Input (T), output (T, D). Parameter ``embedding_weight`` (V, D)."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        model, dtype = spec.model, torch_dtype(spec.numerics.param_dtype)
        self.embedding_weight = nn.Parameter(torch.empty(model.vocab_size, model.hidden_size, dtype=dtype))
        self.std = model.initializer_range
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh normal weights."""
        fill_normal(self.embedding_weight, self.std)

    def forward(self, ids_T: Tensor) -> Tensor:
        return nn.functional.embedding(ids_T, self.embedding_weight)


class Decoder(nn.Module):
    """Embedding, layers, final norm.

    Inputs (B, S) int, the keys (B, 3) of the noise of gates that add it (``core.philox``), and the documents (B, S)
    of packed rows (``core.documents``), whose padding counts in no mixture's balance. Outputs: hidden (B*S, D),
    aux_loss (), load (mixtures, E) and dropped (mixtures); a dense model returns load (1, 1) and dropped (1) of
    zeros. ``recompute``: layers that compute their activations again.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        model = spec.model
        self.compute_dtype = torch_dtype(spec.numerics.compute_dtype)
        self.aux_scale = 1.0 / len(model.moe_layers) if model.moe and model.moe.aux_loss_reduce == "mean" else 1.0
        self.joint_loss: JointLoss | None = None
        if model.moe and model.moe.joins_layers:
            self.joint_loss = JointLoss(model.gates, len(model.moe_layers))
        self.tok_embeddings = TokenEmbedding(spec)
        self.layers = nn.ModuleList([Layer(spec, model.layer(index)) for index in range(model.num_hidden_layers)])
        self.norm_out = RmsNorm(spec)
        self.rope, self.rotary_dtype = model.rope, torch_dtype(spec.numerics.rotary_dtype)
        self.recompute = False
        self.drawing = len(model.moe_layers), model.moe.num_local_experts if model.moe else 0
        self._tables: tuple[Tensor, Tensor] | None = None
        self.l0_module: nn.Module | None = None  # the masks of a run that prunes (``pt.l0``): their penalty

    def tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (length, P), kept for the longest text so far, or where they follow its length for the last."""
        held = 0 if self._tables is None or self._tables[0].device != device else self._tables[0].shape[0]
        if self._tables is None or held < length or (self.rope.follows_length and held != length):
            self._tables = rotary_tables(self.rope.tables(length), self.rotary_dtype, device)
        return self._tables[0][:length], self._tables[1][:length]

    def noise(self, keys_B3: Tensor | None, place: int, tokens: int) -> Tensor | None:
        """(B*S, E) for mixture number ``place``, where there are keys."""
        if keys_B3 is None or place == self.drawing[0]:
            return None
        return mixture_noise(keys_B3, place, (self.drawing[0], tokens, self.drawing[1]))

    def forward(
        self, ids_BS: Tensor, keys_B3: Tensor | None = None, documents_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cos, sin = self.tables(ids_BS.shape[1], ids_BS.device)
        if documents_BS is not None:
            place_BS = restarted_positions(documents_BS)
            cos, sin = cos[place_BS][:, None], sin[place_BS][:, None]
        x_TD = self.tok_embeddings(ids_BS.reshape(-1)).to(self.compute_dtype)
        losses, reports = list[Tensor](), list[Tensor]()
        for layer in self.layers:
            inputs = x_TD, cos, sin, self.noise(keys_B3, len(losses), ids_BS.shape[1]), documents_BS
            if self.recompute and self.training:
                x_TD, aux_loss_G, report_GE = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x_TD, aux_loss_G, report_GE = layer(*inputs)
            if aux_loss_G is not None and report_GE is not None:
                losses.append(aux_loss_G)
                reports.append(report_GE.detach())
        x_TD = self.norm_out(x_TD)
        if not losses:
            zero = torch.zeros((), device=x_TD.device)
            return x_TD, zero, zero.view(1, 1), zero.view(1)
        report = torch.stack(reports)  # (L, G, E + 1)
        total = torch.stack(losses).sum(0)
        aux_loss = total.mean() * self.aux_scale if self.joint_loss is None else self.joint_loss(total)
        return x_TD, aux_loss, report[:, :, :-1].sum(1), report[:, :, -1].mean(1)


class CausalLM(nn.Module):
    """Decoder and head.

    ``forward(ids (B, S)) -> logits (B, S, V)`` float32; ``forward(ids (B, S+1), labels, losses=True)`` ->
    ``Terms`` with loss = lm_loss + aux_loss, or lm_loss alone when ``return_extra_loss`` is off.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        model = spec.model
        self.spec = spec
        self.by_numpy = False  # whether numpy reads all weights for one row (``pt.ops.products``)
        self.tied, self.add_aux_loss = model.tie_word_embeddings, spec.return_extra_loss
        self.model = Decoder(spec)
        if not self.tied:
            dtype = torch_dtype(spec.numerics.param_dtype)
            self.lm_head = Linear(model.hidden_size, model.vocab_size, model.initializer_range, dtype)

    def head(self, x_TD: Tensor) -> Tensor:
        """Logits (T, V) in the type of x."""
        if self.tied:
            return product(x_TD, self.model.tok_embeddings.embedding_weight)
        return self.lm_head(x_TD)

    def forward(
        self,
        ids_BS: Tensor,
        labels_BT: Tensor | None = None,
        losses: bool = False,
        tokens: Tensor | None = None,
        keys: Tensor | None = None,
        documents: Tensor | None = None,
        preference: tuple[Tensor, float] | None = None,
        by_row: bool = False,
    ) -> Tensor | Terms:
        """See the class. ``tokens``: counted tokens to divide the loss by, where other ranks hold a share of them;
        ``keys``: (B, 3) of the noise of gates that add it; ``documents``: of packed rows, of the shape of ids.

        ``preference``: the reference's log-probabilities (B/2, 2) and beta; rows are chosen answers and then as many
        rejected ones, lm_loss is that of ``core.preferences``, and ``core.figures.MEASURED`` stand behind ``dropped``.
        ``by_row``: the sum of the log-probabilities of each row's labels (B) alone.
        """
        if by_row or preference is not None:
            return self._of_rows(ids_BS, labels_BT, keys, preference)
        if losses:
            return self._losses(ids_BS, labels_BT, tokens, keys, documents)
        x_TD, _, _, _ = self.model(ids_BS, None, documents)
        return self.head(x_TD).float().view(*ids_BS.shape, -1)

    def _losses(
        self,
        ids_BT: Tensor,
        labels_BT: Tensor | None,
        tokens: Tensor | None,
        keys: Tensor | None,
        documents_BT: Tensor | None,
    ) -> Terms:
        """The shift by one token happens here. Tokens equal to the pad id do not count."""
        model = self.spec.model
        documents_BS = None if documents_BT is None else documents_BT[:, :-1]
        x_TD, aux_loss, load, dropped = self.model(ids_BT[:, :-1], keys, documents_BS)
        if self.model.l0_module is not None:
            aux_loss = aux_loss + self.model.l0_module()
        target_T, counted_T = targets(ids_BT, labels_BT, model.pad_token_id, model.ignore_token_id)
        total, count = next_token_loss(self.head(x_TD), target_T, counted_T)
        lm_loss = total / (count if tokens is None else tokens).clamp(min=1)
        loss = lm_loss + aux_loss if self.add_aux_loss else lm_loss
        return Terms(loss, lm_loss, aux_loss, load, dropped)

    def _of_rows(
        self, ids_BT: Tensor, labels_BT: Tensor | None, keys: Tensor | None, preference: tuple[Tensor, float] | None
    ) -> Tensor | Terms:
        model = self.spec.model
        x_TD, aux_loss, load, dropped = self.model(ids_BT[:, :-1], keys)
        target_T, counted_T = targets(ids_BT, labels_BT, model.pad_token_id, model.ignore_token_id)
        logp_B = -token_losses(self.head(x_TD), target_T, counted_T).view(len(ids_BT), -1).sum(1)
        if preference is None:
            return logp_B
        lm_loss, measured = preference_loss(logp_B, *preference)
        loss = lm_loss + aux_loss if self.add_aux_loss else lm_loss
        return Terms(loss, lm_loss, aux_loss, load, torch.cat((dropped, measured)))


def build_causal_lm(spec: NetworkSpec) -> CausalLM:
    """The network of ``spec`` with fresh random weights."""
    return CausalLM(spec)
