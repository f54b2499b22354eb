# SPDX-License-Identifier: Apache-2.0
"""``python tools/prune.py experts``: a mixture with fewer experts a layer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mindformers_ext.cli.model_folder import add_folder, output_of
from mindformers_ext.cli.text_options import add_texts, cost, texts_of

METHODS = "reap, frequency or random"


def experts_options(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face folder of a mixture of experts")
    parser.add_argument("output", type=Path, metavar="OUT", help="Hugging Face folder to write")
    add = parser.add_argument
    add("--method", default="reap", help=f"{METHODS}; default %(default)s")
    add("--keep", type=int, required=True, metavar="N", help="experts that stay in each layer")
    add("--seed", type=int, default=0, help="of the random choice; default %(default)s")
    add_folder(parser)
    add_texts(parser, required=False, mindspore=False)


def run_experts(words: argparse.Namespace) -> int:
    """Carry it out and say what the mixture lost."""
    from mindformers_ext.jobs.prune.experts import REPORT, ExpertsRequest, prune_experts

    report = prune_experts(
        ExpertsRequest(
            model=words.model,
            output=output_of(words, words.output),
            texts=texts_of(words),
            method=words.method,
            keep=words.keep,
            seed=words.seed,
        )
    )
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    for layer, found in report.content["layers"].items():
        print(f"layer {layer}: keeps {', '.join(map(str, found['kept']))}")
    if report.losses:
        print(f"on {report.judged} held-out tokens, written: {report.method}")
        print("\n".join(report.lines()))
    told = f" (told before: {report.memory / 1e9:.2f})" if report.memory else ""
    print(f"{words.output}: {cost(report.nbytes, report.seconds)}{told}; scores and losses are in {REPORT}")
    return 0
