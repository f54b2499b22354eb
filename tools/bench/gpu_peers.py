# SPDX-License-Identifier: Apache-2.0
"""Implementations of one MoE layer for ``gpu.py``: same weights and chosen experts, ``run(x, experts, weights)``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec, NumericsSpec
from mindformers_ext.pt.moe.layer import MoE
from mindformers_ext.pt.ops.fused import fused, kernels_wanted
from mindformers_ext.pt.ops.grouped import BACKENDS, fits_gmm

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
# Peers that may be installed; how each is called differs by version, so a person adds it here once it is there.
OTHERS = ("sonicmoe", "scattermoe", "megablocks", "liger_kernel", "vllm", "unsloth")


class Layer:
    """Stacked weights of one layer: gate_up (E, 2F, D) and down (E, D, F)."""

    def __init__(
        self, hidden: int, ffn: int, experts: int, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        std = hidden**-0.5
        self.gate_up = torch.randn(experts, 2 * ffn, hidden, generator=generator, device=device).mul_(std).to(dtype)
        self.down = torch.randn(experts, hidden, ffn, generator=generator, device=device).mul_(std).to(dtype)
        self.gate_up.requires_grad_()
        self.down.requires_grad_()
        self.experts, self.sizes = experts, (hidden, ffn)

    @property
    def parameters(self) -> list[Tensor]:
        """Both stacks."""
        return [self.gate_up, self.down]


def ours(layer: Layer, backend: str, chosen: int) -> Run:
    """``pt.moe.layer`` with one back end."""
    hidden, ffn = layer.sizes
    moe = MoESpec(num_local_experts=layer.experts, num_experts_per_tok=chosen, capacity_factor=-1.0)
    model = ModelSpec(
        vocab_size=8,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=hidden,
        moe=moe,
    )
    with torch.device("meta"):
        module = MoE(NetworkSpec(model=model, seq_length=1, numerics=NumericsSpec()), moe)
    module.ffn.gate_up = torch.nn.Parameter(layer.gate_up.detach())
    module.ffn.down = torch.nn.Parameter(layer.down.detach())
    layer.gate_up, layer.down = module.ffn.gate_up, module.ffn.down
    module.ffn.backend = BACKENDS[backend]
    return lambda x, experts, weights: module.computed(x, experts, weights, None)


def _sorted(x: Tensor, experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = experts.reshape(-1)
    order = torch.argsort(flat, stable=True)
    offsets = torch.histc(flat.float(), bins=count, min=0, max=count - 1).cumsum(0).to(torch.int32)
    return x[order // experts.shape[1]], order, offsets


def _back(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    spread = torch.empty_like(rows)
    spread[order] = rows
    return (spread.view(*weights.shape, -1) * weights[..., None].to(rows.dtype)).sum(1)


def sort_and_grouped_mm(layer: Layer) -> Run:
    """argsort and two F.grouped_mm, the way of transformers 5's default."""

    def run(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        rows, order, offsets = _sorted(x, experts, layer.experts)
        gate, up = F.grouped_mm(rows, layer.gate_up.transpose(1, 2), offs=offsets).chunk(2, -1)
        return _back(F.grouped_mm(F.silu(gate) * up, layer.down.transpose(1, 2), offs=offsets), order, weights)

    return run


def sort_and_loop(layer: Layer) -> Run:
    """argsort and one dense product per expert and matrix."""

    def run(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        rows, order, offsets = _sorted(x, experts, layer.experts)
        ends = offsets.tolist()
        parts = []
        for e, (low, high) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            gate, up = (rows[low:high] @ layer.gate_up[e].T).chunk(2, -1)
            parts.append((F.silu(gate) * up) @ layer.down[e].T)
        return _back(torch.cat(parts), order, weights)

    return run


def eager(layer: Layer) -> Run:
    """A loop over the experts that were hit, with masks and index_add: transformers' eager block."""

    def run(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(experts, layer.experts).permute(2, 1, 0)
        for e in mask.sum((1, 2)).nonzero().flatten().tolist():
            choice, token = torch.where(mask[e])
            gate, up = F.linear(x[token], layer.gate_up[e]).chunk(2, -1)
            found = F.linear(F.silu(gate) * up, layer.down[e]) * weights[token, choice, None].to(x.dtype)
            out.index_add_(0, token, found)
        return out

    return run


def batched(layer: Layer) -> Run:
    """Copies every assignment's weights, then bmm: transformers 5's way of decoding."""

    def run(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        flat = experts.reshape(-1)
        rows = x.repeat_interleave(experts.shape[1], 0)[:, :, None]
        gate, up = torch.bmm(layer.gate_up[flat], rows)[..., 0].chunk(2, -1)
        found = torch.bmm(layer.down[flat], (F.silu(gate) * up)[:, :, None])[..., 0]
        return (found.view(*weights.shape, -1) * weights[..., None].to(x.dtype)).sum(1)

    return run


def peers(layer: Layer, chosen: int, tokens: int, training: bool) -> dict[str, tuple[Run, bool]]:
    """Every implementation that takes these sizes, and whether a CUDA graph can hold it."""
    aligned = fits_gmm(layer.gate_up.dtype, *layer.sizes)
    found: dict[str, tuple[Run, bool]] = {}
    for name, backend in BACKENDS.items():
        if (name != "gmm" or aligned) and (not backend.gathers or fused(layer.down)):
            found[f"ours {name}"] = (ours(layer, name, chosen), backend.capturable)
    if aligned:
        found["sort + grouped_mm"] = (sort_and_grouped_mm(layer), True)
    found["sort + loop"] = (sort_and_loop(layer), False)
    found["eager"] = (eager(layer), False)
    if tokens <= 512 and not training and tokens * chosen <= 4 * layer.experts * 32:
        found["batched bmm"] = (batched(layer), True)
    return found


def missing() -> str:
    """Other peers and whether they are here, and whether our own kernels are."""
    runs = torch.cuda.is_available() and kernels_wanted()
    own = "ours triton runs" if runs else "ours triton left out: no GPU, or no Triton for it"
    return ", ".join(
        [
            own,
            *(
                f"{name} {'installed, not wired' if importlib.util.find_spec(name) else 'not installed'}"
                for name in OTHERS
            ),
        ]
    )
