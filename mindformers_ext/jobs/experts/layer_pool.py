# SPDX-License-Identifier: Apache-2.0
"""Layers of a split solved here, in several processes, or on a Ray cluster: the same splits, in the order they end."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mindformers_ext.jobs.experts.dense_model import DenseModel, open_dense
from mindformers_ext.jobs.experts.split_methods import METHODS, SplitRequest
from mindformers_ext.jobs.items.map_items import Place, Work, map_items
from mindformers_ext.surgery.experts.split import LayerSplit

Solved = tuple[int, LayerSplit, dict[str, Any]]
AGAIN = "use fewer --workers and run the same command again, which keeps the finished layers"


def solve_layers(request: SplitRequest, layers: Sequence[int], workers: int) -> Generator[Solved, None, None]:
    """(layer, split, figures) of each layer, as they are finished.

    Raises:
        UserError: a process was killed, or the Ray cluster cannot be used.
    """
    work = Work("split", _solve, _open, (_absolute(request),), _close, AGAIN)
    if layers:
        yield from map_items(work, layers, Place(workers, request.ray), ordered=False)


def _open(request: SplitRequest) -> tuple[SplitRequest, DenseModel]:
    return request, open_dense(request.model_path)


def _solve(opened: tuple[SplitRequest, DenseModel], layer: int) -> Solved:
    request, model = opened
    return layer, *METHODS[request.method].solve(request, model, layer)


def _close(opened: tuple[SplitRequest, DenseModel]) -> None:
    opened[1].close()


def _absolute(request: SplitRequest) -> SplitRequest:
    """With paths that mean the same in another folder."""
    words = {field.name: getattr(request, field.name) for field in fields(request)}
    paths: dict[str, Any] = {name: word.absolute() for name, word in words.items() if isinstance(word, Path)}
    return replace(request, **paths)
