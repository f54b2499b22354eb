# SPDX-License-Identifier: Apache-2.0
"""``python research/mixtral/convert_reversed.py``: ``convert_weight.py --reversed`` under its older options."""

from __future__ import annotations

import argparse
from pathlib import Path

from mindformers_ext.cli.command import Command
from mindformers_ext.cli.convert import add_common, run
from mindformers_ext.core.families import own_families

EPILOG = """examples:
  python research/mixtral/convert_reversed.py --mindspore_ckpt_path mixtral.ckpt --torch_ckpt_dir mixtral_hf/
  python research/mixtral/convert_reversed.py --mindspore_ckpt_path checkpoint/ --strategy_dir strategy/ \\
      --torch_ckpt_dir mixtral_hf/ --config Mixtral-8x7B-v0.1
"""


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--mindspore_ckpt_path", type=Path, required=True, help="checkpoint, or folder of rank folders")
    parser.add_argument("--torch_ckpt_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--model", choices=own_families(), help="model (default: what the configuration says)")
    add_common(parser)


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.checkpoint.convert import ConvertRequest, shard_bytes

    request = ConvertRequest(
        input_path=arguments.mindspore_ckpt_path,
        output_path=arguments.torch_ckpt_dir,
        direction="to_hf",
        model=arguments.model,
        dtype=arguments.dtype,
        config=arguments.config,
        input_layout=arguments.input_layout,
        strategy_dir=arguments.strategy_dir,
        max_shard_bytes=shard_bytes(arguments.max_shard_size, reverse=True),
        overwrite=arguments.overwrite,
        allow_overflow=arguments.allow_overflow,
    )
    return run(request, arguments.dry_run)


COMMAND = Command(
    prog="convert_reversed.py",
    description="Convert a MindSpore checkpoint of any layout to a Hugging Face folder.",
    epilog=EPILOG,
    options=_options,
    run=_run,
    blas_threads=False,
)
parser, main = COMMAND.parser, COMMAND.main
