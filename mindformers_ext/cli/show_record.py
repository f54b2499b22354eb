# SPDX-License-Identifier: Apache-2.0
"""``python tools/show_record.py``: records of a MindRecord as text, the part that bears loss marked."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_ext.cli.command import Command

if TYPE_CHECKING:
    from mindformers_ext.jobs.preprocess.show import ShownRecord

EPILOG = """\
Marked is what the network learns to write: in finetune data the answers and their </s>, in pretraining data everything
but the first token. Tokens after a padding token never count, nor do labels of -100.

examples:
  python tools/show_record.py alpaca.mindrecord --model_file tokenizer.model
  python tools/show_record.py alpaca.mindrecord --model_file tokenizer.model --n 1 --skip 41 --color never | less
"""
GREEN, DIM, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
# Everything but tab and newline that would move the cursor or colour the screen.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("file", type=Path, help="MindRecord with input_ids, and labels where it is for finetuning")
    parser.add_argument(
        "--model_file",
        type=Path,
        required=True,
        help="the tokenizer the file was made with, as llama_preprocess.py takes it",
    )
    parser.add_argument("--n", type=int, default=3, help="records to show (default 3)")
    parser.add_argument("--skip", type=int, default=0, help="records to pass over first (default 0)")
    parser.add_argument("--pad_id", type=int, help="pad_token_id of the network (default: as llama_preprocess.py)")
    parser.add_argument("--ignore_id", type=int, default=-100, help="label that bears no loss (default -100)")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="mark by colour, or by [[ ]] (default auto: colour on a terminal)",
    )


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.preprocess.show import ShowRequest, open_file

    request = ShowRequest(
        path=arguments.file,
        model_file=arguments.model_file,
        count=arguments.n,
        skip=arguments.skip,
        pad_id=arguments.pad_id,
        ignore_id=arguments.ignore_id,
    )
    opened = open_file(request)
    color = arguments.color == "always" or (arguments.color == "auto" and wants_color())
    marks = f"{GREEN}in this colour{PLAIN}" if color else "between [[ and ]]"
    _print(f"{arguments.file}: {opened.rows} records of {' and '.join(opened.fields)}; loss is on what stands {marks}")
    for number, record in opened.records:
        _print(f"\n-- record {number}: {counts(record)}\n{text(record, color)}")
    return 0


def wants_color() -> bool:
    """Whether stdout is a terminal that shows colours; NO_COLOR (no-color.org) turns them off."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def counts(record: ShownRecord) -> str:
    """One line of counts."""
    parts = [f"{record.tokens} tokens", f"{record.padding} padding", f"{record.loss} bear loss"]
    if record.unknown:
        parts.append(f"{record.unknown} unknown")
    if record.changed:
        parts.append(f"{record.changed} LABELS DIFFER FROM THEIR TOKEN")
    return ", ".join(parts)


def text(record: ShownRecord, color: bool) -> str:
    """The record's text: loss in green and special tokens dim, or loss between [[ and ]]."""
    pieces, inside = [], False
    for segment in record.segments:
        shown = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", segment.text)
        if color:
            codes = GREEN * segment.loss + DIM * segment.special
            pieces.append(f"{codes}{shown}{PLAIN}" if codes else shown)
            continue
        if segment.loss != inside:
            pieces.append("[[" if segment.loss else "]]")
            inside = segment.loss
        pieces.append(shown)
    return "".join([*pieces, "]]" * inside])


def _print(line: str) -> None:
    """What stdout's encoding cannot write is written as its escape."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, errors="backslashreplace").decode(encoding))


COMMAND = Command(
    prog="show_record.py",
    description="Print records of a MindRecord file as text, with the part that bears loss marked.",
    epilog=EPILOG,
    options=_options,
    run=_run,
)
parser, main = COMMAND.parser, COMMAND.main
