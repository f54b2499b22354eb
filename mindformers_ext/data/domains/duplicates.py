# SPDX-License-Identifier: Apache-2.0
"""Near duplicates by MinHash (Broder 1997): ``datasketch`` sketches and indexes, imported when it is asked for.

A document is the set of its runs of five words (one ideograph is a word); the likeness of two is their Jaccard index,
seen through 128 permutations and banded so that the chance of being found rises steeply around the threshold.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.errors import UserError

PERMUTATIONS, RUN = 128, 5
WORDS = re.compile(r"[぀-鿿]|[^\W぀-鿿]+")


def check_datasketch() -> None:
    """``UserError`` where the library is not installed."""
    if find_spec("datasketch") is None:
        raise UserError(
            "--filter duplicates needs datasketch, which is not installed: pip install 'mindformers_ext[dedup]'"
        )


def runs_of(text: str) -> set[bytes]:
    """The runs of words of a text; a text of fewer words is one run."""
    words = WORDS.findall(text.lower())
    return {" ".join(words[at : at + RUN]).encode() for at in range(max(1, len(words) - RUN + 1))}


class Sketcher:
    """Makes sketches: uint32 of shape (PERMUTATIONS,)."""

    def __init__(self) -> None:
        from datasketch import MinHash

        self._empty = MinHash(num_perm=PERMUTATIONS, seed=1)

    def sketch(self, text: str) -> npt.NDArray[np.uint32]:
        """The sketch of a text; equal for equal sets of runs."""
        made = self._empty.copy()
        made.update_batch(sorted(runs_of(text)))
        return np.asarray(made.hashvalues, np.uint32)


class SeenSketches:
    """Sketches that were kept; needs about 3 kB of memory for each."""

    def __init__(self, likeness: float) -> None:
        """``likeness``: Jaccard index, 0 to 1, from which a document is a duplicate."""
        from datasketch import MinHash, MinHashLSH

        self._kind: Any = MinHash
        self._empty = MinHash(num_perm=PERMUTATIONS, seed=1)
        self._index = MinHashLSH(threshold=likeness, num_perm=PERMUTATIONS, hashfunc=_short)
        self._count = 0

    def is_new(self, sketch: npt.NDArray[np.uint32]) -> bool:
        """Whether no document like this one was kept before; then it is from now on."""
        empty = self._empty
        made = self._kind(hashvalues=sketch, permutations=empty.permutations, seed=1, scheme=empty.scheme)
        if self._index.query(made):
            return False
        self._index.insert(self._count, made, check_duplication=False)
        self._count += 1
        return True


def _short(band: bytes) -> bytes:
    return blake2b(band, digest_size=8).digest()
