# SPDX-License-Identifier: Apache-2.0
"""Random keep masks that depend on nothing but (seed, tensor, model, place): any chunks, threads or restarts agree.

Philox counts; the mask of element i is 32 bits at place i of the stream keyed by the names. Source: Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011; numpy's implementation.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

PER_COUNT = 8  # numbers of 32 bits that one step of the counter gives


def words(seed: int, name: str, model: int, start: int, count: int) -> np.ndarray:
    """32 random bits for each of the elements ``start`` to ``start + count`` of a tensor, as uint32."""
    digest = hashlib.blake2b(f"{seed}\0{model}\0{name}".encode(), digest_size=16).digest()
    first = start // PER_COUNT
    source = np.random.Philox(key=int.from_bytes(digest, "little"), counter=first)
    skip = start - first * PER_COUNT
    raw: np.ndarray = source.random_raw((skip + count + 1) // 2).view("<u4")
    return raw[skip : skip + count]


def keep_mask(seed: int, name: str, model: int, start: int, shape: tuple[int, ...], density: float) -> np.ndarray:
    """True with probability ``density`` for each element of a chunk that begins at element ``start``."""
    if density <= 0.0 or density >= 1.0:
        return np.full(shape, density > 0.0)
    drawn = words(seed, name, model, start, int(np.prod(shape)))
    return (drawn < np.uint32(round(density * 2**32 - 0.5))).reshape(shape)


def bit_mask(mask: np.ndarray) -> torch.Tensor:
    """A bool mask as 16-bit integers, all ones where it is true (see ``bits``)."""
    wide = mask.view(np.int8).astype(np.int16)
    return torch.from_numpy(np.negative(wide, out=wide))


def uniform(seed: int, name: str, model: int, start: int, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 numbers in [0, 1) for the elements of a chunk."""
    drawn = words(seed, name, model, start, int(np.prod(shape)))
    return torch.from_numpy((drawn >> 8).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)
