# SPDX-License-Identifier: Apache-2.0
"""``python tools/build_experts.py STAGE ...``: a dense LLaMA becomes a mixture of experts. Each stage has its file.

Each ``cli/experts_STAGE.py`` has ``configure(parser)``, which adds its options, and ``run(words)``, which does the work
and returns the exit code; it loads nothing heavy before ``run``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from typing import Any

from mindformers_ext.cli.command import Command

EPILOG = """examples:
  python tools/build_experts.py split --model_path llama_7B --save_path experts --num_experts 8
  python tools/build_experts.py convert --style mixtral --model_path llama_8B --save_path moe --num_experts 8 --top_k 2
  python tools/build_experts.py upcycle llama_8B moe --method drop --experts 8
  python tools/build_experts.py distribution --model_path llama_8B --save_path files --conversations chats.jsonl
  python tools/build_experts.py align --model_path moe --save_path aligned --conversations chats.jsonl \\
    --distribution_file files/distribution.pt
  python tools/build_experts.py split --help
"""
STAGES = {
    "split": "which neurons make up which expert",
    "features": "what the dense model computes inside, as data for gates",
    "importance": "how much the loss feels each neuron, for the gradient split",
    "gates": "gates of a LLaMA-MoE v2, by clusters of hidden states",
    "grads": "how much the loss feels each neuron, by cluster, for a LLaMA-MoE v2",
    "distribution": "what a dense model's layers add, in mean and variance, for align",
    "select": "fit the gates that choose experts",
    "carve": "a mixture without training, in one pass",
    "convert": "write the mixture, or the dense model again",
    "upcycle": "copies of a feed-forward become experts to train, or a mixture's experts more of them",
    "align": "bring a LLaMA-MoE v2's layers to the dense model's mean and variance",
    "run": "all stages from one YAML",
    "report": "one page of figures about a mixture",
}


def stage_module(stage: str) -> Any:
    """The file of one stage."""
    return importlib.import_module(f"{__package__}.experts_{stage}")


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    found = [stage for stage in STAGES if importlib.util.find_spec(f"{__package__}.experts_{stage}")]
    stages = parser.add_subparsers(dest="stage", required=True, metavar="|".join(found))
    for stage in found:
        text = f"{STAGES[stage][0].upper()}{STAGES[stage][1:]}."
        stage_module(stage).configure(
            stages.add_parser(stage, allow_abbrev=False, help=STAGES[stage], description=text)
        )


def _run(words: argparse.Namespace) -> int:
    code: int = stage_module(words.stage).run(words)
    return code


COMMAND = Command(
    prog="build_experts.py",
    description="Turn a dense LLaMA folder into a mixture of experts (LLaMA-MoE), stage by stage.",
    epilog=EPILOG,
    options=_options,
    run=_run,
)
parser, main = COMMAND.parser, COMMAND.main
