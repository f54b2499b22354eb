# SPDX-License-Identifier: Apache-2.0
"""Cut a dense model by its masks into a Hugging Face folder: block by block, whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from mindformers_ext.core.config.hf_attention import with_both_ropes
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.pruning import ModelShape, shape_of_model
from mindformers_ext.formats.atomic import fresh_folder
from mindformers_ext.formats.disk import check_space, refusal
from mindformers_ext.formats.dtypes import BY_NUMPY, cast, float_dtype
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.tensors import Array, Reader, TensorInfo
from mindformers_ext.jobs.merge.output import OutputRequest, check_output, write_weights
from mindformers_ext.jobs.merge.sidecars import copy_tokenizer, write_json
from mindformers_ext.jobs.prune.masks_file import MASKS, SavedMasks, differences, read_masks, write_masks
from mindformers_ext.jobs.prune.next_stage import next_yaml, write_next
from mindformers_ext.jobs.prune.report import REPORT, check_reached, pruning_report
from mindformers_ext.jobs.prune.source import DenseSource, DenseTensor, open_folder, open_trained
from mindformers_ext.jobs.prune.trained import TrainedRun, find_run, masks_of
from mindformers_ext.surgery.prune.cut import FullMasks, TensorCut, full_masks, pruned_shape, tensor_cut
from mindformers_ext.weights.plan import Plan

THREADS = 2  # each holds a few blocks


@dataclass(frozen=True, kw_only=True)
class CutRequest:
    """What to cut.

    ``model``: a Hugging Face folder, or a pruning run's checkpoint or output_dir. ``masks`` None: those of the
    checkpoint. ``config``: the run's YAML, where it does not lie beside the checkpoint; ``strategies``: the strategy
    files of slices. ``base``: the folder that config.json and the tokenizer come from. ``next_yaml``: where the next
    stage's YAML is written. ``fold_head`` scales the head too, as LLM-Shearing did.
    """

    model: Path
    output: OutputRequest
    masks: Path | None = None
    config: Path | None = None
    strategies: Path | None = None
    base: Path | None = None
    next_yaml: Path | None = None
    dtype: str | None = None
    fold_head: bool = False
    force: bool = False


@dataclass(frozen=True)
class CutReport:
    """What was written."""

    masks: SavedMasks
    shape: ModelShape
    parameters: tuple[int, int]
    nbytes: int
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """A tensor that a cut does not leave as it is: its shape, and what makes it, float32."""

    shape: tuple[int, ...]
    make: Callable[[], Array]


@dataclass(frozen=True)
class Piece:
    """A tensor of the pruned model: what is left of a dense one, or ``changed``, which makes it whole."""

    info: TensorInfo
    dense: DenseTensor | None = None
    cut: TensorCut | None = None
    changed: Callable[[], Array] | None = None

    def blocks(self, reader: Reader) -> Iterator[Array]:
        """Its rows in blocks, in the dense tensor's type or, where they are scaled, float32."""
        if self.changed is not None:
            yield self.changed()
        elif self.dense is not None and self.cut is not None:
            ((_, stored),) = Plan((self.dense.step,), (), (), None).stream(reader)
            yield from self.cut.blocks(stored)


def cut(request: CutRequest) -> CutReport:
    """Write the pruned model.

    Raises:
        UserError: anything wrong with model, masks or output; nothing is left half-written.
        NotReachedError: the masks have not come to the target's shape.
    """
    check_output(request.output, [request.model, *([request.base] if request.base else [])])
    run = None if (request.model / CONFIG).is_file() else find_run(request.model, request.config, request.strategies)
    _check_words(request, run)
    masks = read_masks(request.masks) if request.masks else masks_of(_trained(run))
    notes = check_reached(masks, request.force)
    with ExitStack() as stack:
        dense = stack.enter_context(open_trained(run, request.base) if run else open_folder(request.model))
        _check_model(dense, masks)
        full = full_masks(masks.values, masks.source, dense.model.tie_word_embeddings, request.fold_head)
        shape = pruned_shape(full)
        _check_shape(masks, shape)
        pieces = list(pieces_of(dense, full, float_dtype(request.dtype) if request.dtype else None))
        stage = next_yaml(run, shape, request.output.folder) if run and request.next_yaml else None
        started = time.monotonic()
        parameters = (count_of(item.step.target for item in dense.tensors), count_of(piece.info for piece in pieces))
        try:
            check_space(request.output.folder, sum(piece.info.nbytes for piece in pieces))
            notes += _write(request, dense, pieces, masks, pruning_report(masks, full, shape, parameters), shape)
        except OSError as error:
            raise refusal(error, f"read '{request.model}' or to write '{request.output.folder}'") from error
    if stage and request.next_yaml:
        write_next(request.next_yaml, stage, request.output.overwrite)
        notes += stage.notes
    nbytes = sum(piece.info.nbytes for piece in pieces)
    return CutReport(masks, shape, parameters, nbytes, time.monotonic() - started, tuple(notes))


def _trained(run: TrainedRun | None) -> TrainedRun:
    if run is None:
        raise UserError("a model folder has no masks: give --masks, or a pruning run's checkpoint as the model")
    return run


def _check_words(request: CutRequest, run: TrainedRun | None) -> None:
    problems = Problems("prune cut")
    if run is None and request.next_yaml:
        problems.add("--next_yaml of a model folder", "the next stage follows from a pruning run's YAML: leave it out")
    if run is None and request.strategies:
        problems.add("--strategy_dir of a model folder", "it is for the slices of a run's ranks: leave it out")
    if run is None and request.config:
        problems.add("--config of a model folder", "its config.json tells its sizes: leave it out")
    if request.next_yaml and (request.next_yaml.is_dir() or request.next_yaml.suffix not in (".yaml", ".yml")):
        problems.add(f"--next_yaml '{request.next_yaml}'", "give the name of a .yaml file")
    if request.next_yaml and request.next_yaml.exists() and not request.output.overwrite:
        problems.add(f"--next_yaml '{request.next_yaml}' exists", "choose another name, or pass --overwrite")
    problems.raise_if_any()


def _check_model(dense: DenseSource, masks: SavedMasks) -> None:
    problems = Problems("the masks belong to another model")
    for name, ours, theirs in differences(shape_of_model(dense.model), masks.source):
        problems.add(f"its {name} is {ours}, the masks' {theirs}", "give the model that was pruned")
    problems.raise_if_any()


def _check_shape(masks: SavedMasks, shape: ModelShape) -> None:
    if masks.target is None or shape == masks.target:
        return
    problems = Problems("the masks have not the target's shape")
    for name, ours, theirs in differences(shape, masks.target):
        problems.add(f"{name} is {ours}, the target's {theirs}", "write the masks again with 'prune.py masks'")
    problems.raise_if_any()


def pieces_of(
    dense: DenseSource, full: FullMasks, kind: Any, changes: Mapping[str, Change] | None = None
) -> Iterator[Piece]:
    """Every tensor that stays, under its new name; ``changes`` take the place of some, or stand beside them."""
    numbers = {old: new for new, old in enumerate(full.kept_layers)}
    left = dict(changes or {})
    for tensor in dense.tensors:
        if tensor.layer is not None and tensor.layer not in numbers:
            continue
        target = tensor.step.target
        name = target.name
        if tensor.layer is not None:
            name = name.replace(f"layers.{tensor.layer}.", f"layers.{numbers[tensor.layer]}.", 1)
        found = tensor_cut(target.name, tensor.dims, full, tensor.layer)
        info = TensorInfo(name, found.shape(target.shape), kind or target.dtype)
        change = left.pop(name, None)
        yield Piece(info, changed=change.make) if change else Piece(info, tensor, found)
    stored = dense.tensors[0].step.target.dtype
    for name, change in left.items():
        yield Piece(TensorInfo(name, change.shape, kind or stored), changed=change.make)


def count_of(infos: Iterable[TensorInfo]) -> int:
    """Numbers in these tensors."""
    return sum(prod(info.shape) for info in infos)


def _write(
    request: CutRequest,
    dense: DenseSource,
    pieces: Sequence[Piece],
    masks: SavedMasks,
    report: Mapping[str, Any],
    shape: ModelShape,
) -> list[str]:
    """The folder; returns notes."""
    config = pruned_config(dense, shape, report["layers"], longest_type(pieces))
    source = request.base or (request.model if request.model.is_dir() else None)
    with fresh_folder(request.output.folder, request.output.overwrite) as partial:
        write_pieces(partial, request.output, dense.reader, pieces)
        write_json(partial / CONFIG, config)
        write_json(partial / REPORT, report)
        write_masks(partial / MASKS, masks)
        if source and (source / CONFIG).is_file():
            return copy_tokenizer(str(source), source, partial)
    return ["no tokenizer was written: give the dense model's folder with --base"]


def write_pieces(folder: Path, out: OutputRequest, reader: Reader, pieces: Sequence[Piece]) -> None:
    """Write the weights block by block; ``UserError`` where values do not fit their type."""

    def blocks(place: int) -> Iterator[Array]:
        piece = pieces[place]
        for block in piece.blocks(reader):
            array, lost = cast(block, piece.info.dtype)
            if lost:
                kind = BY_NUMPY[piece.info.dtype].long
                raise UserError(f"'{piece.info.name}': {lost} values do not fit {kind}: choose another --dtype")
            yield array

    write_weights(folder, [piece.info for piece in pieces], replace(out, threads=THREADS), blocks)


def longest_type(pieces: Sequence[Piece]) -> str:
    """The name of the type that config.json tells, of those that the tensors have."""
    return max({BY_NUMPY[piece.info.dtype].long for piece in pieces})


def pruned_config(dense: DenseSource, shape: ModelShape, layers: Sequence[int], dtype: str) -> dict[str, Any]:
    """The config.json of what is left; a head's width is said always, for it need not follow from the sizes."""
    config = with_both_ropes(dense.config)
    for key in ("_name_or_path", "auto_map", "dtype"):
        config.pop(key, None)
    own = dense.model
    if own.full_attention_layers and len(layers) < own.num_hidden_layers and not config.get("layer_types"):
        raise UserError("layers see windows of different widths, and config.json does not say which: add layer_types")
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][layer] for layer in layers]
    sizes = {name: getattr(shape, name) for name in ModelShape.__dataclass_fields__}
    return {**config, **sizes, "torch_dtype": dtype}
