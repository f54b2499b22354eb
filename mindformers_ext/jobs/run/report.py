# SPDX-License-Identifier: Apache-2.0
"""A page about a training run: did it learn, how fast, what was dropped, what does it say."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.jobs.run.metrics import EDGE, RunMetrics, read_metrics

PICTURES = (("loss.png", "Loss over the steps"), ("expert_load.png", "How the experts share the tokens"))


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """``parity``: saved output of the parity check; ``sample``: text, or MindFormers' text_generation_result.txt."""

    run_folder: Path
    parity: Path | None = None
    sample: Path | None = None
    max_loss_ratio: float = 0.75


@dataclass(frozen=True)
class Report:
    """Where the page is and the figures a caller decides on."""

    path: Path
    first_loss: float
    last_loss: float
    ratio: float
    edge: int
    learned: bool


def report_run(request: ReportRequest) -> Report:
    """Write ``report.md`` into the run's folder. ``learned``: last / first mean loss is at most ``max_loss_ratio``."""
    metrics = read_metrics(request.run_folder)
    first, last, ratio = metrics.loss_ratio(EDGE)
    path = request.run_folder / "report.md"
    report = Report(path, first, last, ratio, metrics.edge(EDGE), ratio <= request.max_loss_ratio)
    with fresh_file(path, overwrite=True) as beside:
        beside.write_text(_page(request, metrics, report), encoding="utf-8")
    return report


def _page(request: ReportRequest, metrics: RunMetrics, report: Report) -> str:
    edge = report.edge
    rows = [
        ("steps", f"{len(metrics.step)}"),
        (f"loss, mean of the first {edge} steps", f"{report.first_loss:.4f}"),
        (f"loss, mean of the last {edge} steps", f"{report.last_loss:.4f}"),
        ("last / first", f"{report.ratio:.3f} (at most {request.max_loss_ratio:g}: {_word(report.learned)})"),
        ("speed, median", f"{metrics.typical_tokens_per_second():,.0f} tokens/s"),
    ]
    if metrics.has_experts:
        shares = metrics.step_shares()
        place, layer, expert = np.unravel_index(int(shares.argmax()), shares.shape)
        cv = metrics.load_cv().mean(axis=1)
        dropped = 100 * metrics.dropped.mean(axis=1)
        rows += [
            (f"assignments dropped, first {edge} / last {edge} steps", _pair(dropped, edge, "%")),
            (f"imbalance of the expert load (std / mean), first {edge} / last {edge} steps", _pair(cv, edge)),
            (
                f"largest share of one expert in one step (balanced: {100 / shares.shape[2]:.1f}%)",
                f"{100 * shares.max():.1f}% (step {metrics.step[place]:.0f}, layer {layer}, expert {expert})",
            ),
        ]
    parts = ["# Training report", _table(rows)]
    if request.parity:
        parts.append(f"## Parity of the trained weights with transformers\n\n{_quoted(_read(request.parity).strip())}")
    for name, title in PICTURES:
        if (request.run_folder / name).is_file():
            parts.append(f"## {title}\n\n![{title}]({name})")
    if request.sample:
        parts.append(f"## What the trained model writes\n\n{_quoted(_generated(request.sample))}")
    return "\n\n".join(parts) + "\n"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _pair(values: np.ndarray, edge: int, unit: str = "") -> str:
    return f"{values[:edge].mean():.2f}{unit} / {values[-edge:].mean():.2f}{unit}"


def _word(passed: bool) -> str:
    return "passed" if passed else "FAILED"


def _quoted(text: str) -> str:
    """A code block that no fence inside the text can end."""
    return "\n".join("    " + line for line in text.split("\n"))


def _generated(path: Path) -> str:
    """The texts in MindFormers' result file, a printed Python list; any other text as it is."""
    text = _read(path).strip()
    try:
        results = ast.literal_eval(text)
        texts = [answer for result in results for answer in result["text_generation_text"]]
    except (SyntaxError, ValueError, TypeError, KeyError):
        return text
    return "\n\n".join(map(str, texts))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
