# SPDX-License-Identifier: Apache-2.0
"""Losses by domain between training steps, and the proportions that follow from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.config.run import RunSpec
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.figures import StepFigures
from mindformers_ext.core.json_text import read_object
from mindformers_ext.core.log import get_logger
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.data.mixture.rules import updated
from mindformers_ext.data.mixture.state import MixtureState
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.jobs.engine.protocols import Trainer
from mindformers_ext.jobs.predict.evaluate import Window, score
from mindformers_ext.jobs.predict.network import open_network, open_weights
from mindformers_ext.jobs.run.display import current
from mindformers_ext.jobs.run.from_folder import describe
from mindformers_ext.jobs.run.mixture import TARGETS, Mixture
from mindformers_ext.jobs.train.hooks import QuietHook
from mindformers_ext.jobs.train.mixture_data import MixtureData
from mindformers_ext.jobs.train.token_data import RecordRows, stacked

MEASURED = "target_loss.json"  # in output_dir: what target_loss_from gave
Floats = npt.NDArray[np.float64]


class DomainLosses(QuietHook):
    """Measures losses at the end of every window, and moves the proportions of the next one.

    Args:
        data: the mixture that is trained on.
        trainer: opened; its network is measured as it stands between two steps.
        model: its sizes and special ids.
        rows: that one process computes at once, those of a micro batch.
        targets: (n), for rules that move.
    """

    def __init__(
        self, data: MixtureData, trainer: Trainer, model: ModelSpec, rows: int, targets: Floats | None = None
    ) -> None:
        self.data, self.trainer, self.model, self.rows, self.targets = data, trainer, model, rows, targets
        mixture, first = data.mixture, data.domains[0]
        self.files = [RecordRows(paths, first.columns, first.vocab) for paths in mixture.evaluated]

    def measured(self, step: int, figures: StepFigures) -> Mapping[str, float]:
        """Proportions of the step and rows drawn so far of each domain; at the end of a window also their losses."""
        state, mixture = self.data.schedule.state, self.data.mixture
        result = drawn_figures(state)
        ends = bool(mixture.interval) and step % mixture.interval == 0
        if ends and np.isfinite(figures.loss):
            losses = self._losses(step)
            result |= _named("domain_loss", mixture.names, losses)
            if self.targets is not None:
                before = np.array(state.proportions)
                self.data.schedule.move(updated(mixture.settings, before, losses, self.targets))
        return result

    def _losses(self, step: int) -> Floats:
        """Mean loss per token of each domain (n); NaN, with a warning, where no token counts."""
        total, count = sums(self.trainer, self.files, self.rows, self.model)
        names, log = self.data.mixture.names, get_logger(__name__)
        with np.errstate(invalid="ignore", divide="ignore"):
            losses = np.where(count > 0, total / count, np.nan)
        absent = [name for name, loss in zip(names, losses, strict=True) if not np.isfinite(loss)]
        if absent:
            text = f"warning: step {step}: no loss of {', '.join(absent)} is a number; each counts as on its target"
            log.warning("%s", text)
            current().say(text)
        log.info(
            "Losses behind step %d: %s", step, ", ".join(f"{n} {x:.4f}" for n, x in zip(names, losses, strict=True))
        )
        return losses


def sums(trainer: Trainer, files: Sequence[RecordRows], rows: int, model: ModelSpec) -> tuple[Floats, Floats]:
    """Sum of the loss over all tokens that count, and their number, of each domain (n), over all processes.

    Every process takes ``rows`` at a time, and as many times as the others: what is missing are rows without a label.
    """
    size, rank = trainer.ranks.size, trainer.ranks.rank
    found = np.zeros((len(files), 2), np.float64)
    for domain, held in enumerate(files):
        for first in range(0, len(held), rows * size):
            mine = range(first + rank * rows, min(first + (rank + 1) * rows, len(held)))
            ids, labels, *documents = _batch(held, mine, rows, model)
            counted = (ids[:, :-1] != model.pad_token_id) & (labels[:, 1:] != model.ignore_token_id)
            count = int(counted.sum())
            loss = trainer.evaluate((ids, labels, *documents))
            found[domain] += (loss * count if count else 0.0, count)
    found = trainer.ranks.sum(found)
    return found[:, 0], found[:, 1]


def _batch(held: RecordRows, numbers: range, rows: int, model: ModelSpec) -> tuple[np.ndarray, ...]:
    """Ids, labels and, of packed rows, documents (rows, width); behind the rows with these numbers follow some without
    a label."""
    read = stacked([(held, number) for number in numbers or (0,)])
    columns = read if len(read) > 1 else (read[0], read[0])
    if len(numbers) == rows:
        return columns
    whole = []
    for column, empty in zip(columns, (0, model.ignore_token_id, 0), strict=False):
        filled = np.full((rows, column.shape[1]), empty, np.int32)
        filled[: len(numbers)] = column[: len(numbers)]
        whole.append(filled)
    return tuple(whole)


def drawn_figures(state: MixtureState) -> dict[str, float]:
    """Proportions of the step that is done, and rows drawn so far, of each domain."""
    return _named("proportion", state.names, state.proportions) | _named("rows", state.names, state.used)


def _named(word: str, names: Sequence[str], values: Sequence[float] | Floats) -> dict[str, float]:
    return {f"{word}.{name}": float(value) for name, value in zip(names, values, strict=True)}


def target_losses(data: MixtureData, asked: RunSpec, spec: NetworkSpec) -> Floats | None:
    """Target losses (n) of a mixture that moves, measured where they have to be; None where none are asked for."""
    if data.mixture.target_model is None:
        return data.mixture.targets
    kept = _kept(data.mixture, Path(asked.output_dir)) if asked.resume else None
    return kept if kept is not None else reference_losses(data.mixture, asked, spec, data.domains[0].columns)


def reference_losses(mixture: Mixture, asked: RunSpec, spec: NetworkSpec, columns: tuple[str, ...]) -> Floats:
    """Losses (n) of ``mixture.target_model`` on the rows that losses are measured on, kept in ``output_dir``.

    Raises:
        UserError: no model there, one of another vocabulary, or several processes, of which each would measure it.
    """
    assert mixture.target_model is not None
    if asked.use_parallel:
        raise UserError(
            "target_loss_from is measured by one process: run the same YAML once on one device, and give the file "
            f"{MEASURED} that it writes into output_dir as target_loss"
        )
    found = describe(mixture.target_model)
    if found.model.vocab_size != spec.model.vocab_size:
        raise UserError(
            f"target_loss_from {mixture.target_model}: its vocab_size is {found.model.vocab_size}, this model's is "
            f"{spec.model.vocab_size}: losses of other tokens cannot be compared"
        )
    alone = replace(spec, model=found.model, parallel=type(spec.parallel)())
    weights = open_weights(found.load, found.model)
    current().begin(f"measuring the losses of {mixture.target_model}")
    network = open_network(asked.engine, asked.device, alone, weights, spec.seq_length)
    losses, tokens = [], []
    for paths in mixture.evaluated:
        with closing(RecordRows(paths, columns, spec.model.vocab_size)) as rows:
            windows = (_window(rows, number, found.model) for number in range(len(rows)))
            result = score(network.logits, windows, spec.seq_length)
        losses.append(result.loss)
        tokens.append(result.tokens)
    current().done()
    _keep(mixture, losses, tokens, Path(asked.output_dir))
    return np.array(losses)


def _window(rows: RecordRows, number: int, model: ModelSpec) -> Window:
    read = rows.row(number)
    ids, labels = read[0], read[-1]
    return Window(ids, (ids[:-1] != model.pad_token_id) & (labels[1:] != model.ignore_token_id))


def _kept(mixture: Mixture, folder: Path) -> Floats | None:
    """What ``_keep`` has kept for the run that is continued, None where it was of another model or other domains."""
    path = folder / MEASURED
    if not path.is_file():
        return None
    found = read_object(path, "remove it, and the losses are measured again")
    losses = found.get(TARGETS)
    if found.get("model") != str(mixture.target_model) or not isinstance(losses, dict):
        return None
    values = [value for value in losses.values() if isinstance(value, float)]
    return np.array(values) if tuple(losses) == mixture.names and len(values) == len(losses) else None


def _keep(mixture: Mixture, losses: Sequence[float], tokens: Sequence[int], folder: Path) -> None:
    content = {
        "model": str(mixture.target_model),
        TARGETS: dict(zip(mixture.names, losses, strict=True)),
        "tokens": dict(zip(mixture.names, tokens, strict=True)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MEASURED, json.dumps(content, indent=1) + "\n")
