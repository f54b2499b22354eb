# SPDX-License-Identifier: Apache-2.0
"""Attention within the documents of packed rows (``core.documents``): a mask on any device, lengths on a GPU's kernel.

Which one computes is decided by device and type and logged once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mindformers_ext.core.documents import MOST_DOCUMENTS
from mindformers_ext.core.log import get_logger

# q (B, H, S, P), k and v (B, N, S, P), documents (B, S) and the window; the output is as q
PackedAttention = Callable[[Tensor, Tensor, Tensor, Tensor, int | None], Tensor]
_told: set[str] = set()


def restarted_positions(documents_BS: Tensor) -> Tensor:
    """The place (B, S) of every token in its document, from 0."""
    place_BS = torch.arange(documents_BS.shape[1], device=documents_BS.device).expand_as(documents_BS)
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return place_BS - torch.where(begins_BS, place_BS, torch.zeros_like(place_BS)).cummax(1).values


def document_mask(documents_BS: Tensor, window: int | None) -> Tensor:
    """(B, 1, S, S) bool, True where a query sees a key: of its own document, not later, within the window."""
    place_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    distance_SS = place_S[:, None] - place_S[None]
    seen_SS = distance_SS >= 0 if window is None else (distance_SS >= 0) & (distance_SS < window)
    return ((documents_BS[:, :, None] == documents_BS[:, None]) & seen_SS)[:, None]


def document_ends(documents_BS: Tensor) -> Tensor:
    """Where documents begin in B*S tokens, and the end, int32: 129 a row with its padding, most of no length."""
    B, S = documents_BS.shape
    number = torch.arange(1, MOST_DOCUMENTS + 1, device=documents_BS.device)
    inside = (documents_BS[..., None] > 0) & (documents_BS[..., None] <= number)
    ends = F.pad(inside.sum(1), (0, 1), value=S)
    ends = ends + S * torch.arange(B, device=documents_BS.device)[:, None]
    return F.pad(ends.reshape(-1), (1, 0)).to(torch.int32)


def masked(q: Tensor, k: Tensor, v: Tensor, documents_BS: Tensor, window: int | None) -> Tensor:
    """By a mask, which every device takes."""
    mask, grouped = document_mask(documents_BS, window), q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def by_lengths(q: Tensor, k: Tensor, v: Tensor, documents_BS: Tensor, window: int | None) -> Tensor:
    """By flash attention of variable length, which computes nothing between documents."""
    from torch.nn.attention.varlen import varlen_attn

    B, H, S, P = q.shape
    ends, before = document_ends(documents_BS), -1 if window is None else window - 1
    flat = (x.transpose(1, 2).reshape(B * S, -1, P) for x in (q, k, v))
    grouped = H != k.shape[1]
    mixed = varlen_attn(*flat, ends, ends, S, S, window_size=(before, 0), enable_gqa=grouped)
    assert isinstance(mixed, Tensor)
    return mixed.view(B, S, H, P).transpose(1, 2)


def select_packed(device: torch.device, dtype: torch.dtype) -> PackedAttention:
    """The form for tensors of this type on this device; the first choice of a kind is logged."""
    half = dtype in (torch.float16, torch.bfloat16)
    found = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    lengths = device.type == "cuda" and half and found
    what = f"packed rows, {dtype} on {device.type}: " + (
        "flash attention of variable length" if lengths else "attention with a mask (flash attention takes half types)"
    )
    if what not in _told:
        _told.add(what)
        get_logger(__name__).info("%s", what)
    return by_lengths if lengths else masked
