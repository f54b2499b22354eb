# SPDX-License-Identifier: Apache-2.0
"""``distribution``: mean and variance of what a dense model's layers add, for ``align``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from mindformers_ext.cli.experts_effects import CALIBRATION, check_effects
from mindformers_ext.cli.experts_flags import add_layer_table, layer_table

if TYPE_CHECKING:
    from mindformers_ext.jobs.experts.v2.distribution import DistributionRequest

EFFECTS = CALIBRATION


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    add_layer_table(parser, "distribution.pt")


def run(words: argparse.Namespace) -> int:
    """Write the distribution, and say where it is."""
    from mindformers_ext.jobs.experts.v2.distribution import write_distribution

    check_effects(words, sys.modules[__name__])
    request = request_of(words)
    table = write_distribution(request, lambda line: print(line, flush=True))
    print("nothing was written" if table is None else f"{request.path}: {len(table.layers)} layers; align reads it")
    return 0


def request_of(words: argparse.Namespace) -> DistributionRequest:
    """What the options ask for."""
    from mindformers_ext.jobs.experts.v2.distribution import DistributionRequest

    return DistributionRequest(**layer_table(words))
