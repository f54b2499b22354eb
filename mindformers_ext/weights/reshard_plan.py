# SPDX-License-Identifier: Apache-2.0
"""What every rank of the target receives: names, shapes and boxes, with every tensor of both sides accounted for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mindformers_ext.core.errors import Problems
from mindformers_ext.formats.strategy import Box, Strategy
from mindformers_ext.formats.tensors import TensorInfo
from mindformers_ext.weights.boxes import sizes, whole_box
from mindformers_ext.weights.training_state import MS_TRAINING_STATE, ROUTER_STATE

Unlisted = Literal["error", "copy"]


@dataclass(frozen=True)
class RankPart:
    """One tensor of a rank's file: the part's own name, shape and type, and which box of the whole tensor it is."""

    info: TensorInfo
    box: Box


@dataclass(frozen=True)
class ReshardPlan:
    """By rank, what its file will hold, in order; and by reason, the names that it will not."""

    ranks: tuple[tuple[RankPart, ...], ...]
    left: Mapping[str, tuple[str, ...]]

    def nbytes(self, rank: int) -> int:
        """Bytes of data of one rank's file."""
        return sum(part.info.nbytes for part in self.ranks[rank])


def is_state(name: str) -> bool:
    """Whether ``name`` is training or router state, which a checkpoint may lack."""
    return any(re.fullmatch(pattern, name) for pattern, _ in (*MS_TRAINING_STATE, *ROUTER_STATE))


def _of_a_weight(name: str) -> bool:
    """Whether ``name`` is optimizer state of one weight (and has its shape), unlike counters and scales."""
    return is_state(name) and re.fullmatch(MS_TRAINING_STATE[0][0], name) is not None


def plan_reshard(
    infos: Mapping[str, TensorInfo],
    target: Strategy | None,
    whole_on_ranks: frozenset[str] = frozenset(),
    unlisted: Unlisted = "error",
) -> ReshardPlan:
    """What each rank of ``target`` (None: one rank with everything whole) holds of the whole tensors ``infos``.

    Args:
        infos: the source's whole tensors.
        target: how to cut them.
        whole_on_ranks: tensors that a sliced source has whole on its ranks because no layout names them; they are
            handed on to every rank.
        unlisted: what becomes of other tensors that ``target`` does not list: an error, or a whole copy on each rank.
            Counters and scales are copied in any case, optimizer state of weights is left behind and named.

    Raises:
        UserError: weights that one side lacks, or that cannot be cut; all listed.
    """
    if target is None:
        return ReshardPlan((tuple(RankPart(info, whole_box(info.shape)) for info in infos.values()),), {})
    problems = Problems(f"tensors of the checkpoint against target strategy '{target.source}'")
    listed = target.names()
    left: dict[str, tuple[str, ...]] = {}
    strangers = [name for name in infos if name not in listed]
    copies = [
        name
        for name in strangers
        if name in whole_on_ranks or unlisted == "copy" or (is_state(name) and not _of_a_weight(name))
    ]
    _note(
        left,
        "optimizer state, not in the target strategy",
        [name for name in strangers if name not in copies and _of_a_weight(name)],
    )
    wrong = [name for name in strangers if name not in copies and not _of_a_weight(name)]
    problems.add_names(
        "tensors",
        "not in the target strategy",
        wrong,
        "give the strategy of this model, or --unlisted copy to put them whole on every rank",
    )
    absent = [name for name in listed if name not in infos]
    _note(left, "state that the target strategy lists and the source lacks", [n for n in absent if is_state(n)])
    problems.add_names(
        "tensors",
        "missing in the source",
        [name for name in absent if not is_state(name)],
        "the target strategy lists them: it belongs to another model, or the checkpoint is not whole",
    )
    for stage in target.stages:
        for name, layout in stage.items():
            fault = layout.fault(infos[name].shape) if name in infos else None
            if fault:
                problems.add(f"'{name}'", f"{fault}; give the strategy of this model")
    problems.raise_if_any()
    ranks = tuple(_rank_parts(infos, target, rank, copies) for rank in range(target.world))
    return ReshardPlan(ranks, left)


def _rank_parts(
    infos: Mapping[str, TensorInfo], target: Strategy, rank: int, copies: list[str]
) -> tuple[RankPart, ...]:
    stage, local = divmod(rank, target.devices)
    parts = []
    for name, info in infos.items():
        layout = target.stages[stage].get(name)
        if layout is not None:
            box = layout.box(info.shape, local)
            parts.append(RankPart(TensorInfo(name, sizes(box), info.dtype), box))
        elif name in copies:
            parts.append(RankPart(info, whole_box(info.shape)))
    return tuple(parts)


def _note(left: dict[str, tuple[str, ...]], reason: str, names: list[str]) -> None:
    if names:
        left[reason] = tuple(names)
