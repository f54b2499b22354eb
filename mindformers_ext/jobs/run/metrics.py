# SPDX-License-Identifier: Apache-2.0
"""Reads what a training run has measured: one JSON object a step under ``<output_dir>/metrics/``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import JsonError, parse_json

FOLDER = "metrics"
EDGE = 20  # records averaged at the start and at the end of a run
REQUIRED = ("step", "loss", "lm_loss", "aux_loss", "dropped", "expert_load")
OPTIONAL = ("learning_rate", "tokens_per_second")
AXES = {**dict.fromkeys((*REQUIRED, *OPTIONAL), 0), "dropped": 1, "expert_load": 2}


@dataclass(frozen=True)
class RunMetrics:
    """A run's figures over its N recorded steps, L layers and E experts, ordered by step.

    ``expert_load`` counts assignments before dropping, ``dropped`` is the share of assignments dropped, in [0, 1].
    ``learning_rate`` and ``tokens_per_second`` hold NaN where a step did not record them. E is 1 for a dense model.
    """

    step: np.ndarray  # (N,)
    loss: np.ndarray  # (N,)
    lm_loss: np.ndarray  # (N,)
    aux_loss: np.ndarray  # (N,)
    learning_rate: np.ndarray  # (N,)
    tokens_per_second: np.ndarray  # (N,)
    dropped: np.ndarray  # (N, L)
    expert_load: np.ndarray  # (N, L, E)

    @property
    def has_experts(self) -> bool:
        """Whether the model routes tokens at all."""
        return self.expert_load.shape[-1] > 1

    def load_share(self, first: int, last: int) -> np.ndarray:
        """(L, E): each expert's share of its layer's assignments over the records [first, last); rows sum to 1."""
        total = self.expert_load[first:last].sum(axis=0)
        return total / np.maximum(total.sum(axis=-1, keepdims=True), 1.0)

    def step_shares(self) -> np.ndarray:
        """(N, L, E): the same in every single record."""
        return self.expert_load / np.maximum(self.expert_load.sum(axis=-1, keepdims=True), 1.0)

    def load_cv(self) -> np.ndarray:
        """(N, L): coefficient of variation of the load, standard deviation over mean; 0 is a perfect balance."""
        mean = np.maximum(self.expert_load.mean(axis=-1), 1e-12)
        return self.expert_load.std(axis=-1) / mean

    def edge(self, count: int) -> int:
        """Records to average at the start and at the end: ``count``, or half of a shorter run."""
        return max(1, min(count, len(self.step) // 2))

    def loss_ratio(self, count: int) -> tuple[float, float, float]:
        """(mean loss of the first ``edge(count)`` records, of the last ones, last / first)."""
        edge = self.edge(count)
        first, last = float(self.loss[:edge].mean()), float(self.loss[-edge:].mean())
        return first, last, last / first

    def typical_tokens_per_second(self) -> float:
        """Median over all records but the first, whose step compiles the network."""
        rates = self.tokens_per_second[1:] if len(self.step) > 1 else self.tokens_per_second
        return float(np.median(rates))


def read_metrics(run_folder: Path) -> RunMetrics:
    """The metrics below ``run_folder``.

    Several ranks (data parallel) become one run: losses and drop rates are averaged, loads and tokens per second added,
    over the steps that every rank has recorded. A last line without its end (a killed run) is left out.

    Raises:
        UserError: no file, no record, or a record that is not what it must be (file and line are named).
    """
    ranks = read_records(run_folder)
    steps = sorted(set.intersection(*(set(rank) for rank in ranks)))
    if not steps:
        raise UserError(
            f"{run_folder / FOLDER} holds no step that every file has recorded: the run ended before its first step"
        )
    return _joined([_stacked([rank[step] for step in steps]) for rank in ranks])


def read_records(run_folder: Path) -> list[dict[int, dict[str, Any]]]:
    """Of each rank: step -> record, with all that the record holds.

    Raises:
        UserError: see ``read_metrics``.
    """
    folder = run_folder / FOLDER
    files = sorted(folder.glob("rank_*.jsonl"))  # load_rank_*.jsonl are the loads of a pipeline's stages
    if not files:
        raise UserError(f"no metrics in {folder}: give the output_dir of a training run of run_mindformer.py")
    return [_read_file(file) for file in files]


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over ``window`` values along the first axis; fewer at both ends, so no end is bent towards zero."""
    half = window // 2
    sums = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    counts = (high - low).reshape(-1, *[1] * (values.ndim - 1))
    return (sums[high] - sums[low]) / counts


def _read_file(file: Path) -> dict[int, dict[str, Any]]:
    """Step -> record; of a step recorded twice the later record counts."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}): it is damaged") from error
    records = (_parsed(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1))
    return {record["step"]: record for record in records}


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except JsonError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    missing = [name for name in REQUIRED if not isinstance(record, dict) or name not in record]
    if missing:
        raise UserError(f"{where}: no {', '.join(missing)}")
    for name, axes in AXES.items():
        if not _has_axes(record.get(name), axes):
            kind = ("a number", "a list of numbers", "lists of numbers of one length")[axes]
            raise UserError(f"{where}: {name} is not {kind}")
    if type(record["step"]) is not int or not 0 < record["step"] < 2**53:
        raise UserError(f"{where}: step={str(record['step'])[:80]} is not the number of a step")
    return record


def _has_axes(value: Any, axes: int) -> bool:
    """Whether ``value`` holds numbers along so many axes; null counts as a number."""
    if axes:
        rows = isinstance(value, list) and all(_has_axes(item, axes - 1) for item in value)
        return rows and bool(value) and (axes == 1 or len({len(item) for item in value}) == 1)
    if value is None or isinstance(value, float):
        return True
    return isinstance(value, int) and abs(value) < 2**63


def _stacked(records: list[dict[str, Any]]) -> RunMetrics:
    def column(name: str) -> np.ndarray:
        return np.array([record.get(name) for record in records], dtype=np.float64)  # null becomes NaN

    shapes = {(len(record["dropped"]), *np.shape(record["expert_load"])) for record in records}
    if len(shapes) > 1:
        raise UserError(
            f"the records hold dropped and expert_load of different shapes {sorted(shapes)}: they come from two models"
        )
    return RunMetrics(**{name: column(name) for name in (*REQUIRED, *OPTIONAL)})


def _joined(ranks: list[RunMetrics]) -> RunMetrics:
    added = ("expert_load", "tokens_per_second")
    return RunMetrics(
        **{
            name: sum(getattr(rank, name) for rank in ranks) / (1 if name in added else len(ranks))
            for name in (*REQUIRED, *OPTIONAL)
        }
    )
