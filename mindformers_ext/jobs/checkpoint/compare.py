# SPDX-License-Identifier: Apache-2.0
"""Compares a Hugging Face folder with a MindSpore checkpoint of any layout, tensor by tensor, in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.formats.dtypes import BY_NUMPY
from mindformers_ext.formats.tensors import Array
from mindformers_ext.jobs.checkpoint.source import described_layout, open_hf, open_ms, read_config
from mindformers_ext.weights.convert import plan_relayout, plan_to_mindspore
from mindformers_ext.weights.layouts import Layout, resolve_layout
from mindformers_ext.weights.plan import Overflow


@dataclass(frozen=True)
class WeightParity:
    """``different`` lists (MindSpore name, largest absolute difference) of tensors that are not bit-equal.

    Where the checkpoint has another type, Hugging Face's tensors are cast to it first: ``cast_to`` names it.
    """

    tensors: int
    different: tuple[tuple[str, float], ...]
    layout: Layout
    cast_to: str | None


def compare_weights(folder: Path, checkpoint: Path, strategy_dir: Path | None = None) -> WeightParity:
    """Compare all tensors; training state in the checkpoint is no part of it.

    Raises:
        UserError: files that cannot be read, names or shapes that do not fit the folder's config.json.
    """
    spec = model_spec_from_hf(read_config(folder))
    reader, meta = open_ms(checkpoint, strategy_dir)
    with closing(reader), closing(open_hf(folder)) as reference:
        layout = resolve_layout(reader.infos, spec, described_layout(meta))
        ours = plan_relayout(reader, spec, layout, Layout())
        held = {info.name: info.dtype for info in ours.targets}
        plan = plan_to_mindspore(reference, spec)
        kinds = {held[info.name] for info in plan.targets}
        alike = len(kinds) > 1 or kinds == {info.dtype for info in plan.targets}
        cast_to = None if alike else kinds.pop()
        if cast_to is not None:
            plan = plan_to_mindspore(reference, spec, BY_NUMPY[cast_to].long)
        different = []
        mine, theirs = ours.stream(reader), plan.stream(reference, Overflow(allow=True))
        for (info, blocks), (_, wanted) in zip(mine, theirs, strict=False):  # ours may hold router state behind
            difference = _largest_difference(blocks, wanted)
            if difference is not None:
                different.append((info.name, difference))
        return WeightParity(len(plan.targets), tuple(different), layout, BY_NUMPY[cast_to].long if cast_to else None)


def _largest_difference(ours: Iterator[Array], theirs: Iterator[Array]) -> float | None:
    """None when all bits are equal; NaN where one side alone has one."""
    worst: float | None = None
    for mine, wanted in _aligned(ours, theirs):
        if mine.dtype == wanted.dtype and mine.tobytes() == wanted.tobytes():
            continue
        gap = np.abs(mine.astype(np.float32) - wanted.astype(np.float32))
        largest = float(np.max(gap))
        worst = largest if worst is None or not largest <= worst else worst
    return worst


def _aligned(left: Iterator[Array], right: Iterator[Array]) -> Iterator[tuple[Array, Array]]:
    """Both streams cut at the same places."""
    one, other = np.empty(0), np.empty(0)
    while True:
        one = one if one.size else _next(left)
        other = other if other.size else _next(right)
        if not one.size or not other.size:
            if one.size != other.size:
                raise ValueError("the streams are of different length")
            return
        size = min(one.size, other.size)
        yield one[:size], other[:size]
        one, other = one[size:], other[size:]


def _next(blocks: Iterator[Array]) -> Array:
    block = next(blocks, None)
    return np.empty(0) if block is None else np.ascontiguousarray(block).reshape(-1)
