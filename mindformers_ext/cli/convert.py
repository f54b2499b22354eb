# SPDX-License-Identifier: Apache-2.0
"""``python convert_weight.py``: Hugging Face folders and MindSpore checkpoints of any layout, into each other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_ext.cli.command import Command, add_switch, dtype, optional_path
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import LLAMA, own_families

if TYPE_CHECKING:
    from mindformers_ext.jobs.checkpoint.convert import ConvertRequest
    from mindformers_ext.weights.plan import Direction

EPILOG = """examples:
  Hugging Face to MindSpore, and back:
    python convert_weight.py --model mixtral --input_path Mixtral-8x7B-v0.1 --output_path mixtral.ckpt --dtype bf16
    python convert_weight.py --model mixtral --reversed --input_path mixtral.ckpt --output_path mixtral_hf/
  back from the slices of many ranks:
    python convert_weight.py --model mixtral --reversed --input_path checkpoint/ --output_path mixtral_hf/ \\
        --strategy_dir strategy/ --config Mixtral-8x7B-v0.1
  for predict with grouped matmul, from Hugging Face or from a MindSpore checkpoint:
    python convert_weight.py --use_gmm=True --dtype=fp16 --torch_ckpt_dir=Mixtral-8x7B-v0.1 \\
        --mindspore_ckpt_path=gmm.ckpt
    python convert_weight.py --use_gmm=True --dtype=fp16 --pre_ckpt_path=mixtral.ckpt --mindspore_ckpt_path=gmm.ckpt
"""
SEED_DTYPE = "fp16"  # what --mindspore_ckpt_path has always written without --dtype
MS_SUFFIXES = (".ckpt", ".safetensors")
COMPOSER = "composer"
# what a Composer checkpoint has no use for
NOT_COMPOSER = (
    *("torch_ckpt_idr", "torch_ckpt_dir", "mindspore_ckpt_path", "pre_ckpt_path", "use_gmm", "qkv_concat"),
    *("strategy_dir", "input_layout", "max_shard_size", "allow_overflow", "dry_run", "download"),
)


def add_common(target: argparse.ArgumentParser) -> None:
    """What both directions know."""
    target.add_argument(
        "--dtype",
        type=dtype,
        metavar="TYPE",
        help="type of the weights written: fp16, bf16, fp32 or another word for them such as bfloat16, half (default: "
        f"keep; {SEED_DTYPE} when --mindspore_ckpt_path is written)",
    )
    target.add_argument(
        "--config",
        type=optional_path,
        help="Hugging Face config.json or its folder (default: the input's own); with --reversed the folder's "
        "tokenizer files are copied too",
    )
    target.add_argument(
        "--strategy_dir",
        type=optional_path,
        help="strategy files of a sliced checkpoint; the input is then the folder above rank_0, rank_1, ...",
    )
    target.add_argument(
        "--input_layout",
        choices=("dense", "gmm"),
        help="how the experts of the MindSpore input lie, where neither its description nor its shapes tell",
    )
    target.add_argument("--max_shard_size", help="largest shard of a Hugging Face folder (default 5GB)")
    add_switch(target, "--overwrite", text="replace an existing output")
    add_switch(target, "--allow_overflow", text="let values too large for --dtype become infinite, and count them")
    add_switch(target, "--dry_run", text="check everything and print the plan, write nothing")


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--model", choices=own_families(), help="model (default: what the configuration says)")
    parser.add_argument(
        "--format",
        choices=("mindspore", COMPOSER),
        default="mindspore",
        help="of the output, with --reversed of the input: composer is LLM-Shearing's state_dict.pt, made from a "
        "Hugging Face folder or a MindSpore checkpoint; default %(default)s",
    )
    add_switch(parser, "--reversed", text="MindSpore to Hugging Face")
    parser.add_argument(
        "--input_path",
        type=Path,
        help="Hugging Face folder, or its one .safetensors file; a MindSpore checkpoint with --reversed or to change "
        "its layout",
    )
    parser.add_argument("--output_path", type=Path, help="X.ckpt or X.safetensors; a folder with --reversed")
    parser.add_argument("--torch_ckpt_dir", type=Path, help="Hugging Face folder (with --reversed: to write)")
    parser.add_argument("--torch_ckpt_idr", type=Path, help="the same, as an old document spells it")
    parser.add_argument("--pre_ckpt_path", type=Path, help="a MindSpore checkpoint to bring into another layout")
    parser.add_argument(
        "--mindspore_ckpt_path", type=Path, help="X.ckpt or X.safetensors to write (with --reversed: to read)"
    )
    add_switch(
        parser, "--download", text="fetch an input named OWNER/NAME from the hub where it was not downloaded yet"
    )
    add_switch(parser, "--use_gmm", text="write the experts transposed, as predict with grouped matmul wants them")
    add_switch(parser, "--qkv_concat", text="write q, k, v as one tensor (gate and up of a dense model too)")
    add_common(parser)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.format == COMPOSER:
        return _composer(arguments)
    return run(_request(arguments), arguments.dry_run)


def _composer(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.checkpoint.composer import save_composer, save_hugging_face

    for name in NOT_COMPOSER:
        if getattr(arguments, name):
            raise UserError(f"--{name} has no effect with --format {COMPOSER}: leave it out")
    if arguments.model not in (None, LLAMA.name):
        raise UserError(f"--model {arguments.model}: LLM-Shearing's format is LLaMA's alone")
    source = _one("input", {"--input_path": arguments.input_path})
    output = _one("output", {"--output_path": arguments.output_path})
    if arguments.reversed:
        report = save_hugging_face(source, output, {}, arguments.config, arguments.dtype, arguments.overwrite)
    else:
        report = save_composer(source, output, arguments.config, arguments.dtype, arguments.overwrite)
    _say(report.notes, {})
    print(f"{output}: {report.tensors} tensors, {report.nbytes / 1e9:.3f} GB")
    return 0


def _request(arguments: argparse.Namespace) -> ConvertRequest:
    from mindformers_ext.jobs.checkpoint.convert import ConvertRequest, shard_bytes
    from mindformers_ext.jobs.checkpoint.hub import find_folder
    from mindformers_ext.weights.layouts import DENSE, GMM, Layout

    source, target, direction = _paths(arguments)
    if arguments.download and direction != "to_ms":
        raise UserError(
            f"--download fetches a Hugging Face model, and '{source}' is a MindSpore checkpoint: leave it out"
        )
    source = find_folder(source, arguments.download) if direction == "to_ms" else source
    seed_form = arguments.mindspore_ckpt_path == target
    return ConvertRequest(
        input_path=source,
        output_path=target,
        direction=direction,
        model=arguments.model,
        dtype=arguments.dtype or (SEED_DTYPE if seed_form else None),
        config=arguments.config,
        layout=Layout(GMM if arguments.use_gmm else DENSE, arguments.qkv_concat),
        input_layout=arguments.input_layout,
        strategy_dir=arguments.strategy_dir,
        max_shard_bytes=shard_bytes(arguments.max_shard_size, direction == "to_hf"),
        overwrite=arguments.overwrite,
        allow_overflow=arguments.allow_overflow,
        refuse_gmm_twice=arguments.pre_ckpt_path is not None,
    )


def _paths(arguments: argparse.Namespace) -> tuple[Path, Path, Direction]:
    """Source, target and direction, from whichever names the user chose."""
    torch = {"--torch_ckpt_dir": arguments.torch_ckpt_dir, "--torch_ckpt_idr": arguments.torch_ckpt_idr}
    mindspore = {"--mindspore_ckpt_path": arguments.mindspore_ckpt_path}
    sources: dict[str, Path | None] = {"--input_path": arguments.input_path}
    targets: dict[str, Path | None] = {"--output_path": arguments.output_path}
    if arguments.torch_ckpt_idr:
        print("note: --torch_ckpt_idr is read as --torch_ckpt_dir", file=sys.stderr)
    if arguments.reversed:
        for name, value in (
            ("--pre_ckpt_path", arguments.pre_ckpt_path),
            ("--use_gmm", arguments.use_gmm),
            ("--qkv_concat", arguments.qkv_concat),
        ):
            if value:
                raise UserError(f"{name} does not go with --reversed: the checkpoint's own layout is found and undone")
        sources, targets = sources | mindspore, targets | torch
        return _one("input", sources), _one("output", targets), "to_hf"
    sources |= torch | {"--pre_ckpt_path": arguments.pre_ckpt_path}
    source, target = _one("input", sources), _one("output", targets | mindspore)
    from_ms = arguments.pre_ckpt_path or arguments.strategy_dir or _is_mindspore(source)
    if not from_ms and arguments.input_layout:
        raise UserError("--input_layout describes a MindSpore input, and the input is a Hugging Face folder")
    return source, target, "relayout" if from_ms else "to_ms"


def _is_mindspore(source: Path) -> bool:
    from mindformers_ext.jobs.checkpoint.source import is_hf_file

    return source.is_file() and source.suffix in MS_SUFFIXES and not is_hf_file(source)


def _one(what: str, given: Mapping[str, Path | None]) -> Path:
    found = {name: path for name, path in given.items() if path}
    if len(found) != 1:
        raise UserError(
            f"the {what} must be given once, found {', '.join(found) or 'nothing'}: pass one of " + ", ".join(given)
        )
    return next(iter(found.values()))


def run(request: ConvertRequest, dry_run: bool) -> int:
    """Convert, or show the plan, and say what was done."""
    from mindformers_ext.jobs.checkpoint.convert import convert, plan_only

    if dry_run:
        plan = plan_only(request)
        print(f"plan: {plan.source} -> {plan.target}")
        for line in plan.lines:
            print(f"  {line}")
        _say(plan.notes, plan.ignored)
        print(
            f"{request.output_path}: {len(plan.lines)} tensors, {plan.nbytes / 1e9:.3f} GB to write, "
            f"{plan.free / 1e9:.1f} GB free; nothing was written"
        )
        return 0
    report = convert(request)
    _say(report.notes, report.ignored)
    speed = report.nbytes / 1e6 / max(report.seconds, 1e-9)
    print(
        f"{request.output_path}: {report.tensors} tensors, {report.nbytes / 1e9:.3f} GB in {report.seconds:.1f} s "
        f"({speed:.0f} MB/s)"
    )
    return 0


def _say(notes: Sequence[str], ignored: Mapping[str, Sequence[str]]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for reason, names in ignored.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"left behind, {reason}: {names[0]}{more}")


COMMAND = Command(
    prog="convert_weight.py",
    description="Convert a Hugging Face model folder to a MindSpore checkpoint, back with --reversed, or one "
    "MindSpore layout to another. Tensors stream in blocks; outputs appear whole or not at all.",
    epilog=EPILOG,
    options=_options,
    run=_run,
    blas_threads=False,
)
parser, main = COMMAND.parser, COMMAND.main
