# SPDX-License-Identifier: Apache-2.0
"""Pages that need nothing else: no script, no font, no picture from outside; light and dark, wide and narrow."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

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
Cell = tuple[str, bool]  # HTML and whether it is a number


def document(title: str, body: str) -> str:
    """A whole page; ``body`` is HTML."""
    view = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"{view}<title>{escape(title)}</title><style>{STYLE}</style>"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}\n</body></html>\n'


def picture(path: Path, words: str) -> str:
    """A PNG inside the page; ``words`` say what it shows."""
    data = b64encode(path.read_bytes()).decode("ascii")
    return f'<p><img src="data:image/png;base64,{data}" alt="{escape(words)}" style="max-width: 100%"></p>'


def bullets(lines: Iterable[str]) -> str:
    """A list of plain lines; nothing where there are none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
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


def text(value: object) -> Cell:
    """A cell of words."""
    return escape(str(value)), False


def number(value: object) -> Cell:
    """A cell of a figure."""
    return escape(str(value)), True
