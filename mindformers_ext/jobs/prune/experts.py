# SPDX-License-Identifier: Apache-2.0
"""Take experts out of a mixture: what tokens send to them is measured a layer at a time, then the folder is written.

REAP (Lasby et al. 2025, arXiv:2510.13999) and router frequency score experts on calibration text; a draw is the
baseline. The losses of all three, and of the whole mixture, are measured on text that has scored nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.run import PYTORCH
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.formats.atomic import fresh_folder, scratch_folder, write_text
from mindformers_ext.formats.disk import check_space, refusal
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.tensors import Array
from mindformers_ext.jobs.checkpoint.hf_code import with_code
from mindformers_ext.jobs.experts.probe import TOKENS, Arrays, Course, Needs, Part, check_needs, forward, needs
from mindformers_ext.jobs.experts.states import States
from mindformers_ext.jobs.experts.texts import Ready, Texts, with_texts
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
from mindformers_ext.jobs.prune.quality import ORIGINAL, loss_of
from mindformers_ext.surgery.prune.experts import (
    MEANING,
    RANDOM,
    SCORES,
    ExpertSums,
    drawn,
    highest,
    narrower_gate,
)
from mindformers_ext.surgery.prune.hard_concrete import Floats

REPORT = "expert_pruning.json"
METHODS = tuple(MEANING)
THREADS = 2  # that write; each holds a few blocks


@dataclass(frozen=True, kw_only=True)
class ExpertsRequest:
    """What to take out of ``model``: ``keep`` experts stay in every mixture. ``texts``: without ``calibration`` for a
    draw alone. ``seed``: of the draw."""

    model: Path
    output: OutputRequest
    texts: Texts
    method: str
    keep: int
    seed: int = 0

    def check(self) -> None:
        """What can be judged without reading anything; ``UserError`` lists every option that does not fit."""
        problems = Problems("prune experts")
        self.texts.collect(problems, engines=(PYTORCH,))
        problems.one_of("--method", self.method, METHODS)
        problems.positive("--keep", self.keep)
        if self.seed < 0:
            problems.add(f"--seed {self.seed}", "give 0 or more")
        if self.method != RANDOM and not self.texts.calibration:
            problems.add(f"--method {self.method} without --calibration", "give texts; only 'random' needs none")
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
    check_output(request.output, [request.model, *request.texts.calibration, *request.texts.held_out])
    with closing(open_mixture(request.model)) as model:
        _check_keep(model, request)
        start = with_texts(model, request.texts) if request.texts.calibration else None
        wanted = _needed(start, request) if start else 0
        started = time.monotonic()
        try:
            with scratch_folder(request.output.folder) as place:
                sums = _measured(start, place) if start else {}
                ways = _ways(model, sums, request)
                views = {ORIGINAL: model} | {name: model.without(cut) for name, cut in ways.items()}
                losses = {name: loss_of(start.judged, view, place / name) for name, view in views.items() if start}
            tokens = (start.measured.rows.tokens, start.judged.rows.predicted) if start else (0, 0)
            content = _content(model, request, ways, sums, losses, tokens)
            nbytes, notes = _write(model, ways[request.method], content, request)
        except OSError as error:
            raise refusal(error, f"read '{request.model}' or to write '{request.output.folder}'") from error
    seconds = time.monotonic() - started
    notes += _unused(sums)
    return ExpertsReport(request.method, losses, tokens[1], wanted, nbytes, seconds, tuple(notes), content)


def _check_keep(model: MixtureModel, request: ExpertsRequest) -> None:
    experts, chosen = model.moe.num_local_experts, model.moe.num_experts_per_tok
    if model.moe.by_threshold:
        raise UserError(
            f"'{model.folder}' passes a token through every expert above a threshold: which could be taken out is "
            "not measured here; give a mixture that chooses a number of experts (carve it with another --router)"
        )
    if not chosen <= request.keep < experts:
        raise UserError(
            f"--keep {request.keep}: '{model.folder}' has {experts} experts a layer and a token chooses {chosen}, so "
            + (f"keep {chosen} to {experts - 1}" if chosen < experts else "none can be taken out")
        )
    if has_hidden_gate(model.moe) and not request.texts.calibration:
        raise UserError(
            f"'{model.folder}' has a gate of two layers, which is fitted anew to the experts that stay: give "
            "--calibration texts"
        )


def _sink(course: Course[MixtureModel]) -> _Statistics:
    spec, moe = course.model.spec, course.model.moe
    each = 3 * spec.expert_size + 2 * spec.hidden_size  # of a token at one expert, float32
    values = ("chosen", "gate_weights", "expert_norms", *(("gate_hidden",) if has_hidden_gate(moe) else ()))
    return _Statistics(values, 4 * max(TOKENS, course.length) * moe.num_experts_per_tok * each)


def _needed(start: Ready[MixtureModel], request: ExpertsRequest) -> int:
    """Bytes of memory that the passes take; ``UserError`` where they are not there."""
    found = Needs(0, 0)
    for course in (start.measured, start.judged):
        own = needs(course, _sink(course), start.model.spec.num_hidden_layers, backward=False, loss=True)
        found = Needs(max(found.memory, own.memory), max(found.disk, own.disk))
    place = next(folder for folder in request.output.folder.absolute().parents if folder.is_dir())
    check_needs(found, place)
    return found.memory


def _measured(start: Ready[MixtureModel], place: Path) -> dict[int, ExpertSums]:
    course, sink = start.measured, _sink(start.measured)
    states = States(place / "scores", course.length, course.model.spec.hidden_size, "scores", keep=False)
    forward(course, states, sink, course.model.spec.moe_layers)
    states.remove()
    wrong = [layer for layer, sums in sink.sums.items() if not np.isfinite(sums.weighed).all()]
    if wrong:
        raise UserError(
            f"'{start.model.folder}': experts of layer {wrong[0]} give values that are no numbers: copy the model again"
        )
    return sink.sums


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
    tokens: tuple[int, int],
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
        "tokens": dict(zip(("calibration", "held_out"), tokens, strict=True)),
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
