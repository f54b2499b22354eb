# SPDX-License-Identifier: Apache-2.0
"""A sliced checkpoint seen as whole tensors, read on demand; and the parts of whole tensors that a rank holds.

Every slice is a box of the whole tensor, so merging, slicing and slicing anew are the same: read the box that is asked
for from the boxes that are there. Data moves in pieces of ``PIECE`` bytes; nothing grows with a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import Problems, UserError, listed
from mindformers_ext.formats.ms_file import open_checkpoint
from mindformers_ext.formats.rank_dirs import rank_files
from mindformers_ext.formats.strategy import Box, SliceLayout, Strategy, read_strategy
from mindformers_ext.formats.tensors import Array, Index, TensorInfo, TensorReader
from mindformers_ext.weights.boxes import full_box, overlap, pieces, read_box, shift, sizes, whole_box
from mindformers_ext.weights.reshard_plan import is_state


@dataclass(frozen=True)
class SourcePart:
    """What one rank holds of a tensor: the box ``box`` of the whole, as the whole tensor of ``reader``."""

    rank: int
    box: Box


class SlicedReader:
    """A ``TensorReader`` of the whole tensors of a sliced checkpoint. Opening compares names, shapes and types only.

    A tensor that the strategy does not list is whole on its ranks: it is taken from the first and must be equal on all.
    ``absent`` names what the strategy lists and no rank holds (training state alone may be missing).
    """

    def __init__(self, readers: Mapping[int, TensorReader], strategy: Strategy) -> None:
        """``readers``: every rank's file. Tensors missing, misshaped or of two types are one ``UserError``."""
        problems = Problems(f"ranks of the checkpoint against strategy '{strategy.source}'")
        self._readers, self.strategy = readers, strategy
        self._parts: dict[str, tuple[SourcePart, ...]] = {}
        self.infos: dict[str, TensorInfo] = {}
        self.absent: tuple[str, ...] = ()
        if sorted(readers) != list(range(strategy.world)):
            lacking = sorted(set(range(strategy.world)) - set(readers))
            found = f"{len(readers)} ranks, the strategy describes {strategy.world}"
            problems.add(
                found + (f"; rank_{listed(lacking)} is missing" if lacking else ""),
                "give all ranks and all stages of one run",
            )
            problems.raise_if_any()
        for name, first in strategy.names().items():
            self._list(problems, name, first)
        self.unlisted = self._find_unlisted(problems)
        problems.raise_if_any()
        for name in self.unlisted:
            self._check_equal(problems, name)
        problems.raise_if_any()

    def read(self, name: str, index: Index = ()) -> Array:
        """The whole tensor, or the part that ``index`` selects, put together from the ranks that hold it."""
        info = self.infos[name]
        box, dropped = full_box(index, info.shape)
        out = np.empty(sizes(box), info.dtype)
        for part in self._parts[name]:
            if (common := overlap(box, part.box)) is not None:
                out[shift(common, box)] = read_box(self._readers[part.rank], name, shift(common, part.box))
        return np.squeeze(out, axis=dropped) if dropped else out

    def check_copies(self) -> None:
        """Compare what several ranks hold alike (data parallel copies, tensors that stages share); reads every file.

        Raises:
            UserError: copies differ; each such tensor is named with two ranks.
        """
        problems = Problems("parts that several ranks hold alike")
        for name, info in self.infos.items():
            first: dict[str, int] = {}
            for stage, layouts in enumerate(self.strategy.stages):
                ranks = self.strategy.ranks(stage) if name in layouts else range(0)
                for local, rank in enumerate(ranks):
                    box = layouts[name].box(info.shape, local)
                    twin = first.setdefault(str(box), rank)
                    if twin != rank and not self._equal(name, twin, rank):
                        problems.add(
                            f"'{name}' differs between rank_{twin} and rank_{rank}",
                            "both hold the same part: one file is damaged or of another step",
                        )
                        break
        problems.raise_if_any()

    def _equal(self, name: str, left: int, right: int) -> bool:
        """Whether two ranks hold the same bits under ``name``."""
        ours, theirs = self._readers[left], self._readers[right]
        info = ours.infos[name]
        return theirs.infos[name] == info and all(
            read_box(theirs, name, piece).tobytes() == read_box(ours, name, piece).tobytes()
            for piece in pieces(whole_box(info.shape), info.dtype.itemsize)
        )

    def close(self) -> None:
        """Close every rank's file."""
        for reader in self._readers.values():
            if (close := getattr(reader, "close", None)) is not None:
                close()

    def _list(self, problems: Problems, name: str, first: int) -> None:
        """Enter one tensor of the strategy, of its first stage; stages that share it must agree."""
        wholes: dict[TensorInfo, int] = {}
        for stage, layouts in enumerate(self.strategy.stages):
            if name in layouts:
                info = self._whole(problems, name, stage, layouts[name])
                if info is None:
                    continue
                wholes.setdefault(info, stage)
        if len(wholes) > 1:
            problems.add(
                f"'{name}' is {' and '.join(f'{info.dtype}{info.shape}' for info in wholes)} in stages "
                f"{listed(list(wholes.values()))}",
                "files of different runs are mixed",
            )
        if not wholes:
            self.absent += (name,)
            return
        info, stage = next(iter(wholes.items()))
        layout = self.strategy.stages[stage][name]
        boxes: dict[tuple[int, ...], SourcePart] = {}
        for local, rank in enumerate(self.strategy.ranks(stage)):
            boxes.setdefault(layout.place(local), SourcePart(rank, layout.box(info.shape, local)))
        self.infos[name], self._parts[name] = info, tuple(boxes.values())

    def _whole(self, problems: Problems, name: str, stage: int, layout: SliceLayout) -> TensorInfo | None:
        """The whole tensor as the ranks of one stage tell it; None (and a problem, unless state) if they do not."""
        held = {rank: info for rank in self.strategy.ranks(stage) if (info := self._readers[rank].infos.get(name))}
        if not held and is_state(name):
            return None
        lacking = [rank for rank in self.strategy.ranks(stage) if rank not in held]
        if lacking:
            problems.add(f"'{name}' is missing in rank_{listed(lacking)}", "the strategy puts a part of it there")
            return None
        kinds = {(info.dtype, info.shape): rank for rank, info in reversed(held.items())}
        if len(kinds) > 1:
            told = [f"{dtype}{shape} in rank_{rank}" for (dtype, shape), rank in kinds.items()]
            problems.add(
                f"'{name}' is {listed(told)}", "parts of a tensor are alike: files of different runs are mixed"
            )
            return None
        (dtype, shape), rank = next(iter(kinds.items()))
        if len(shape) != len(layout.tensor_map):
            problems.add(
                f"'{name}' {shape} has {len(shape)} axes in rank_{rank}, the strategy cuts {layout.parts}",
                "give the strategy of the run that saved the checkpoint",
            )
            return None
        return TensorInfo(name, layout.whole_shape(shape), dtype)

    def _find_unlisted(self, problems: Problems) -> tuple[str, ...]:
        listed = self.strategy.names()
        found: dict[str, list[int]] = {}
        for rank, reader in self._readers.items():
            stage = self.strategy.stages[rank // self.strategy.devices]
            for name in reader.infos:
                if name not in listed:
                    found.setdefault(name, []).append(rank)
                elif name not in stage:
                    problems.add(f"'{name}' is in rank_{rank}", "the strategy puts it into other pipeline stages only")
        for name, ranks in found.items():
            info = self._readers[ranks[0]].infos[name]
            self.infos[name] = info
            self._parts[name] = (SourcePart(ranks[0], whole_box(info.shape)),)
        self._holders = found
        return tuple(found)

    def _check_equal(self, problems: Problems, name: str) -> None:
        """A tensor without a layout must be the same on every rank that holds it."""
        first, *others = self._holders[name]
        stages = {rank // self.strategy.devices for rank in self._holders[name]}
        lacking = sorted({rank for stage in stages for rank in self.strategy.ranks(stage)} - {first, *others})
        if lacking:
            problems.add(
                f"'{name}' is in rank_{first}, not in rank_{listed(lacking)}, and not in the strategy",
                "ranks of a stage hold the same tensors: files of different runs are mixed",
            )
            return
        for rank in others:
            if not self._equal(name, first, rank):
                problems.add(
                    f"'{name}' differs between rank_{first} and rank_{rank} and is not in the strategy",
                    "it was cut in a way that no file tells: give the strategy that lists it",
                )
                return


def open_sliced(checkpoint_dir: Path, strategy_dir: Path, label: str | None = None) -> SlicedReader:
    """A reader of the whole tensors of ``checkpoint_dir/rank_N/*`` as the strategy file or folder cut them.

    ``label`` chooses among several files of a rank, see ``rank_files``.

    Raises:
        UserError: ranks, files, stages or tensors missing, double or contradicting; all listed, no data is read.
    """
    strategy = read_strategy(strategy_dir)
    files = rank_files(checkpoint_dir, label)
    if len(files) == 1 < strategy.world:
        raise UserError(
            f"'{checkpoint_dir}' holds one rank, strategy '{strategy_dir}' describes {strategy.world}: "
            "leave the strategy away for a whole checkpoint, or give all ranks"
        )
    with ExitStack() as stack:
        readers = {}
        for rank, path in files.items():
            readers[rank] = open_checkpoint(path)
            stack.callback(readers[rank].close)
        result = SlicedReader(readers, strategy)
        stack.pop_all()
    return result
