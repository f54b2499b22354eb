# SPDX-License-Identifier: Apache-2.0
"""A LLaMA-MoE folder becomes the dense LLaMA of which it was cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.hf_attention import with_both_ropes
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import LLAMA, LLAMA_MOE
from mindformers_ext.formats.dtypes import BY_NUMPY
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.tensors import Reader, TensorInfo
from mindformers_ext.jobs.checkpoint.renamed import notes_of
from mindformers_ext.jobs.checkpoint.source import open_hf, read_config
from mindformers_ext.jobs.experts.cut import DENSE, INNER, MLP, RESIDUAL, ROUTED, Cut, cuts, routed_prefix
from mindformers_ext.jobs.experts.gating import Gating, mixture_config
from mindformers_ext.jobs.experts.neuron_file import NEURONS, read_neurons
from mindformers_ext.jobs.experts.parts import model_sizes
from mindformers_ext.jobs.experts.writing import Task, Tensors, copied, write_model
from mindformers_ext.jobs.merge.output import MergeReport, OutputRequest, check_output
from mindformers_ext.jobs.merge.sidecars import copy_tokenizer, write_json
from mindformers_ext.surgery.experts.split import LayerSplit


@dataclass(frozen=True, kw_only=True)
class DenseRequest:
    """A mixture folder to be put together again. ``splits``: where its neurons were, if not in the folder itself."""

    model: Path
    output: OutputRequest
    splits: Mapping[int, LayerSplit] | None = None


def reverse(request: DenseRequest, write: bool = True) -> MergeReport:
    """Write the dense model of which a mixture was cut, neuron by neuron in the old order; gates are left out.

    Raises:
        UserError: no such mixture, or its experts share or lack neurons.
    """
    check_output(request.output, [request.model])
    config = read_config(request.model)
    if config.get("model_type") != LLAMA_MOE.name:
        raise UserError(f"'{request.model}' is a {config.get('model_type')}: give a {LLAMA_MOE.name} folder")
    reader = open_hf(request.model)
    try:
        layers, width = model_sizes(request.model)
        in_order = {layer: _in_order(reader, layer) for layer in range(layers)}
        for layer, found in in_order.items():
            if found.width != width:
                raise UserError(
                    f"the experts of layer {layer} have {found.width} neurons, config.json says {width}: copy the "
                    "model again"
                )
        notes = list(notes_of(reader))
        splits = request.splits
        if splits is None:
            splits = read_neurons(request.model / NEURONS, width, layers)
        if splits is None:
            notes.append(f"no {NEURONS}: neurons stay in the experts' order, which computes the same")
            splits = in_order
        tasks = _joined_tasks(reader, splits, layers)
        result = _dense_config(config, splits)

        def beside(folder: Path) -> list[str]:
            write_json(folder / CONFIG, result)
            return copy_tokenizer(str(request.model), request.model, folder)

        return write_model(request.output, tasks, beside, notes, write)
    finally:
        reader.close()


def _in_order(reader: Reader, layer: int) -> LayerSplit:
    """The experts of one layer, neurons in their order."""
    residual = _sizes(reader, MLP.format(layer) + RESIDUAL)
    prefix = MLP.format(layer) + (INNER if residual else "") + ROUTED
    routed = _sizes(reader, prefix)
    if not routed:
        raise UserError(f"layer {layer} has no experts '{prefix}...': give a mixture that this command has written")
    ends = np.cumsum([*routed, *residual])
    parts = np.split(np.arange(ends[-1]), ends[:-1])
    return LayerSplit(int(ends[-1]), tuple(parts[: len(routed)]), tuple(parts[len(routed) :]))


def _sizes(reader: Reader, prefix: str) -> list[int]:
    """Neurons of each expert whose tensors begin with ``prefix``."""
    start = f"{prefix}weight_gate."
    count = sum(name.startswith(start) for name in reader.infos)
    names = [f"{start}{number}" for number in range(count)]
    if any(name not in reader.infos for name in names):
        raise UserError(
            f"there is no whole row of experts '{start}0', ...: give a mixture that this command has written"
        )
    return [reader.infos[name].shape[0] for name in names]


def _joined_tasks(reader: Reader, splits: Mapping[int, LayerSplit], layers: int) -> list[Task]:
    """Every tensor of the dense model."""
    mixed = tuple(MLP.format(layer) for layer in range(layers))
    tasks = [copied(reader, info) for name, info in reader.infos.items() if not name.startswith(mixed)]
    for layer in range(layers):
        split = splits[layer]
        if not split.is_partition:
            raise UserError(
                f"layer {layer} shares neurons between experts, or lacks some: no dense model holds the same weights"
            )
        for matrix in DENSE:
            info, parts = _parts(reader, layer, split, matrix)
            tasks.append(_joined(reader, info, parts))
    return tasks


def _parts(reader: Reader, layer: int, split: LayerSplit, matrix: str) -> tuple[TensorInfo, list[Cut]]:
    """A dense matrix and the experts' matrices it is made of: all are there, of one type and of the right size."""
    name, axis = DENSE[matrix]
    first = f"{routed_prefix(layer, split)}{ROUTED}{name}.0"
    if first not in reader.infos:
        raise UserError(f"'{first}' is missing: copy the model again")
    stored = reader.infos[first]
    shape = list(stored.shape)
    shape[axis] = split.width
    info = TensorInfo(MLP.format(layer) + matrix, tuple(shape), stored.dtype)
    parts = list(cuts(layer, split, matrix, info))
    for part in parts:
        found = reader.infos.get(part.info.name)
        if found is None:
            raise UserError(f"'{part.info.name}' is missing: copy the model again, or give the split of this model")
        if found.shape != part.info.shape:
            raise UserError(f"'{part.info.name}' has another size than the split says: give the split of this model")
        if found.dtype != stored.dtype:
            raise UserError(
                f"'{part.info.name}' is {BY_NUMPY[found.dtype].long}, '{first}' {BY_NUMPY[stored.dtype].long}: one "
                "dense matrix has one type; write the mixture in one (--dtype)"
            )
    return info, parts


def _joined(reader: Reader, info: TensorInfo, parts: Sequence[Cut]) -> Task:
    def read() -> Tensors:
        dense = np.empty(info.shape, info.dtype)
        for part in parts:
            part.into(dense, reader.read(part.info.name))
        yield info, dense

    return Task((info,), read, info.nbytes + max(part.info.nbytes for part in parts))


def _dense_config(config: Mapping[str, Any], splits: Mapping[int, LayerSplit]) -> dict[str, Any]:
    """config.json without what belongs to a mixture."""
    own = set(mixture_config({}, splits, Gating(chosen=1), "")) | {"auto_map", "gate_noise_epsilon"}
    kept = {key: value for key, value in with_both_ropes(config).items() if key not in own}
    kept |= {"architectures": [LLAMA.hf_class], "model_type": LLAMA.name, "intermediate_size": splits[0].width}
    if "torch_dtype" in config:
        kept["torch_dtype"] = config["torch_dtype"]
    return kept
