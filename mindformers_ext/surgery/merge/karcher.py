# SPDX-License-Identifier: Apache-2.0
"""karcher: the Riemannian mean of the models' directions on a sphere, with the mean of their lengths.

Each tensor is one vector x_m of length n_m and direction u_m; all count alike. From the normalised mean u of the
directions, steps
    T = mean of (a_m / sin a_m) (u_m - cos(a_m) u),  cos a_m = u . u_m,   u <- cos|T| u + sin|T| T / |T|
until |T| < ``tol`` or for ``max_iter`` of them; out = (mean n_m) u. Vectors shorter than ``tol`` have no direction and
count in the length alone. Everything stays in the span of the u_m, so the steps need their inner products only: one
walk for these in float64, one for the result. Source: Grove and Karcher 1973; Karcher 1977.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from mindformers_ext.surgery.merge.settings import Method, Parameter, Settings
from mindformers_ext.surgery.merge.spheres import wide
from mindformers_ext.surgery.merge.stream import Stream

TINY = 1e-12  # angles below this have no sine to divide by


def karcher(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks of the mean, in the type of the inputs."""
    if stream.inputs == 1:
        yield from (chunk.inputs[0] for chunk in stream.chunks())
        return
    factors = mean_factors(_gram(stream), int(settings.number("max_iter")), settings.number("tol"))
    for chunk in stream.chunks():
        total = torch.zeros_like(wide(chunk.inputs[0]))
        for factor, tensor in zip(factors, chunk.inputs, strict=True):
            total.add_(wide(tensor), alpha=float(factor))
        yield total.to(chunk.inputs[0].dtype)


def _gram(stream: Stream) -> np.ndarray:
    """Inner products of all pairs of the tensors, float64 (N, N)."""
    gram = np.zeros((stream.inputs, stream.inputs))
    for chunk in stream.chunks():
        rows = torch.stack([tensor.reshape(-1).to(torch.float64) for tensor in chunk.inputs])
        gram += (rows @ rows.T).cpu().numpy()
    return gram


def mean_factors(gram: np.ndarray, steps: int, tol: float) -> np.ndarray:
    """What each vector is multiplied by in the mean, from the inner products of all pairs."""
    tol = max(tol, TINY)
    norms = np.sqrt(gram.diagonal().clip(min=0))
    known = np.flatnonzero(norms > tol)
    factors = np.zeros(len(norms))
    if not len(known):
        return factors
    with np.errstate(invalid="ignore"):  # of infinite values, which the caller finds in the result
        cosines = gram[np.ix_(known, known)] / np.outer(norms[known], norms[known])

    def length(c: np.ndarray) -> float:
        return float(np.sqrt(max(c @ cosines @ c, 0.0)))

    share = 1 / len(known)
    u = np.full(len(known), share)
    u = u / length(u) if length(u) >= tol else np.eye(len(known))[0]
    for _ in range(steps):
        dots = (cosines @ u).clip(-1, 1)
        angles = np.arccos(dots)
        # a vector at u is there already; from the opposite point no way is the shortest
        moving = (angles >= tol) & (angles <= np.pi - tol)
        pull = share * np.where(moving, angles / np.where(moving, np.sin(angles), 1.0), 0.0)
        step = pull - (pull @ dots) * u
        size = length(step)
        if size < tol:
            break
        u = np.cos(size) * u + np.sin(size) / size * step
        u = u / length(u)
    factors[known] = norms.mean() * u / norms[known]
    return factors


KARCHER = Method(
    "karcher",
    karcher,
    (Parameter("max_iter", 10, low=0.0, whole=True), Parameter("tol", 1e-5, low=0.0)),
    base="never",
)
