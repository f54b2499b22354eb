# SPDX-License-Identifier: Apache-2.0
"""A dense LLaMA folder becomes a LLaMA-MoE v2 folder, one dense matrix in memory per thread."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.families import LLAMA, MISTRAL
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.dtypes import BY_NUMPY, float_dtype
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.tensors import Array, Reader, TensorInfo
from mindformers_ext.jobs.checkpoint.hf_code import with_code
from mindformers_ext.jobs.checkpoint.renamed import notes_of
from mindformers_ext.jobs.checkpoint.source import read_config
from mindformers_ext.jobs.experts.cut import in_type
from mindformers_ext.jobs.experts.dense_model import open_dense
from mindformers_ext.jobs.experts.v2.forms import MATRICES, PLAIN, SHARED, V2, Form, config_of
from mindformers_ext.jobs.experts.v2.parts import PLAIN_STYLE, Made, MixtralParts, make_parts
from mindformers_ext.jobs.experts.writing import Task, Tensors, as_written, copied, given, write_model
from mindformers_ext.jobs.merge.output import MergeReport, OutputRequest, check_output
from mindformers_ext.jobs.merge.sidecars import copy_tokenizer, write_json
from mindformers_ext.weights.convert import rule_set

KINDS = (LLAMA.name, MISTRAL.name)


@dataclass(frozen=True, kw_only=True)
class MixtralRequest:
    """A dense folder to cut. ``fold``: in a form that transformers itself computes, where there is one. ``dtype`` None
    keeps types; gates are float32 in any case."""

    model: Path
    parts: MixtralParts
    output: OutputRequest
    fold: bool = False
    dtype: str | None = None


@dataclass(frozen=True)
class Piece:
    """Rows or columns of a dense matrix, ``neurons`` beyond its width being zeros, times ``factor``."""

    info: TensorInfo
    axis: int
    neurons: np.ndarray
    factor: float

    def of(self, dense: Array) -> Array:
        """The piece of the dense matrix, in the type of ``info``."""
        inside = self.neurons[self.neurons < dense.shape[self.axis]]
        part = np.take(dense, inside, self.axis)
        if inside.size < self.neurons.size:  # padding comes last
            missing = [(0, self.neurons.size - inside.size if axis == self.axis else 0) for axis in range(2)]
            part = np.pad(part, missing)
        if self.factor != 1.0:
            part = part.astype(np.float32) * np.float32(self.factor)
        return as_written(self.info, np.ascontiguousarray(part))


def convert(request: MixtralRequest, write: bool = True) -> MergeReport:
    """Write the mixture, or with ``write`` false only check everything.

    Raises:
        UserError: anything wrong with model, options, files or output; nothing is left half-written.
    """
    check_output(request.output, [request.model])
    kind = float_dtype(request.dtype) if request.dtype else None
    with closing(open_dense(request.model)) as model:
        config = read_config(request.model)
        form = _form(request, model.spec, config)
        made = make_parts(request.parts, model.spec, fingerprint(model.reader))
        sizes = replace(made.sizes, scale=1.0) if request.fold else made.sizes
        tasks = mixture_tasks(model.reader, made, form, kind, made.sizes.scale if request.fold else 1.0)
        stored = max((info.dtype for info in model.reader.infos.values()), key=lambda item: item.itemsize)
        told = None if kind else config.get("torch_dtype") or config.get("dtype")
        result = config_of(form, config, sizes, str(told or BY_NUMPY[kind or stored].long))
        check_names(result, tasks)
        notes = [*notes_of(model.reader), *made.notes, *_form_notes(request, form, made)]

        def beside(folder: Path) -> list[str]:
            write_json(folder / CONFIG, with_code(folder, result))
            return copy_tokenizer(str(request.model), request.model, folder)

        return write_model(request.output, tasks, beside, notes, write)


def _form(request: MixtralRequest, spec: ModelSpec, config: Mapping[str, Any]) -> Form:
    """In which words the mixture of ``spec`` is written; what no form can say is a ``UserError``."""
    form = V2
    if request.fold and request.parts.style != PLAIN_STYLE:
        form = SHARED
    elif request.fold and request.parts.ends == 0:
        form = PLAIN
    check_dense(request.model, spec, config, form, request.fold)
    return form


def check_dense(folder: Path, spec: ModelSpec, config: Mapping[str, Any], form: Form, fold: bool = True) -> None:
    """A dense model whose mixture no file of ``form`` can say is a ``UserError``. ``fold``: transformers itself is to
    compute it."""
    problems = Problems(f"'{folder}'")
    if config.get("model_type") not in KINDS:
        problems.add(f"it is a {config.get('model_type')}", f"give a dense {' or '.join(KINDS)}")
    if spec.mlp_bias:
        problems.add("mlp_bias=True", "experts have no biases")
    if spec.sliding_window is not None:
        problems.add(f"sliding_window={spec.sliding_window}", "a mixture sees every token: set it to null in a copy")
    if fold and spec.out_bias:
        problems.add("attention_bias=True", "transformers' own mixtures have no such biases")
    if form is SHARED and spec.head_dim * spec.num_attention_heads != spec.hidden_size:
        problems.add(f"head_dim={spec.head_dim}", f"a {SHARED.name} has hidden_size / heads")
    problems.raise_if_any()


def _form_notes(request: MixtralRequest, form: Form, made: Made) -> list[str]:
    if form is not V2:
        said = f"written as a {form.name}, which transformers, vLLM and llama.cpp compute as it is"
        return [f"{said}; scale_factor is in the experts' last matrices"]
    text = "load it with trust_remote_code=True: without, transformers takes it for a Mixtral and leaves out "
    left = ["dense layers"] * (made.sizes.ends > 0) + ["the residual part"] * (made.sizes.always > 0)
    left += ["scale_factor"] * (made.sizes.scale != 1.0 and not request.fold)
    return [text + " and ".join(left)] if left else []


def mixture_tasks(
    reader: Reader, made: Made, form: Form, kind: np.dtype | None, scale: float = 1.0, skip: Collection[str] = ()
) -> list[Task]:
    """Every tensor of the dense model but those to ``skip``, copied, renamed or cut, and the gates; ``scale``: by which
    the experts' last matrices are multiplied."""
    tasks: list[Task] = []
    places = {f"model.layers.{n}.mlp.{m}.weight": (n, m) for n in range(made.sizes.layers) for m in MATRICES}
    for name, info in reader.infos.items():
        if name.endswith("rotary_emb.inv_freq") or name in skip:
            continue
        if name not in places:
            tasks.append(copied(reader, in_type(info, kind)))
            continue
        layer, matrix = places[name]
        start, target = f"model.layers.{layer}.", in_type(info, kind)
        axis, word = MATRICES[matrix], form.matrix[matrix]
        if layer not in made.splits:
            whole = replace(target, name=start + form.dense.format(word))
            pieces = [Piece(whole, axis, np.arange(info.shape[axis]), 1.0)]
        else:
            split, last = made.splits[layer], axis == 1
            parts = [(form.expert.format(e, word), ids, scale) for e, ids in enumerate(split.experts)]
            parts += [(form.always.format(word), ids, form.always_factor) for ids in split.residual]
            pieces = [
                Piece(sized(target, start + to, axis, ids.size), axis, ids, factor if last else 1.0)
                for to, ids, factor in parts
            ]
        tasks.append(cut_task(reader, name, pieces))
    for layer, gate in made.gates.items():
        start = f"model.layers.{layer}."
        tasks.append(given(start + form.gate, gate))
        if form.always_gate:
            tasks.append(given(start + form.always_gate, np.zeros((1, gate.shape[1]), np.float32)))
    return tasks


def sized(info: TensorInfo, name: str, axis: int, size: int) -> TensorInfo:
    """``info`` under another name, of another length along ``axis``."""
    shape = tuple(size if place == axis else length for place, length in enumerate(info.shape))
    return replace(info, name=name, shape=shape)


def cut_task(reader: Reader, name: str, pieces: list[Piece]) -> Task:
    """The pieces of one tensor."""

    def read() -> Tensors:
        dense = reader.read(name)
        for piece in pieces:
            yield piece.info, piece.of(dense)

    stored, largest = reader.infos[name], max(piece.info.nbytes for piece in pieces)
    return Task(tuple(piece.info for piece in pieces), read, stored.nbytes + 4 * largest)


def check_names(config: Mapping[str, Any], tasks: list[Task]) -> None:
    """What will be written must be what its own config.json describes, tensor for tensor."""
    rules = rule_set(model_spec_from_hf(config))
    wanted = {name: shape for binding in rules.bindings for name, shape in binding.hf.items()}
    copies = {name for name, _ in rules.hf_extras.copies}
    made = {
        info.name: tuple(info.shape) for task in tasks for info in task.infos if info.name not in copies - set(wanted)
    }
    if made != wanted:
        wrong = sorted({*made.items()} ^ {*wanted.items()})[:5]
        raise UserError(f"the mixture's tensors are not those of its config.json ({wrong}): copy the model again")
