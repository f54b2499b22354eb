# SPDX-License-Identifier: Apache-2.0
"""Random keep masks that depend on nothing but (seed, tensor, model, place): any chunks, threads or restarts agree.

The mask of element i is at place i of a stream of bits that the names key and that can be entered anywhere: PCG64DXSM,
which takes half the time of Philox. Source: O'Neill, "PCG: a family of simple fast space-efficient statistically good
algorithms for random number generation", 2014; numpy's implementation.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

STEP = 8  # bytes that one step of the stream gives
COARSE = 2**-4  # the density from which on 16 bits are enough: it is met to a factor of 1 +- 2**-13, else to 2**-32


def words(seed: int, name: str, model: int, start: int, count: int, kind: str = "<u4") -> np.ndarray:
    """Random bits for each of the elements ``start`` to ``start + count`` of a tensor, as unsigned integers."""
    digest = hashlib.blake2b(f"{seed}\0{model}\0{name}".encode(), digest_size=16).digest()
    each = STEP // np.dtype(kind).itemsize
    first = start // each
    skip = start - first * each
    source = np.random.PCG64DXSM(int.from_bytes(digest, "little")).advance(first)
    raw: np.ndarray = source.random_raw(-(-(skip + count) // each)).astype("<u8", copy=False).view(kind)
    return raw[skip : skip + count]


def keep_mask(seed: int, name: str, model: int, start: int, shape: tuple[int, ...], density: float) -> np.ndarray:
    """True with probability ``density`` for each element of a chunk that begins at element ``start``."""
    if density <= 0.0 or density >= 1.0:
        return np.full(shape, density > 0.0)
    kind, values = ("<u2", 2**16) if density >= COARSE else ("<u4", 2**32)
    drawn = words(seed, name, model, start, int(np.prod(shape)), kind)
    return (drawn < np.array(min(round(density * values), values - 1), kind)).reshape(shape)


def bit_mask(mask: np.ndarray) -> torch.Tensor:
    """A bool mask as 16-bit integers, all ones where it is true (see ``bits``)."""
    wide = mask.view(np.int8).astype(np.int16)
    return torch.from_numpy(np.negative(wide, out=wide))


def uniform(seed: int, name: str, model: int, start: int, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 numbers in [0, 1) for the elements of a chunk."""
    drawn = words(seed, name, model, start, int(np.prod(shape)))
    return torch.from_numpy((drawn >> 8).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)
