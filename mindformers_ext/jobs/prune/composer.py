# SPDX-License-Identifier: Apache-2.0
"""A Composer checkpoint of LLM-Shearing's pruning stage, cut by its own masks into another Composer checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.config.pruning import target_shape
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.pruning import MASKS, MODULES, Z_LOGA, ModelShape, shape_of_model
from mindformers_ext.formats.atomic import scratch_folder
from mindformers_ext.formats.dtypes import cast
from mindformers_ext.formats.tensors import Array, Reader, TensorInfo
from mindformers_ext.jobs.checkpoint.composer import (
    as_hugging_face,
    check_output,
    described,
    open_raw,
    save_composer,
    write_composer,
)
from mindformers_ext.jobs.checkpoint.saved import checkpoint_file
from mindformers_ext.jobs.merge.output import OutputRequest
from mindformers_ext.jobs.prune.cut import CutRequest, cut
from mindformers_ext.jobs.prune.masks_file import SavedMasks
from mindformers_ext.jobs.prune.report import check_reached
from mindformers_ext.surgery.prune.cut import full_masks, pruned_shape, tensor_cut
from mindformers_ext.surgery.prune.hard_concrete import clamped, deterministic, sparsity
from mindformers_ext.weights.convert import rule_set
from mindformers_ext.weights.views import BLOCK

CHECKPOINTS = "checkpoint"  # of a run's output_dir
SHARD = 5 * 10**9  # bytes


@dataclass(frozen=True)
class PrunedComposer:
    """What was written."""

    path: Path
    masks: SavedMasks
    shape: ModelShape
    notes: tuple[str, ...]


def prune_composer(
    path: Path, words: Mapping[str, int], force: bool = False, overwrite: bool = False
) -> PrunedComposer:
    """Write ``pruned-<name>`` beside the checkpoint.

    Args:
        path: a Composer checkpoint with masks.
        words: the target's sizes (d_model, n_heads, n_layers, intermediate_size, ...); none: as many units as are
            expected; ``num_attention_heads`` of the source where no mask of heads tells it.
        force: cut although the masks have not come to the target.
        overwrite: replace what stands there.

    Raises:
        UserError: no masks, or sizes that do not fit; nothing is left half-written.
        NotReachedError: see ``jobs.prune.report``.
    """
    output = path.with_name(f"pruned-{path.name}")
    check_output(output, overwrite)
    with closing(open_raw(path)) as raw:
        logas = _parameters(raw, path)
        reader = as_hugging_face(raw, path, masked=True)
        source_words = {name: words[name] for name in ("num_attention_heads", "head_dim") if name in words}
        if "head" in logas and logas["head"].ndim == 2:
            source_words.setdefault("num_attention_heads", logas["head"].shape[1])
        source_words.pop("head_dim", None)
        model = model_spec_from_hf(described(reader, source_words, None, str(path)))
        shape = shape_of_model(model)
        problems = Problems("the target")
        asked = {name: value for name, value in words.items() if name != "num_attention_heads"}
        target = target_shape(asked or None, shape, model.vocab_size, problems)
        masks = _masks(logas, shape, target, path)
        notes = check_reached(masks, force)
        full = full_masks(masks.values, shape, model.tie_word_embeddings)
        left, numbers = pruned_shape(full), {old: new for new, old in enumerate(full.kept_layers)}
        tensors: list[tuple[TensorInfo, Iterator[Array]]] = []
        for rule in rule_set(model).rules:
            for layer in full.kept_layers if rule.per_layer else (None,):
                name = str(rule.hf).format(layer=layer)
                cut, info = tensor_cut(name, str(rule.dims), full, layer), reader.infos[name]
                new = str(rule.hf).format(layer=None if layer is None else numbers[layer])
                blocks = (cast(block, info.dtype)[0] for block in cut.blocks(_blocks(reader, name)))
                tensors.append((TensorInfo(new, cut.shape(info.shape), info.dtype), blocks))
        write_composer(output, tensors, overwrite)
    return PrunedComposer(output, masks, left, tuple(notes))


def prune_run(run: Path, file: Path, force: bool = False, overwrite: bool = False) -> PrunedComposer:
    """A pruning run of this package, cut by its masks into ``pruned-<name>`` beside ``file``; as ``prune_composer``."""
    output = file.with_name(f"pruned-{file.name}")
    check_output(output, overwrite)
    with scratch_folder(output.with_suffix(".parts")) as place:
        folder = OutputRequest(folder=place / "model", shard_bytes=SHARD, quiet=True)
        report = cut(CutRequest(model=run, output=folder, force=force))
        save_composer(folder.folder, output, overwrite=overwrite)
    return PrunedComposer(output, report.masks, report.shape, report.notes)


def run_beside(file: Path) -> Path | None:
    """The run of this package where LLM-Shearing's trainer would have left ``file``; None where there is none."""
    return file.parent if not file.exists() and (file.parent / CHECKPOINTS).is_dir() else None


@contextmanager
def composer_of(file: Path) -> Iterator[Path]:
    """``file``, or what the newest checkpoint of the run beside it is in Composer's names, as long as it is needed."""
    run = run_beside(file)
    newest = (checkpoint_file(run / CHECKPOINTS) or checkpoint_file(run / CHECKPOINTS, ".safetensors")) if run else None
    if newest is None:
        yield file
        return
    with scratch_folder(file.with_suffix(".parts")) as place:
        save_composer(newest, place / "state.safetensors")
        yield place / "state.safetensors"


def _parameters(raw: Reader, path: Path) -> dict[str, np.ndarray]:
    found = {}
    for name in raw.infos:
        if not name.startswith(MASKS) or not name.endswith("." + Z_LOGA):
            continue
        module = name.removeprefix(MASKS).removesuffix("." + Z_LOGA)
        if module not in MODULES:
            raise UserError(f"'{path}' has masks of '{module[:60]}': known are {', '.join(MODULES)}")
        found[module] = np.asarray(raw.read(name), np.float32)
        if not np.isfinite(found[module]).all():
            raise UserError(f"'{path}': {name} holds values that are no numbers: take an earlier checkpoint")
    if not found:
        raise UserError(
            f"'{path}' has no masks ({MASKS}*): it was not trained by the pruning stage, or is pruned already"
        )
    return found


def _masks(logas: Mapping[str, np.ndarray], shape: ModelShape, target: ModelShape | None, path: Path) -> SavedMasks:
    for name, loga in logas.items():
        if loga.shape != shape.mask_shape(name):
            raise UserError(
                f"'{path}': the mask {name} has shape {list(loga.shape)}, not {list(shape.mask_shape(name))}"
            )
    inside = {name: clamped(loga) for name, loga in logas.items()}
    values = {
        name: deterministic(loga, target.units(name) if target else None).astype(np.float32)
        if not target or target.units(name) != shape.units(name)
        else np.ones(loga.shape, np.float32)  # a size that stays has no mask of ours
        for name, loga in inside.items()
    }
    moved = {name: loga for name, loga in inside.items() if not target or target.units(name) != shape.units(name)}
    return SavedMasks(values, shape, target, {name: np.atleast_1d(sparsity(loga)) for name, loga in moved.items()})


def _blocks(reader: Reader, name: str) -> Iterator[Array]:
    """The tensor in parts of some rows."""
    shape = reader.infos[name].shape
    step = max(1, BLOCK // max(1, prod(shape[1:])))
    for low in range(0, shape[0], step):
        yield reader.read(name, (slice(low, min(low + step, shape[0])),))
