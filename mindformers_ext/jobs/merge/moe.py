# SPDX-License-Identifier: Apache-2.0
"""Assembles a Mixtral or a Qwen2-MoE: attention and norms of the base, the feed-forward part of each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.formats.dtypes import BY_NUMPY, cast
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.tensors import Array, Index, TensorInfo
from mindformers_ext.jobs.merge.course import Prepared, run_merge
from mindformers_ext.jobs.merge.gates import gate_rows
from mindformers_ext.jobs.merge.models import Model, folders_of, opened
from mindformers_ext.jobs.merge.moe_config import MoEConfig, read_moe_config
from mindformers_ext.jobs.merge.moe_outputs import fitting_output, mixture_config
from mindformers_ext.jobs.merge.moe_plan import CopyFrom, GateRows, Neurons, Target, Zeros, plan_targets
from mindformers_ext.jobs.merge.output import MergeReport, OutputRequest, check_output, check_result
from mindformers_ext.jobs.merge.plan import MergePart, TensorTask
from mindformers_ext.jobs.merge.sidecars import Card, copy_tokenizer, write_card, write_json
from mindformers_ext.jobs.merge.stream import COPIED, Findings, TaskRunner, row_blocks
from mindformers_ext.surgery.experts.shuffle import shuffled
from mindformers_ext.surgery.merge.architectures import HEAD
from mindformers_ext.surgery.merge.settings import Settings

CONFIG_COPY = "mergekit_moe_config.yml"


@dataclass(frozen=True, kw_only=True)
class MoERequest:
    """An assembly. ``fused`` stores the experts of a layer as two tensors (transformers 5)."""

    config: Path
    output: OutputRequest
    fused: bool = False
    gate_scale: float | None = None
    untrained_is_fine: bool = False
    seed: int = 0
    strict: bool = False
    allow_overflow: bool = False
    adapted: str | None = None
    allow_crimes: bool = False
    truncate_embeddings: bool = False
    device: str = "cpu"


def assemble(request: MoERequest, write: bool = True) -> MergeReport:
    """Run the assembly, or with ``write`` false only check everything and plan it (a full disk is no error then).

    Raises:
        UserError: anything wrong with the configuration, the models or the output path; nothing is left half-written.
    """
    return run_merge(request.output, _opened(request), Findings(request.strict, request.allow_overflow), write)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A mixture said in full. ``rows`` makes the router's, float32 (layers, experts of all segments and shared ones,
    hidden), and what the run should say; ``router``: in a few words, how. ``fused``: see ``MoERequest``."""

    config: MoEConfig
    rows: Callable[[], tuple[np.ndarray, list[str]]]
    router: str
    card: Card
    fused: bool = False
    seed: int = 0


@contextmanager
def _opened(request: MoERequest) -> Iterator[Prepared]:
    config = read_moe_config(request.config, request.untrained_is_fine)
    if request.device != "cpu":
        raise UserError(f"device '{request.device}': assembling only copies, it runs on the processor")
    if request.gate_scale is not None and not abs(request.gate_scale) < float("inf"):
        raise UserError(f"--gate-scale {request.gate_scale}: give a finite number")
    names = config.models()
    check_output(request.output, [request.config, *folders_of(names, request.output.download)])
    with opened(names, request.adapted) as models:
        if not config.output_said:
            kind = models[config.base_model].architecture.model_type
            config = replace(config, output=fitting_output(kind, len(config.shared), config.output))
        yield prepared(_recipe(request, config, models), models, request.output)


def _recipe(request: MoERequest, config: MoEConfig, models: Mapping[str, Model]) -> Recipe:
    def rows() -> tuple[np.ndarray, list[str]]:
        found, notes = gate_rows(config, models[config.base_model], request.seed)
        found = per_segment(found, len(config.experts), config.segments)
        return found if request.gate_scale is None else found * np.float32(request.gate_scale), notes

    method = f"mixture of experts, gate mode {config.gate_mode}"
    return Recipe(
        config=config,
        rows=rows,
        router=config.gate_mode,
        card=Card(method, tuple(models), config.base_model, config.text, CONFIG_COPY),
        fused=request.fused,
        seed=request.seed,
    )


def prepared(recipe: Recipe, models: Mapping[str, Model], out: OutputRequest) -> Prepared:
    """The plan of a mixture of open ``models``, checked, for ``run_merge``.

    Raises:
        UserError: models that do not fit, all of it in one message.
    """
    config = recipe.config
    problems = Problems("the mixture cannot be assembled")
    targets, notes = plan_targets(config, models, recipe.fused, problems)
    problems.raise_if_any()
    base = models[config.base_model]
    result = mixture_config(
        config.output,
        {**base.architecture.defaults, **base.config},
        len(config.experts) * config.segments,
        config.experts_per_token,
        segments=config.segments,
        dtype=_common_type(targets),
        tied=_tied(targets),
        dense=config.dense,
        normalised=config.normalised,
    )
    check_result(out, result)
    notes += [note for model in models.values() for note in model.notes]
    return _prepared(_Assembly(recipe, models, targets), out, result, notes)


@dataclass(frozen=True)
class _Assembly:
    """An assembly that is open and checked."""

    recipe: Recipe
    models: Mapping[str, Model]
    targets: list[Target]

    @property
    def base(self) -> Model:
        return self.models[self.recipe.config.base_model]


def _prepared(job: _Assembly, out: OutputRequest, result: Mapping[str, Any], notes: list[str]) -> Prepared:
    def start(findings: Findings, said: list[str]) -> Callable[[int], Iterator[Array]]:
        rows, more = job.recipe.rows()
        said += more
        return _maker(job, rows, findings)

    lines = tuple(
        f"{t.info.name} {BY_NUMPY[t.info.dtype].long} {list(t.info.shape)} = {_origin(job, t)}" for t in job.targets
    )
    return Prepared(
        [target.info for target in job.targets],
        lines,
        notes,
        start,
        lambda folder: _write_beside(folder, out, job, result),
        lambda: _comparison(job),
    )


def per_segment(rows: np.ndarray, experts: int, segments: int) -> np.ndarray:
    """The router's rows (layers, experts and shared ones, hidden) with each expert's repeated for its segments.

    Segments of one model are then chosen together and weigh the same: the mixture begins as the one of whole models.
    """
    return np.concatenate([np.repeat(rows[:, :experts], segments, axis=1), rows[:, experts:]], axis=1)


def _comparison(job: _Assembly) -> tuple[TaskRunner, Sequence[TensorTask]]:
    """The feed-forward matrices of the base and of every model that gives an expert."""
    from mindformers_ext.surgery.merge.passthrough import PASSTHROUGH

    base = job.base
    others = [name for name in job.models if name != base.name]
    rows = [row.name for row in base.architecture.layer_rows() if ".mlp." in row.name and row.name.endswith(".weight")]
    names = [row.replace("{layer}", str(layer)) for layer in range(base.layers) for row in rows]
    tasks = [
        TensorTask(
            base.reader.infos[name],
            MergePart(base.name, name),
            tuple(MergePart(other, name) for other in others),
            Settings(),
            "float32",
        )
        for name in names
        if others
    ]
    readers = {name: model.reader for name, model in job.models.items()}
    return TaskRunner(PASSTHROUGH, readers, "cpu", Findings()), tasks


def _common_type(targets: list[Target]) -> str:
    return BY_NUMPY[targets[0].info.dtype].long


def _tied(targets: list[Target]) -> bool:
    return all(target.info.name != HEAD.name for target in targets)


def _maker(job: _Assembly, rows: np.ndarray, findings: Findings) -> Callable[[int], Iterator[Array]]:
    """The blocks of each target."""

    def blocks(place: int) -> Iterator[Array]:
        target = job.targets[place]
        for source in target.sources:
            if isinstance(source, GateRows):
                yield _typed(rows[source.layer, source.first : source.end], target.info, findings)
            elif isinstance(source, Zeros):
                yield np.zeros(source.length, target.info.dtype)
            else:
                yield from _copied(job, source, target.info, findings)

    return blocks


def _blocks(source: CopyFrom, shape: tuple[int, ...]) -> Iterator[Index]:
    """Indices of consecutive blocks of what is taken of a tensor of ``shape``."""
    if source.cut is None:
        yield from (index for index, _ in row_blocks(shape, COPIED))
        return
    axis, first, end = source.cut
    for index, _ in row_blocks((end - first, shape[1]) if axis == 0 else (shape[0], end - first), COPIED):
        rows = index[0]
        assert isinstance(rows, slice)
        yield (slice(rows.start + first, rows.stop + first),) if axis == 0 else (rows, slice(first, end))


def _typed(array: Array, info: TensorInfo, findings: Findings) -> Array:
    """``array`` in the type of the tensor it belongs to."""
    array, lost = cast(array, info.dtype)
    findings.overflow(info.name, lost, BY_NUMPY[info.dtype].long)
    return array


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream]))


def _shuffled(source: CopyFrom, neurons: Neurons, dense: Array, seed: int) -> Array:
    """The cut of a whole matrix in its own order, some of it drawn anew."""
    assert source.cut is not None
    axis, first, end = source.cut
    order = _generator(seed, neurons.order).permutation(dense.shape[axis])
    chosen = _generator(seed, neurons.redrawn).permutation(dense.shape[axis])
    redrawn = chosen[: int(neurons.ratio * len(chosen))]
    return shuffled(dense, axis, order, redrawn, slice(first, end), _generator(seed, source.stream))


def _copied(job: _Assembly, source: CopyFrom, info: TensorInfo, findings: Findings) -> Iterator[Array]:
    """The blocks of a matrix, with the expert's noise and scale, in the type of ``info``."""
    reader, seed, neurons = job.models[source.model].reader, job.recipe.seed, source.neurons
    random = _generator(seed, source.stream) if source.noise else None
    shape = reader.infos[source.name].shape
    for index in [()] if neurons else _blocks(source, shape):  # shuffled columns and rows come from everywhere
        array = reader.read(source.name, index)
        if neurons:
            array = _shuffled(source, neurons, array, seed)
        findings.look(array, MergePart(source.model, source.name))
        if random is not None or source.scale != 1.0:
            wide = array.astype(np.float32)
            if random is not None:
                wide += random.standard_normal(wide.shape, dtype=np.float32) * np.float32(source.noise)
            wide *= np.float32(source.scale)
            array = wide
        yield _typed(array, info, findings)


def _write_beside(folder: Path, out: OutputRequest, job: _Assembly, result: Mapping[str, Any]) -> list[str]:
    base = job.base
    write_json(folder / CONFIG, result)
    notes = copy_tokenizer(base.name, base.folder, folder) if out.copy_tokenizer else []
    if out.model_card:
        write_card(folder, out.folder.name, job.recipe.card)
    return notes


def _origin(job: _Assembly, target: Target) -> str:
    first, count = target.sources[0], len(target.sources)
    if isinstance(first, GateRows):
        return f"gate, {job.recipe.router}"
    if isinstance(first, Zeros):
        return "zeros"
    more = f" and {count - 1} more" if count > 1 else ""
    cut = f" {('rows', 'columns')[first.cut[0]]} {first.cut[1]} to {first.cut[2] - 1}" if first.cut else ""
    how = f", its neurons shuffled, {first.neurons.ratio:g} of them redrawn" if first.neurons else ""
    return f"copy of {first.model}:{first.name}{cut}{how}{more}"
