# SPDX-License-Identifier: Apache-2.0
"""``python tools/transform_ckpt.py``: merge, cut and cut anew the ranks of a MindSpore checkpoint."""

from __future__ import annotations

import argparse
import sys

from mindformers_ext.cli.command import Command, add_switch, optional_path
from mindformers_ext.core.errors import UserError

EPILOG = """examples:
  merge:     --src_ckpt_strategy output/strategy/ --src_ckpt_dir output/checkpoint/ --dst_ckpt_dir whole/
  cut:       --src_ckpt_dir mixtral.ckpt --dst_ckpt_strategy output/strategy/ --dst_ckpt_dir ranks/
  cut anew:  --src_ckpt_strategy old/strategy/ --dst_ckpt_strategy new/strategy/ --src_ckpt_dir .. --dst_ckpt_dir ..
The output is DST/rank_N/<prefix>N.ckpt. The same command goes on after an interruption.
"""
# option, other names (MindFormers' second tool), help
PATHS = (
    ("--src_ckpt_strategy", ("--src_strategy",), "strategy file or folder of the source; empty or None: it is whole"),
    ("--dst_ckpt_strategy", ("--dst_strategy",), "strategy file or folder of the target; empty or None: whole"),
    ("--src_ckpt_dir", ("--src_checkpoint",), "folder with rank_0, rank_1, .. (one file each), or a whole checkpoint"),
    ("--dst_ckpt_dir", ("--dst_checkpoint_dir",), "folder for rank_0, rank_1, .."),
)
NUMBERS = (
    ("--rank_id", "do the share of this rank alone, as --transform_process_num divides them (default: all ranks)"),
    ("--world_size", "ranks of the target; only checked, the strategy tells them"),
)


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    for name, others, text in PATHS:
        parser.add_argument(name, *others, type=optional_path, default="", metavar="PATH", help=text)
    parser.add_argument("--prefix", default="checkpoint_", help="start of the files' names (default checkpoint_)")
    for name, text in NUMBERS:
        parser.add_argument(name, type=int, help=text)
    parser.add_argument(
        "--transform_process_num", "--process_num", type=int, default=1, help="processes; must divide the target ranks"
    )
    add_switch(parser, "--transform_by_rank", text="accepted: files are always made rank by rank here")
    parser.add_argument("--output_format", choices=("ckpt", "safetensors"), help="default: the source's format")
    parser.add_argument("--pick", help="where a rank folder holds several files: last, or the end of the name (3_2)")
    parser.add_argument(
        "--unlisted",
        choices=("error", "copy"),
        default="error",
        help="tensors that the target strategy does not list: an error, or whole on every rank",
    )
    add_switch(
        parser, "--check_copies", text="compare what several source ranks hold alike (reads every file once more)"
    )
    add_switch(parser, "--overwrite", text="replace existing outputs")
    add_switch(parser, "--dry_run", text="check everything and print the plan, write nothing")


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.checkpoint.transform import TransformRequest, transform

    source, target = arguments.src_ckpt_dir, arguments.dst_ckpt_dir
    if source is None or target is None:
        raise UserError("--src_ckpt_dir and --dst_ckpt_dir are both needed: give the source and the folder to write")
    if not arguments.prefix or "/" in arguments.prefix or arguments.prefix.startswith("."):
        raise UserError(f"--prefix '{arguments.prefix}' must start a file name: no '/', not empty, no dot in front")
    report = transform(
        TransformRequest(
            src_ckpt_dir=source,
            dst_ckpt_dir=target,
            src_strategy=arguments.src_ckpt_strategy,
            dst_strategy=arguments.dst_ckpt_strategy,
            prefix=arguments.prefix,
            output_format=arguments.output_format,
            rank_id=arguments.rank_id,
            world_size=arguments.world_size,
            process_num=arguments.transform_process_num,
            unlisted=arguments.unlisted,
            pick=arguments.pick,
            check_copies=arguments.check_copies,
            overwrite=arguments.overwrite,
            dry_run=arguments.dry_run,
        )
    )
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    for reason, names in report.left.items():
        print(f"not written, {reason}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    if report.kept:
        print(f"kept from the interrupted run: {len(report.kept)} ranks")
    if arguments.dry_run:
        for path, tensors, size in report.files:
            print(f"would write {path}: {tensors} tensors, {size / 1e9:.3f} GB")
        return 0
    speed = report.nbytes / 1e6 / max(report.seconds, 1e-9)
    written = f"{report.nbytes / 1e9:.3f} GB in {report.seconds:.1f} s ({speed:.0f} MB/s)"
    print(f"{target}: {len(report.files)} ranks, {written}")
    return 0


COMMAND = Command(
    prog="transform_ckpt.py",
    description="Merge the ranks of a checkpoint, cut a whole one, or cut ranks anew, by MindSpore's strategy "
    "files. Tensors stream in pieces; everything is checked before the first byte is written.",
    epilog=EPILOG,
    options=_options,
    run=_run,
    blas_threads=False,
)
parser, main = COMMAND.parser, COMMAND.main
