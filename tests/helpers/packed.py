# SPDX-License-Identifier: Apache-2.0
"""The same documents packed into rows and one to a row, and networks small enough to compare them in."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.data.documents import IGNORED, Document, DocumentPacker

VOCAB, SEQ, PAD = 40, 24, 0
SIZES = (7, 5, 9, 12, 4)  # two rows


class Columns(NamedTuple):
    """int32 (rows, SEQ + 1) each."""

    ids: np.ndarray
    labels: np.ndarray
    documents: np.ndarray


def documents(sizes: tuple[int, ...] = SIZES) -> list[Document]:
    """Random ones; the first tokens of each bear no loss, as a prompt's."""
    draw = np.random.default_rng(5)
    found = []
    for size in sizes:
        ids = draw.integers(1, VOCAB, size).astype(np.int32)
        found.append(Document(ids, np.where(np.arange(size) < 2, IGNORED, ids).astype(np.int32)))
    return found


def columns(strategy: str, sizes: tuple[int, ...] = SIZES) -> Columns:
    """Their rows."""
    packer = DocumentPacker(SEQ + 1, PAD, strategy)
    rows = [row for row in [*map(packer.add, documents(sizes)), packer.close()] if row is not None]
    return Columns(*(np.stack([row[name] for row in rows]) for name in ("input_ids", "labels", "document_ids")))


def dense() -> NetworkSpec:
    """Grouped queries and a window shorter than a document."""
    model = ModelSpec(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        pad_token_id=PAD,
        initializer_range=0.3,
        family="mistral",
    )
    return NetworkSpec(model=model, seq_length=SEQ, packed=True)


def mixtral() -> NetworkSpec:
    """Dropless, with every loss of balance."""
    moe = MoESpec(
        num_local_experts=4,
        num_experts_per_tok=2,
        capacity_factor=-1.0,
        aux_losses=(("expert", 0.1),),
        z_loss_factor=0.01,
    )
    model = replace(dense().model, moe=moe, family="", sliding_window=None)
    return replace(dense(), model=model)


def llama_moe() -> NetworkSpec:
    """LLaMA-MoE's gate without noise, which rows of another number would draw otherwise."""
    moe = MoESpec(
        num_local_experts=4,
        num_experts_per_tok=2,
        capacity_factor=0.0,
        gate="mlp_noisy",
        norm_topk_prob=False,
        gate_add_noise=False,
        gate_balance_loss_weight=0.25,
    )
    model = replace(dense().model, moe=moe, family="llama_moe", sliding_window=None)
    return replace(dense(), model=model)


def llama_moe_v2() -> NetworkSpec:
    """Heads that are experts too: a token is found in the experts that it passes."""
    moe = MoESpec(
        num_local_experts=4,
        num_experts_per_tok=2,
        capacity_factor=0.0,
        norm_single_choice=True,
        routed_scaling_factor=2.0,
        aux_losses=(("expert", 0.1),),
        aux_loss_reduce="mean",
    )
    heads = {"attn_experts": 2, "top_k_attn": 1, "scale_factor_attn": 1.5}
    model = replace(dense().model, moe=moe, family="llama_moe_v2", sliding_window=None, **heads)
    return replace(dense(), model=model)


NETWORKS = {"dense": dense, "mixtral": mixtral, "llama_moe": llama_moe, "llama_moe_v2": llama_moe_v2}
