# SPDX-License-Identifier: Apache-2.0
"""model_stock: between the base and the mean of N models, the nearer to the mean the more their task vectors agree.

c = mean cosine of all pairs of task vectors, t = N c / (1 + (N-1) c), out = t mean(x_m) + (1-t) b. One t for the whole
tensor, or one per row with ``filter_wise``. Source: Jang et al. 2024, "Model Stock", arXiv 2403.19522.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mindformers_ext.surgery.merge.settings import Method, Parameter, Settings
from mindformers_ext.surgery.merge.spheres import wide
from mindformers_ext.surgery.merge.stream import Chunk, Stream, need_base

TINY = 1e-8


def model_stock(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks between the base and the mean of the inputs."""
    by_row = settings.on("filter_wise") and stream.shape[0] > 1
    whole = None if by_row else sum((_gram(chunk).sum(0) for chunk in stream.chunks()), torch.zeros(()))
    for chunk in stream.chunks():
        base = wide(need_base(chunk))
        t = _share(_gram(chunk) if whole is None else whole[None])[:, None].to(base.dtype)
        mean = sum((wide(tensor) for tensor in chunk.inputs), torch.zeros_like(base)) / len(chunk.inputs)
        yield (t * mean + (1 - t) * base).to(chunk.inputs[0].dtype)


def _gram(chunk: Chunk) -> torch.Tensor:
    """Inner products of all pairs of task vectors, row by row: (rows, N, N), float64."""
    base = wide(need_base(chunk))
    deltas = torch.stack([wide(tensor) - base for tensor in chunk.inputs], dim=1)
    return torch.bmm(deltas, deltas.transpose(1, 2)).to(torch.float64)


def _share(gram: torch.Tensor) -> torch.Tensor:
    """t for each row of ``gram``."""
    count = gram.shape[-1]
    norms = gram.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    cosines = (gram / (norms[:, :, None] * norms[:, None, :]).clamp_min(TINY)).clamp(-1, 1)
    pairs = torch.triu_indices(count, count, 1)
    mean = cosines[:, pairs[0], pairs[1]].mean(1)
    return count * mean / (1 + (count - 1) * mean)


MODEL_STOCK = Method("model_stock", model_stock, (Parameter("filter_wise", False),), fewest=2)
