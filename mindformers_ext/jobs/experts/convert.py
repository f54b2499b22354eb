# SPDX-License-Identifier: Apache-2.0
"""A dense LLaMA folder, its split and its gates become a LLaMA-MoE folder, one dense matrix in memory per thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.families import LLAMA, LLAMA_MOE
from mindformers_ext.formats.dtypes import BY_NUMPY, float_dtype
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.tensors import Array, Reader
from mindformers_ext.jobs.checkpoint.hf_code import save_code
from mindformers_ext.jobs.checkpoint.renamed import notes_of
from mindformers_ext.jobs.checkpoint.source import read_config
from mindformers_ext.jobs.experts.changed import ChangedReader
from mindformers_ext.jobs.experts.cut import MLP, Cut, cuts, dense_matrix, ids_of, in_type, routed_prefix
from mindformers_ext.jobs.experts.gating import NETWORKS, Gating, check_gate, mixture_config, random_gates
from mindformers_ext.jobs.experts.neuron_file import NEURONS, write_neurons
from mindformers_ext.jobs.experts.writing import Task, Tensors, as_written, copied, given, write_model
from mindformers_ext.jobs.merge.fit import check_fit
from mindformers_ext.jobs.merge.models import opened
from mindformers_ext.jobs.merge.output import MergeReport, OutputRequest, check_output
from mindformers_ext.jobs.merge.sidecars import copy_tokenizer, write_json
from mindformers_ext.surgery.experts.split import LayerSplit
from mindformers_ext.surgery.experts.words import NOISE

Gates = Mapping[int, Mapping[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class MixtureRequest:
    """A dense folder to cut. ``splits`` and ``gates`` by layer; no gates: random ones. ``dtype`` None keeps types.
    ``changes``: tensors of the model that are others; ``beside`` writes more into the folder."""

    model: Path
    splits: Mapping[int, LayerSplit]
    gates: Gates | None
    gating: Gating
    output: OutputRequest
    dtype: str | None = None
    seed: int = 0
    changes: Mapping[str, Callable[[], Array]] = field(default_factory=dict)
    beside: Callable[[Path], None] = lambda folder: None


def convert(request: MixtureRequest, write: bool = True) -> MergeReport:
    """Write the mixture, or with ``write`` false only check everything.

    Raises:
        UserError: anything wrong with model, split, gates or output; nothing is left half-written.
    """
    check_output(request.output, [request.model])
    with dense_folder(request.model) as (config, stored):
        reader = ChangedReader(stored, request.changes)
        layers = int(config["num_hidden_layers"])
        notes = [*notes_of(stored), *_check_mixture(request, config)]
        kind = float_dtype(request.dtype) if request.dtype else None
        tasks = _cut_tasks(request, reader, layers, kind)
        types = {info.dtype for task in tasks for info in task.infos}
        dtype = BY_NUMPY[max(types, key=lambda item: item.itemsize)].long
        result = mixture_config(config, request.splits, request.gating, dtype)

        def beside(folder: Path) -> list[str]:
            write_json(folder / CONFIG, save_code(folder, result))
            write_neurons(folder / NEURONS, ids_of(request.splits))
            request.beside(folder)
            return copy_tokenizer(str(request.model), request.model, folder)

        return write_model(request.output, tasks + _gate_tasks(request, config), beside, notes, write)


@contextmanager
def dense_folder(folder: Path) -> Iterator[tuple[Mapping[str, Any], Reader]]:
    """An open dense model whose tensors are those of its config.json."""
    kind = read_config(folder).get("model_type")
    if kind != LLAMA.name:
        raise UserError(f"'{folder}' is a {kind}: give a dense {LLAMA.name} folder")
    with opened([str(folder)]) as models:
        model = models[str(folder)]
        problems = Problems(f"'{folder}'")
        for key in ("attention_bias", "mlp_bias"):
            if model.config.get(key):
                problems.add(f"it has {key}", f"a {LLAMA_MOE.name} has no biases")
        shapes = {name: info.shape for name, info in model.reader.infos.items()}
        check_fit(shapes, model.architecture, model.config, f"'{folder}'", problems)
        problems.raise_if_any()
        yield model.config, model.reader


def _check_mixture(request: MixtureRequest, config: Mapping[str, Any]) -> list[str]:
    """What must fit together; returns notes."""
    layers, width = int(config["num_hidden_layers"]), int(config["intermediate_size"])
    problems = Problems("the mixture cannot be made")
    missing = [layer for layer in range(layers) if layer not in request.splits]
    if missing:
        problems.add(f"the split lacks layers {missing}", "split them, or give the folder that holds all")
    for layer, split in sorted(request.splits.items()):
        if layer >= layers:
            problems.add(f"the split has layer {layer}, the model {layers}", "give the split of this model")
        elif split.width != width:
            problems.add(
                f"the split of layer {layer} has {split.width} neurons, the model {width}",
                "give the split of this model",
            )
    problems.raise_if_any()
    experts = len(request.splits[0].experts)
    request.gating.collect(experts, layers, problems)
    problems.raise_if_any()
    if request.gates is None:
        return ["no gates were given: random ones are written, and experts are chosen at random until they are trained"]
    absent = [layer for layer in range(layers) if layer not in request.gates]
    if absent:
        raise UserError(f"the gates lack layers {absent}: fit them, or give the folder that holds all")
    for layer, gate in request.gates.items():
        check_gate(layer, gate, request.gating.network, experts, int(config["hidden_size"]))
    return []


def _cut_tasks(request: MixtureRequest, reader: Reader, layers: int, kind: np.dtype | None) -> list[Task]:
    """Every tensor of the dense model: copied, or a feed-forward matrix cut."""
    tasks = []
    for name, info in reader.infos.items():
        place = dense_matrix(name, layers)
        if place is None:
            target = in_type(info, kind)
            tasks.append(copied(reader, target))
        else:
            parts = list(cuts(place[0], request.splits[place[0]], place[1], in_type(info, kind)))
            tasks.append(_cut(reader, name, parts))
    return tasks


def _cut(reader: Reader, name: str, parts: Sequence[Cut]) -> Task:
    def read() -> Tensors:
        dense = reader.read(name)
        for part in parts:
            yield part.info, as_written(part.info, part.of(dense))

    stored, largest = reader.infos[name], max(part.info.nbytes for part in parts)
    return Task(tuple(part.info for part in parts), read, stored.nbytes + 2 * largest)


def _gate_tasks(request: MixtureRequest, config: Mapping[str, Any]) -> list[Task]:
    """The gate of every layer; one that can add noise has weights of 0 for it where it was fitted without."""
    layers, width = int(config["num_hidden_layers"]), int(config["hidden_size"])
    experts = len(request.splits[0].experts)
    std = float(config.get("initializer_range", 0.02))
    drawn = () if request.gates else random_gates(layers, experts, width, request.gating.network, std, request.seed)
    gates = request.gates or dict(enumerate(drawn))
    tasks = []
    for layer in range(layers):
        prefix = routed_prefix(layer, request.splits[layer]) + "gate."
        arrays = dict(gates[layer])
        if request.gating.network in NETWORKS:
            arrays = {NOISE: np.zeros((experts, width), np.float32)} | arrays
        residual = request.splits[layer].residual
        made = {prefix + name: np.asarray(array, np.float32) for name, array in arrays.items()}
        if residual:
            name = MLP.format(layer) + "residual_block.gate.gate_network.weight"
            made[name] = np.zeros((len(residual), width), np.float32)
        tasks += [given(name, array) for name, array in made.items()]
    return tasks
