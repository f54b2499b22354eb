# SPDX-License-Identifier: Apache-2.0
"""A mixture of E experts becomes one of m E: every expert and its router's row m times, m times as many chosen.

Copies share a score, so all of a chosen expert's are chosen, and each weighs 1/m of what it weighed, whether weights
are divided by their sum (which counts each m times) or not (a softmax over m times as many). The function is the old
one, to rounding. Copy c of expert e is number c E + e: the first E are the old mixture, and ranks that share out
experts in blocks hold different ones.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.config.ranges import SEEDS
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.spec import MOST_EXPERTS, ModelSpec
from mindformers_ext.formats.dtypes import BY_NUMPY, float_dtype
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.tensors import Reader, TensorInfo
from mindformers_ext.jobs.checkpoint.fused import unfused
from mindformers_ext.jobs.checkpoint.renamed import notes_of
from mindformers_ext.jobs.checkpoint.source import open_hf, read_config
from mindformers_ext.jobs.experts.cut import in_type
from mindformers_ext.jobs.experts.upcycle.card import card_of
from mindformers_ext.jobs.experts.upcycle.request import MINDSPORE, MOST_SPREAD, NO_STATES, Upcycled, UpcycleRequest
from mindformers_ext.jobs.experts.v2.mixtral import check_names
from mindformers_ext.jobs.experts.writing import Task, Tensors, as_written, copied, write_model
from mindformers_ext.jobs.merge.moe_outputs import OUTPUTS, Output
from mindformers_ext.jobs.merge.output import OutputRequest, check_output
from mindformers_ext.jobs.merge.sidecars import copy_tokenizer, write_card, write_json
from mindformers_ext.weights.convert import plan_to_mindspore


def upcycle_mixture(request: UpcycleRequest, out: OutputRequest, write: bool) -> Upcycled:
    """Write the larger mixture to ``out``, or with ``write`` false only check everything.

    Raises:
        UserError: anything wrong with options, model or output; nothing is left half-written.
    """
    folder = request.model
    check_output(out, [folder])
    config = read_config(folder)
    spec = model_spec_from_hf(config)
    row = _row(request, folder, spec)
    copies = _copies(request, folder, spec)
    chosen = spec.routing.num_experts_per_tok * copies if request.top_k is None else request.top_k
    with closing(unfused(open_hf(folder), row.kind)) as reader:
        left = dict(plan_to_mindspore(reader, spec).ignored)
        dtype = float_dtype(request.dtype) if request.dtype else None
        infos = [in_type(info, dtype) for name, info in reader.infos.items() if name not in left]
        tasks = [_task(reader, info, row, copies, request) for info in infos]
        result = _config(config, row, request.experts, chosen, BY_NUMPY[dtype].long if dtype else None)
        check_names(result, tasks)

        def beside(place: Path) -> list[str]:
            write_json(place / CONFIG, result)
            if out.model_card:
                write_card(place, out.folder.name, card_of(request, "mixture"))
            return copy_tokenizer(str(folder), folder, place) if out.copy_tokenizer else []

        report = write_model(out, tasks, beside, notes_of(reader), write)
    return Upcycled(report, tuple(_facts(request, spec, row, copies, chosen)))


def _row(request: UpcycleRequest, folder: Path, spec: ModelSpec) -> Output:
    """How the model's kind calls its experts."""
    row = next((row for row in OUTPUTS if row.kind == spec.model_type), None)
    if row is None:
        kinds = ", ".join(row.name for row in OUTPUTS)
        raise UserError(f"'{folder}' is a {spec.model_type}: --method expert takes a mixture, one of {kinds}")
    if request.form not in (None, MINDSPORE, row.kind):
        raise UserError(f"--format {request.form}: '{folder}' is a {row.kind} and stays one; leave --format out")
    return row


def _copies(request: UpcycleRequest, folder: Path, spec: ModelSpec) -> int:
    """How many of each expert, checked with the other options."""
    problems, experts = Problems("the options"), spec.routing.num_local_experts
    if request.experts % experts or request.experts <= experts:
        problems.add(
            f"--experts {request.experts}: '{folder}' has {experts}",
            f"give a multiple: {', '.join(str(experts * times) for times in (2, 3, 4))}, ...",
        )
    if request.top_k is not None and not 1 <= request.top_k <= request.experts:
        problems.add(f"--top_k {request.top_k} of {request.experts} experts", "choose 1 to all of them")
    if not 0 <= request.router_noise <= MOST_SPREAD:
        problems.add(f"--router_noise {request.router_noise}", f"give 0 to {MOST_SPREAD:g}")
    if not 0 <= request.seed <= SEEDS:
        problems.add(f"--seed {request.seed}", f"give a whole number of 0 to {SEEDS}")
    if spec.num_hidden_layers * request.experts > MOST_EXPERTS:
        problems.add(
            f"--experts {request.experts} in {spec.num_hidden_layers} layers",
            f"at most {MOST_EXPERTS} in all are built",
        )
    problems.raise_if_any()
    return request.experts // experts


def _config(config: Mapping[str, Any], row: Output, experts: int, chosen: int, dtype: str | None) -> dict[str, Any]:
    result = {key: value for key, value in config.items() if key not in ("_name_or_path", "auto_map")}
    if dtype:
        result.pop("dtype", None)
        result["torch_dtype"] = dtype
    return result | {row.count_key: experts, "num_experts_per_tok": chosen}


def _task(reader: Reader, info: TensorInfo, row: Output, copies: int, request: UpcycleRequest) -> Task:
    """What becomes of one tensor of the old mixture."""
    start = rf"(model\.layers\.\d+\.{re.escape(row.moe)})"
    if re.fullmatch(start + r"gate\.weight", info.name):
        return _gate(reader, info, copies, request)
    expert = re.fullmatch(start + r"experts\.(\d+)(\..+)", info.name)
    if not expert:
        return copied(reader, info)
    old = request.experts // copies
    names = [f"{expert[1]}experts.{copy * old + int(expert[2])}{expert[3]}" for copy in range(copies)]
    infos = tuple(replace(info, name=name) for name in names)

    def read() -> Tensors:
        array = as_written(info, reader.read(info.name))
        yield from ((target, array) for target in infos)

    return Task(infos, read, reader.infos[info.name].nbytes + info.nbytes)


def _gate(reader: Reader, info: TensorInfo, copies: int, request: UpcycleRequest) -> Task:
    """The router: its rows once for each copy; those of the second and later ones with noise of ``router_noise`` times
    the rows' root mean square."""
    target = replace(info, shape=(info.shape[0] * copies, info.shape[1]))

    def read() -> Tensors:
        rows = reader.read(info.name)
        found = np.tile(rows, (copies, 1))
        if request.router_noise:
            random = np.random.Generator(np.random.Philox(key=[request.seed, zlib.crc32(info.name.encode())]))
            wide = found.astype(np.float32)
            size = np.sqrt(np.square(rows.astype(np.float64)).mean()) * request.router_noise
            later = wide[len(rows) :]
            later += random.standard_normal(later.shape, dtype=np.float32) * np.float32(size)
            found = wide
        yield target, as_written(target, found)

    return Task((target,), read, 8 * math.prod(target.shape))


def _facts(request: UpcycleRequest, spec: ModelSpec, row: Output, copies: int, chosen: int) -> Iterator[str]:
    old = spec.routing
    yield (
        f"{row.name}: {request.experts} experts (each of {old.num_local_experts} {copies} times), {chosen} chosen "
        f"instead of {old.num_experts_per_tok}"
    )
    whole = chosen == old.num_experts_per_tok * copies
    first = old.norm_topk_prob and chosen == 1 == old.num_experts_per_tok
    if whole and not request.router_noise or first and not request.router_noise:
        yield "at the start: the function of the old mixture, to rounding"
    elif whole:
        yield f"at the start: near the old mixture's function; rows of copies differ by {request.router_noise:g}"
    else:
        yield (
            f"at the start: not the old mixture's function, which takes --top_k "
            f"{old.num_experts_per_tok * copies}: all copies of a chosen expert, as they share a score"
        )
    if not request.router_noise:
        yield "copies get equal gradients and stay equal in training: --router_noise 0.01 sets them apart"
    yield NO_STATES
