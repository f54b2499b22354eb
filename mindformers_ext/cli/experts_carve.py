# SPDX-License-Identifier: Apache-2.0
"""``carve``: a dense folder becomes a mixture without training, one pass, and is judged beside simpler cuts."""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_ext.cli.experts_flags import add_switch

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
    text = "ridge or mean_gate; to measure, also representative, threshold, oracle; default: the method's (emp: ridge)"
    add("--router", help=text)
    add("--refit", help="least_squares or none; default: the method's (of emp least_squares)")
    add(
        "--format",
        help="qwen2_moe (default), mixtral (default with --shared 0), ours (a LLaMA-MoE), none: the losses alone",
    )
    add("--ladder", default="short", help="what it is compared with: short (default), full or none")
    add("--dtype", metavar="TYPE", help="type of the written weights; default: the stored one")
    add("--to_mindspore", "--to-mindspore", type=Path, metavar="OUT.ckpt", help="also convert the result for MindSpore")
    add("--max_shard_size", default="5GB", metavar="SIZE", help="bytes of one shard; default %(default)s")
    add_switch(parser, "--overwrite", text="replace an existing folder")
    add_switch(parser, "--quiet", text="no progress bar")
    add = parser.add_argument_group("texts").add_argument
    add("--calibration", type=Path, nargs="+", required=True, metavar="FILE", help="plain text to measure on")
    add("--tokens", type=int, default=16384, metavar="T", help="of it that are measured; default %(default)s")
    behind = "to judge on; default: what is left of the calibration"
    add("--held_out", "--eval_text", type=Path, nargs="+", default=[], metavar="FILE", help=behind)
    add("--held_out_tokens", "--eval_tokens", type=int, default=8192, help="of it that judge; default %(default)s")
    add("--block_size", type=int, default=512, help="tokens a row; default %(default)s")
    add("--seed", type=int, default=0, help="of the draw of the calibration's rows and of splits; default %(default)s")
    add("--engine", default="pt", help="pt (PyTorch) or ms (MindSpore); default %(default)s")
    add("--device_target", default="CPU", help="CPU, GPU or Ascend; default %(default)s")
    add("--device_id", type=int, default=0, help="number of the device; default %(default)s")


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
    from mindformers_ext.core.byte_sizes import read_size
    from mindformers_ext.core.families import MIXTRAL, QWEN2_MOE
    from mindformers_ext.jobs.experts.carve.request import CarveRequest, recipe_of
    from mindformers_ext.jobs.experts.texts import Texts
    from mindformers_ext.jobs.merge.output import OutputRequest

    texts = Texts(
        calibration=tuple(words.calibration),
        tokens=words.tokens,
        held_out=tuple(words.held_out),
        held_out_tokens=words.held_out_tokens,
        block_size=words.block_size,
        engine=words.engine,
        device_target=words.device_target,
        device_id=words.device_id,
        quiet=words.quiet,
        seed=words.seed,
    )
    auto = words.shared is None
    sizes = (words.experts, 1, words.active - 1) if auto else (words.experts, words.shared, words.active)
    recipe = recipe_of(words.method, words.router, words.refit, sizes, words.seed)
    output = OutputRequest(
        folder=words.output,
        shard_bytes=read_size(words.max_shard_size, "--max_shard_size", bare=True),
        overwrite=words.overwrite,
        quiet=words.quiet,
        to_mindspore=words.to_mindspore,
    )
    stock = QWEN2_MOE.name if auto or words.shared > 0 else MIXTRAL.name
    return CarveRequest(
        model=words.model,
        output=output,
        texts=texts,
        recipe=recipe,
        form=words.format or stock,
        ladder=words.ladder,
        dtype=words.dtype,
        auto=auto,
    )
