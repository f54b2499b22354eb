# SPDX-License-Identifier: Apache-2.0
"""``python tools/mix.py plan|fit|show``: the proportions of a data mixture before and behind training."""

from __future__ import annotations

import argparse
from pathlib import Path

from mindformers_ext.cli.command import Command, Subcommand, add_subcommands

EPILOG = """examples:
  python tools/mix.py plan --config configs/tiny/mixture_pretrain.yaml
  python tools/mix.py plan --dataset_dir prepared --split for_ft --preset llama --tokens 2e9
  python tools/mix.py show output/mixture
  python tools/mix.py fit sweep/run_* --output fit.json
  python tools/mix.py fit runs.jsonl --tokens 2e9 --available code=3e8 --available wiki=1e9 --repeat 4
"""


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_subcommands(parser, COMMANDS)


def _run(words: argparse.Namespace) -> int:
    return COMMANDS[words.command].run(words)


def named_number(text: str) -> tuple[str, float]:
    """ "code=0.5" as its name and its number."""
    name, mark, number = text.rpartition("=")
    try:
        return name, float(number) if mark and name else float("")
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=NUMBER, for example code=0.5") from None


def _fit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run, or a file of JSON lines"
    )
    parser.add_argument(
        "--weight",
        type=named_number,
        action="append",
        default=[],
        metavar="NAME=W",
        help="weight of a domain's loss in what is made least (default 1 each); may be repeated",
    )
    parser.add_argument("--tokens", type=positive, metavar="N", help="tokens of the run to come")
    parser.add_argument(
        "--available",
        type=named_number,
        action="append",
        default=[],
        metavar="NAME=N",
        help="tokens that a domain has; with --tokens its share is limited; may be repeated",
    )
    parser.add_argument(
        "--repeat", type=positive, default=4.0, metavar="R", help="passes over a domain at most (default 4)"
    )
    parser.add_argument("--drawings", type=int, default=100, metavar="N", help="fits for the error bars (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawings (default 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write everything as JSON")  # fmt: skip


def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return number


def _fit(words: argparse.Namespace) -> int:
    from mindformers_ext.jobs.mixing.fit import FitRequest, fit

    found = fit(
        FitRequest(
            words.runs,
            dict(words.weight),
            words.tokens,
            dict(words.available),
            words.repeat,
            words.drawings,
            words.seed,
            words.output,
        )
    )
    best, width = found.best, max(6, *map(len, found.names))
    print(f"{'domain':{width}}  proportion    +-       loss     +-    uniform   at most")
    for n, name in enumerate(found.names):
        print(
            f"{name:{width}}  {best.proportions[n]:9.4f} {best.spread[n]:7.4f}  {best.losses[n]:8.4f} "
            f"{best.loss_spread[n]:7.4f}  {found.uniform[n]:8.4f}  {found.caps[n]:7.4f}"
        )
    least, uniform = found.objective
    print(f"weighted loss by the law: {least:.4f}, at 1/{len(found.names)} each {uniform:.4f}")
    print(f"the best run measured: {found.seen_loss:.4f} ({found.seen})")
    print(f"{found.runs} runs, the law misses their losses by {found.missed:.2g} (root mean square)")
    for note in found.notes:
        print(f"note: {note}")
    if words.output:
        print(f'wrote {words.output}; its "proportion" goes into train_dataset.data_loader')
    return 0


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="YAML", help="of a run on a data mixture; options count before it"
    )
    parser.add_argument("--dataset_dir", metavar="DIR", help="a folder prepared by domain")
    parser.add_argument("--split", help="of that folder: for_prune or for_ft")
    parser.add_argument(
        "--proportion", type=named_number, action="append", metavar="NAME=P", help="of a domain; may be repeated"
    )
    parser.add_argument(
        "--preset", help="published names and proportions: llama, sheared_llama, uniform, sheared_1.3b, ..."
    )
    parser.add_argument("--update_type", help="how proportions start and move: constant, stratified, temperature, ...")
    parser.add_argument("--temperature", type=positive, metavar="T", help="of update_type temperature")
    parser.add_argument("--max_weight", type=positive, metavar="P", help="no proportion is above it")
    parser.add_argument("--tokens", type=positive, metavar="N", help="of the run (default: the YAML's epochs)")
    parser.add_argument(
        "--repeat", type=positive, default=4.0, metavar="R", help="passes beyond which a domain is named (default 4)"
    )


def _plan(words: argparse.Namespace) -> int:
    from mindformers_ext.jobs.mixing.plan import plan

    names = ("dataset_dir", "split", "preset", "update_type", "temperature", "max_weight")
    given = {name: getattr(words, name) for name in names if getattr(words, name) is not None}
    if words.proportion:
        given |= {"proportion": dict(words.proportion), "set_names": [name for name, _ in words.proportion]}
    found = plan(words.config, given, words.tokens, words.repeat)
    width = max(6, *(len(one.name) for one in found.domains))
    print(f"{found.rows} rows of {found.width} tokens ({found.rows * found.width:.3g}), update_type {found.rule}")
    print(f"{'domain':{width}}        rows   proportion   rows taken   passes   at most")
    for one in found.domains:
        print(
            f"{one.name:{width}}  {one.rows:10}   {one.proportion:10.4f}   {one.proportion * found.rows:10.0f}   "
            f"{one.passes:6.2f}   {one.most:7.2f}"
        )
    for note in found.notes:
        print(f"note: {note}")
    return 0


def _show_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run; the picture goes there")


def _show(words: argparse.Namespace) -> int:
    from mindformers_ext.jobs.mixing.show import show

    for run in words.runs:
        print(f"wrote {show(run)}")
    return 0


COMMANDS = {
    "plan": Subcommand("say how often a run repeats each domain", _plan_options, _plan),
    "show": Subcommand("draw proportions and losses by domain over a run's steps", _show_options, _show),
    "fit": Subcommand("find the proportions that several runs speak for", _fit_options, _fit),
}
COMMAND = Command(
    prog="mix.py",
    description="Proportions of a data mixture: what they mean before training, what runs have shown, what is best.",
    epilog=EPILOG,
    options=_options,
    run=_run,
)
parser, main = COMMAND.parser, COMMAND.main
