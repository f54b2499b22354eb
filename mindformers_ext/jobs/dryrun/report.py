# SPDX-License-Identifier: Apache-2.0
"""A dry run's result as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.byte_sizes import size_text
from mindformers_ext.core.cluster.memory import StageMemory
from mindformers_ext.core.spec import ParallelSpec
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.jobs.dryrun.facts import KINDS, RankFacts, TrafficFact
from mindformers_ext.jobs.dryrun.plan import LIMITS, DryRunPlan

SIZES = (
    "data_parallel",
    "model_parallel",
    "pipeline_stage",
    "pp_interleave_num",
    "expert_parallel",
    "micro_batch_num",
    "micro_batch_interleave_num",
    "use_seq_parallel",
    "vocab_emb_dp",
    "enable_alltoall",
    "enable_parallel_optimizer",
)
HELD = (
    ("weight", "weights"),
    ("gradient", "gradients"),
    ("optimizer", "optimizer states"),
    ("cache", "keys and values"),
)
# Fields of StageMemory, their names for people, and whether they are estimates.
MEMORY = (
    ("weights", "weights", False),
    ("gradients", "gradients", False),
    ("optimizer", "optimizer states", False),
    ("cache", "keys and values", False),
    ("activations", "activations", True),
    ("gathered", "gathered weights", True),
    ("total", "together", True),
)
BY_LOAD = "by load"
LOSS_NOTE = (
    "Between pipeline stages ours also sends the auxiliary loss and its gradient, a few bytes in one message "
    "per micro batch and direction; MindFormers' network computes that loss and throws it away."
)


@dataclass(frozen=True)
class DryRunReport:
    """Everything a report is written from.

    ``native``: the ranks of MindFormers' own network, when it was asked for. ``made``: how the report came about, as
    names and texts: command, options over the file, versions, date.
    """

    config: str
    plan: DryRunPlan
    ranks: tuple[RankFacts, ...]
    native: tuple[RankFacts, ...] = ()
    made: tuple[tuple[str, str], ...] = ()

    @property
    def compiles(self) -> bool:
        """Whether every asked rank of our network compiled."""
        return all(facts.compiles for facts in self.ranks)

    def one_per_stage(self) -> list[RankFacts]:
        """The first compiled rank of each stage, by stage."""
        found: dict[int, RankFacts] = {}
        for facts in self.ranks:
            if facts.compiles:
                found.setdefault(facts.stage, facts)
        return [found[stage] for stage in sorted(found)]


def sizes(parallel: ParallelSpec) -> dict[str, Any]:
    """The parallel sizes as the YAML names them."""
    return {name: getattr(parallel, name) for name in SIZES}


def report_json(report: DryRunReport) -> dict[str, Any]:
    """The report as plain values."""
    plan = report.plan
    return {
        "config": report.config,
        "made": dict(report.made),
        "device_memory": plan.limit,
        "devices": plan.world,
        "compiles": report.compiles,
        "parallel": sizes(plan.spec.parallel),
        "rows_per_step": plan.rows,
        "notes": list(plan.notes),
        "memory_by_arithmetic": [asdict(stage) | {"total": stage.total} for stage in plan.memory],
        "limits": list(LIMITS),
        "ranks": [facts.to_json() | {"bytes": {kind: facts.nbytes(kind) for kind in KINDS}} for facts in report.ranks],
        "native_ranks": [facts.to_json() for facts in report.native],
    }


def write_json(report: DryRunReport, path: Path) -> None:
    """Write ``report_json`` to ``path``."""
    with fresh_file(path, overwrite=True) as beside:
        beside.write_text(json.dumps(report_json(report), indent=1) + "\n", encoding="utf-8")


def report_text(report: DryRunReport) -> str:
    """The report for a terminal."""
    plan, parallel = report.plan, report.plan.spec.parallel
    kinds = shown_kinds(report.ranks)
    lines = [
        f"{report.config}: {plan.world} devices, {plan.work}",
        ", ".join(f"{k} {v}" for k, v in sizes(parallel).items()),
        *(f"note: {note}" for note in plan.notes),
        "",
        "compilation",
        *table(
            ("rank", "stage", "compiles", "seconds", "peak RSS", *kinds.values()),
            (_rank_row(facts, kinds) for facts in report.ranks),
        ),
    ]
    lines += ["", *memory_lines(plan.memory)]
    for facts in report.ranks:
        if facts.error:
            lines += ["", f"rank {facts.rank} does not compile:", *(f"  {line}" for line in facts.error.splitlines())]
    for facts in report.one_per_stage():
        lines += ["", *stage_lines(facts, plan.one_run)]
    if len(report.one_per_stage()) > 1:
        lines += ["", *balance_lines(report.one_per_stage())]
    if report.native:
        lines += ["", *comparison_lines(report)]
    return "\n".join([*lines, "", *LIMITS, ""])


def memory_lines(memory: Sequence[StageMemory]) -> list[str]:
    """What a device of each stage needs, by arithmetic; the last two parts are estimates."""
    head, rows = memory_table(memory, "~")
    return ["memory of a device by arithmetic (~ is an estimate)", *table(head, rows)]


def memory_table(memory: Sequence[StageMemory], mark: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows; what no stage has is left out, ``mark`` stands before what is estimated."""
    shown = [
        (name, title, estimated) for name, title, estimated in MEMORY if any(getattr(stage, name) for stage in memory)
    ]
    rows = [
        (
            str(stage.stage),
            *((mark if estimated else "") + size_text(getattr(stage, name)) for name, _, estimated in shown),
        )
        for stage in memory
    ]
    return ("stage", *(title for _, title, _ in shown)), rows


def shown_kinds(ranks: Sequence[RankFacts]) -> dict[str, str]:
    """The kinds of parameters that some rank has, and their names for people."""
    return {kind: title for kind, title in HELD if any(facts.nbytes(kind) for facts in ranks)}


def _rank_row(facts: RankFacts, kinds: Mapping[str, str]) -> tuple[str, ...]:
    if not facts.compiles:
        return (str(facts.rank), str(facts.stage), "NO", *[""] * (2 + len(kinds)))
    seconds = facts.start_seconds + facts.build_seconds + facts.compile_seconds
    parts = [size_text(facts.nbytes(kind)) for kind in kinds]
    return (str(facts.rank), str(facts.stage), "yes", f"{seconds:.0f}", size_text(facts.peak_rss), *parts)


def stage_lines(facts: RankFacts, one_run: str) -> list[str]:
    """Collectives (of ``one_run``), largest tensors and generated strategies of one rank."""
    lines = [f"stage {facts.stage} (rank {facts.rank}), collectives of {one_run}"]
    rows = [(row.kind, row.purpose, group_text(row.ranks), f"{row.count}", *moved_text(row)) for row in facts.traffic]
    lines += table(("kind", "for", "ranks", "count", "payload", "sent by this rank"), rows)
    if any(BY_LOAD in row for row in rows):
        lines.append(f"{BY_LOAD}: rows that go on from where routing has taken them; no graph tells how many")
    lines.append(f"largest tensors of rank {facts.rank}")
    lines += table(
        ("tensor", "whole", "here", "type", "bytes"),
        (
            (row.name, shape_text(row.whole), shape_text(row.local), row.dtype, size_text(row.nbytes))
            for row in facts.largest()
        ),
    )
    if facts.unplanned:
        kinds = ", ".join(sorted({row.kind for row in facts.unplanned}))
        lines.append(f"{len(facts.unplanned)} operators have no strategy of their own (MindSpore made one up): {kinds}")
    return lines


def moved_text(row: TrafficFact) -> tuple[str, str]:
    """Payload and what this rank sends; of rows that go on from where the load has taken them neither is known."""
    if row.kind == "AlltoAllV" and not row.payload:
        return BY_LOAD, BY_LOAD
    return size_text(row.payload), size_text(row.sent)


def balance_lines(stages: Sequence[RankFacts]) -> list[str]:
    """How evenly the pipeline stages share weights and products."""
    most = max(facts.matmul_flops for facts in stages) or 1
    rows = [
        (
            str(facts.stage),
            size_text(facts.nbytes("weight")),
            f"{facts.matmul_flops / 1e12:.3f}",
            f"{100 * facts.matmul_flops / most:.0f}%",
        )
        for facts in stages
    ]
    return ["pipeline balance", *table(("stage", "weights", "TFLOP of products per step", "of the busiest"), rows)]


def compared(ours: RankFacts, theirs: RankFacts) -> list[tuple[str, int, int, int, int]]:
    """By kind and together: number of collectives of a step in our network and in theirs, and bytes sent by each."""
    rows: list[tuple[str, int, int, int, int]] = []
    for kind in sorted({row.kind for row in (*ours.traffic, *theirs.traffic)}):
        mine, other = ([row for row in facts.traffic if row.kind == kind] for facts in (ours, theirs))
        rows.append(
            (
                kind,
                sum(row.count for row in mine),
                sum(row.count for row in other),
                sum(row.sent for row in mine),
                sum(row.sent for row in other),
            )
        )
    counts = [sum(numbers) for numbers in list(zip(*rows, strict=True))[1:]] or [0] * 4
    return [*rows, ("together", counts[0], counts[1], counts[2], counts[3])]


def comparison_lines(report: DryRunReport) -> list[str]:
    """Collectives of our network beside MindFormers' own for the same YAML."""
    lines = ["MindFormers' own network for the same file", LOSS_NOTE]
    for ours in report.ranks:
        for theirs in (facts for facts in report.native if facts.rank == ours.rank):
            if theirs.error:
                lines.append(f"rank {theirs.rank}: it does not compile: {theirs.error.splitlines()[0]}")
            if ours.error or theirs.error:
                continue
            rows = [
                (kind, f"{mine}", f"{other}", size_text(sent), size_text(other_sent))
                for kind, mine, other, sent, other_sent in compared(ours, theirs)
            ]
            lines += [f"rank {ours.rank}", *table(("kind", "ours", "theirs", "sent, ours", "sent, theirs"), rows)]
    return lines


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, columns aligned."""
    body = [tuple(head), *map(tuple, rows)]
    widths = [max(len(row[place]) for row in body) for place in range(len(head))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body
    ]


def shape_text(shape: Sequence[int]) -> str:
    """(2, 3) as ``2x3``; a scalar as ``-``."""
    return "x".join(map(str, shape)) or "-"


def group_text(ranks: Sequence[int]) -> str:
    """Members of a group in short: ``0-7``, ``0-14 by 2``, or the numbers."""
    if len(ranks) > 2:
        step = ranks[1] - ranks[0]
        if step > 0 and list(ranks) == list(range(ranks[0], ranks[-1] + 1, step)):
            return f"{ranks[0]}-{ranks[-1]}" + (f" by {step}" if step > 1 else "")
    return ",".join(map(str, ranks))
