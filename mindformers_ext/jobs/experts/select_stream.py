# SPDX-License-Identifier: Apache-2.0
"""Gates fitted while the model runs: of every layer a sample of tokens is held in memory, and no features are written.

Several processes take their share of the rows, and exchange their parts of the sample through files, a layer at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.experts.calibration import Opened, opened
from mindformers_ext.jobs.experts.dense_model import POINT_OF, DenseModel, template_kind
from mindformers_ext.jobs.experts.gate_files import GateFiles
from mindformers_ext.jobs.experts.layer_data import FEWEST, TRAIN_SHARE, Gathered
from mindformers_ext.jobs.experts.probe import Needs, Part, check_needs, forward, needs
from mindformers_ext.jobs.experts.ranks import Share, own_share
from mindformers_ext.jobs.experts.sample import SLOTS, Arrays, Drawn, SampleParts, draw
from mindformers_ext.jobs.experts.states import States, remove_left
from mindformers_ext.surgery.experts.split import LayerSplit
from mindformers_ext.surgery.experts.words import OUTPUT_NORM

if TYPE_CHECKING:
    from mindformers_ext.jobs.experts.select import SelectRequest

End = Callable[[int, Arrays], None]
X, SCORES, TARGETS = "x", "scores", "targets"


class Reservoir:
    """A sink that keeps this process's tokens of the sample, the same of every layer, and hands each layer's to ``end``
    when it is over: x (T, D), scores (T, E) and, where they are wanted, targets (T, E).
    """

    gradients: tuple[str, ...] = ()

    def __init__(
        self, request: SelectRequest, model: DenseModel, splits: Mapping[int, LayerSplit], drawn: Drawn, end: End
    ) -> None:
        self._kind = template_kind(request.template)
        self._norms = request.gate == "ridge" or request.criterion == OUTPUT_NORM
        self._criterion, self._model, self._splits, self._end = request.criterion, model, splits, end
        answers = (POINT_OF[self._kind],)
        self.values = ("mlp_input", *answers, *(("hidden",) if self._norms and "hidden" not in answers else ()))
        self._kept, count = drawn.kept, len(drawn.kept)
        width, experts = model.spec.hidden_size, request.experts
        self.each = 4 * width + 8 * experts  # bytes of a token
        self.nbytes = self.each * (count + drawn.count * (1 if count == drawn.count else 2))  # joined, and a part
        self._x = np.empty((count, width), np.float32)
        self._scores = np.empty((count, experts), np.float32)
        self._targets = np.empty((count, experts), np.float32) if self._norms else None
        self._down: np.ndarray | None = None
        self._seen = 0

    def take(self, layer: int, part: Part, values: Mapping[str, np.ndarray], gradients: object) -> None:
        """Keep the part's tokens that are in the sample."""
        from mindformers_ext.surgery.experts.gate_layer import norms_of, scores_of

        count = len(part.rows)
        first, end = np.searchsorted(self._kept, (self._seen, self._seen + count))
        inside = self._kept[first:end] - self._seen
        self._seen += count
        if not len(inside):
            return
        split = self._splits[layer]
        self._x[first:end] = values["mlp_input"][inside]
        if self._criterion != OUTPUT_NORM:
            self._scores[first:end] = scores_of(values[POINT_OF[self._kind]][inside], split, self._criterion)
        if self._targets is not None:
            if self._down is None:
                self._down = self._model.matrix("down_proj", layer)
            self._targets[first:end] = norms_of(values["hidden"][inside], self._down, split)

    def end(self, layer: int) -> None:
        """Hand the layer's tokens on."""
        arrays = {X: self._x, SCORES: self._scores}
        if self._targets is not None:
            arrays |= {TARGETS: self._targets, **({SCORES: self._targets} if self._criterion == OUTPUT_NORM else {})}
        self._seen, self._down = 0, None
        self._end(layer, arrays)


@dataclass(frozen=True)
class Fitting:
    """Fits gates to a sample, or to its parts where several processes take it."""

    request: SelectRequest
    model: DenseModel
    splits: Mapping[int, LayerSplit]
    files: GateFiles
    about: Mapping[int, Mapping[str, Any]]
    drawn: Drawn
    parts: SampleParts
    fitted: list[int] = field(default_factory=list)

    @property
    def is_alone(self) -> bool:
        """Whether this process takes the whole sample."""
        return self.parts.share.size == 1

    def end(self, layer: int, arrays: Arrays) -> None:
        """A layer's tokens of this process are there."""
        if self.is_alone:
            self._fit(layer, arrays)
        else:
            self.parts.write(layer, {**arrays, SLOTS: self.drawn.slots})
            self.join(layer)

    def join(self, layer: int) -> None:
        """Fit the layer's gate if all parts of its sample are there."""
        with self.parts.whole(layer) as whole:
            if whole and not self.files.done(layer, self.about[layer]):
                self._fit(layer, self.parts.joined(layer, self.drawn.count))
        if self.files.done(layer, self.about[layer]):
            self.parts.drop(layer)

    def _fit(self, layer: int, arrays: Arrays) -> None:
        from mindformers_ext.jobs.experts.select import fit_and_write

        train = int(TRAIN_SHARE * self.drawn.count)
        found = Gathered(arrays[X], arrays[SCORES], arrays.get(TARGETS), train, self.drawn.there)
        fit_and_write(self.request, self.model, layer, self.splits[layer], found, self.files, self.about[layer])
        self.fitted.append(layer)


def stream(
    request: SelectRequest,
    model: DenseModel,
    splits: Mapping[int, LayerSplit],
    files: GateFiles,
    about: Mapping[int, Mapping[str, Any]],
    tell: Callable[[str], object],
) -> tuple[int, ...]:
    """Fit the gates of the layers of ``splits`` in one pass through the model. A killed run goes on where it was.

    Returns:
        The layers whose gates this process has fitted.

    With several processes each takes its rows' share of the sample; the one that comes last to a layer fits its gate.

    Raises:
        UserError: texts that do not fit, too little memory or disk.
    """
    share = own_share()
    if request.calibration is None:
        raise ValueError("texts are missing")
    with opened(request.calibration, share) as start:
        if start.tokens < FEWEST:
            raise UserError(f"the texts have {start.tokens} tokens, a gate needs {FEWEST} at least: give more")
        drawn = draw(start.every.lengths, share, request.reservoir, request.seed)
        words = json.dumps({str(layer): one for layer, one in about.items()}, sort_keys=True)
        parts = SampleParts(files.folder, start.every.digest(words), share)
        fitting = Fitting(request, model, splits, files, about, drawn, parts)
        sink = Reservoir(request, model, splits, drawn, fitting.end)
        wanted = needs(start.course, sink, len(splits), backward=False)
        exchanged = 0 if fitting.is_alone else len(splits) * drawn.count * sink.each
        for line in _lines(start, wanted, exchanged) if share.rank == 0 else ():
            tell(line)
        check_needs(wanted, files.folder, exchanged)
        if request.overwrite and share.rank == 0:
            files.clear(tuple(splits), about)
        parts.drop_old(request.overwrite)
        left = [layer for layer in splits if not parts.has(layer)]
        if left:
            _pass(start, _states(files, share), words, sink, left, request.overwrite)
        else:
            remove_left(_states(files, share))
        for layer in splits if not fitting.is_alone else ():
            fitting.join(layer)  # a killed process may have left all parts
        return tuple(fitting.fitted)


def clean(files: GateFiles) -> None:
    """Delete what this process left where it was killed when all gates were there."""
    share = own_share()
    remove_left(_states(files, share))
    SampleParts(files.folder, "", share).drop_old(anew=True)


def _states(files: GateFiles, share: Share) -> Path:
    return files.folder / f".states_{share.rank}"


def _lines(start: Opened, wanted: Needs, exchanged: int) -> list[str]:
    more = f", and at most {exchanged / 1e9:.3f} GB of samples for each other" if exchanged else ""
    return [
        *start.notes,
        f"{start.rows} rows, {start.tokens} tokens; no features are written, besides {wanted.disk / 1e9:.3f} GB while "
        f"it runs{more}; memory of a process about {wanted.memory / 1e9:.2f} GB, for any number of layers",
    ]


def _pass(start: Opened, place: Path, words: str, sink: Reservoir, layers: Sequence[int], anew: bool) -> None:
    digest = start.course.rows.digest(words)
    states = States(place, start.course.length, start.model.spec.hidden_size, digest, keep=False, anew=anew)
    if states.done("forward") > min(layers):
        states.finish("forward", 0)  # a gate behind that point was taken away
    forward(start.course, states, sink, layers)
    states.remove()
