# SPDX-License-Identifier: Apache-2.0
"""Embeddings and heads rearranged for a merge's vocabulary, row by row, as they are read.

A row of a model is its own where it has the token; else what the configuration says; else the row of the only model
that has it; else the base's; else the mean over those that have it; else zeros. A row without a token is the model's
own (or the base's) row of that number, where that is unused there too, else the mean of all rows with tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.dtypes import cast
from mindformers_ext.formats.tensors import Array, Index, Reader, TensorInfo
from mindformers_ext.jobs.merge.vocab import Vocabulary
from mindformers_ext.jobs.merge.vocab_config import TokenSource, VocabularyWish

ZERO, MEAN, FILL = -1, -2, -3
CHUNK = 1024  # rows of one step of a mean over a whole tensor


@dataclass(frozen=True)
class Member:
    """A model: its reader, its vocabulary, its rows (of the embedding), and which tensors have a row per token.

    ``standin`` gives the tensor that another one is tied to.
    """

    name: str
    reader: Reader
    vocabulary: Vocabulary
    rows: int
    tensors: tuple[str, ...]
    standin: Mapping[str, str]


@dataclass(frozen=True)
class RowPlan:
    """For every new row: the number of the model that gives it (or ZERO, MEAN, FILL), and its row there."""

    donor: np.ndarray
    row: np.ndarray


def plan_rows(
    vocabulary: Vocabulary, size: int, members: Sequence[Member], base: int | None, wish: VocabularyWish
) -> tuple[list[RowPlan], np.ndarray]:
    """A plan for each member, and (members, size) the row of every new token in each, -1 where it has none.

    ``base`` is the number of the base among ``members``.
    """
    ids = vocabulary.ids
    own = np.full((len(members), size), -1, np.int64)
    for number, member in enumerate(members):
        for word, place in ids.items():
            found = member.vocabulary.ids.get(word, -1)
            own[number, place] = found if found < member.rows else -1
    common = _defaults(own, base)
    plans = []
    for number in range(len(members)):
        donor, row = common.donor.copy(), common.row.copy()
        here = own[number] >= 0
        donor[here], row[here] = number, own[number][here]
        for word, source in wish.tokens.items():
            if source.forced or own[number, ids[word]] < 0:
                donor[ids[word]], row[ids[word]] = _wished(word, source, members)
        givers = [] if wish.trim else [item for item in (base, number) if item is not None]  # the own has the last word
        plans.append(_with_unused(RowPlan(donor, row), ids, members, givers))
    return plans, own


def _defaults(own: np.ndarray, base: int | None) -> RowPlan:
    """What stands in for a token that a model lacks."""
    owners = (own >= 0).sum(0)
    donor = np.where(owners > 1, MEAN, ZERO).astype(np.int64)
    row = np.zeros(own.shape[1], np.int64)
    chosen = np.where(owners == 1, (own >= 0).argmax(0), -1)
    if base is not None:
        chosen = np.where((owners > 1) & (own[base] >= 0), base, chosen)
    some = np.flatnonzero(chosen >= 0)
    donor[some], row[some] = chosen[some], own[chosen[some], some]
    return RowPlan(donor, row)


def _wished(word: str, source: TokenSource, members: Sequence[Member]) -> tuple[int, int]:
    if source.model is None:
        return ZERO, 0
    number = [member.name for member in members].index(source.model)
    member = members[number]
    wanted = word if source.token is None else source.token
    row = wanted if isinstance(wanted, int) else member.vocabulary.ids.get(wanted, -1)
    if not 0 <= row < member.rows:
        raise UserError(f"tokenizer.tokens.{word}: '{source.model}' has no token {wanted!r}: name one that it has")
    return number, row


def _with_unused(plan: RowPlan, ids: Mapping[str, int], members: Sequence[Member], givers: Sequence[int]) -> RowPlan:
    """The plan with the rows that no token of the merge has; of ``givers`` the last one that has such a row."""
    free = np.ones(len(plan.donor), bool)
    free[list(ids.values())] = False
    plan.donor[free] = FILL
    for giver in givers:
        used = set(members[giver].vocabulary.ids.values())
        rows = [place for place in np.flatnonzero(free) if place < members[giver].rows and place not in used]
        plan.donor[rows], plan.row[rows] = giver, rows
    return plan


class RebuiltRows:
    """A ``Reader`` of one member whose tensors with a row per token follow its plan; all others stay as they are."""

    def __init__(self, number: int, members: Sequence[Member], plan: RowPlan, own: np.ndarray) -> None:
        """See member ``number`` that way; ``own`` is the second result of ``plan_rows``."""
        self._number, self._members, self._plan, self._own = number, members, plan, own
        self._fills: dict[str, Array] = {}
        me, size = members[number], len(plan.donor)
        infos = dict(me.reader.infos)
        for name in me.tensors:
            infos[name] = replace(infos[name], shape=(size, *infos[name].shape[1:]))
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str, index: Index = ()) -> Array:
        """The tensor, or the part that ``index`` selects."""
        me = self._members[self._number]
        if name not in me.tensors:
            return me.reader.read(name, index)
        rows = index[0] if index else slice(None)
        if isinstance(rows, int):
            return np.ascontiguousarray(self._gathered(name, rows, rows + 1)[0][index[1:]])
        start, stop, _ = rows.indices(len(self._plan.donor))
        part = self._gathered(name, start, stop)
        within = (slice(None), *index[1:])
        return np.ascontiguousarray(part[within]) if len(index) > 1 else part

    def close(self) -> None:
        """Close the files."""
        self._members[self._number].reader.close()

    def _gathered(self, name: str, start: int, stop: int) -> Array:
        donor, row = self._plan.donor[start:stop], self._plan.row[start:stop]
        info = self.infos[name]
        result = np.zeros((stop - start, *info.shape[1:]), info.dtype)
        for giver in np.unique(donor):
            places = np.flatnonzero(donor == giver)
            if giver >= 0:
                rows, lost = cast(self._rows(giver, name, row[places]), info.dtype)
                if lost:
                    raise UserError(
                        f"rows of '{self._members[giver].name}' are beyond the range of {info.dtype}, the type of "
                        f"'{name}' in '{self._members[self._number].name}': convert that one to bfloat16 or float32"
                    )
                result[places] = rows
            elif giver == MEAN:
                result[places] = self._means(name, start + places)
            elif giver == FILL:
                result[places] = self._fill(name)
        return result

    def _rows(self, giver: int, name: str, rows: np.ndarray) -> Array:
        """Rows of another member's tensor (or of what it is tied to), a run of neighbours at a time."""
        member = self._members[giver]
        there = name if name in member.tensors else member.standin[name]
        cuts = np.flatnonzero(np.diff(rows) != 1) + 1
        runs = np.split(rows, cuts)
        parts = [member.reader.read(there, (slice(int(run[0]), int(run[-1]) + 1),)) for run in runs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _means(self, name: str, places: np.ndarray) -> Array:
        total = np.zeros((len(places), *self.infos[name].shape[1:]), np.float32)
        owners = self._own[:, places] >= 0
        for number in range(len(self._members)):
            here = np.flatnonzero(owners[number])
            if len(here):
                total[here] += self._rows(number, name, self._own[number][places[here]]).astype(np.float32)
        return cast(
            total / owners.sum(0).reshape(-1, *[1] * (total.ndim - 1)).astype(np.float32), self.infos[name].dtype
        )[0]

    def _fill(self, name: str) -> Array:
        """The mean of all rows that have a token."""
        if name not in self._fills:
            kept = np.flatnonzero(self._plan.donor != FILL)
            total = np.zeros(self.infos[name].shape[1:], np.float64)
            for at in range(0, len(self._plan.donor), CHUNK):
                stop = min(at + CHUNK, len(self._plan.donor))
                inside = kept[(kept >= at) & (kept < stop)] - at
                if len(inside):
                    runs = np.split(inside, np.flatnonzero(np.diff(inside) != 1) + 1)
                    total += sum(
                        self._gathered(name, at + run[0], at + run[-1] + 1).astype(np.float64).sum(0)
                        for run in map(np.ndarray.tolist, runs)
                    )
            mean = (total / len(kept)).astype(np.float32)
            self._fills[name] = cast(mean, self.infos[name].dtype)[0]
        return self._fills[name]
