# SPDX-License-Identifier: Apache-2.0
"""``python tools/merge.py yaml|moe CONFIG OUT``: merge models, or assemble them to a mixture of experts."""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_ext.cli.command import Command
from mindformers_ext.cli.merge_flags import adapted_dtype, check_flags, common, device_of, switch

if TYPE_CHECKING:
    from mindformers_ext.jobs.merge.output import MergeReport, OutputRequest

EPILOG = """examples (mergekit's YAML files and flags work as they are):
  python tools/merge.py yaml configs/merge/slerp.yaml merged --copy-tokenizer --out-shard-size 1B
  python tools/merge.py yaml configs/merge/ties.yaml merged --dry-run
  python tools/merge.py moe configs/merge/moe.yaml frankenmoe --to-mindspore frankenmoe.ckpt
"""
LAYOUTS = ("per_expert", "fused")


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="yaml|moe")
    commands.add_parser(
        "yaml",
        parents=[common()],
        allow_abbrev=False,
        help="merge dense models: slerp, ties, ...",
        description="Merge models of one architecture, as a YAML describes it.",
    )
    moe = commands.add_parser(
        "moe",
        parents=[common()],
        allow_abbrev=False,
        help="assemble a mixture of experts",
        description="Take the feed-forward parts of several models as experts.",
    )
    moe.add_argument(
        "--moe-layout",
        choices=LAYOUTS,
        default=LAYOUTS[0],
        help="how experts are stored: a matrix per expert (every reader), or fused (transformers 5 only)",
    )
    moe.add_argument(
        "--gate-scale", type=float, default=None, metavar="X", help="factor of the gate's rows (default 1)"
    )
    moe.add_argument("--load-in-4bit", action="store_true", help="refused: not available on CPU and NPU")
    moe.add_argument("--load-in-8bit", action="store_true", help="refused: not available on CPU and NPU")
    switch(
        moe, "--i-understand-this-is-not-useful-without-training", False, "allow experts that are all the same model"
    )


def run(arguments: argparse.Namespace) -> int:
    """Merge, or show the plan, and say what was done."""
    notes = check_flags(arguments)
    report = (_yaml if arguments.command == "yaml" else _moe)(arguments)
    if arguments.dry_run or arguments.verbose:
        for line in report.lines:
            print(f"  {line}")
    if not arguments.quiet:
        for note in [*notes, *report.notes]:
            print(f"note: {note}", file=sys.stderr)
    print(_summary(arguments, report))
    return 0


def _summary(arguments: argparse.Namespace, report: MergeReport) -> str:
    size = f"{arguments.out}: {report.tensors} tensors, {report.parameters / 1e6:.1f} M parameters, "
    size += f"{report.nbytes / 1e9:.3f} GB"
    if report.seconds is None:
        return f"{size} to write, {report.free / 1e9:.1f} GB free; nothing was written"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    speed = report.nbytes / 1e6 / max(report.seconds, 1e-9)
    return f"{size} in {report.seconds:.1f} s ({speed:.3g} MB/s), peak memory {peak} MB"


def _output(arguments: argparse.Namespace) -> OutputRequest:
    from mindformers_ext.jobs.merge.output import OutputRequest
    from mindformers_ext.jobs.merge.shard_size import shard_bytes

    return OutputRequest(
        folder=Path(arguments.out),
        shard_bytes=shard_bytes(arguments.out_shard_size),
        overwrite=arguments.overwrite,
        copy_tokenizer=arguments.copy_tokenizer,
        model_card=arguments.write_model_card,
        quiet=arguments.quiet,
        to_mindspore=Path(arguments.to_mindspore) if arguments.to_mindspore else None,
        report=Path(arguments.report) if arguments.report else None,
        threads=arguments.num_threads,
        download=arguments.download,
    )


def _yaml(arguments: argparse.Namespace) -> MergeReport:
    from mindformers_ext.jobs.merge.dense import MergeRequest, merge

    request = MergeRequest(
        config=Path(arguments.config),
        output=_output(arguments),
        allow_crimes=arguments.allow_crimes,
        truncate_embeddings=arguments.unsafe_truncate_embeddings,
        strict=arguments.strict,
        allow_overflow=arguments.allow_overflow,
        adapted=adapted_dtype(arguments),
        seed=arguments.random_seed,
        device=device_of(arguments),
    )
    return merge(request, write=not arguments.dry_run)


def _moe(arguments: argparse.Namespace) -> MergeReport:
    from mindformers_ext.jobs.merge.moe import MoERequest, assemble

    request = MoERequest(
        config=Path(arguments.config),
        output=_output(arguments),
        fused=arguments.moe_layout == "fused",
        gate_scale=arguments.gate_scale,
        untrained_is_fine=arguments.i_understand_this_is_not_useful_without_training,
        seed=arguments.random_seed,
        strict=arguments.strict,
        allow_overflow=arguments.allow_overflow,
        adapted=adapted_dtype(arguments),
        allow_crimes=arguments.allow_crimes,
        truncate_embeddings=arguments.unsafe_truncate_embeddings,
        device=device_of(arguments),
    )
    return assemble(request, write=not arguments.dry_run)


COMMAND = Command(
    prog="merge.py",
    description="Merge Hugging Face models in one pass over their files. Everything is checked before any data is "
    "read; the output folder appears whole or not at all.",
    epilog=EPILOG,
    options=_options,
    run=run,
    blas_threads=False,
)
parser, main = COMMAND.parser, COMMAND.main


if __name__ == "__main__":
    raise SystemExit(main())
