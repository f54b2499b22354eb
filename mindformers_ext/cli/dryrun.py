# SPDX-License-Identifier: Apache-2.0
"""``python tools/dryrun.py``: compile a cluster's job for Ascend on this machine, without an NPU."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from mindformers_ext.cli.command import Command, add_switch
from mindformers_ext.cli.run_flags import FLAGS, OneValue, apply_flags, read_arguments
from mindformers_ext.core.cluster.anchors import DEVICE
from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.errors import UserError

FAILED = 1
EPILOG = """\
examples:
  does it compile on 16 devices, and what does each pipeline stage hold and send?
    python tools/dryrun.py --config research/mixtral/mixtral_8x7b/pretrain_mixtral-8x7b.yaml --worker_num 16
  every rank, with the strategy files for transform_ckpt.py in output/dryrun/strategy:
    python tools/dryrun.py --config job.yaml --worker_num 16 --ranks all --out output/dryrun
  another split, given on the command line:
    python tools/dryrun.py --config job.yaml --worker_num 16 --parallel_config.data_parallel 4 \\
        --parallel_config.model_parallel 2 --parallel_config.use_seq_parallel True
  which splits fit devices of 64 GB, how large a micro batch, with how little recompute (nothing is compiled)?
    python tools/dryrun.py --config job.yaml --worker_num 16 --suggest --memory 64GB
  do the graphs compile that 8 devices answer prompts with, and is their memory enough?
    python tools/dryrun.py --config research/mixtral/mixtral_8x7b/predict_mixtral-8x7b.yaml --worker_num 8 \\
        --memory 64GB
Every option of run_mindformer.py (--epochs, --section.key, ...) works here as well.
"""
RANK_COMMAND = (sys.executable, "-m", "mindformers_ext.cli.dryrun_rank")  # each process that compiles
PACKAGES = ("mindformers_ext", "mindspore", "mindformers")
OWN = tuple("config worker_num ranks out memory suggest device jobs compare keep_graphs options".split())


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options: its own, and those of ``run_mindformer.py``."""
    parser.add_argument("--config", required=True, metavar="YAML", help="configuration file of the job")
    parser.add_argument(
        "--worker_num",
        type=int,
        metavar="N",
        help="devices of the whole job (needed but with --suggest, where it defaults to those of the file's split)",
    )
    parser.add_argument(
        "--ranks",
        default="stages",
        metavar="WHICH",
        help="all, stages (the first rank of each pipeline stage) or numbers such as 0,8 (default stages)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for report.html, report.json, strategy/ and "
        "one log per rank (default output/dryrun/<name of the file>)",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="of one device, for example 64GB (10^9 bytes) or 64GiB: a job that needs more is refused",
    )
    add_switch(
        parser,
        "--suggest",
        text="list the splits that fit --memory (default context.max_device_memory), the cheapest "
        "first, and the largest micro batches with the least recompute, and compile nothing",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="with --suggest: whose published share of its peak is the tokens/s estimated from; another one than "
        f"{DEVICE} gives no estimate (default {DEVICE})",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="ranks compiled at a time (default: one per core)")
    add_switch(parser, "--compare", text="also compile MindFormers' own network for the same file")
    add_switch(parser, "--keep_graphs", text="keep MindSpore's graphs as text (large)")
    parser.set_defaults(output_dir=None)  # here it is --out
    for flag in (row for row in FLAGS if row.field != "output_dir"):
        more: dict[str, Any] = {"nargs": "+"} if flag.many else {}
        more |= {"choices": flag.choices} if flag.choices else {}
        parser.add_argument(
            *flag.names, dest=flag.field, type=flag.reader, action=OneValue, help=argparse.SUPPRESS, **more
        )
    parser.add_argument("--options", nargs="+", metavar="KEY=VALUE", help=argparse.SUPPRESS)


def _read(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    return read_arguments(parser, argv, own=tuple(f"--{name}" for name in OWN))


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.dryrun.facts import RankFacts
    from mindformers_ext.jobs.dryrun.page import write_page
    from mindformers_ext.jobs.dryrun.plan import plan_dry_run
    from mindformers_ext.jobs.dryrun.progress import DryRunProgress
    from mindformers_ext.jobs.dryrun.ranks import RankJob, compile_ranks
    from mindformers_ext.jobs.dryrun.report import DryRunReport, report_text, write_json
    from mindformers_ext.jobs.dryrun.stubs import ensure_stubs
    from mindformers_ext.jobs.dryrun.suggest import suggestions
    from mindformers_ext.jobs.run.display import choose_sink

    path = Path(arguments.config)
    config = apply_flags(load_yaml(path), arguments)
    if config.get("run_mode") == "predict":
        _check_words_of_training(arguments)
    if arguments.suggest:
        words = arguments.worker_num, arguments.memory, DEVICE if arguments.device is None else arguments.device
        print("\n".join(suggestions(config, str(path), *words)))
        return 0
    if arguments.device is not None:
        raise UserError("--device belongs to --suggest, which estimates tokens a second: add that, or leave it out")
    if arguments.worker_num is None:
        raise UserError("--worker_num is missing: give the number of devices of the whole job")
    out = (arguments.out or Path("output") / "dryrun" / path.stem).resolve()
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: give 1 or more")
    plan = plan_dry_run(config, str(path), arguments.worker_num, arguments.ranks, out, arguments.memory)
    stubs = ensure_stubs()

    at_once = arguments.jobs or os.cpu_count() or 1

    def compiled(native: bool) -> tuple[RankFacts, ...]:
        job = RankJob(
            plan=plan,
            stubs=stubs,
            command=RANK_COMMAND,
            folder=out / ("native" if native else "ranks"),
            native=native,
            keep_graphs=arguments.keep_graphs,
            at_once=at_once,
        )
        what = "MindFormers' own network" if native else str(path)
        progress = DryRunProgress(plan, at_once, choose_sink(sys.stderr, {"TERM": os.environ.get("TERM", "")}), what)
        with progress.ticking():
            return tuple(compile_ranks(job, progress.ended, progress.reached))

    ranks = compiled(native=False)
    report = DryRunReport(str(path), plan, ranks, compiled(native=True) if arguments.compare else (), _made(arguments))
    write_json(report, out / "report.json")
    write_page(report, out / "report.html")
    print(report_text(report))
    strategy = "" if plan.shape else "strategy/, "
    print(f"{out}: report.html, report.json, {strategy}ranks/rank_*/log.txt")
    return 0 if report.compiles else FAILED


def _made(arguments: argparse.Namespace) -> tuple[tuple[str, str], ...]:
    """How the report comes about, for its reader."""
    given = [
        (flag.names[0], getattr(arguments, flag.field)) for flag in FLAGS if getattr(arguments, flag.field) is not None
    ]
    options = [f"{name} {value}" for name, value in (*given, *((f"--{key}", text) for key, text in arguments.pairs))]
    return (
        ("command", shlex.join(["python", *sys.argv])),
        ("options over the file", ", ".join(options) or "none"),
        ("versions", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)),
        ("date", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")),
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _check_words_of_training(arguments: argparse.Namespace) -> None:
    """Options without a meaning for a prediction."""
    if arguments.suggest:
        raise UserError(
            "--suggest lists the splits of a training step; a prediction is cut over all devices by "
            "model_parallel, and --memory says how many are enough"
        )
    if arguments.compare:
        raise UserError("--compare compiles MindFormers' training step; leave it out for a prediction")


COMMAND = Command(
    prog="dryrun.py",
    description="Compile a cluster's job, its training step or the graphs of its prediction, with MindSpore's "
    "Ascend compiler, rank by rank, and "
    "report whether it compiles, what each rank holds and what it sends. Needs a C compiler, no NPU and no CANN.",
    epilog=EPILOG,
    options=_options,
    read=_read,
    run=_run,
)
parser, main = COMMAND.parser, COMMAND.main
