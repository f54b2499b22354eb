# SPDX-License-Identifier: Apache-2.0
"""A dry run's result as one HTML page that needs nothing else: no script, no font, no picture from outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    shape_text,
    shown_kinds,
    sizes,
)

STYLE = """
:root { color-scheme: light dark; --line: #8885 }
:root { --a: #3b6ea8; --b: #c98a1b; --c: #5a9a52; --d: #9a6bb0; --e: #8aa4b8; --f: #b8a58a; --bad: #c0392b }
@media (prefers-color-scheme: dark) { :root { --a: #5b93d3; --e: #6d8090; --f: #8f8068; --bad: #e8604f } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
h1, p, li, dd { overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .92rem } dd { margin: 0 }
.answer { font-size: 1.1rem; padding: .6rem .9rem; border-left: .4rem solid var(--c); background: #8881 }
.answer.bad { border-color: var(--bad) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .92rem }
td, th { padding: .22rem .8rem .22rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.bar { position: relative; display: flex; height: 1.1rem; background: #8882 } .bar i { display: block; height: 100% }
td .bar { width: 8rem; background: none } .rank { margin: .7rem 0 } .rank p { margin: 0 0 .15rem; font-size: .92rem }
.bar .limit { position: absolute; top: -.25rem; bottom: -.25rem; height: auto; width: .15rem; background: var(--bad) }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem } .key i { display: inline-block; width: .8rem; height: .8rem }
.key span { display: inline-flex; gap: .35rem; align-items: center }
.key .limit { width: .15rem; background: var(--bad) }
dt, td::before { opacity: .7 }
@media (max-width: 40rem) { body { margin: 1rem auto } dl { display: block } dd { margin: 0 0 .4rem }
  th { display: none }
  table, tbody, tr, td, td.n { display: block; text-align: left }
  tr { padding: .4rem 0; border-bottom: 1px solid var(--line) }
  td, td.n { display: flex; gap: 1rem; padding: 0; border: 0; white-space: normal; overflow-wrap: anywhere }
  td::before { content: attr(data-name); flex: 0 0 9rem; overflow-wrap: normal } }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .6rem } ul { padding-left: 1.2rem }
"""
COLOURS = {"weight": "a", "gradient": "b", "optimizer": "c", "cache": "d", "activations": "e", "gathered": "f"}
ESTIMATED = {"activations": "activations (about)", "gathered": "gathered weights (about)"}
Cell = tuple[str, bool]  # HTML and whether it is a number


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
        _list(f"note: {note}" for note in plan.notes),
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
        _list(LIMITS),
    ]
    view = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"{view}<title>Dry run of {escape(report.config)}</title><style>{STYLE}</style>"
    text = "\n".join(filter(None, body))
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{text}\n</body></html>\n'


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _failure(facts: RankFacts) -> str:
    return f"<h2>Rank {facts.rank} does not compile</h2><pre>{escape(facts.error)}</pre>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table; a column is right-aligned when its cells are numbers."""
    body = list(rows)
    numbers = [bool(body) and body[0][place][1] for place in range(len(head))]
    top = "".join(f"<th{_class(number)}>{escape(name)}</th>" for name, number in zip(head, numbers, strict=True))
    names = [escape(name) for name in head]  # on a narrow screen each cell stands beside its column's name
    lines = (
        "".join(
            f'<td{_class(number)} data-name="{name}">{cell}</td>'
            for name, (cell, number) in zip(names, row, strict=True)
        )
        for row in body
    )
    return f'<div class="wide"><table><tr>{top}</tr>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _class(number: bool) -> str:
    return ' class="n"' if number else ""


def _text(value: object) -> Cell:
    return escape(str(value)), False


def _number(value: object) -> Cell:
    return escape(str(value)), True


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
            _number(facts.rank),
            _number(facts.stage),
            *(_number(size_text(held)) for held in parts[facts.rank].values()),
            _number(size_text(sum(parts[facts.rank].values()))),
        )
        for facts in good
    ]
    head = ("rank", "stage", *titles.values(), "together")
    return f'<p class="key">{key}</p>{bars}' + _table(head, rows)


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
    return _table(head, [tuple(map(_number, row)) for row in rows])


def _stage(facts: RankFacts, one_run: str) -> str:
    """Traffic and largest tensors of one stage's first rank."""
    most = max((row.sent for row in facts.traffic), default=0) or 1
    traffic = [
        (
            _text(row.kind),
            _text(row.purpose),
            _text(group_text(row.ranks)),
            _number(row.count),
            _number(size_text(row.payload)),
            _number(size_text(row.sent)),
            (f'<div class="bar"><i style="background:var(--a);width:{100 * row.sent / most:.2f}%"></i></div>', False),
        )
        for row in sorted(facts.traffic, key=lambda row: -row.sent)
    ]
    tensors = [
        (
            _text(row.name),
            _text(row.kind),
            _text(shape_text(row.whole)),
            _text(shape_text(row.local)),
            _text(row.dtype),
            _number(size_text(row.nbytes)),
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
        + _table(("kind", "for", "ranks", "count", "payload", "sent by this rank", ""), traffic)
        + planned
        + "<p>Largest tensors:</p>"
        + _table(("tensor", "kind", "whole", "on this rank", "type", "bytes"), tensors)
    )


def _compilation(ranks: Sequence[RankFacts]) -> str:
    rows = []
    for facts in ranks:
        seconds = (facts.start_seconds, facts.build_seconds, facts.compile_seconds)
        measured = [*(f"{number:.1f}" for number in seconds), size_text(facts.peak_rss)] if facts.compiles else [""] * 4
        rows.append(
            (
                _number(facts.rank),
                _number(facts.stage),
                _text("yes" if facts.compiles else "NO"),
                *map(_number, measured),
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
    return _table(head, rows)


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
            (_text(kind), _number(mine), _number(other), _number(size_text(sent)), _number(size_text(other_sent)))
            for kind, mine, other, sent, other_sent in compared(ours, theirs)
        ]
        parts.append(
            f"<p>Rank {theirs.rank}</p>"
            + _table(("kind", "count, ours", "count, theirs", "sent, ours", "sent, theirs"), rows)
        )
    head = f"<h2>MindFormers' own network for the same file</h2><p>{escape(LOSS_NOTE)}</p>"
    return [head, *parts] if parts else []
