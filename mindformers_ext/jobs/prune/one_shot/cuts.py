# SPDX-License-Identifier: Apache-2.0
"""A cut of a model in one shot as it is tried, judged and written; see ``shape`` and ``depth``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.pruning import ModelShape, shape_of_model
from mindformers_ext.formats.atomic import fresh_folder, scratch_folder
from mindformers_ext.formats.disk import check_space, refusal
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.jobs.experts.probe import Tell
from mindformers_ext.jobs.experts.texts import Ready, Texts, ready
from mindformers_ext.jobs.merge.sidecars import copy_tokenizer, write_json
from mindformers_ext.jobs.prune.cut import Change, count_of, pieces_of, write_pieces
from mindformers_ext.jobs.prune.masks_file import MASKS, SavedMasks, write_masks
from mindformers_ext.jobs.prune.next_stage import NextStage, next_from_yaml, write_next
from mindformers_ext.jobs.prune.one_shot.importance import measured
from mindformers_ext.jobs.prune.one_shot.importance_file import Importance, provenance
from mindformers_ext.jobs.prune.one_shot.pruned import pruned_model, pruned_words
from mindformers_ext.jobs.prune.one_shot.refit import Fit, Fitter, biases
from mindformers_ext.jobs.prune.one_shot.request import OneShotRequest
from mindformers_ext.jobs.prune.quality import ORIGINAL, RANDOM, Judgement, loss_of
from mindformers_ext.jobs.prune.report import REPORT, pruning_report
from mindformers_ext.jobs.prune.source import DenseSource, open_folder
from mindformers_ext.surgery.prune.cut import FullMasks, full_masks, pruned_shape
from mindformers_ext.surgery.prune.importance import METHODS, Scores, by_chance, masks_of_scores
from mindformers_ext.surgery.prune.least_squares import LEAST_SQUARES, NONE

ONE_SHOT = "one_shot.json"
FITTED = "fitted_"  # folders of matrices fitted anew
MAGNITUDE = "magnitude"
Values = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Cut:
    """Masks of 0 and 1 by module, what changes besides, and how well that fits."""

    values: Values
    changes: Mapping[str, Change] = field(default_factory=dict)
    fits: Sequence[Fit] = ()


@dataclass(frozen=True)
class OneShotReport:
    """What was written."""

    masks: SavedMasks
    shape: ModelShape
    parameters: tuple[int, int]
    nbytes: int
    seconds: float
    judgement: Judgement
    fits: tuple[Fit, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Workbench:
    """A dense model, its texts and a scratch folder, on which cuts are tried."""

    start: Ready
    dense: DenseSource
    scratch: Path

    @property
    def shape(self) -> ModelShape:
        """The model's sizes."""
        return shape_of_model(self.dense.model)

    def full(self, values: Values) -> FullMasks:
        """All masks from those that are given."""
        return full_masks(values, self.shape, self.dense.model.tie_word_embeddings)

    def scores(self, method: str, found: Importance | None, seed: int) -> Scores:
        """By a measure, or drawn."""
        if method == RANDOM or found is None:
            return by_chance(self.shape, seed)
        return METHODS[method].score(found.statistics, self.shape)

    def cut(self, values: Values, refit: str = NONE, bias: Importance | None = None) -> Cut:
        """The cut, its output matrices fitted anew, or with biases."""
        if refit == LEAST_SQUARES:
            folder = Path(mkdtemp(prefix=FITTED, dir=self.scratch))
            changes, fits = Fitter(self.start.measured, self.dense, self.full(values), values, folder).fit()
            return Cut(values, changes, fits)
        return Cut(values, biases(self.dense, self.full(values), values, bias) if bias else {})

    def loss(self, cut: Cut | None) -> float:
        """On the text that judges; of the whole model without a cut."""
        model = self.start.model
        if cut is not None:
            model = pruned_model(self.dense, self.full(cut.values), cut.changes, model.folder)
        return loss_of(self.start.judged, model, self.scratch / "loss")

    def judge(self, cuts: Mapping[str, Cut], seed: int, tell: Tell) -> Judgement:
        """The losses of the model and of every cut; those that are the same cut are computed once."""
        losses = {ORIGINAL: self.loss(None)}
        seen: list[tuple[Cut, float]] = []
        for name, cut in cuts.items():
            tell(f"judging {name}")
            same = next((loss for other, loss in seen if _same(cut, other)), None)
            losses[name] = self.loss(cut) if same is None else same
            seen.append((cut, losses[name]))
        return Judgement(losses, self.start.judged.rows.predicted, self.start.measured.rows.tokens, seed)


def _same(one: Cut, other: Cut) -> bool:
    return not one.changes and not other.changes and one.values.keys() == other.values.keys() and all(
        np.array_equal(value, other.values[name]) for name, value in one.values.items()
    )  # fmt: skip


@contextmanager
def open_workbench(model: Path, texts: Texts, work: Path) -> Iterator[Workbench]:
    """Everything that cuts of ``model`` are tried with; ``work``: beside it a scratch folder is made."""
    with ExitStack() as stack:
        start = stack.enter_context(ready(model, texts))
        dense = stack.enter_context(open_folder(model))
        yield Workbench(start, dense, stack.enter_context(scratch_folder(work)))


def carry_out(
    request: OneShotRequest,
    tell: Tell,
    kinds: Sequence[str],
    aim: Callable[[Workbench], ModelShape],
    choose: Callable[[Workbench, Importance, ModelShape], dict[str, Cut]],
) -> OneShotReport:
    """Measure, cut, judge and write: the first of the chosen cuts is written, the others stand beside it. The request
    is checked.

    ``aim``: the shape that is wanted; ``choose``: cuts by name.

    Raises:
        UserError: anything wrong with options, model, texts or output; nothing is left half-written.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        start = stack.enter_context(ready(request.model, request.texts))
        dense = stack.enter_context(open_folder(request.model))
        target = aim(Workbench(start, dense, request.work))
        stage = None
        if request.train_yaml:
            stage = next_from_yaml(load_yaml(request.train_yaml), target, request.output.folder)
        check_space(request.output.folder, sum(item.step.target.nbytes for item in dense.tensors))
        importance = measured(start, request.importance_path, kinds, request.remake, tell)
        bench = Workbench(start, dense, stack.enter_context(scratch_folder(request.work)))
        cuts = choose(bench, importance, target)
        judgement = bench.judge(cuts, request.seed, tell)
        try:
            return _write(request, bench, next(iter(cuts.items())), target, judgement, importance, stage, started)
        except OSError as error:
            raise refusal(error, f"read '{request.model}' or to write '{request.output.folder}'") from error


def _write(
    request: OneShotRequest,
    bench: Workbench,
    chosen: tuple[str, Cut],
    target: ModelShape,
    judgement: Judgement,
    importance: Importance,
    stage: NextStage | None,
    started: float,
) -> OneShotReport:
    name, cut = chosen
    dense, full, out = bench.dense, bench.full(cut.values), request.output
    shape = pruned_shape(full)
    if shape != target:
        raise ValueError(f"{shape} came of a target of {target}")
    pieces = list(pieces_of(dense, full, None, cut.changes))
    masks = SavedMasks({key: np.asarray(value, np.float32) for key, value in cut.values.items()}, bench.shape, target)
    parameters = (count_of(item.step.target for item in dense.tensors), count_of(piece.info for piece in pieces))
    told = {
        "method": name,
        "importance": provenance(importance.about),
        "losses": judgement.json(),
        "fits": [asdict(fit) for fit in cut.fits],
    }
    with fresh_folder(out.folder, out.overwrite) as partial:
        write_pieces(partial, out, dense.reader, pieces)
        write_json(partial / CONFIG, pruned_words(dense, full, pieces, cut.changes))
        write_json(partial / REPORT, pruning_report(masks, full, shape, parameters))
        write_json(partial / ONE_SHOT, told)
        write_masks(partial / MASKS, masks)
        notes = copy_tokenizer(str(request.model), request.model, partial)
    if stage and request.next_yaml:
        write_next(request.next_yaml, stage, out.overwrite)
        notes += stage.notes
    nbytes = sum(piece.info.nbytes for piece in pieces)
    seconds = time.monotonic() - started
    return OneShotReport(masks, shape, parameters, nbytes, seconds, judgement, tuple(cut.fits), tuple(notes))


def chosen_by(bench: Workbench, method: str, found: Importance, target: ModelShape, seed: int) -> Values:
    """The masks by a measure, or drawn."""
    return masks_of_scores(bench.scores(method, found, seed), bench.shape, target)
