# SPDX-License-Identifier: Apache-2.0
"""``importance``: how much the loss feels each neuron, per cluster of like texts, for the gradient split."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_ext.cli.experts_effects import CALIBRATION, check_effects
from mindformers_ext.cli.experts_flags import add_calibration, add_layers, add_writing, calibration, layers

if TYPE_CHECKING:
    from mindformers_ext.jobs.experts.importance import ImportanceRequest

EFFECTS = CALIBRATION


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    parser.add_argument("--model_path", type=Path, required=True, help="Hugging Face folder of a dense LLaMA")
    parser.add_argument("--save_path", type=Path, required=True, help="Gradients16/MODEL-Gradients-... is made in here")
    add_layers(parser)
    parser.add_argument("--num_clusters", type=int, default=16, help="clusters of texts; default %(default)s")
    parser.add_argument("--kernel", default="l1_norm", help="plain, l1_norm or l2_norm; default %(default)s")
    parser.add_argument(
        "--accumulate_level", default="sample", help="sample: kernel of each token; total: of the sum; default sample"
    )
    parser.add_argument(
        "--importance_type", default="feature_change", help="feature_grad or feature_change; default %(default)s"
    )
    add_calibration(parser)
    add_writing(parser)


def run(words: argparse.Namespace) -> int:
    """Write the vectors, and say where they are."""
    from mindformers_ext.jobs.experts.importance import write_importance

    check_effects(words, sys.modules[__name__])
    report = write_importance(request_of(words), lambda line: print(line, flush=True))
    if words.dry_run:
        print("nothing was written")
    elif report.whole:
        print(f"{report.folder}: vectors of {len(report.rows)} clusters")
    else:
        print(f"{report.folder}: this process has ended, the last one writes the vectors")
    return 0


def request_of(words: argparse.Namespace) -> ImportanceRequest:
    """What the options ask for."""
    from mindformers_ext.jobs.experts.importance import ImportanceRequest

    return ImportanceRequest(
        calibration=calibration(words),
        save_path=words.save_path,
        clusters=words.num_clusters,
        kernel=words.kernel,
        level=words.accumulate_level,
        kind=words.importance_type,
        layers=layers(words),
        overwrite=words.overwrite,
        dry_run=words.dry_run,
    )
