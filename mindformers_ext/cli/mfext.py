# SPDX-License-Identifier: Apache-2.0
"""``mfext NAME ...``: every command of a user under one name. Help and completion come from the table ``ROWS``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mindformers_ext import __version__
from mindformers_ext.cli.command import Command

PROG = "mfext"


@dataclass(frozen=True)
class Row:
    """One sub-command.

    module: its file in cli/; ``command``: the ``Command`` in it, "" where its ``main`` takes the name by which it is
    called. script: what the same is called by its older name, as its examples write it; "" for none. words: those that
    go before the user's.
    """

    name: str
    summary: str
    module: str
    command: str = "COMMAND"
    script: str = ""
    words: tuple[str, ...] = ()


PREPROCESS = "python tools/dataset_preprocess/llama/llama_preprocess.py"
ROWS = (
    Row("convert", "Hugging Face folders and MindSpore checkpoints into each other", "convert", "COMMAND",
        "python convert_weight.py"),
    Row("transform", "merge, cut and cut anew the ranks of a checkpoint", "transform_ckpt", "COMMAND",
        "python tools/transform_ckpt.py"),
    Row("merge", "merge models, or assemble them to a mixture of experts", "merge", "COMMAND", "python tools/merge.py"),
    Row("experts", "cut a dense LLaMA into a mixture of experts, stage by stage", "experts", "COMMAND",
        "python tools/build_experts.py"),
    Row("preprocess", "text and conversations to MindRecord files of token rows", "preprocess", "COMMAND", PREPROCESS),
    Row("mix", "proportions of a data mixture: plan, show, fit", "mix", "COMMAND", "python tools/mix.py"),
    Row("train", "train a model folder on a file, or a YAML", "first", "TRAIN"),
    Row("predict", "answer prompts with a model folder, or a YAML", "first", "PREDICT"),
    Row("eval", "perplexity of a model folder on a text, or of a YAML", "first", "EVAL"),
    Row("chat", "talk with a model folder, or a YAML", "first", "CHAT"),
    Row("dryrun", "compile a cluster's job for Ascend on this machine", "dryrun", "COMMAND", "python tools/dryrun.py"),
    Row("launch", "start a script in several processes (--torchrun: on PyTorch)", "launch", ""),
    Row("plot", "loss curve and expert load of a training run", "plot_run", "COMMAND", "python tools/plot_run.py"),
    Row("inspect", "what a weight file or folder holds", "inspect_ckpt", "COMMAND", "python tools/inspect_ckpt.py"),
    Row("parity", "transformers and our network on the same text", "check_parity", "COMMAND",
        "python tools/check_parity.py"),
    Row("mergekit-yaml", "merge yaml, by mergekit's name", "merge", words=("yaml",)),
    Row("mergekit-moe", "merge moe, by mergekit's name", "merge", words=("moe",)),
    Row("completion", "print completion of these names for a shell: bash, zsh or fish", "completion"),
)  # fmt: skip
EXAMPLES = """\
examples:
  mfext chat SmolLM2-135M-Instruct
  mfext predict SmolLM2-135M-Instruct "The capital of France is" --max_new_tokens 50
  mfext eval SmolLM2-135M-Instruct --text notes.txt
  mfext train SmolLM2-135M-Instruct --data notes.txt --save_yaml notes.yaml
  mfext convert --input_path Mixtral-8x7B-v0.1 --output_path mixtral.ckpt --dtype bf16
  eval "$(mfext completion bash)"
mfext NAME --help shows a command's options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that ``argv`` names; 2 where it names none."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"{PROG} {__version__}")
        return 0
    row = next((row for row in ROWS if row.name == name), None)
    if row is None:
        from mindformers_ext.core.errors import nearest

        what = f"no command is called '{name}': {nearest(name, [row.name for row in ROWS])}" if name else "name one"
        print(f"error: {what} ({PROG} --help lists all)", file=sys.stderr)
        return 2
    if not row.command:
        code: int = _module(row).main(rest, prog=f"{PROG} {row.name}")
        return code
    return command_of(row).main(rest)


def usage() -> str:
    """The text of ``--help``."""
    width = max(len(row.name) for row in ROWS)
    lines = [f"  {row.name:<{width}}  {row.summary}" for row in ROWS]
    return "\n".join([f"usage: {PROG} NAME ...", "", "commands:", *lines, "", EXAMPLES])


def command_of(row: Row) -> Command:
    """The row's command under its name here; its examples too."""
    found: Command = getattr(_module(row), row.command)
    texts: dict[str, Any] = {"prog": f"{PROG} {row.name}", "epilog": renamed(found.epilog)}
    if row.words:
        texts["read"] = partial(_read_behind, row)
    return replace(found, **texts)


def renamed(text: str) -> str:
    """``text`` with every older name in its place."""
    for row in ROWS:
        if row.script:
            text = text.replace(row.script, f"{PROG} {row.name}")
    return text


def _read_behind(row: Row, parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments behind the row's own words, which its help does not show."""
    inner = parser
    for word in row.words:
        (inner,) = (action.choices[word] for action in inner._actions if isinstance(action.choices, dict))
        inner.prog = parser.prog
    return parser.parse_args([*row.words, *(argv or ())])


def _module(row: Row) -> Any:
    return importlib.import_module(f"mindformers_ext.cli.{row.module}")
