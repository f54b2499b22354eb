# SPDX-License-Identifier: Apache-2.0
"""What commands have that measure a model on some text and judge it on other: texts, and what is said at the end."""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindformers_ext.jobs.experts.texts import Texts


def add_texts(parser: argparse.ArgumentParser, required: bool = True, mindspore: bool = True) -> None:
    """Texts, rows, engine and device. ``mindspore``: it can do the work, too."""
    add = parser.add_argument_group("texts").add_argument
    files: dict[str, Any] = {"type": Path, "nargs": "+", "default": [], "metavar": "FILE"}
    add("--calibration", required=required, help="plain texts to measure on", **files)
    add("--tokens", type=int, default=16384, help="that are measured, in equal shares; default %(default)s")
    add("--held_out", "--eval_text", help="texts to judge on; default: what follows in those of --calibration", **files)
    add(
        "--held_out_tokens",
        "--eval_tokens",
        type=int,
        default=8192,
        help="that judge, in equal shares; default %(default)s",
    )
    add("--block_size", type=int, help="tokens a row; default 1024, or as many as the model has positions for")
    engines, devices = "pt (PyTorch)", "CPU or GPU"
    if mindspore:
        engines, devices = f"{engines} or ms (MindSpore)", "CPU, GPU or Ascend"
    add("--engine", default="pt", help=f"{engines}; default %(default)s")
    add("--device_target", default="CPU", help=f"{devices}; default %(default)s")
    add("--device_id", type=int, default=0, help="number of the device; default %(default)s")


def texts_of(words: argparse.Namespace, seed: int | None = None) -> Texts:
    """The request in the words of ``add_texts``. ``seed``: of the order of rows."""
    from mindformers_ext.jobs.experts.texts import Texts

    return Texts(
        calibration=tuple(words.calibration),
        tokens=words.tokens,
        held_out=tuple(words.held_out),
        held_out_tokens=words.held_out_tokens,
        block_size=words.block_size,
        engine=words.engine,
        device_target=words.device_target,
        device_id=words.device_id,
        quiet=words.quiet,
        seed=seed,
    )


def cost(nbytes: int, seconds: float) -> str:
    """What was written, in how long, and the memory of this process at its peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return f"{nbytes / 1e9:.3f} GB in {seconds:.1f} s, {peak:.2f} GB of memory"


def written(folder: Path, parameters: tuple[int, int], nbytes: int, seconds: float) -> str:
    """The last line of a cut of a dense model. ``parameters``: before and after."""
    before, after = parameters
    return f"{folder}: {after} of {before} weights ({after / before:.1%}), {cost(nbytes, seconds)}"
