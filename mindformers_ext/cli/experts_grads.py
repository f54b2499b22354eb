# SPDX-License-Identifier: Apache-2.0
"""``grads``: how much the loss feels each neuron on the tokens of each cluster, for ``split --method gradient``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_ext.cli.experts_effects import CALIBRATION, check_effects
from mindformers_ext.cli.experts_flags import add_layer_table, layer_table

if TYPE_CHECKING:
    from mindformers_ext.jobs.experts.v2.scores import ScoresRequest

EFFECTS = CALIBRATION


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    add = parser.add_argument
    add("--gate_weights_file", type=Path, required=True, metavar="FILE", help="what gates wrote")
    add_layer_table(parser, "importance_scores.pt")


def run(words: argparse.Namespace) -> int:
    """Write the scores, and say where they are."""
    from mindformers_ext.jobs.experts.v2.scores import write_scores

    check_effects(words, sys.modules[__name__])
    request = request_of(words)
    table = write_scores(request, lambda line: print(line, flush=True))
    if table is not None:
        print(f"{request.path}: scores of {len(table.layers)} layers; split --method gradient makes neurons of them")
    else:
        ended = "this process has ended, the last one writes the scores"
        print("nothing was written" if words.dry_run else f"{request.path}: {ended}")
    return 0


def request_of(words: argparse.Namespace) -> ScoresRequest:
    """What the options ask for."""
    from mindformers_ext.jobs.experts.v2.scores import ScoresRequest

    return ScoresRequest(**layer_table(words), gates=words.gate_weights_file)
