# SPDX-License-Identifier: Apache-2.0
"""How a model's folder is written: options that several commands have, and the request that they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_ext.cli.command import add_switch
from mindformers_ext.core.byte_sizes import read_size

if TYPE_CHECKING:
    from mindformers_ext.jobs.merge.output import OutputRequest


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Shards, what may be replaced, and whether a bar is shown."""
    parser.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="bytes of one shard; default %(default)s"
    )
    add_switch(parser, "--overwrite", text="replace an existing folder")
    add_switch(parser, "--quiet", text="no progress bar")


def add_out_shard_size(parser: argparse.ArgumentParser) -> None:
    """Shards in mergekit's words."""
    text = "bytes of one shard; default 5B (5e9)"
    parser.add_argument("--out_shard_size", "--out-shard-size", default="5B", metavar="SIZE", help=text)


def output_of(words: argparse.Namespace, folder: Path) -> OutputRequest:
    """The request for ``folder`` by ``--max_shard_size`` or ``--out_shard_size``, ``--overwrite``, ``--quiet``, and
    ``--to_mindspore`` where the command has it."""
    from mindformers_ext.jobs.merge.output import OutputRequest
    from mindformers_ext.jobs.merge.shard_size import shard_bytes

    given = vars(words)
    if "max_shard_size" in given:
        size = read_size(words.max_shard_size, "--max_shard_size", bare=True)
    else:
        size = shard_bytes(words.out_shard_size)
    return OutputRequest(
        folder=folder,
        shard_bytes=size,
        overwrite=words.overwrite,
        quiet=words.quiet,
        to_mindspore=given.get("to_mindspore"),
    )
