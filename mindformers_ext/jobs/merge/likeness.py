# SPDX-License-Identifier: Apache-2.0
"""``--report``: a folder with the cosines between the models of a merge, as a table, a picture and numbers."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from itertools import combinations
from threading import Event

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import fresh_folder
from mindformers_ext.jobs.merge.cosines import CHANGES, WEIGHTS, Line, mean_cosine, write_picture
from mindformers_ext.jobs.merge.output import OutputRequest
from mindformers_ext.jobs.merge.plan import TensorTask
from mindformers_ext.jobs.merge.stream import TaskRunner
from mindformers_ext.jobs.merge.threads import in_threads, thread_count

PAGE, PICTURE, NUMBERS = "report.md", "cosines.png", "cosines.csv"
STRANGERS = 0.2  # mean cosine of matrices below which models have little to do with each other
LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp|block_sparse_moe)?\.?(.+?)(?:\.weight)?$")


def write_likeness(out: OutputRequest, runner: TaskRunner, tasks: Sequence[TensorTask]) -> list[str]:
    """Compare the inputs of every task and write the folder ``out.report``; returns notes.

    Raises:
        UserError: no tensor has two models to compare.
    """
    folder = out.report or out.folder
    lines = _measured(runner, tasks, out)
    if not lines:
        raise UserError("--report: no tensor of this merge has two models to compare: leave the option out")
    with fresh_folder(folder, out.overwrite) as partial:
        with (partial / NUMBERS).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("what", "tensor", "layer", "first", "second", "cosine"))
            writer.writerows(
                (x.what, x.kind, "" if x.layer is None else x.layer, x.first, x.second, f"{x.cosine:.6f}")
                for x in lines
            )
        write_picture(lines, partial / PICTURE)
        (partial / PAGE).write_text(_page(lines), encoding="utf-8")
    mean = mean_cosine([line for line in lines if line.what == WEIGHTS and line.matrix])
    notes = [f"{folder / PAGE}: mean cosine of the models' matrices {mean:.3f}"]
    if mean < STRANGERS:
        notes.append(
            f"warning: the models have little in common (mean cosine {mean:.3f}): they do not come from one "
            "base, and what a merge of them writes is likely to be nonsense"
        )
    return notes


def _measured(runner: TaskRunner, tasks: Sequence[TensorTask], out: OutputRequest) -> list[Line]:
    from tqdm import tqdm

    from mindformers_ext.surgery.merge.bridge import one_thread_each

    one_thread_each()
    found: dict[int, list[Line]] = {}
    with tqdm(total=len(tasks), desc="comparing", unit="tensor", disable=out.quiet, dynamic_ncols=True) as bar:

        def compare(place: int, stop: Event) -> None:
            found[place] = [] if stop.is_set() else _lines(runner, tasks[place])
            with bar.get_lock():
                bar.update(1)

        in_threads(compare, range(len(tasks)), thread_count(out.threads))
    return [line for place in sorted(found) for line in found[place]]


def _lines(runner: TaskRunner, task: TensorTask) -> list[Line]:
    """The cosines of one tensor; none where it has one model."""
    from mindformers_ext.surgery.merge.likeness import likeness

    names = [part.model for part in task.inputs]
    if len(names) + (task.base is not None) < 2:
        return []
    found = likeness(runner.stream(task))
    match = LAYER.match(task.info.name)
    layer, kind = (int(match[1]), match[2]) if match else (None, task.info.name.removesuffix(".weight"))
    both = [task.base.model, *names] if task.base else names
    result = []
    for what, cosines, who in ((WEIGHTS, found.weights, both), (CHANGES, found.changes, names)):
        if cosines is not None:
            result += [
                Line(what, kind, layer, who[i], who[j], float(cosines[i, j]), len(task.info.shape) > 1)
                for i, j in combinations(range(len(who)), 2)
            ]
    return result


def _page(lines: Sequence[Line]) -> str:
    parts = [
        "# How alike the models are\n",
        f"![cosines]({PICTURE})\n",
        "Cosines between the models' tensors, means over layers. Weights of one family lie near 1. Task vectors "
        "(a model minus its base) near 0 changed different things, below 0 they pull against each other. "
        f"Every number: `{NUMBERS}`.\n",
    ]
    for what in (WEIGHTS, CHANGES):
        chosen = [line for line in lines if line.what == what]
        pairs = list(dict.fromkeys((line.first, line.second) for line in chosen))
        if not pairs:
            continue
        parts += [
            f"## {what.capitalize()}\n",
            "| tensor | " + " | ".join(f"{a} / {b}" for a, b in pairs) + " |",
            "|---|" + "---|" * len(pairs),
        ]
        for kind in dict.fromkeys(line.kind for line in chosen):
            cells = [mean_cosine([x for x in chosen if (x.kind, x.first, x.second) == (kind, *pair)]) for pair in pairs]
            parts.append(f"| {kind} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)
