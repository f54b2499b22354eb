# SPDX-License-Identifier: Apache-2.0
"""Gates fitted while the model runs: of every layer a sample of tokens is held in memory, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.experts.calibration import opened
from mindformers_ext.jobs.experts.dense_model import POINT_OF, DenseModel, template_kind
from mindformers_ext.jobs.experts.gate_files import GateFiles
from mindformers_ext.jobs.experts.layer_data import FEWEST, TRAIN_SHARE, Gathered
from mindformers_ext.jobs.experts.probe import Part, check_needs, forward, needs
from mindformers_ext.jobs.experts.ranks import own_share
from mindformers_ext.jobs.experts.states import States
from mindformers_ext.surgery.experts.split import LayerSplit
from mindformers_ext.surgery.experts.words import OUTPUT_NORM

if TYPE_CHECKING:
    from mindformers_ext.jobs.experts.select import SelectRequest

Fit = Callable[[int, Gathered], None]


class Reservoir:
    """A sink that keeps the same sample of tokens of every layer, and hands each layer to ``fit`` when it is over.

    ``tokens``: how many will come. The sample is drawn before anything comes, and kept in their order.
    """

    gradients: tuple[str, ...] = ()

    def __init__(
        self, request: SelectRequest, model: DenseModel, splits: Mapping[int, LayerSplit], tokens: int, fit: Fit
    ) -> None:
        self._kind = template_kind(request.template)
        self._norms = request.gate == "ridge" or request.criterion == OUTPUT_NORM
        self._criterion, self._model, self._splits, self._fit = request.criterion, model, splits, fit
        answers = (POINT_OF[self._kind],)
        self.values = ("mlp_input", *answers, *(("hidden",) if self._norms and "hidden" not in answers else ()))
        count = min(tokens, request.reservoir)
        draws = np.random.default_rng(request.seed)
        self._places = np.sort(draws.choice(tokens, count, replace=False))
        width, experts = model.spec.hidden_size, request.experts
        self.nbytes = count * (4 * width + 8 * experts) * 2
        self._x = np.empty((count, width), np.float32)
        self._scores = np.empty((count, experts), np.float32)
        self._targets = np.empty((count, experts), np.float32) if self._norms else None
        self._down: np.ndarray | None = None
        self._seen, self._there = 0, tokens

    def take(self, layer: int, part: Part, values: Mapping[str, np.ndarray], gradients: object) -> None:
        """Keep the part's tokens that are in the sample."""
        from mindformers_ext.surgery.experts.gate_layer import norms_of, scores_of

        count = len(part.rows)
        first, end = np.searchsorted(self._places, (self._seen, self._seen + count))
        inside = self._places[first:end] - self._seen
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
        """Fit the layer's gate."""
        train = int(TRAIN_SHARE * len(self._x))
        scores = self._targets if self._targets is not None and self._criterion == OUTPUT_NORM else self._scores
        self._fit(layer, Gathered(self._x, scores, self._targets, train, self._there))
        self._seen, self._down = 0, None


def stream(
    request: SelectRequest,
    model: DenseModel,
    splits: Mapping[int, LayerSplit],
    files: GateFiles,
    about: Mapping[int, Mapping[str, Any]],
    tell: Callable[[str], object],
) -> None:
    """Fit the gates of the layers of ``splits`` in one pass through the model. A killed run goes on where it was.

    Raises:
        UserError: texts that do not fit, too little memory or disk, several processes.
    """
    from mindformers_ext.jobs.experts.select import fit_and_write

    share = own_share()
    if share.size > 1:
        raise UserError(
            "--stream runs in one process, since a gate is fitted to the tokens of all: start one, or write features "
            "with several and select from them"
        )
    if request.calibration is None:
        raise ValueError("texts are missing")
    with opened(request.calibration, share) as start:
        tokens = start.course.rows.tokens
        if tokens < FEWEST:
            raise UserError(f"the texts have {tokens} tokens, a gate needs {FEWEST} at least: give more")
        sink = Reservoir(
            request,
            model,
            splits,
            tokens,
            lambda layer, found: fit_and_write(request, model, layer, splits[layer], found, files, about[layer]),
        )
        wanted = needs(start.course, sink, len(splits), backward=False)
        for line in (
            *start.notes,
            f"{start.rows} rows, {tokens} tokens; no features are written, besides {wanted.disk / 1e9:.3f} GB while "
            f"it runs; memory about {wanted.memory / 1e9:.2f} GB",
        ):
            tell(line)
        check_needs(wanted, files.folder)
        place = files.folder / ".states"
        digest = start.course.rows.digest(json.dumps({str(layer): one for layer, one in about.items()}, sort_keys=True))
        states = States(place, start.course.length, model.spec.hidden_size, digest, keep=False, anew=request.overwrite)
        if states.done("forward") > min(splits):
            states.finish("forward", 0)  # a gate behind that point was taken away
        forward(start.course, states, sink, tuple(splits))
        states.remove()
