# SPDX-License-Identifier: Apache-2.0
"""``python tools/prune.py masks|cut|shape|depth|report|experts``: a dense model cut to a smaller shape, by the masks of
a pruning run or in one shot, and a mixture to fewer experts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mindformers_ext.cli.command import Command, Subcommand, add_subcommands, add_switch, dtype
from mindformers_ext.cli.model_folder import add_folder, output_of
from mindformers_ext.cli.prune_experts import experts_options, run_experts
from mindformers_ext.cli.prune_one_shot import DEPTH, SHAPE
from mindformers_ext.cli.text_options import written

EPILOG = """examples:
  python tools/prune.py masks output/prune --output masks.npz
  python tools/prune.py cut output/prune --output pruned --base Llama-2-7b-hf --next_yaml continue.yaml
  python tools/prune.py cut Llama-2-7b-hf --masks masks.npz --output pruned
  python tools/prune.py shape Llama-2-7b-hf pruned --method minitron --fewer_parameters 0.2 --calibration text.txt
  python tools/prune.py depth Llama-2-7b-hf pruned --method bi --keep 28 --calibration text.txt
  python tools/prune.py report pruned
  python tools/prune.py experts Mixtral-8x7B-v0.1 mixtral-6x7b --keep 6 --calibration code.txt wiki.txt
exit code 3: the masks have not come to the target's shape, and nothing was written
"""
NOT_REACHED = 3


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_subcommands(parser, COMMANDS)


def _run(words: argparse.Namespace) -> int:
    from mindformers_ext.jobs.prune.report import NotReachedError

    try:
        return COMMANDS[words.command].run(words)
    except NotReachedError as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_REACHED


def _add_run(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("model", type=Path, metavar="RUN", help=text)
    parser.add_argument(
        "--config", type=Path, metavar="YAML", help="the run's, where none lies in its output_dir (run_config/)"
    )
    parser.add_argument(
        "--strategy_dir",
        type=Path,
        metavar="DIR",
        help="strategy files of slices; default: strategy/ in the output_dir",
    )


def _masks_options(parser: argparse.ArgumentParser) -> None:
    _add_run(parser, "checkpoint of a pruning run, or its output_dir")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.npz", help="masks by module")
    add_switch(parser, "--overwrite", text="replace an existing file")


def _masks(words: argparse.Namespace) -> int:
    from mindformers_ext.jobs.prune.masks_file import write_masks
    from mindformers_ext.jobs.prune.report import table
    from mindformers_ext.jobs.prune.trained import find_run, masks_of

    masks = masks_of(find_run(words.model, words.config, words.strategy_dir))
    write_masks(words.output, masks, words.overwrite)
    print("\n".join(table(masks)))
    print(f"wrote {words.output}")
    return 0


def _cut_options(parser: argparse.ArgumentParser) -> None:
    _add_run(parser, "Hugging Face folder (with --masks), or checkpoint of a pruning run, or its output_dir")
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="Hugging Face folder to write")
    add("--masks", type=Path, metavar="FILE.npz", help="that 'masks' has written; default: the checkpoint's own")
    add("--base", type=Path, metavar="DIR", help="the dense model's folder, for config.json and the tokenizer")
    add("--next_yaml", type=Path, metavar="YAML", help="write the YAML of continued pretraining")
    add("--dtype", type=dtype, metavar="TYPE", help="type of the written weights; default: the stored one")
    add_switch(parser, "--fold_lm_head", text="scale the head too, as LLM-Shearing did: not the masked model")
    add_switch(parser, "--force", text="cut although the masks have not come to the target's shape")
    add_folder(parser)


def _cut(words: argparse.Namespace) -> int:
    from mindformers_ext.jobs.prune.cut import CutRequest, cut
    from mindformers_ext.jobs.prune.report import table

    report = cut(
        CutRequest(
            model=words.model,
            output=output_of(words, words.output),
            masks=words.masks,
            config=words.config,
            strategies=words.strategy_dir,
            base=words.base,
            next_yaml=words.next_yaml,
            dtype=words.dtype,
            fold_head=words.fold_lm_head,
            force=words.force,
        )
    )
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print("\n".join(table(report.masks)))
    print(written(words.output, report.parameters, report.nbytes, report.seconds))
    return 0


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", type=Path, metavar="DIR|FILE.npz", help="a folder that 'cut' has written, or masks")


def _report(words: argparse.Namespace) -> int:
    from mindformers_ext.jobs.prune.masks_file import MASKS, read_masks
    from mindformers_ext.jobs.prune.report import table

    print("\n".join(table(read_masks(words.place / MASKS if words.place.is_dir() else words.place))))
    return 0


COMMANDS = {
    "masks": Subcommand("write the masks that a pruning run has come to", _masks_options, _masks),
    "cut": Subcommand("write the model that the masks leave", _cut_options, _cut),
    "shape": SHAPE,
    "depth": DEPTH,
    "report": Subcommand("show expected sizes beside the target's", _report_options, _report),
    "experts": Subcommand("take experts out of a mixture", experts_options, run_experts),
}
COMMAND = Command(
    prog="prune.py",
    description="Cut a dense model to a smaller shape: by the masks of a pruning run (Sheared-LLaMA), where the result "
    "is the masked model, exactly, or in one shot by what a pass over some text measures. Or take experts out of a "
    "mixture by what such text sends to them. Weights stream in blocks; outputs appear whole or not at all.",
    epilog=EPILOG,
    options=_options,
    run=_run,
)
parser, main = COMMAND.parser, COMMAND.main
