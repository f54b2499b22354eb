# SPDX-License-Identifier: Apache-2.0
"""Options that several stages of ``build_experts.py`` have."""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ext.cli.command import add_switch
from mindformers_ext.cli.model_folder import add_out_shard_size

if TYPE_CHECKING:
    from mindformers_ext.jobs.experts.calibration import Calibration
    from mindformers_ext.jobs.merge.output import MergeReport

TEMPLATE = "layers.{}.mlp.gate_proj.weight"


def add_model(parser: argparse.ArgumentParser, save: str) -> None:
    """The model, the output and the template."""
    parser.add_argument("--model_path", type=Path, required=True, help="Hugging Face folder of a dense LLaMA")
    parser.add_argument("--save_path", type=Path, required=True, help=save)
    parser.add_argument(
        "--templates",
        "--template",
        dest="templates",
        default=TEMPLATE,
        help="the matrix to go by, gate_proj or up_proj; default %(default)s",
    )


def add_layers(parser: argparse.ArgumentParser) -> None:
    """Which layers."""
    parser.add_argument(
        "--specify_layer", type=int, nargs="+", metavar="N", help="numbers of layers; without it all layers"
    )


def add_calibration(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Texts, rows, engine and device."""
    group = parser.add_argument_group("texts" if required else "texts (with --stream)")
    group.add_argument("--train_data_path", type=Path, help="folder with *commoncrawl*.jsonl, *c4*.jsonl, ...")
    group.add_argument("--train_data_cache_path", type=Path, help="folder where tokens are kept for the next time")
    group.add_argument("--text", type=Path, help="one plain text file instead")
    group.add_argument(
        "--domain_weights",
        type=weights,
        metavar="KEY=N,...",
        help="weights of other domains than LLaMA's: wiki=3,code=1",
    )
    share = "share of the texts; default 0.01" + ("" if required else ". Of features: share of the files; default 1")
    group.add_argument("--data_use_percent", type=float, help=share)
    most = "tokens at most" + ("" if required else ". Of features: tokens of a layer; default 262144")
    group.add_argument("--max_tokens", type=int, help=most)
    group.add_argument("--block_size", type=int, default=2048, help="tokens a row; default %(default)s")
    group.add_argument("--batch_size", type=int, default=4, help="rows a batch; default %(default)s")
    group.add_argument("--seed", type=int, default=0, help="of every draw; default %(default)s")
    group.add_argument("--engine", default="pt", help="pt (PyTorch) or ms (MindSpore); default %(default)s")
    group.add_argument("--device_target", default="CPU", help="CPU, GPU or Ascend; default %(default)s")
    group.add_argument("--device_id", type=int, default=0, help="number of the device; default %(default)s")


def add_conversations(parser: argparse.ArgumentParser) -> None:
    """Texts that are conversations, by the tokenizer's chat template; their answers are what is predicted."""
    parser.add_argument(
        "--conversations", type=Path, metavar="FILE", help="instead of texts: .json or .jsonl of conversations"
    )


def add_layer_table(parser: argparse.ArgumentParser, file: str) -> None:
    """What is asked of a stage that writes a value per layer of a dense model, as ``file``."""
    parser.add_argument("--model_path", type=Path, required=True, help="Hugging Face folder of a dense LLaMA")
    parser.add_argument("--save_path", type=Path, required=True, help=f"folder in which {file} is made")
    parser.add_argument("--format", default="pt", help="pt, npz or json; default %(default)s")
    add_calibration(parser)
    add_conversations(parser)
    add_writing(parser)


def layer_table(words: argparse.Namespace) -> dict[str, Any]:
    """The words of ``add_layer_table`` as those of ``jobs.experts.v2.table_stage.TableRequest``."""
    return {
        "calibration": calibration(words),
        "save_path": words.save_path,
        "fmt": words.format,
        "overwrite": words.overwrite,
        "dry_run": words.dry_run,
    }


def add_writing(parser: argparse.ArgumentParser) -> None:
    """How outputs are written."""
    for name, text in (
        ("--overwrite", "replace what stands there"),
        ("--dry_run", "say what it would take, and do nothing"),
        ("--quiet", "no progress"),
    ):
        add_switch(parser, name, text=text)


def add_model_output(parser: argparse.ArgumentParser) -> None:
    """How a model's folder is written."""
    add = parser.add_argument
    add("--to_mindspore", "--to-mindspore", type=Path, metavar="OUT.ckpt", help="also convert the result for MindSpore")
    add_out_shard_size(parser)


def tell_report(folder: Path, report: MergeReport, quiet: bool) -> None:
    """Say what was written to ``folder``, or would be."""
    if not quiet:
        for note in report.notes:
            print(f"note: {note}", file=sys.stderr)
    size = f"{report.tensors} tensors, {report.parameters / 1e6:.1f} M parameters, {report.nbytes / 1e9:.3f} GB"
    if report.seconds is None:
        print(f"{folder}: {size} to write, {report.free / 1e9:.1f} GB free; nothing was written")
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"{folder}: {size} in {report.seconds:.1f} s, peak memory {peak} MB")


def calibration(words: argparse.Namespace) -> Calibration:
    """The request in the words of ``add_calibration``."""
    from mindformers_ext.jobs.experts.calibration import Calibration

    more: dict[str, Any] = {"domains": words.domain_weights} if words.domain_weights else {}
    return Calibration(
        model_path=words.model_path,
        train_data_path=words.train_data_path,
        train_data_cache_path=words.train_data_cache_path,
        text=words.text,
        conversations=getattr(words, "conversations", None),
        data_use_percent=0.01 if words.data_use_percent is None else words.data_use_percent,
        block_size=words.block_size,
        batch_size=words.batch_size,
        max_tokens=words.max_tokens,
        seed=words.seed,
        engine=words.engine,
        device_target=words.device_target,
        device_id=words.device_id,
        quiet=words.quiet,
        **more,
    )


def layers(words: argparse.Namespace) -> tuple[int, ...] | None:
    """The layers asked for; None where none are named."""
    return tuple(words.specify_layer) if words.specify_layer is not None else None


def weights(text: str) -> dict[str, int]:
    """``wiki=3,code=1`` as a table."""
    found: dict[str, int] = {}
    for part in text.split(","):
        key, _, number = part.partition("=")
        if not key.isidentifier() or not number.isdecimal() or int(number) < 1 or key in found:
            raise argparse.ArgumentTypeError(f"'{part}' is no domain with its weight: write KEY=N,KEY=N")
        found[key] = int(number)
    return found
