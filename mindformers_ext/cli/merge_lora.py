# SPDX-License-Identifier: Apache-2.0
"""``python tools/merge_lora.py``: LoRA adapters into the base weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from mindformers_ext.cli.command import Command, add_switch

EPILOG = """examples:
  python tools/merge_lora.py --base data/ms/mixtral.ckpt --adapter output/checkpoint --output data/ms/merged.ckpt
  python tools/merge_lora.py --base mixtral.ckpt --adapter adapter.ckpt --lora_scaling 1.0 --output merged.safetensors
"""


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--base", type=Path, required=True, help="whole checkpoint of the base, dense layout")
    parser.add_argument(
        "--adapter", type=Path, required=True, help="checkpoint of the run with pet_config, or its folder 'checkpoint'"
    )
    parser.add_argument("--output", type=Path, required=True, help=".ckpt or .safetensors to write")
    parser.add_argument(
        "--lora_scaling", type=float, help="lora_alpha / lora_rank (default: from the run's adapter_config.json)"
    )
    add_switch(parser, "--overwrite", text="replace an existing output")


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.checkpoint.merge_lora import merge_lora

    done = merge_lora(arguments.base, arguments.adapter, arguments.output, arguments.lora_scaling, arguments.overwrite)
    print(f"{arguments.output}: {done.tensors} tensors, adapters added to {len(done.layers)}, factor {done.scale:g}")
    return 0


COMMAND = Command(
    prog="merge_lora.py",
    description="Add the LoRA adapters of a finetuning run to the weights they were trained on: W + lora_alpha / "
    "lora_rank * B A. The result loads like the base, without pet_config.",
    epilog=EPILOG,
    options=_options,
    run=_run,
)
parser, main = COMMAND.parser, COMMAND.main
