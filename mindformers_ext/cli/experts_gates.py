# SPDX-License-Identifier: Apache-2.0
"""``gates``: gates of a LLaMA-MoE v2 from a dense model's hidden states, by clustering or as tokens drawn."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from mindformers_ext.cli.command import add_switch
from mindformers_ext.cli.experts_effects import CALIBRATION, Effect, check_effects
from mindformers_ext.cli.experts_flags import add_layer_table, layer_table

if TYPE_CHECKING:
    from mindformers_ext.jobs.experts.v2.gates import GatesRequest

CLUSTERED = Effect(lambda words: words.method == "clustering", "--method clustering")
EFFECTS = {
    **CALIBRATION,
    **dict.fromkeys(("balance_jitter_factor", "distance_metric", "max_iter", "n_jobs"), CLUSTERED),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    add = parser.add_argument
    add("--num_experts", type=int, default=16, metavar="E", help="experts per layer; default %(default)s")
    add("--method", default="clustering", help="clustering, or random: tokens drawn; default %(default)s")
    add(
        "--balance_jitter_factor",
        type=float,
        default=0.1,
        metavar="J",
        help="how much larger or smaller than the mean a cluster may be; 0 all alike; default %(default)s",
    )
    add("--distance_metric", default="l2", help="l2 or cos; default %(default)s")
    add("--max_iter", type=int, default=100, metavar="N", help="passes of the clustering; default %(default)s")
    add("--random_state", type=int, default=114514, metavar="N", help="of clusters and draws; default %(default)s")
    add("--n_jobs", type=int, default=10, metavar="N", help="beginnings, of which the best is taken; default 10")
    add(
        "--max_features",
        type=int,
        default=131072,
        metavar="N",
        help="tokens of a layer that are clustered; default %(default)s",
    )
    add_switch(parser, "--normalize_centers", text="gates of length 1 (the published program makes none)")
    add_layer_table(parser, "gate_weights.pt")


def run(words: argparse.Namespace) -> int:
    """Write the gates, and say where they are."""
    from mindformers_ext.jobs.experts.v2.gates import write_gates

    check_effects(words, sys.modules[__name__])
    request = request_of(words)
    table = write_gates(request, lambda line: print(line, flush=True))
    print("nothing was written" if table is None else f"{request.path}: gates of {len(table.layers)} layers")
    return 0


def request_of(words: argparse.Namespace) -> GatesRequest:
    """What the options ask for."""
    from mindformers_ext.jobs.experts.v2.gates import GatesRequest

    return GatesRequest(
        **layer_table(words),
        experts=words.num_experts,
        method=words.method,
        jitter=words.balance_jitter_factor,
        metric=words.distance_metric,
        passes=words.max_iter,
        seed=words.random_state,
        starts=words.n_jobs,
        features=words.max_features,
        normalise=words.normalize_centers,
    )
