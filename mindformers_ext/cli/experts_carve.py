# SPDX-License-Identifier: Apache-2.0
"""``carve``: a dense folder becomes a mixture without training, one pass, and is judged beside simpler cuts."""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_ext.cli.model_folder import add_folder, output_of
from mindformers_ext.cli.text_options import add_texts, texts_of

if TYPE_CHECKING:
    from mindformers_ext.jobs.experts.carve.request import CarveRequest


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face folder of a dense LLaMA or Mistral")
    add("output", type=Path, metavar="OUT", help="folder to write")
    add("--experts", type=int, required=True, metavar="N", help="groups of neurons of one size, the shared included")
    text = "of them that every token passes; auto: found by how far each layer's predictions stray"
    add("--shared", type=number_or_auto, required=True, metavar="S", help=text)
    text = "of the others that are chosen for a token; with --shared auto, all that a token passes"
    add("--active", type=int, required=True, metavar="A", help=text)
    add("--method", default="emp", help="emp (default), cmoe, expertweaver, or static: no mixture, to compare")
    text = "ridge or mean_gate; with --format ours, threshold; to measure, also representative, oracle; default: the "
    text += "method's (emp: ridge)"
    add("--router", help=text)
    add("--refit", help="least_squares or none; default: the method's (of emp least_squares)")
    add(
        "--format",
        help="qwen2_moe (default), mixtral (default with --shared 0), ours (a LLaMA-MoE), none: the losses alone",
    )
    add("--ladder", default="short", help="what it is compared with: short (default), full or none")
    add("--dtype", metavar="TYPE", help="type of the written weights; default: the stored one")
    add("--to_mindspore", "--to-mindspore", type=Path, metavar="OUT.ckpt", help="also convert the result for MindSpore")
    add("--seed", type=int, default=0, help="of the draw of the calibration's rows and of splits; default %(default)s")
    add_folder(parser)
    add_texts(parser)


def run(words: argparse.Namespace) -> int:
    """Carve, and say what came out."""
    from mindformers_ext.jobs.experts.carve.run import carve

    report = carve(_request(words), lambda line: print(line, flush=True))
    print(*report.judged.lines(), sep="\n  ")
    print(*report.said, sep="\n", end="\n" if report.said else "")
    for note in report.written.notes if report.written and not words.quiet else ():
        print(f"note: {note}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    size = f"{report.written.nbytes / 1e9:.3f} GB" if report.written else "the losses"
    print(f"{words.output}: {size}, peak memory {peak:.2f} GB")
    return 0


def number_or_auto(word: str) -> int | None:
    """A number, None for "auto"."""
    return None if word == "auto" else int(word)


def _request(words: argparse.Namespace) -> CarveRequest:
    from mindformers_ext.core.families import MIXTRAL, QWEN2_MOE
    from mindformers_ext.jobs.experts.carve.request import CarveRequest, recipe_of

    auto = words.shared is None
    sizes = (words.experts, 1, words.active - 1) if auto else (words.experts, words.shared, words.active)
    recipe = recipe_of(words.method, words.router, words.refit, sizes, words.seed)
    stock = QWEN2_MOE.name if auto or words.shared > 0 else MIXTRAL.name
    return CarveRequest(
        model=words.model,
        output=output_of(words, words.output),
        texts=texts_of(words, words.seed),
        recipe=recipe,
        form=words.format or stock,
        ladder=words.ladder,
        dtype=words.dtype,
        auto=auto,
    )
