# SPDX-License-Identifier: Apache-2.0
"""Take experts out of a mixture: what tokens send to them is measured a layer at a time, then the folder is written.

REAP (Lasby et al. 2025, arXiv:2510.13999) and router frequency score experts on calibration text; a draw is the
baseline. The losses of all three, and of the whole mixture, are measured on text that has scored nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.run import CPU, GPU, PYTORCH
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.spec import DeviceSpec
from mindformers_ext.data.tokenizers import open_tokenizer
from mindformers_ext.formats.atomic import fresh_folder, scratch_folder, write_text
from mindformers_ext.formats.disk import check_space, refusal
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.tensors import Array
from mindformers_ext.jobs.checkpoint.hf_code import with_code
from mindformers_ext.jobs.experts.probe import (
    TOKENS,
    Arrays,
    Course,
    Needs,
    Nothing,
    Part,
    Rows,
    Sink,
    check_needs,
    forward,
    mean_loss,
    needs,
)
from mindformers_ext.jobs.experts.states import States
from mindformers_ext.jobs.experts.text_domains import check_length, limited, read_plain_text
from mindformers_ext.jobs.merge.output import OutputRequest, check_output, write_weights
from mindformers_ext.jobs.merge.sidecars import copy_tokenizer, write_json
from mindformers_ext.jobs.prune.experts_cut import (
    ExpertCut,
    MixtureModel,
    cut_config,
    cut_tensors,
    has_hidden_gate,
    open_mixture,
)
from mindformers_ext.surgery.prune.experts import (
    MEANING,
    RANDOM,
    SCORES,
    ExpertSums,
    Floats,
    drawn,
    highest,
    narrower_gate,
)

REPORT = "expert_pruning.json"
ORIGINAL = "original"
METHODS = tuple(MEANING)
PYTORCH_DEVICES = (CPU, GPU)
THREADS = 2  # that write; each holds a few blocks
HELD_OUT = 5  # one row in so many judges, where no text is given for it


@dataclass(frozen=True, kw_only=True)
class ExpertsRequest:
    """What to take out of ``model``.

    ``keep`` experts stay in every mixture. ``calibration``: plain texts, ``tokens`` of them in equal shares; none for a
    draw alone. ``held_out``: texts that judge; none: the last fifth of each calibration text's rows does.
    """

    model: Path
    output: OutputRequest
    method: str
    keep: int
    calibration: Sequence[Path] = ()
    held_out: Sequence[Path] = ()
    tokens: int = 32768
    block_size: int | None = None
    seed: int = 0
    device_target: str = CPU
    device_id: int = 0
    quiet: bool = False

    def check(self) -> None:
        """What can be judged without reading anything; ``UserError`` lists every option that does not fit."""
        problems = Problems("prune experts")
        problems.one_of("--method", self.method, METHODS)
        problems.one_of("--device_target", self.device_target, PYTORCH_DEVICES)
        for name in ("seed", "device_id"):
            if getattr(self, name) < 0:
                problems.add(f"--{name} {getattr(self, name)}", "give 0 or more")
        for name in ("keep", "tokens"):
            problems.positive(f"--{name}", getattr(self, name))
        if self.block_size is not None:
            problems.positive("--block_size", self.block_size)
        if self.method != RANDOM and not self.calibration:
            problems.add(f"--method {self.method} without --calibration", "give texts; only 'random' needs none")
        if self.held_out and not self.calibration:
            problems.add("--held_out without --calibration", "give both: the ways beside it are scored, too")
        for path in (*self.calibration, *self.held_out):
            if not path.is_file():
                problems.add(f"the text '{path}' is no file", "give plain text files")
        problems.raise_if_any()


@dataclass(frozen=True)
class ExpertsReport:
    """``losses`` by way, mean per predicted token, of ``judged`` tokens; empty without calibration. ``memory``: bytes
    that the passes take by arithmetic. ``content``: what the report file says."""

    method: str
    losses: Mapping[str, float]
    judged: int
    memory: int
    nbytes: int
    seconds: float
    notes: tuple[str, ...]
    content: Mapping[str, Any]

    def lines(self) -> list[str]:
        """A line for every way, the best first."""
        width = max(map(len, self.losses), default=0)
        base = self.losses.get(ORIGINAL, 0.0)
        return [
            f"{name:{width}} loss {loss:.4f} ({loss - base:+.4f}) perplexity {_perplexity(loss):.2f}  "
            + ("all experts" if name == ORIGINAL else MEANING[name])
            for name, loss in sorted(self.losses.items(), key=lambda item: item[1])
        ]


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


@dataclass
class _Statistics:
    """A sink of ``probe.forward``: what experts did, by layer."""

    values: tuple[str, ...]
    nbytes: int
    gradients: tuple[str, ...] = ()
    sums: dict[int, ExpertSums] = field(default_factory=dict)

    def take(self, layer: int, part: Part, values: Arrays, gradients: Arrays) -> None:
        """Add a part's tokens."""
        chosen, weights, norms, *hidden = (values[name] for name in self.values)
        self.sums.setdefault(layer, ExpertSums()).add(chosen, weights, norms, *hidden)

    def end(self, layer: int) -> None:
        """Nothing: sums are small."""


def prune_experts(request: ExpertsRequest) -> ExpertsReport:
    """Write the mixture that is left.

    Raises:
        UserError: anything wrong with options, model, texts or output; nothing is left half-written.
    """
    request.check()
    check_output(request.output, [request.model, *request.calibration, *request.held_out])
    with closing(open_mixture(request.model)) as model:
        _check_keep(model, request)
        rows = _texts(model, request)
        wanted = _needed(model, rows, request)
        started = time.monotonic()
        try:
            with scratch_folder(request.output.folder) as place:
                sums = _measured(model, rows[0], request, place) if rows else {}
                ways = _ways(model, sums, request)
                views = {ORIGINAL: model} | {name: model.without(cut) for name, cut in ways.items()}
                losses = {
                    name: _loss(_course(view, rows[1], request), place / name) for name, view in views.items() if rows
                }
            cut = ways[request.method]
            content = _content(model, request, ways, sums, losses, rows)
            nbytes, notes = _write(model, cut, content, request)
        except OSError as error:
            raise refusal(error, f"read '{request.model}' or to write '{request.output.folder}'") from error
    seconds, judged = time.monotonic() - started, rows[1].predicted if rows else 0
    notes += _unused(sums)
    return ExpertsReport(request.method, losses, judged, wanted, nbytes, seconds, tuple(notes), content)


def _check_keep(model: MixtureModel, request: ExpertsRequest) -> None:
    experts, chosen = model.moe.num_local_experts, model.moe.num_experts_per_tok
    if not chosen <= request.keep < experts:
        raise UserError(
            f"--keep {request.keep}: '{model.folder}' has {experts} experts a layer and a token chooses {chosen}, so "
            + (f"keep {chosen} to {experts - 1}" if chosen < experts else "none can be taken out")
        )
    if has_hidden_gate(model.moe) and not request.calibration:
        raise UserError(
            f"'{model.folder}' has a gate of two layers, which is fitted anew to the experts that stay: give "
            "--calibration texts"
        )


def _texts(model: MixtureModel, request: ExpertsRequest) -> tuple[Rows, Rows] | None:
    """The rows that score and those that judge; None without texts."""
    if not request.calibration:
        return None
    tokenizer = open_tokenizer(model.folder)
    length = request.block_size or min(2048, model.spec.max_position_embeddings)
    check_length(length, tokenizer, model.spec.max_position_embeddings)

    def read(paths: Sequence[Path]) -> list[Rows]:
        found = [limited(read_plain_text(path, tokenizer, length), -(-request.tokens // len(paths))) for path in paths]
        largest = max(int(rows.ids.max(initial=0)) for rows in found)
        if largest >= model.spec.vocab_size:
            raise UserError(
                f"the tokenizer in '{model.folder}' gives the id {largest}, the embedding has "
                f"{model.spec.vocab_size} rows: they belong to different models"
            )
        return found

    scoring = read(request.calibration)
    if request.held_out:
        judging = _together(read(request.held_out))
        if not judging.predicted:
            raise UserError("--held_out has no token that follows another one: give a longer text, or more --tokens")
        return _together(scoring), judging
    short = [path for path, rows in zip(request.calibration, scoring, strict=True) if len(rows.ids) < 2]
    if short:
        raise UserError(
            f"'{short[0]}' gives one row of {length} tokens, and the last fifth of the rows is to judge: give a longer "
            "text, more --tokens, a smaller --block_size, or --held_out"
        )
    ends = [len(rows.ids) - max(len(rows.ids) // HELD_OUT, 1) for rows in scoring]
    pairs = list(zip(scoring, ends, strict=True))
    return _together([rows.at(slice(end)) for rows, end in pairs]), _together(
        [rows.at(slice(end, None)) for rows, end in pairs]
    )


def _together(parts: Sequence[Rows]) -> Rows:
    return Rows(np.concatenate([rows.ids for rows in parts]), np.concatenate([rows.lengths for rows in parts]))


def _course(model: MixtureModel, rows: Rows, request: ExpertsRequest) -> Course[MixtureModel]:
    device = DeviceSpec(request.device_target, request.device_id)
    together = max(1, TOKENS // int(rows.ids.shape[1]))
    return Course(model, rows, PYTORCH, device, together, quiet=request.quiet)


def _sink(model: MixtureModel, rows: Rows) -> _Statistics:
    moe, tokens = model.moe, max(TOKENS, int(rows.ids.shape[1]))
    each = 3 * model.spec.expert_size + 2 * model.spec.hidden_size  # of a token at one expert, float32
    values = ("chosen", "gate_weights", "expert_norms", *(("gate_hidden",) if has_hidden_gate(moe) else ()))
    return _Statistics(values, 4 * tokens * moe.num_experts_per_tok * each)


def _needed(model: MixtureModel, rows: tuple[Rows, Rows] | None, request: ExpertsRequest) -> int:
    """Bytes of memory that the passes take; ``UserError`` where they are not there."""
    if not rows:
        return 0
    layers, found = model.spec.num_hidden_layers, Needs(0, 0)
    for part in rows:
        own = needs(_course(model, part, request), _sink(model, part), layers, backward=False, loss=True)
        found = Needs(max(found.memory, own.memory), max(found.disk, own.disk))
    place = next(folder for folder in request.output.folder.absolute().parents if folder.is_dir())
    check_needs(found, place)
    return found.memory


def _pass(course: Course, folder: Path, sink: Sink, layers: Sequence[int], keep_last: bool) -> States:
    states = States(folder, course.length, course.model.spec.hidden_size, folder.name, keep=False)
    forward(course, states, sink, layers, keep_last)
    return states


def _measured(model: MixtureModel, rows: Rows, request: ExpertsRequest, place: Path) -> dict[int, ExpertSums]:
    sink = _sink(model, rows)
    _pass(_course(model, rows, request), place / "scores", sink, model.spec.moe_layers, keep_last=False).remove()
    wrong = [layer for layer, sums in sink.sums.items() if not np.isfinite(sums.weighed).all()]
    if wrong:
        raise UserError(
            f"'{model.folder}': experts of layer {wrong[0]} give values that are no numbers: copy the model again"
        )
    return sink.sums


def _loss(course: Course[MixtureModel], folder: Path) -> float:
    layers = range(course.model.spec.num_hidden_layers)
    states = _pass(course, folder, Nothing(), layers, keep_last=True)
    try:
        probe = course.open()
        probe.fill_head(course.model.norm(), course.model.head())
        file = states.input_of(len(layers))
        loss = mean_loss(course, probe, file)
        file.close()
        return loss
    finally:
        states.remove()


def _ways(model: MixtureModel, sums: Mapping[int, ExpertSums], request: ExpertsRequest) -> dict[str, ExpertCut]:
    """The cut of every method that can be made."""
    layers, experts = model.spec.moe_layers, model.moe.num_local_experts
    found = {
        name: {layer: highest(score(sums[layer]), request.keep) for layer in layers}
        for name, score in SCORES.items()
        if sums
    }
    found[RANDOM] = dict(zip(layers, drawn(len(layers), experts, request.keep, request.seed), strict=True))
    return {name: ExpertCut(kept, dict(_gates(model, kept, sums))) for name, kept in found.items()}


def _gates(model: MixtureModel, kept: Mapping[int, tuple[int, ...]], sums: Mapping[int, ExpertSums]) -> Iterator[Any]:
    """What is left of gates of two layers, by layer."""
    for layer in kept if has_hidden_gate(model.moe) else ():
        gram = sums[layer].gram
        assert gram is not None  # the sink has asked for it
        yield layer, narrower_gate(model.second_of_gate(layer), gram, kept[layer])


def _unused(sums: Mapping[int, ExpertSums]) -> list[str]:
    nobody = {layer: np.flatnonzero(own.chosen == 0).tolist() for layer, own in sums.items()}
    told = ", ".join(f"{experts} of layer {layer}" for layer, experts in nobody.items() if experts)
    return [f"no calibration token chose the experts {told}: their score is 0"] if told else []


def _content(
    model: MixtureModel,
    request: ExpertsRequest,
    ways: Mapping[str, ExpertCut],
    sums: Mapping[int, ExpertSums],
    losses: Mapping[str, float],
    rows: tuple[Rows, Rows] | None,
) -> dict[str, Any]:
    cut = ways[request.method]

    def plain(values: Floats) -> list[float]:
        return [float(value) for value in values]

    layers: dict[str, dict[str, Any]] = {}
    for layer, kept in cut.kept.items():
        layers[str(layer)] = {"kept": list(kept)}
        if layer in sums:
            layers[str(layer)] |= {name: plain(score(sums[layer])) for name, score in SCORES.items()}
        if layer in cut.gates:
            layers[str(layer)] |= {"gate_units": list(cut.gates[layer].units), "gate_lost": cut.gates[layer].lost}
    return {
        "method": request.method,
        "seed": request.seed,
        "experts": [model.moe.num_local_experts, request.keep],
        "tokens": {"calibration": rows[0].tokens if rows else 0, "held_out": rows[1].predicted if rows else 0},
        "losses": dict(losses),
        "layers": layers,
    }


def _write(
    model: MixtureModel, cut: ExpertCut, content: Mapping[str, Any], request: ExpertsRequest
) -> tuple[int, list[str]]:
    """The folder; its bytes of weights, and notes."""
    tensors, out = cut_tensors(model, cut), replace(request.output, threads=THREADS)
    infos = [info for info, _ in tensors]
    nbytes = sum(info.nbytes for info in infos)
    check_space(out.folder, nbytes)

    def blocks(place: int) -> Iterator[Array]:
        return tensors[place][1]()

    with fresh_folder(out.folder, out.overwrite) as partial:
        write_weights(partial, infos, out, blocks)
        write_json(partial / CONFIG, with_code(partial, cut_config(model, cut)))
        write_text(partial / REPORT, json.dumps(content, indent=1) + "\n")
        return nbytes, copy_tokenizer(str(model.folder), model.folder, partial)
