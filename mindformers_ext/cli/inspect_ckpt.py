# SPDX-License-Identifier: Apache-2.0
"""``python tools/inspect_ckpt.py``: what a weight file or folder holds, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from mindformers_ext.cli.command import Command, add_switch
from mindformers_ext.core.byte_sizes import size_text
from mindformers_ext.core.errors import UserError

EPILOG = """examples:
  python tools/inspect_ckpt.py mixtral.ckpt
  python tools/inspect_ckpt.py Mixtral-8x7B-v0.1 --grep 'layers\\.0\\.'
  python tools/inspect_ckpt.py mixtral.ckpt --json > mixtral.json
"""
LAYOUT = ("layout", "qkv_concat")  # of the description: said in the line before


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("path", type=Path, help="file or folder")
    parser.add_argument("--grep", help="only tensors whose name matches this regular expression")
    add_switch(parser, "--json", text="print JSON")


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.checkpoint.inspect import inspect_ckpt, type_name

    try:
        wanted = re.compile(arguments.grep or "")
    except re.error as error:
        raise UserError(f"--grep '{arguments.grep}' is no regular expression: {error}") from error
    found = inspect_ckpt(arguments.path)
    if arguments.json:
        table = found.to_json()
        table["tensors"] = [row for row in table["tensors"] if wanted.search(row["name"])]
        print(json.dumps(table, indent=1))
        return 0
    rows = [
        (info.name, str(info.shape), type_name(info), size_text(info.nbytes))
        for info in found.tensors
        if wanted.search(info.name)
    ]
    widths = [max((len(row[place]) for row in rows), default=0) for place in range(4)]
    for row in rows:
        print(
            "  ".join(
                (*(text.ljust(width) for text, width in zip(row[:3], widths, strict=False)), row[3].rjust(widths[3]))
            )
        )
    print(
        f"{found.path}: {found.kind}, {len(found.tensors)} tensors, {size_text(found.nbytes)} ("
        + ", ".join(f"{kind} {size_text(nbytes)}" for kind, nbytes in found.types().items())
        + ")"
    )
    print(f"layout: {found.layout or 'not told'}; fingerprint: {found.fingerprint[:16]}")
    for name, value in (found.description or {}).items():
        if found.layout is None or name not in LAYOUT:
            print(f"{name}: {value}")
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


COMMAND = Command(
    prog="inspect_ckpt.py",
    description="Show names, shapes, types, layout and bytes of a MindSpore .ckpt or .safetensors file, a PyTorch "
    "file, or a Hugging Face folder. No data is loaded.",
    epilog=EPILOG,
    options=_options,
    run=_run,
    blas_threads=False,
)
parser, main = COMMAND.parser, COMMAND.main
