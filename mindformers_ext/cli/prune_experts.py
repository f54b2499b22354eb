# SPDX-License-Identifier: Apache-2.0
"""``python tools/prune.py experts``: a mixture with fewer experts a layer."""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path

from mindformers_ext.cli.command import add_switch
from mindformers_ext.core.byte_sizes import read_size

METHODS = "reap, frequency or random"


def experts_options(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face folder of a mixture of experts")
    parser.add_argument("output", type=Path, metavar="OUT", help="Hugging Face folder to write")
    add = parser.add_argument
    add("--method", default="reap", help=f"{METHODS}; default %(default)s")
    add("--keep", type=int, required=True, metavar="N", help="experts that stay in each layer")
    add(
        "--calibration", type=Path, nargs="+", default=[], metavar="FILE", help="plain texts whose tokens score experts"
    )
    add(
        "--held_out", type=Path, nargs="+", default=[], metavar="FILE", help="texts that judge; default: the last fifth"
    )
    add("--tokens", type=int, default=32768, metavar="T", help="of all texts of a kind; default %(default)s")
    add("--block_size", type=int, help="tokens a row; default 2048, or as many as the model has positions for")
    add("--seed", type=int, default=0, help="of the random choice; default %(default)s")
    add("--device_target", default="CPU", help="CPU or GPU; default %(default)s")
    add("--device_id", type=int, default=0, help="number of the device; default %(default)s")
    add("--max_shard_size", default="5GB", metavar="SIZE", help="bytes of one shard; default %(default)s")
    add_switch(parser, "--overwrite", text="replace an existing folder")
    add_switch(parser, "--quiet", text="no progress bar")


def run_experts(words: argparse.Namespace) -> int:
    """Carry it out and say what the mixture lost."""
    from mindformers_ext.jobs.merge.output import OutputRequest
    from mindformers_ext.jobs.prune.experts import REPORT, ExpertsRequest, prune_experts

    out = OutputRequest(
        folder=words.output,
        shard_bytes=read_size(words.max_shard_size, "--max_shard_size", bare=True),
        overwrite=words.overwrite,
        quiet=words.quiet,
    )
    names = "model method keep calibration held_out tokens block_size seed device_target device_id quiet".split()
    report = prune_experts(ExpertsRequest(output=out, **{name: getattr(words, name) for name in names}))
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    for layer, found in report.content["layers"].items():
        print(f"layer {layer}: keeps {', '.join(map(str, found['kept']))}")
    if report.losses:
        print(f"on {report.judged} held-out tokens, written: {report.method}")
        print("\n".join(report.lines()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    told = f" (told before: {report.memory / 1e9:.2f})" if report.memory else ""
    print(
        f"{words.output}: {report.nbytes / 1e9:.3f} GB in {report.seconds:.1f} s, {peak:.2f} GB of memory{told}; "
        f"scores and losses are in {REPORT}"
    )
    return 0
