# SPDX-License-Identifier: Apache-2.0
"""Tensors from a reader to a writer, block by block: a bar of bytes, and reading ahead of writing where it pays."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from mindformers_ext.formats.tensors import Array, TensorReader, TensorWriter
from mindformers_ext.weights.plan import Overflow, Plan

LARGE = 2**23  # bytes of a tensor for which reading ahead pays


def copy_tensors(plan: Plan, reader: TensorReader, writer: TensorWriter, overflow: Overflow) -> None:
    """All that ``plan`` makes of ``reader``'s tensors, written in its order."""
    with bytes_bar(plan.nbytes, "converting") as bar:
        for info, blocks in plan.stream(reader, overflow):
            writer.add_parts(info, counted(_ahead(blocks) if info.nbytes > LARGE else blocks, bar))


def bytes_bar(total: int, task: str, quiet: bool = False) -> Any:
    """A progress bar of ``total`` bytes, to be closed by ``with``."""
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc=task, mininterval=0.5, dynamic_ncols=True, disable=quiet)


def counted(blocks: Iterator[Array], bar: Any) -> Iterator[Array]:
    """``blocks``, each added to ``bar`` once it is dealt with; several threads may share a bar."""
    for block in blocks:
        size = block.nbytes
        yield block
        del block  # or it lives on while the next one is made
        with bar.get_lock():
            bar.update(size)


def _ahead(blocks: Iterator[Array]) -> Iterator[Array]:
    """The same blocks; the next is made while this one is written."""
    with ThreadPoolExecutor(1) as pool, _short_turns():
        coming = pool.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = pool.submit(next, blocks, None)
            yield block
            del block  # or it lives on while the next one is made


@contextmanager
def _short_turns() -> Iterator[None]:
    """Threads pass the interpreter on after 0.5 ms instead of 5: longer than that a finished write waits for it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
