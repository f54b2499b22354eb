# SPDX-License-Identifier: Apache-2.0
"""A pruning run's checkpoint: its file, the YAML it was trained by, and the masks in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.config.mixture_words import with_mixture_words
from mindformers_ext.core.config.pruning import pruning_from_yaml
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.pruning import MASKS, ROOT, Z_LOGA, PruningSpec
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.rank_dirs import rank_folders
from mindformers_ext.formats.tensors import Array, Index, Reader, TensorInfo
from mindformers_ext.jobs.checkpoint.saved import checkpoint_file, holds_whole
from mindformers_ext.jobs.checkpoint.source import open_ms
from mindformers_ext.jobs.prune.masks_file import SavedMasks
from mindformers_ext.jobs.run.keep import kept_above
from mindformers_ext.jobs.run.resume import STRATEGY
from mindformers_ext.surgery.prune.hard_concrete import clamped, deterministic, sparsity


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint and what trained it. ``file``: of the first rank; ``strategies``: where ranks hold slices, the
    strategy files by which they are put together."""

    file: Path
    yaml: Path
    config: Mapping[str, Any]
    model: ModelSpec
    pruning: PruningSpec
    strategies: Path | None = None


def find_run(path: Path, config: Path | None, strategies: Path | None = None) -> TrainedRun:
    """The newest checkpoint at ``path`` (a file, a run's output_dir, its checkpoint folder) and the YAML of its run.

    ``strategies``: the strategy files of slices, by default the folder ``strategy`` beside the checkpoint folder.

    Raises:
        UserError: no checkpoint, no YAML, or one that prunes nothing; slices without their strategy.
    """
    if not path.exists():
        raise UserError(f"'{path}' does not exist: give a checkpoint of a pruning run, or its output_dir")
    inside = path / "checkpoint"
    place = inside if inside.is_dir() else path
    file = checkpoint_file(place) or checkpoint_file(place, ".safetensors")
    if file is None:
        raise UserError(f"'{path}' holds no checkpoint: give a .ckpt or .safetensors file of a pruning run")
    yaml = config or kept_above(file, "train")
    if yaml is None:
        raise UserError(f"nothing tells how '{file}' was trained: give the run's YAML with --config")
    read = with_mixture_words(load_yaml(yaml))
    model = network_spec_from_yaml(read, 1).model
    pruning = pruning_from_yaml(read, model)
    if pruning is None:
        raise UserError(f"'{yaml}' has no l0_module: give the YAML of the run that pruned")
    return TrainedRun(file, yaml, read, model, pruning, _strategies(place, file, model, strategies))


def _strategies(place: Path, file: Path, model: ModelSpec, given: Path | None) -> Path | None:
    """The strategy files of slices in ``place``, None where ``file`` holds the whole network."""
    if given is not None and not place.is_dir():
        raise UserError(f"'{place}' is one file: with --strategy_dir give the folder above rank_0, rank_1, ...")
    if place.is_file() or given is None and (len(rank_folders(place)) < 2 or holds_whole(file, model)):
        return None
    found = given or place.parent / STRATEGY
    if given is not None and not given.exists():
        raise UserError(f"--strategy_dir '{given}' does not exist: give output/strategy of the run")
    if not found.exists():
        raise UserError(
            f"'{place}' holds the slices of {len(rank_folders(place))} ranks: give the folder of their strategy files "
            "(--strategy_dir), output/strategy of the run"
        )
    return found


def masks_of(run: TrainedRun) -> SavedMasks:
    """The masks without noise: with a target exactly as many units as it has, otherwise as many as are expected.

    Raises:
        UserError: the checkpoint has not the masks of its YAML, or values that are no numbers.
    """
    spec, logas = run.pruning, {}
    with opened(run) as reader:
        for name in spec.modules:
            full = f"{MASKS}{name}.{Z_LOGA}"
            if full not in reader.infos:
                raise UserError(f"'{run.file}' has no {full}: it is no checkpoint of the run of '{run.yaml}'")
            wanted = spec.source.mask_shape(name)
            if reader.infos[full].shape != wanted:
                found = list(reader.infos[full].shape)
                raise UserError(f"'{run.file}': {full} has shape {found}, by '{run.yaml}' it is {list(wanted)}")
            logas[name] = np.asarray(reader.read(full), np.float32)
            if not np.isfinite(logas[name]).all():
                raise UserError(f"'{run.file}': {full} holds values that are no numbers: take an earlier checkpoint")
    logas = {name: clamped(loga) for name, loga in logas.items()}
    keep = {name: spec.target.units(name) if spec.target else None for name in spec.modules}
    values = {name: deterministic(loga, keep[name]).astype(np.float32) for name, loga in logas.items()}
    expected = {name: np.atleast_1d(sparsity(loga)) for name, loga in logas.items()}
    return SavedMasks(values, spec.source, spec.target, expected)


class WithoutMasks:
    """A checkpoint's weights, as if it had been trained without masks."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.infos: Mapping[str, TensorInfo] = {name: info for name, info in reader.infos.items() if ROOT not in name}

    def read(self, name: str, index: Index = ()) -> Array:
        """As the reader below."""
        return self.reader.read(name, index)

    def close(self) -> None:
        """As the reader below."""
        self.reader.close()


@contextmanager
def opened(run: TrainedRun) -> Iterator[Reader]:
    """The checkpoint's whole tensors, masks included."""
    reader, _ = open_ms(run.file.parent.parent if run.strategies else run.file, run.strategies)
    try:
        yield reader
    finally:
        reader.close()
