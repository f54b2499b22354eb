# SPDX-License-Identifier: Apache-2.0
"""A short name for what a set of tensors holds, found without reading it all.

SHA-256 over the names in order, shapes, types and the first and last elements of every tensor. It tells files of
different models, sizes, types, layouts and training steps apart; it is no proof that every byte is right.
"""

from __future__ import annotations

import hashlib

from mindformers_ext.formats.dtypes import BY_NUMPY
from mindformers_ext.formats.tensors import Index, TensorReader

SAMPLE = 1024  # elements from each end of a tensor


def fingerprint(reader: TensorReader) -> str:
    """64 hexadecimal digits; the same for the same tensors in one file or many, in any format."""
    digest = hashlib.sha256()
    for name in sorted(reader.infos):
        info = reader.infos[name]
        kind = BY_NUMPY[info.dtype].long if info.dtype in BY_NUMPY else str(info.dtype)
        digest.update(f"{name} {kind} {info.shape}\n".encode())
        if info.nbytes:
            for index in _ends(info.shape):
                digest.update(reader.read(name, index).tobytes())
    return digest.hexdigest()


def _ends(shape: tuple[int, ...]) -> tuple[Index, ...]:
    if not shape:
        return ((),)
    width = shape[-1]
    first: Index = (*(0 for _ in shape[:-1]), slice(0, min(SAMPLE, width)))
    last: Index = (*(size - 1 for size in shape[:-1]), slice(max(0, width - SAMPLE), width))
    return first, last
