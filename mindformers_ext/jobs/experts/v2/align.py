# SPDX-License-Identifier: Apache-2.0
"""A LLaMA-MoE v2 whose parts add what the dense model's add, by channel: in mean and variance over the same texts.

Layer after layer, those before it aligned already: attention's output where heads are experts, then that of the whole
feed-forward part, the residual one too. Scales go into the last matrices. The bias is each expert's own, divided by the
factor of the experts' sum: weights add up to 1, so that the sum adds it once. Routing depends on none of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import LLAMA_MOE_V2, LLAMA_MOE_V2_RESIDUAL
from mindformers_ext.core.parameters import layer_rows, shape_of, size_letters
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.dtypes import cast
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.tensors import Array, Reader
from mindformers_ext.jobs.checkpoint.hf_code import with_code
from mindformers_ext.jobs.checkpoint.source import read_config
from mindformers_ext.jobs.engine.protocols import LayerProbe
from mindformers_ext.jobs.experts.calibration import Calibration, opened
from mindformers_ext.jobs.experts.dense_model import StreamedModel, open_weights
from mindformers_ext.jobs.experts.probe import Course, Part, Tell, check_needs, embed, needs, pass_on
from mindformers_ext.jobs.experts.ranks import alone
from mindformers_ext.jobs.experts.states import States
from mindformers_ext.jobs.experts.v2.attention import other_tasks
from mindformers_ext.jobs.experts.v2.distribution import POINT, MomentsSink
from mindformers_ext.jobs.experts.v2.layer_tables import DISTRIBUTION, MOMENTS, PARTS, LayerTable, read_table
from mindformers_ext.jobs.experts.v2.mixtral import check_names
from mindformers_ext.jobs.experts.writing import Task, Tensors, as_written, write_model
from mindformers_ext.jobs.merge.output import MergeReport, OutputRequest, check_output
from mindformers_ext.jobs.merge.sidecars import copy_tokenizer, write_json
from mindformers_ext.surgery.experts.alignment import Moments, Rescale, rescale

HEADS, MLP = PARTS
Scales = dict[str, Rescale]  # by part of a layer
# A part's last matrices and their biases: in a file, and in a network (below "model.layers.N."), where the channels are
# the axis that is told.
_FILES = {
    HEADS: (r"self_attn\.o_proj\.\d+",),
    MLP: (r"block_sparse_moe\.experts\.\d+\.w2", r"mlp_residual\.w2"),
}
_WEIGHTS = {"attention.wo.weight": (HEADS, 0), "ffn.w2.weight": (MLP, 1), "shared_experts.w2.weight": (MLP, 0)}
_BIASES = {"attention.expert_bias": HEADS, "ffn.w2.bias": MLP}


@dataclass(frozen=True, kw_only=True)
class AlignRequest:
    """What is asked for. ``calibration``: the mixture and the texts; ``distribution``: the dense model's, of the same
    texts."""

    calibration: Calibration
    distribution: Path
    output: OutputRequest


def align(request: AlignRequest, write: bool = True, tell: Tell = lambda line: None) -> MergeReport:
    """Write the aligned mixture, or with ``write`` false only check everything.

    Raises:
        UserError: anything wrong with mixture, distribution, texts or output; nothing is left half-written.
    """
    request.calibration.check()
    folder = request.calibration.model_path
    check_output(request.output, [folder])
    share = alone("a model is aligned")
    table = read_table(request.distribution, DISTRIBUTION)
    with opened(request.calibration, share, write, open_mixture) as start:
        model = start.model
        table.check_made_from(texts=start.every.digest(""))
        wanted = _reference(table, model.spec)
        moe = model.spec.routing
        spec = replace(model.spec, moe=replace(moe, expert_bias=True))
        course = replace(start.course, model=replace(model, spec=spec))
        for line in (*start.notes, f"{start.rows} rows, {start.tokens} tokens"):
            tell(line)
        asked = needs(course, MomentsSink(PARTS, spec.hidden_size), 1, backward=False)
        check_needs(asked, request.output.folder.absolute().parent)
        found = _measured(course, wanted, _places(request), tell) if write else _unchanged(spec, wanted)
        tasks = _tasks(model.reader, spec, found)
        config = {**read_config(folder), "add_rescale_bias": True}
        check_names(config, tasks)

        def beside(place: Path) -> list[str]:
            write_json(place / CONFIG, with_code(place, config))
            return copy_tokenizer(str(folder), folder, place)

        return write_model(request.output, tasks, beside, (), write)


def open_mixture(folder: Path) -> StreamedModel:
    """The LLaMA-MoE v2 in ``folder``.

    Raises:
        UserError: no such folder, another model, or weights that are not those of its config.json.
    """
    if not folder.is_dir():
        raise UserError(f"--model_path '{folder}' is no folder: give what convert --style wrote")
    spec = model_spec_from_hf(read_config(folder))
    if spec.family not in (LLAMA_MOE_V2.name, LLAMA_MOE_V2_RESIDUAL.name):
        raise UserError(
            f"'{folder}' is a {spec.model_type}: give what convert --style wrote without --fold_scale; transformers' "
            "own mixtures have no biases"
        )
    return StreamedModel(folder, spec, *open_weights(folder, spec))


def _places(request: AlignRequest) -> Path:
    out = request.output.folder.absolute()
    return out.with_name(f".{out.name}.states")


def _parts(spec: ModelSpec, layer: int) -> tuple[str, ...]:
    """What is aligned of a layer."""
    built = spec.layer(layer)
    return () if built.moe is None else PARTS if built.attention.experts else (MLP,)


def _reference(table: LayerTable, spec: ModelSpec) -> dict[int, dict[str, Moments]]:
    """The wanted moments, by layer and part."""
    count = spec.num_hidden_layers
    if set(table.layers) != set(range(count)):
        raise UserError(
            f"'{table.path}' tells of layers {min(table.layers)} to {max(table.layers)}, {len(table.layers)} in all, "
            f"the model has {count}: give the distribution of the dense model that it was made of"
        )
    found: dict[int, dict[str, Moments]] = {}
    for layer in range(count):
        found[layer] = {}
        for part in _parts(spec, layer):
            arrays = [table.layers[layer].get(f"{part}.{name}") for name in MOMENTS]
            if any(array is None for array in arrays):
                raise UserError(f"'{table.path}', layer {layer} has no '{part}': make it again with distribution")
            number, mean, variance = (np.asarray(array, np.float64) for array in arrays)
            if mean.size != spec.hidden_size:
                raise UserError(
                    f"'{table.path}', layer {layer}: {mean.size} channels, the model has {spec.hidden_size}: give the "
                    "distribution of the dense model that it was made of"
                )
            found[layer][part] = Moments(int(number[0]), mean, variance)
    return found


def _unchanged(spec: ModelSpec, wanted: Mapping[int, Mapping[str, Moments]]) -> dict[int, Scales]:
    ones, zeros = np.ones(spec.hidden_size), np.zeros(spec.hidden_size)
    return {layer: dict.fromkeys(parts, Rescale(ones, zeros)) for layer, parts in wanted.items()}


def _measured(
    course: Course, wanted: Mapping[int, Mapping[str, Moments]], folder: Path, tell: Tell
) -> dict[int, Scales]:
    """What is done to each part, layer after layer; each pass has what is aligned before it."""
    spec, probe = course.model.spec, course.open()
    states = States(folder, course.length, spec.hidden_size, "", keep=False, anew=True)
    found: dict[int, Scales] = {}
    try:
        embed(course, states)
        for layer in range(spec.num_hidden_layers):
            found[layer] = {}
            for part in wanted[layer]:
                moments = _moments(course, probe, states, layer, part, found[layer])
                one = rescale(wanted[layer][part], moments)
                found[layer][part] = one
                low, middle, high = np.quantile(one.scale, (0, 0.5, 1))
                bias = np.abs(one.bias).max()
                tell(f"layer {layer}, {part}: scales {low:.3g} to {high:.3g}, median {middle:.3g}; bias to {bias:.3g}")
            probe.fill(layer, _aligned(course.model, layer, found[layer]))
            pass_on(course, probe, layer, states, states)
    finally:
        states.remove()
    return found


def _moments(
    course: Course, probe: LayerProbe, states: States, layer: int, part: str, done: Mapping[str, Rescale]
) -> Moments:
    """Of one part's output, the parts before it ``done``."""
    sink = MomentsSink((part,), course.model.spec.hidden_size)
    probe.fill(layer, _aligned(course.model, layer, done))
    came = states.input_of(layer)
    for batch, rows, length in course.parts():
        values = probe.forward(came.read(rows, length), sink.values)[1]
        inside, numbers = course.kept(rows, length)
        sink.take(layer, Part(batch, numbers), {POINT[part]: values[POINT[part]][inside]}, {})
    came.close()
    return sink.found[part]


def _factor(spec: ModelSpec, part: str) -> float:
    """Of the sum of a part's experts."""
    return spec.scale_factor_attn if part == HEADS else spec.routing.routed_scaling_factor


def _aligned(model: StreamedModel, layer: int, done: Mapping[str, Rescale]) -> Iterator[tuple[str, np.ndarray]]:
    """A layer's weights by a network's names, in values that their type in the file has; biases of zeros where the file
    has none."""
    spec, sizes = model.spec, size_letters(model.spec)
    rows = (row for row in layer_rows(spec.layer(layer)) if row.name.endswith(tuple(_BIASES)))
    biases = {row.name: np.zeros(shape_of(row.dims, sizes), np.float32) for row in rows}
    for name, array in model.layer(layer):
        part, axis = next((place for end, place in _WEIGHTS.items() if name.endswith(end)), ("", 0))
        if name in biases:
            biases[name] = array
        elif part in done:
            shape = [-1 if place == axis else 1 for place in range(array.ndim)]
            yield name, _in_file(model, part, layer, array * done[part].scale.reshape(shape))
        else:
            yield name, array
    for name, bias in biases.items():
        part = next(part for end, part in _BIASES.items() if name.endswith(end))
        if part in done:
            moved = bias * done[part].scale + done[part].bias / _factor(spec, part)
            yield name, _in_file(model, part, layer, moved)
        else:
            yield name, bias


def _in_file(model: StreamedModel, part: str, layer: int, array: np.ndarray) -> np.ndarray:
    start = f"model.layers.{layer}."
    infos = model.reader.infos
    name = next(name for name in infos if re.fullmatch(re.escape(start) + _FILES[part][0] + r"\.weight", name))
    rounded: np.ndarray = cast(array.astype(np.float32), infos[name].dtype)[0].astype(np.float32)
    return rounded


def _tasks(reader: Reader, spec: ModelSpec, found: Mapping[int, Scales]) -> list[Task]:
    """Every tensor of the mixture: changed ones with their biases, the others as they are."""
    changed: dict[str, Task] = {}
    biases = set[str]()
    for name in reader.infos:
        told = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
        if not told:
            continue
        for part, one in found.get(int(told[1]), {}).items():
            for place, pattern in enumerate(_FILES[part]):
                if re.fullmatch(pattern, told[2]):
                    has_bias = place == 0
                    changed[name] = _task(reader, name, one, _factor(spec, part) if has_bias else None)
                    biases |= {_bias_of(name)} if has_bias else set()
    return [*other_tasks(reader, spec, {*changed, *biases}, None), *changed.values()]


def _bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _task(reader: Reader, name: str, one: Rescale, factor: float | None) -> Task:
    """A matrix whose rows are scaled; of an expert, with its bias, by whose sum's ``factor`` it is divided."""
    info, other = reader.infos[name], _bias_of(name)
    bias = replace(info, name=other, shape=info.shape[:1])

    def read() -> Tensors:
        yield info, as_written(info, _float(reader.read(name)) * one.scale[:, None].astype(np.float32))
        if factor is not None:
            before = _float(reader.read(other)) if other in reader.infos else np.zeros(bias.shape, np.float32)
            yield bias, as_written(bias, (before * one.scale + one.bias / factor).astype(np.float32))

    return Task((info, bias) if factor is not None else (info,), read, 3 * info.nbytes)


def _float(array: Array) -> np.ndarray:
    return np.asarray(array, np.float32)
