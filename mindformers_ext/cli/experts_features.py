# SPDX-License-Identifier: Apache-2.0
"""``features``: what a dense model computes inside, layer by layer, as data for gates."""

from __future__ import annotations

import argparse
import sys

from mindformers_ext.cli.experts_effects import CALIBRATION, check_effects
from mindformers_ext.cli.experts_flags import add_calibration, add_layers, add_model, add_writing, calibration, layers

EFFECTS = CALIBRATION


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    add_model(parser, "MODEL-Hidden-Features is made in here")
    add_layers(parser)
    add_calibration(parser)
    parser.add_argument("--save_interval", type=int, default=1, help="batches a file; default %(default)s")
    parser.add_argument("--format", default="pth", help="pth or npy; default %(default)s")
    add_writing(parser)
    # what torch.distributed.launch adds to a script's words; the same stands in LOCAL_RANK
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def run(words: argparse.Namespace) -> int:
    """Write the features, and say what was done."""
    from mindformers_ext.jobs.experts.features import FeatureRequest, write_features

    check_effects(words, sys.modules[__name__])
    request = FeatureRequest(
        calibration=calibration(words),
        save_path=words.save_path,
        template=words.templates,
        layers=layers(words),
        save_interval=words.save_interval,
        fmt=words.format,
        overwrite=words.overwrite,
        dry_run=words.dry_run,
    )
    report = write_features(request, lambda line: print(line, flush=True))
    if words.dry_run:
        print("nothing was written")
    elif not report.layers:
        print(f"{report.folder}: all layers were there already")
    else:
        print(f"{report.folder}: {report.layers} layers, {report.tokens} tokens, {report.nbytes / 1e9:.3f} GB in all")
    return 0
