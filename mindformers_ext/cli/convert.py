# SPDX-License-Identifier: Apache-2.0
"""``python convert_weight.py``: Hugging Face folder <-> MindSpore checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mindformers_ext.cli.outcome import exit_code

EPILOG = """examples:
  python convert_weight.py --model mixtral --input_path Mixtral-8x7B-v0.1 --output_path mixtral.ckpt --dtype bf16
  python convert_weight.py --model mixtral --reversed --input_path mixtral.ckpt --output_path mixtral_hf
"""
BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def boolean(text: str) -> bool:
    """True or False from the words for them; "False" is False."""
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return BOOLEANS[text.lower()]


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog="convert_weight.py",
        description="Convert a Hugging Face model folder to a MindSpore checkpoint, or back with --reversed. "
        "Tensors stream one at a time; outputs appear whole or not at all.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("--model", choices=("llama", "mixtral"), help="model (default: what the configuration says)")
    _switch(result, "--reversed", "MindSpore to Hugging Face")
    result.add_argument(
        "--input_path", type=Path, required=True, help="Hugging Face folder; a checkpoint with --reversed"
    )
    result.add_argument(
        "--output_path", type=Path, required=True, help="X.ckpt or X.safetensors; a folder with --reversed"
    )
    result.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="type of the weights written (default: keep)")
    result.add_argument(
        "--config",
        type=Path,
        help="Hugging Face config.json or its folder (default: the input's own); with --reversed the folder's "
        "tokenizer files are copied too",
    )
    result.add_argument("--max_shard_size", help="largest shard written by --reversed (default 5GB)")
    _switch(result, "--overwrite", "replace an existing output")
    _switch(result, "--allow_overflow", "let values too large for --dtype become infinite")
    return result


def _switch(target: argparse.ArgumentParser, name: str, text: str) -> None:
    target.add_argument(name, type=boolean, nargs="?", const=True, default=False, metavar="True|False", help=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 2 on a user's mistake."""
    return exit_code(_run, parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.convert import ConvertRequest, convert, shard_bytes

    report = convert(
        ConvertRequest(
            input_path=arguments.input_path,
            output_path=arguments.output_path,
            reverse=arguments.reversed,
            model=arguments.model,
            dtype=arguments.dtype,
            config=arguments.config,
            max_shard_bytes=shard_bytes(arguments.max_shard_size, arguments.reversed),
            overwrite=arguments.overwrite,
            allow_overflow=arguments.allow_overflow,
        )
    )
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    for reason, names in report.ignored.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"left behind, {reason}: {names[0]}{more}")
    speed = report.nbytes / 1e6 / max(report.seconds, 1e-9)
    print(
        f"{arguments.output_path}: {report.tensors} tensors, {report.nbytes / 1e9:.3f} GB in {report.seconds:.1f} s "
        f"({speed:.0f} MB/s)"
    )
    return 0
