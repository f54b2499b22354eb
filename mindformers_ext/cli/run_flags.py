# SPDX-License-Identifier: Apache-2.0
"""The options of ``run_mindformer.py``: one row each, and how a row changes the configuration.

The rows are the union of MindFormers r1.3 to r1.7. Every other option is a dotted path (``core.config.overrides``).
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.cli.command import add_switch, boolean
from mindformers_ext.core.config.dtype_keys import name_dtypes
from mindformers_ext.core.config.overrides import apply_overrides, parse_dotted
from mindformers_ext.core.config.run import AUTO, DEVICES, ENGINES, RUN_MODES, TRAINER_KEY, TRAINERS
from mindformers_ext.core.errors import Problems, UserError, nearest


def boolean_or_name(text: str) -> bool | str:
    """True, False, or a checkpoint's file name."""
    return boolean(text) if text.lower() in ("true", "false") else text


@dataclass(frozen=True)
class Flag:
    """One option: its names, the dotted keys it sets ('' for none), its reader, its help and its choices."""

    names: tuple[str, ...]
    keys: tuple[str, ...]
    help: str
    reader: Callable[[str], Any] = str
    many: bool = False
    choices: tuple[str, ...] | None = None

    @property
    def field(self) -> str:
        """The attribute that argparse fills."""
        return self.names[0].removeprefix("--")


TRAIN_FILE, EVAL_FILE = "train_dataset.data_loader.dataset_dir", "eval_dataset.data_loader.dataset_dir"
FLAGS: tuple[Flag, ...] = (
    Flag(("--run_mode",), ("run_mode",), "train, finetune (the same), eval or predict", choices=RUN_MODES),
    Flag(("--mode",), ("context.mode",), "0 graph mode (fast), 1 pynative mode (for debugging)", int),
    Flag(("--device_target",), ("context.device_target",), "where to run", choices=DEVICES),
    Flag(
        ("--engine",),
        ("engine",),
        "ms MindSpore, pt PyTorch (default on GPU, and possible on CPU), auto the faster one for this run",
        choices=(*ENGINES, AUTO),
    ),
    Flag(
        ("--trainer",),
        (TRAINER_KEY,),
        "who trains: mindformers (its Trainer, default of ms) or own (our loop, on one device or in data parallel, "
        "without MindFormers; always so for pt)",
        choices=TRAINERS,
    ),
    Flag(("--device_id",), ("context.device_id",), "number of the device on this machine", int),
    Flag(
        ("--use_parallel",), ("use_parallel",), "run on several devices (start with scripts/msrun_launcher.sh)", boolean
    ),
    Flag(("--train_data", "--train_dataset_dir"), (TRAIN_FILE,), "MindRecord file or folder to train on"),
    Flag(
        ("--eval_data", "--eval_dataset_dir"),
        (EVAL_FILE,),
        "MindRecord file or folder, text or .jsonl file to evaluate on",
    ),
    Flag(
        ("--predict_data",),
        ("input_data",),
        "one or more prompts, a text file with one prompt a line, or - for standard input",
        many=True,
    ),
    Flag(("--predict_batch_size",), ("predict_batch_size",), "prompts computed together (default all)", int),
    Flag(("--modal_type",), ("modal_type",), "kinds of the prompts; only 'text' here", many=True),
    Flag(("--adapter_id",), ("adapter_id",), "LoRA adapters to predict with", many=True),
    Flag(
        ("--chat",),
        (),
        "True: prompts are messages, put into the tokenizer's chat template; with "
        "--predict_data - on a terminal a conversation",
        boolean,
    ),
    Flag(
        ("--eval_stride",), (), "eval of text: tokens from one window to the next (default the window, seq_length)", int
    ),
    Flag(("--hf",), (), "eval: a Hugging Face folder; transformers measures the same tokens with it"),
    Flag(("--do_sample",), ("model.model_config.do_sample",), "sample instead of taking the best token", boolean),
    Flag(("--max_new_tokens",), ("model.model_config.max_new_tokens",), "tokens of an answer at most", int),
    Flag(("--temperature",), ("model.model_config.temperature",), "sampling: below 1 safer, above 1 wilder", float),
    Flag(("--top_k",), ("model.model_config.top_k",), "sampling: among so many best tokens, 0 = all", int),
    Flag(("--top_p",), ("model.model_config.top_p",), "sampling: within this probability mass", float),
    Flag(("--load_checkpoint",), ("load_checkpoint",), "checkpoint file, or folder with rank_0, to start from"),
    Flag(
        ("--resume_training",),
        ("resume_training",),
        "True, or a file name: continue a run (steps, data position, "
        "schedule, optimizer, loss scale) from --load_checkpoint, by default <output_dir>/checkpoint",
        boolean_or_name,
    ),
    Flag(("--src_strategy_path_or_dir",), ("src_strategy_path_or_dir",), "strategy files of a sliced checkpoint"),
    Flag(("--auto_trans_ckpt",), ("auto_trans_ckpt",), "re-slice the checkpoint for this run's devices", boolean),
    Flag(("--transform_process_num",), ("transform_process_num",), "processes that re-slice", int),
    Flag(("--only_save_strategy",), ("only_save_strategy",), "stop once the strategy files are written", boolean),
    Flag(("--strategy_load_checkpoint",), ("parallel.strategy_ckpt_load_file",), "strategy file, or a folder of them"),
    Flag(("--epochs",), ("runner_config.epochs",), "passes over the training data", int),
    Flag(("--batch_size",), ("runner_config.batch_size",), "rows per device and micro batch", int),
    Flag(
        ("--gradient_accumulation_steps",),
        ("runner_config.gradient_accumulation_steps",),
        "micro batches per step",
        int,
    ),
    Flag(("--sink_mode",), ("runner_config.sink_mode",), "feed data through the device's queue (not on CPU)", boolean),
    Flag(
        ("--num_samples",),
        ("train_dataset.data_loader.num_samples", "eval_dataset.data_loader.num_samples"),
        "use only the first n rows",
        int,
    ),
    Flag(("--do_eval",), ("do_eval",), "also evaluate while training", boolean),
    Flag(("--seed",), ("seed",), "seed of weights and data order", int),
    Flag(("--output_dir",), ("output_dir",), "folder for checkpoints, metrics and logs (default ./output)"),
    Flag(("--profile",), ("profile",), "record a profile", boolean),
    Flag(("--remote_save_url",), ("remote_save_url",), "Huawei object store to copy outputs to (needs ModelArts)"),
    Flag(("--register_path",), ("register_path",), "folder with your own classes (auto_register)"),
    Flag(("--trust_remote_code",), ("trust_remote_code",), "accepted; nothing here runs remote code", boolean),
)


def add_flags(target: argparse.ArgumentParser) -> None:
    """Every row of ``FLAGS`` as an option, and the switches of the command itself."""
    for flag in FLAGS:
        more: dict[str, Any] = {"nargs": "+"} if flag.many else {}
        if flag.choices:
            more["choices"] = flag.choices
        else:
            more["metavar"] = flag.field.upper() if flag.reader is str else "VALUE"
        target.add_argument(*flag.names, dest=flag.field, type=flag.reader, action=OneValue, help=flag.help, **more)
    target.add_argument("--options", nargs="+", metavar="KEY=VALUE", help="older spelling of --key value")
    add_switch(
        target,
        "--verbose",
        text="training: print the whole log, MindFormers' and MindSpore's too, instead of one live line",
    )


def read_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, own: Sequence[str] = (), mixed: bool = False
) -> argparse.Namespace:
    """Parse ``argv``; ``pairs`` holds the dotted options.

    Args:
        parser: the command's.
        argv: default: the process's.
        own: options of the command besides ``FLAGS``.
        mixed: words that belong to no option may stand anywhere between options.

    Raises:
        UserError: an option that is neither a row of ``FLAGS`` nor a dotted path.
    """
    if mixed:
        plain, dotted = _apart(sys.argv[1:] if argv is None else argv)
        arguments, rest = parser.parse_known_intermixed_args(plain)
        rest += dotted
    else:
        arguments, rest = parser.parse_known_args(argv)
    known = [name for flag in FLAGS for name in flag.names] + ["--config", "--options", "--verbose", *own]
    problems = Problems("command line options")
    for word in rest:
        name = word.partition("=")[0]
        if name.startswith("--") and "." not in name:
            problems.add(f"unknown option {name}", nearest(name, known) + " Keys of the file are written --section.key")
    problems.raise_if_any()
    options = [option.partition("=") for option in arguments.options or ()]
    for key, given, _ in options:
        if not given:
            problems.add(f"--options {key} has no value", f"write --options {key}=VALUE")
    problems.raise_if_any()
    arguments.pairs = [*((key, value) for key, _, value in options), *parse_dotted(rest)]
    return arguments


def _apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """``argv`` without the dotted options, and these with their values."""
    plain: list[str] = []
    dotted: list[str] = []
    takes = False  # the word before is a dotted option that waits for its value
    for word in argv:
        name, given, _ = word.partition("=")
        is_dotted = name.startswith("--") and "." in name
        (dotted if is_dotted or (takes and not word.startswith("--")) else plain).append(word)
        takes = is_dotted and not given
    return plain, dotted


def apply_flags(config: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """A copy of ``config`` with the given options and then the dotted pairs set.

    Raises:
        UserError: for a dotted path that leads nowhere, and options that contradict each other.
    """
    result = copy.deepcopy(dict(config))
    for flag in FLAGS:
        value = getattr(arguments, flag.field)
        if value is None:
            continue
        for key in flag.keys:
            if key.startswith(("train_dataset", "eval_dataset")) and not result.get(key.partition(".")[0]):
                if len(flag.keys) > 1:
                    continue  # --num_samples: only where the file has that data set
                raise UserError(
                    f"{flag.names[0]} is given but the file has no section '{key.partition('.')[0]}': "
                    "add it, or drop the option"
                )
            set_path(result, key, _value(flag, value))
    result = apply_overrides(result, arguments.pairs)
    name_dtypes(result)
    return result


def set_path(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making sections on the way."""
    *sections, last = key.split(".")
    for section in sections:
        if config.get(section) is None:
            config[section] = {}
        config = config[section]
    config[last] = value


def _value(flag: Flag, value: Any) -> Any:
    if flag.field == "predict_data":
        prompts = [text.replace(r"\n", "\n") for text in value]
        return prompts[0] if len(prompts) == 1 else prompts
    if flag.field == "modal_type" and set(value) != {"text"}:
        raise UserError(f"--modal_type {' '.join(value)}: these models read text only; leave the option out")
    if flag.field == "strategy_load_checkpoint" and Path(value).is_dir():
        files = sorted(Path(value).glob("*.ckpt"))
        if not files:
            raise UserError(f"--strategy_load_checkpoint {value} holds no .ckpt strategy file")
        return str(files[0])
    return value


class OneValue(argparse.Action):
    """Two names of one option may not be given with different values."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the value, or stop when another one is there."""
        before = getattr(namespace, self.dest)
        if before is not None and before != values:
            parser.error(f"{' and '.join(self.option_strings)} are one option, given as {before!r} and {values!r}")
        setattr(namespace, self.dest, values)
