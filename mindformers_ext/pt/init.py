# SPDX-License-Identifier: Apache-2.0
"""Initial weights: those that MindSpore draws from the same seed, tensor by tensor in MindSpore's order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from mindformers_ext.core.log import get_logger
from mindformers_ext.core.philox import normal, seeds
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.core.weight_fit import STATE
from mindformers_ext.pt.causal_lm import CausalLM
from mindformers_ext.pt.models import build_causal_lm
from mindformers_ext.pt.names import named_views
from mindformers_ext.pt.norm import RmsNorm

DRAWN_LIMIT = 2_000_000_000  # weights; above it torch's own generator is used, minutes instead of hours
_FEED_FORWARD = (
    "feed_forward.router.dense.weight",
    "feed_forward.ffn.w1.weight",
    "feed_forward.ffn.w2.weight",
    "feed_forward.ffn.w3.weight",
    "feed_forward.w1.weight",
    "feed_forward.w2.weight",
    "feed_forward.w3.weight",
)
_LAYER = (*(f"attention.{name}.weight" for name in ("wq", "wk", "wv", "wo")), *_FEED_FORWARD)


def build_empty(spec: NetworkSpec, device: torch.device) -> CausalLM:
    """The network with norms of 1, router state of 0, and nothing yet in its matrices."""
    with torch.device("meta"):
        network = build_causal_lm(spec)
    network.to_empty(device=device)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, RmsNorm):
                module.weight.fill_(1.0)
        for name, buffer in network.named_buffers():
            if name.endswith(STATE):
                buffer.zero_()
    return network


def drawn_names(layers: int) -> Iterator[str]:
    """Weights that are drawn, in the order in which MindSpore's network makes them (norms start at 1)."""
    yield "model.tok_embeddings.embedding_weight"
    for layer in range(layers):
        yield from (f"model.layers.{layer}.{name}" for name in _LAYER)
    yield "lm_head.weight"


def draw_weights(network: nn.Module, layers: int, std: float, seed: int) -> Iterator[int]:
    """Fill the network; returns the seeds that are left for what is made after it (LoRA)."""
    views, left = named_views(network), seeds(seed)
    own = sum(view.numel() for view in views.values()) > DRAWN_LIMIT
    if own:
        get_logger(__name__).info("so many weights are drawn by torch: MindSpore's would be others from this seed")
    for name in drawn_names(layers):
        if name in views:
            _draw(views[name], next(left), std, own)
    return left


def _draw(view: torch.Tensor, seed: int, std: float, own: bool) -> None:
    with torch.no_grad():
        if own:
            view.normal_(0.0, std, generator=torch.Generator(view.device).manual_seed(seed % (1 << 63)))
        else:
            view.copy_(torch.from_numpy(normal(seed, view.numel(), std)).view(view.shape))
