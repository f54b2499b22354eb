# SPDX-License-Identifier: Apache-2.0
"""A dry run's result as one HTML page that needs nothing else: no script, no font, no picture from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from mindformers_ext.core.byte_sizes import size_text
from mindformers_ext.core.cluster.memory import StageMemory
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.jobs.dryrun.facts import RankFacts
from mindformers_ext.jobs.dryrun.plan import LIMITS
from mindformers_ext.jobs.dryrun.report import (
    LOSS_NOTE,
    DryRunReport,
    compared,
    group_text,
    memory_table,
    moved_text,
    shape_text,
    shown_kinds,
    sizes,
)
from mindformers_ext.jobs.run import html

COLOURS = {"weight": "a", "gradient": "b", "optimizer": "c", "cache": "d", "activations": "e", "gathered": "f"}
ESTIMATED = {"activations": "activations (about)", "gathered": "gathered weights (about)"}


def write_page(report: DryRunReport, path: Path) -> None:
    """Write the page to ``path``."""
    with fresh_file(path, overwrite=True) as beside:
        beside.write_text(page(report), encoding="utf-8")


def page(report: DryRunReport) -> str:
    """The page's HTML."""
    plan = report.plan
    failed = [facts for facts in report.ranks if not facts.compiles]
    answer = (
        f"{len(report.ranks)} of {plan.world} ranks were compiled, all of them successfully."
        if not failed
        else f"{len(failed)} of the {len(report.ranks)} ranks asked for did not compile."
    )
    body = [
        f"<h1>Dry run of {escape(report.config)}</h1>",
        f"<p>{plan.world} devices, {escape(plan.work)}: "
        + escape(", ".join(f"{name} {value}" for name, value in sizes(plan.spec.parallel).items()))
        + "</p>",
        f'<p class="answer{" bad" if failed else ""}">{answer}</p>',
        _made(report),
        html.bullets(f"note: {note}" for note in plan.notes),
        *(_failure(facts) for facts in failed),
        "<h2>Memory of each rank</h2>",
        _memory(report),
        "<p>By arithmetic, one device of each stage:</p>",
        _estimate(plan.memory),
        *(_stage(facts, plan.one_run) for facts in report.one_per_stage()),
        "<h2>Compilation</h2>",
        _compilation(report.ranks),
        *_comparison(report),
        "<h2>What this does not show</h2>",
        html.bullets(LIMITS),
    ]
    return html.document(f"Dry run of {report.config}", "\n".join(filter(None, body)))


def _failure(facts: RankFacts) -> str:
    return f"<h2>Rank {facts.rank} does not compile</h2><pre>{escape(facts.error)}</pre>"


def _made(report: DryRunReport) -> str:
    """Command, options, versions and date."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in report.made)
    return f"<dl>{rows}</dl>" if rows else ""


def _memory(report: DryRunReport) -> str:
    """One bar per rank, all on one scale: what its graph holds, what arithmetic adds, and where a device ends."""
    good = [facts for facts in report.ranks if facts.compiles]
    if not good:
        return "<p>No rank compiled.</p>"
    kinds, limit = shown_kinds(good), report.plan.limit
    stages = {stage.stage: stage for stage in report.plan.memory}
    estimated = {
        name: title for name, title in ESTIMATED.items() if any(getattr(stage, name) for stage in stages.values())
    }
    parts = {
        facts.rank: {
            **{kind: facts.nbytes(kind) for kind in kinds},
            **{name: getattr(stages[facts.stage], name) for name in estimated if facts.stage in stages},
        }
        for facts in good
    }
    scale = max([limit or 0, *(sum(held.values()) for held in parts.values())]) or 1
    titles = {**kinds, **estimated}
    key = "".join(f'<span><i style="background:var(--{COLOURS[kind]})"></i>{titles[kind]}</span>' for kind in titles)
    if limit:
        key += f'<span><i class="limit"></i>memory of a device, {size_text(limit)}</span>'
    bars = "".join(_bar(facts, parts[facts.rank], titles, scale, limit) for facts in good)
    rows = [
        (
            html.number(facts.rank),
            html.number(facts.stage),
            *(html.number(size_text(held)) for held in parts[facts.rank].values()),
            html.number(size_text(sum(parts[facts.rank].values()))),
        )
        for facts in good
    ]
    head = ("rank", "stage", *titles.values(), "together")
    return f'<p class="key">{key}</p>{bars}' + html.table(head, rows)


def _bar(facts: RankFacts, held: Mapping[str, int], titles: Mapping[str, str], scale: int, limit: int | None) -> str:
    pieces = "".join(
        f'<i style="background:var(--{COLOURS[kind]});width:{100 * size / scale:.2f}%" '
        f'title="{titles[kind]} {size_text(size)}"></i>'
        for kind, size in held.items()
    )
    total, over = sum(held.values()), ""
    if limit:
        pieces += f'<i class="limit" style="left:calc({100 * limit / scale:.2f}% - .15rem)"></i>'
        over = f", {100 * total / limit:.0f}% of a device" + (": TOO MUCH" if total > limit else "")
    head = f"<p>rank {facts.rank}, stage {facts.stage}: {size_text(total)}{over}</p>"
    return f'<div class="rank">{head}<div class="bar">{pieces}</div></div>'


def _estimate(memory: Sequence[StageMemory]) -> str:
    """The parts of each stage's memory that follow from shapes, estimates marked."""
    head, rows = memory_table(memory, "about ")
    return html.table(head, [tuple(map(html.number, row)) for row in rows])


def _stage(facts: RankFacts, one_run: str) -> str:
    """Traffic and largest tensors of one stage's first rank."""
    most = max((row.sent for row in facts.traffic), default=0) or 1
    traffic = [
        (
            html.text(row.kind),
            html.text(row.purpose),
            html.text(group_text(row.ranks)),
            html.number(row.count),
            *map(html.number, moved_text(row)),
            (f'<div class="bar"><i style="background:var(--a);width:{100 * row.sent / most:.2f}%"></i></div>', False),
        )
        for row in sorted(facts.traffic, key=lambda row: -row.sent)
    ]
    tensors = [
        (
            html.text(row.name),
            html.text(row.kind),
            html.text(shape_text(row.whole)),
            html.text(shape_text(row.local)),
            html.text(row.dtype),
            html.number(size_text(row.nbytes)),
        )
        for row in facts.largest()
    ]
    planned = ""
    if facts.unplanned:
        kinds = ", ".join(sorted({row.kind for row in facts.unplanned}))
        planned = (
            f"<p>{len(facts.unplanned)} operators have no strategy of their own (MindSpore made one up): "
            f"{escape(kinds)}</p>"
        )
    return (
        f"<h2>Stage {facts.stage} (rank {facts.rank})</h2><p>{facts.matmul_flops / 1e12:.3f} TFLOP of matrix products "
        f"and these collectives in {escape(one_run)}, by this rank:</p>"
        + html.table(("kind", "for", "ranks", "count", "payload", "sent by this rank", ""), traffic)
        + planned
        + "<p>Largest tensors:</p>"
        + html.table(("tensor", "kind", "whole", "on this rank", "type", "bytes"), tensors)
    )


def _compilation(ranks: Sequence[RankFacts]) -> str:
    rows = []
    for facts in ranks:
        seconds = (facts.start_seconds, facts.build_seconds, facts.compile_seconds)
        measured = [*(f"{number:.1f}" for number in seconds), size_text(facts.peak_rss)] if facts.compiles else [""] * 4
        rows.append(
            (
                html.number(facts.rank),
                html.number(facts.stage),
                html.text("yes" if facts.compiles else "NO"),
                *map(html.number, measured),
            )
        )
    head = (
        "rank",
        "stage",
        "compiles",
        "imports, s (shared)",
        "network, s",
        "compiler, s",
        "peak memory of this machine",
    )
    return html.table(head, rows)


def _comparison(report: DryRunReport) -> list[str]:
    """Our network's collectives beside MindFormers' own."""
    parts = []
    for theirs in report.native:
        ours = next(facts for facts in report.ranks if facts.rank == theirs.rank)
        if theirs.error:
            parts.append(
                f"<p>Rank {theirs.rank}: MindFormers' network does not compile.</p><pre>{escape(theirs.error)}</pre>"
            )
        if ours.error or theirs.error:
            continue
        rows = [
            (
                html.text(kind),
                html.number(mine),
                html.number(other),
                html.number(size_text(sent)),
                html.number(size_text(other_sent)),
            )
            for kind, mine, other, sent, other_sent in compared(ours, theirs)
        ]
        parts.append(
            f"<p>Rank {theirs.rank}</p>"
            + html.table(("kind", "count, ours", "count, theirs", "sent, ours", "sent, theirs"), rows)
        )
    head = f"<h2>MindFormers' own network for the same file</h2><p>{escape(LOSS_NOTE)}</p>"
    return [head, *parts] if parts else []
