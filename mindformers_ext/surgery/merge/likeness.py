# SPDX-License-Identifier: Apache-2.0
"""How alike the models of a merge are, tensor by tensor: cosines of the weights, and of what training changed.

cos(x, y) = x.y / (|x| |y|) of the flattened tensors; for task vectors the base is taken off first. Fine-tuned models of
one base have weights of cosine nearly 1, so their task vectors tell more: near 0 they changed different things, below 0
they pull against each other. Weights of cosine near 0 come from different training runs, and no method mends that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mindformers_ext.surgery.merge.spheres import wide
from mindformers_ext.surgery.merge.stream import Stream


@dataclass(frozen=True)
class Likeness:
    """Cosines of all pairs: (N, N) of the weights, base first where there is one, (M, M) of the M task vectors.

    A tensor of zeros has no direction: its cosines are NaN.
    """

    weights: torch.Tensor
    changes: torch.Tensor | None


def likeness(stream: Stream) -> Likeness:
    """Cosines of the tensors of ``stream``; products in float32 within a chunk, float64 between chunks."""
    weights: torch.Tensor | None = None
    changes: torch.Tensor | None = None
    for chunk in stream.chunks():
        inputs = [wide(tensor).reshape(-1) for tensor in chunk.inputs]
        if chunk.base is not None:
            base = wide(chunk.base).reshape(-1)
            gram = _gram([tensor - base for tensor in inputs])
            changes = gram if changes is None else changes + gram
            inputs = [base, *inputs]
        gram = _gram(inputs)
        weights = gram if weights is None else weights + gram
    if weights is None:
        raise ValueError(f"'{stream.name}' has no chunk")
    return Likeness(_cosines(weights), None if changes is None else _cosines(changes))


def _gram(vectors: list[torch.Tensor]) -> torch.Tensor:
    stacked = torch.stack(vectors)
    return (stacked @ stacked.T).to(torch.float64).cpu()


def _cosines(gram: torch.Tensor) -> torch.Tensor:
    norms = gram.diagonal().clamp_min(0).sqrt()
    return (gram / (norms[:, None] * norms[None, :])).clamp(-1, 1)
