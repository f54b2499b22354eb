# SPDX-License-Identifier: Apache-2.0
"""Initial weights: those that MindSpore draws from the same seed, tensor by tensor in MindSpore's order."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mindformers_ext.core.log import get_logger
from mindformers_ext.core.parameters import model_weights
from mindformers_ext.core.philox import normal, seeds
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.causal_lm import CausalLM, build_causal_lm
from mindformers_ext.pt.names import named_views

DRAWN_LIMIT = 2_000_000_000  # weights; above it torch's own generator is used, minutes instead of hours
CONSTANT = {"ones": 1.0, "zeros": 0.0}


def build_empty(spec: NetworkSpec, device: torch.device) -> CausalLM:
    """The network with norms of 1, biases and router state of 0, and nothing yet in its matrices."""
    with torch.device("meta"):
        network = build_causal_lm(spec)
    network.to_empty(device=device)
    views = named_views(network)
    with torch.no_grad():
        for weight in model_weights(spec.model):
            if weight.row.init in CONSTANT:
                views[weight.name].fill_(CONSTANT[weight.row.init])
        for buffer in network.buffers():
            buffer.zero_()
    return network


def draw_weights(network: CausalLM, seed: int) -> Iterator[int]:
    """Fill the matrices of an empty network; returns the seeds that are left for what is made after it (LoRA)."""
    model, views, left = network.spec.model, named_views(network), seeds(seed)
    own = sum(view.numel() for view in views.values()) > DRAWN_LIMIT
    if own:
        get_logger(__name__).info("so many weights are drawn by torch: MindSpore's would be others from this seed")
    for weight in model_weights(model):
        if weight.row.init not in CONSTANT:
            _draw(views[weight.name], next(left), model.initializer_range, own)
    return left


def _draw(view: torch.Tensor, seed: int, std: float, own: bool) -> None:
    with torch.no_grad():
        if own:
            view.normal_(0.0, std, generator=torch.Generator(view.device).manual_seed(seed % (1 << 63)))
        else:
            view.copy_(torch.from_numpy(normal(seed, view.numel(), std)).view(view.shape))
