# SPDX-License-Identifier: Apache-2.0
"""``tools/prune.py shape|depth``: a dense model cut to a smaller shape by what one pass over some text measures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ext.cli.command import Subcommand, add_switch
from mindformers_ext.cli.model_folder import add_folder, output_of
from mindformers_ext.cli.text_options import add_texts, texts_of, written

if TYPE_CHECKING:
    from mindformers_ext.jobs.prune.one_shot.cuts import OneShotReport


def _common(parser: argparse.ArgumentParser, methods: str) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face folder of a dense LLaMA")
    add("output", type=Path, metavar="OUT", help="Hugging Face folder to write")
    add("--method", required=True, metavar="NAME", help=methods)
    add(
        "--next_yaml", type=Path, metavar="YAML", help="write the YAML of continued pretraining, made from --train_yaml"
    )
    add("--train_yaml", type=Path, metavar="YAML", help="a training YAML of the dense model")
    add("--importance", type=Path, metavar="FILE.npz", help="what was measured; default: beside OUT, named after MODEL")
    add_switch(parser, "--remake_importance", text="measure anew, whatever the file holds")
    add("--seed", type=int, default=0, help="of the random cut beside it; default %(default)s")
    add_folder(parser)
    add_texts(parser)


def _shape_options(parser: argparse.ArgumentParser) -> None:
    _common(parser, "magnitude, minitron, flap or taylor")
    add = parser.add_argument
    add(
        "--target",
        nargs="+",
        default=[],
        metavar="NAME=N",
        help="sizes to come to: hidden_size, num_attention_heads, num_key_value_heads, intermediate_size, "
        "num_hidden_layers",
    )
    add("--fewer_parameters", type=float, metavar="SHARE", help="of the whole model, instead of --target")
    add(
        "--axes",
        nargs="+",
        metavar="NAME",
        help="sizes that --fewer_parameters makes smaller: intermediate_size (default), num_attention_heads, "
        "hidden_size",
    )
    add("--refit", default="none", metavar="NAME", help="none (default), or least_squares: fit output matrices anew")
    add_switch(parser, "--bias", text="flap: what is cut leaves its mean as a bias (mlp_bias, attention_bias)")


def _depth_options(parser: argparse.ArgumentParser) -> None:
    _common(parser, "bi (how much a layer changes its input) or ppl (how much it is missed)")
    add = parser.add_argument
    add("--keep", type=int, metavar="N", help="layers that stay")
    add("--fewer_parameters", type=float, metavar="SHARE", help="of the whole model, instead of --keep")
    add("--order_tokens", type=int, default=4096, help="of the calibration that ppl tries on; default %(default)s")


def _request(words: argparse.Namespace) -> dict[str, Any]:
    """What both requests have in common."""
    return {
        "model": words.model,
        "output": output_of(words, words.output),
        "texts": texts_of(words),
        "method": words.method,
        "importance": words.importance,
        "remake": words.remake_importance,
        "seed": words.seed,
        "train_yaml": words.train_yaml,
        "next_yaml": words.next_yaml,
    }


def _shape(words: argparse.Namespace) -> int:
    from mindformers_ext.jobs.prune.one_shot.request import ShapeRequest
    from mindformers_ext.jobs.prune.one_shot.shape import prune_shape
    from mindformers_ext.jobs.prune.one_shot.targets import read_sizes

    request = ShapeRequest(
        **_request(words),
        sizes=read_sizes(words.target),
        fewer_parameters=words.fewer_parameters,
        axes=None if words.axes is None else tuple(words.axes),
        refit=words.refit,
        bias=words.bias,
    )
    return _show(words.output, prune_shape(request, _tell))


def _depth(words: argparse.Namespace) -> int:
    from mindformers_ext.jobs.prune.one_shot.depth import prune_depth
    from mindformers_ext.jobs.prune.one_shot.request import DepthRequest

    request = DepthRequest(
        **_request(words),
        keep=words.keep,
        fewer_parameters=words.fewer_parameters,
        order_tokens=words.order_tokens,
    )
    return _show(words.output, prune_depth(request, _tell))


def _tell(line: str) -> None:
    print(line, flush=True)


def _show(output: Path, report: OneShotReport) -> int:
    from mindformers_ext.jobs.prune.report import table

    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print("\n".join(table(report.masks)))
    if report.fits:
        before, after = (
            sum(getattr(fit, name) for fit in report.fits) / len(report.fits) for name in ("before", "after")
        )
        print(f"least squares: error of an output matrix {before:.4f} of its output on average, fitted {after:.4f}")
    print("\n".join(report.judgement.lines()))
    print(written(output, report.parameters, report.nbytes, report.seconds))
    return 0


SHAPE = Subcommand("cut to a smaller shape in one shot", _shape_options, _shape)
DEPTH = Subcommand("leave whole layers out in one shot", _depth_options, _depth)
