# SPDX-License-Identifier: Apache-2.0
"""``mfext train|predict|eval|chat``: a model folder and a few words, or a YAML, by ``run_mindformer.py``'s road."""

from __future__ import annotations

import argparse
import glob
import gzip
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ext.cli.command import Command
from mindformers_ext.cli.preprocess import cores
from mindformers_ext.cli.run_flags import add_flags, apply_flags, read_arguments
from mindformers_ext.cli.run_mindformer import carry_out, load_config
from mindformers_ext.core.config.file import dump_yaml
from mindformers_ext.core.config.run import MODEL, TRAINING
from mindformers_ext.core.config.values import section_at
from mindformers_ext.core.errors import UserError

if TYPE_CHECKING:
    from mindformers_ext.core.config.from_model import FirstTry
    from mindformers_ext.jobs.run.from_folder import Described

FOLDER = "a Hugging Face folder or name (OWNER/NAME), the folder of a run, or a checkpoint of ours"
MADE = "# Made by mfext"  # the first words of a file that may be written over
DEFAULTS = """
Sizes, ids and tokenizer come from the folder, everything else has a default. The YAML that this stands for is printed,
or saved with --save_yaml; python run_mindformer.py --config YAML runs the same.
"""
EXAMPLES = {
    "train": """examples:
  mfext train SmolLM2-135M-Instruct --data notes.txt --epochs 2 --output_dir output/notes
  mfext train SmolLM2-135M-Instruct --data train.mindrecord --lr_schedule.learning_rate 1e-4
  mfext train --config configs/tiny/mixtral_pretrain.yaml --train_data data/train.mindrecord
A text or .jsonl file is first made into rows (as mfext preprocess does) in the output folder.""",
    "predict": """examples:
  mfext predict SmolLM2-135M-Instruct "The capital of France is" --max_new_tokens 50
  mfext predict output/notes prompts.txt --do_sample True --engine pt
  mfext predict --config configs/tiny/mixtral_pretrain.yaml --predict_data "The file" \\
      --load_checkpoint output/checkpoint""",
    "eval": """examples:
  mfext eval SmolLM2-135M-Instruct --text notes.txt
  mfext eval SmolLM2-135M-Instruct --text notes.txt --hf SmolLM2-135M-Instruct
  mfext eval --config configs/tiny/mixtral_pretrain.yaml --eval_data data/eval.mindrecord \\
      --load_checkpoint output/checkpoint""",
    "chat": """examples:
  mfext chat SmolLM2-135M-Instruct
  echo "What is gravity?" | mfext chat SmolLM2-135M-Instruct --max_new_tokens 40""",
}
DATA = {"train": ("data", "train_data"), "eval": ("text", "eval_data")}  # options: ours, and run_mindformer.py's
LENGTHS = {
    "train": "a row (default 512, or those of the MindRecord)",
    "eval": "a window (default 2048, or as many as the model has positions)",
    "predict": "prompt and answer (default: as many as the model has positions)",
    "chat": "the conversation (default: as many as the model has positions)",
}
MODES = {"train": TRAINING, "predict": ("predict",), "eval": ("eval",), "chat": ("predict",)}


def _options(job: str, parser: argparse.ArgumentParser) -> None:
    """The options of ``job``: its own, and those of ``run_mindformer.py``."""
    parser.add_argument("words", nargs="*", metavar="FOLDER", help=FOLDER + ("; prompts" if job == "predict" else ""))
    parser.add_argument("--config", metavar="YAML", help="instead of a folder: a MindFormers YAML")
    parser.add_argument(
        "--download", action="store_true", help="fetch a model named OWNER/NAME from the hub if need be"
    )
    parser.add_argument("--save_yaml", type=Path, metavar="FILE", help="write the YAML there instead of printing it")
    parser.add_argument("--seq_length", type=int, metavar="N", help="tokens of " + LENGTHS[job])
    if job == "train":
        parser.add_argument("--data", type=Path, metavar="FILE", help="MindRecord, text or .jsonl file to train on")
    if job == "eval":
        parser.add_argument("--text", type=Path, metavar="FILE", help="text, .jsonl or MindRecord file to evaluate on")
    add_flags(parser)


def _read(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    return read_arguments(
        parser, argv, own=("--save_yaml", "--seq_length", "--data", "--text", "--download"), mixed=True
    )


def _run(job: str, arguments: argparse.Namespace) -> int:
    if arguments.run_mode not in (None, *MODES[job]):
        raise UserError(f"--run_mode {arguments.run_mode} with mfext {job}: leave it out")
    if bool(arguments.config) == bool(arguments.words):
        raise UserError(f"mfext {job} takes a folder ({FOLDER}) or --config YAML: give one of them")
    if job == "chat":
        arguments.chat = True
    if arguments.config:
        return _run_yaml(job, arguments)
    config = apply_flags(_made(job, arguments), arguments)
    _show(config, job, arguments)
    return carry_out(config, f"mfext {job}", arguments)


def _run_yaml(job: str, arguments: argparse.Namespace) -> int:
    """A YAML that the user has; its run_mode gives way to ``job``."""
    for name in ("save_yaml", "seq_length", "data", "text", "download"):
        if getattr(arguments, name, None):
            raise UserError(f"--{name} belongs to a folder without a YAML: leave it out, or leave out --config")
    path, config = load_config(arguments.config)
    if config.get("run_mode") not in MODES[job]:
        config["run_mode"] = MODES[job][0]
    if job == "chat" and not arguments.predict_data:
        arguments.predict_data = ["-"]
    return carry_out(apply_flags(config, arguments), str(path), arguments)


def _made(job: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The YAML's content, from the folder and the words beside it."""
    from mindformers_ext.core.config.from_model import FirstTry, yaml_from_model
    from mindformers_ext.jobs.checkpoint.hub import find_folder
    from mindformers_ext.jobs.run.from_folder import describe, this_device

    folder, *prompts = arguments.words
    if prompts and job != "predict":
        raise UserError(f"mfext {job} {folder}: what is '{prompts[0]}'? Give one folder, and quote a text with blanks")
    found = describe(find_folder(Path(folder), arguments.download))
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    device, engine = this_device(arguments.engine)
    if arguments.device_target:
        device, engine = arguments.device_target, arguments.engine
    most = found.model.max_position_embeddings
    if arguments.seq_length is not None and not 1 <= arguments.seq_length <= most:
        raise UserError(f"--seq_length {arguments.seq_length}: give 1 to {most}, the model's positions")
    given: dict[str, Any] = {
        "job": job,
        "load": str(found.load),
        "tokenizer": str(found.tokenizer or ""),
        "device": device,
        "engine": engine,
        "stored": found.stored,
        "seq_length": arguments.seq_length,
        "prompts": ("-",) if job == "chat" else tuple(text.replace(r"\n", "\n") for text in prompts),
    }
    asked = FirstTry(**given)
    if job in DATA:
        asked = _with_data(asked, _data(job, arguments), found, arguments)
    return yaml_from_model(found.model, asked)


def _data(job: str, arguments: argparse.Namespace) -> Path:
    """The file that ``job`` reads, by our name or by run_mindformer.py's."""
    ours, theirs = DATA[job]
    named = [name for name in (ours, theirs) if getattr(arguments, name)]
    if len(named) != 1:
        raise UserError(f"mfext {job} needs its data once, found {', '.join(named) or 'none'}: give --{ours} FILE")
    file = Path(getattr(arguments, named[0])).expanduser().absolute()
    if not file.is_file():
        raise UserError(f"--{named[0]} {file} is no file: give a text, .jsonl or .mindrecord file")
    setattr(arguments, theirs, None)  # it goes into the YAML by another way
    return file


def _with_data(asked: FirstTry, file: Path, found: Described, arguments: argparse.Namespace) -> FirstTry:
    """``asked`` of ``file``: rows of a MindRecord tell their own length, a text is made into rows for training."""
    from mindformers_ext.jobs.run.from_folder import record_shape

    if asked.job == "train" and "mindrecord" not in file.name:
        file = _rows_of(file, asked, found, arguments)
    if "mindrecord" not in file.name:
        return replace(asked, data=str(file))
    rows, width, columns = record_shape(file)
    if asked.seq_length not in (None, width - 1):
        raise UserError(f"--seq_length {asked.seq_length}, and {file} has rows for {width - 1}: leave it out")
    columns = columns if asked.job == "train" else columns[:1]
    return replace(asked, data=str(file), seq_length=width - 1, rows=rows, columns=columns)


def _rows_of(file: Path, asked: FirstTry, found: Described, arguments: argparse.Namespace) -> Path:
    """``file`` as MindRecord, below the output folder."""
    from mindformers_ext.core.config.from_model import yaml_from_model
    from mindformers_ext.jobs.preprocess.preprocess import preprocess
    from mindformers_ext.jobs.preprocess.request import PreprocessRequest

    if found.tokenizer is None:
        raise UserError(f"{file} is a text and {found.load} holds no tokenizer: put its tokenizer.json there")
    words = section_at(apply_flags(yaml_from_model(found.model, asked), arguments), MODEL)
    name = file.name.partition(".")[0] or "data"
    output = Path(arguments.output_dir or "output").absolute() / "data" / f"{name}.mindrecord"
    summary = preprocess(
        PreprocessRequest(
            dataset_type=_kind(file),
            input_glob=glob.escape(str(file)),
            output_file=output,
            model_file=found.tokenizer,
            seq_length=words["seq_length"],
            pad_id=found.model.pad_token_id if found.model.pad_token_id >= 0 else None,
            workers=cores(),
            overwrite=True,
        )
    )
    print(f"note: {file} is {summary.records} rows of {summary.row_length} tokens in {output}", file=sys.stderr)
    return output


def _kind(file: Path) -> str:
    """The word of ``--dataset_type`` for a text: by its ending, and conversations by their first record."""
    plain = file.name.removesuffix(".gz")
    if not plain.endswith((".json", ".jsonl")):
        return "text"
    with gzip.open(file, "rb") if plain != file.name else file.open("rb") as opened:
        start = opened.read(1 << 16)
    return "qa" if b'"conversations"' in start or b'"messages"' in start else "jsonl"


def _show(config: dict[str, Any], job: str, arguments: argparse.Namespace) -> None:
    """Print or save the YAML, with the command that runs it."""
    from mindformers_ext.jobs.run.keep import keep_text

    given = {"--chat": arguments.chat, "--hf": arguments.hf, "--eval_stride": arguments.eval_stride}
    more = "".join(f" {name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None)
    path = arguments.save_yaml or Path("FILE.yaml")
    text = f"{MADE} {job}; the same again:\n#   python run_mindformer.py --config {shlex.quote(str(path))}{more}\n"
    text += dump_yaml(config)
    if arguments.save_yaml is None:
        print(text, file=sys.stderr)
        return
    if path.exists() and not (path.is_file() and path.read_bytes().startswith(MADE.encode())):
        raise UserError(f"--save_yaml {path} exists and was not made by mfext: choose another name")
    keep_text(path, text)


def _command(job: str, description: str, own: str) -> Command:
    return Command(
        prog=f"mfext {job}",
        usage=f"mfext {job} FOLDER {own}[--save_yaml FILE] [options] [--section.key VALUE ...]\n"
        f"       mfext {job} --config YAML [options] [--section.key VALUE ...]",
        description=description,
        epilog=EXAMPLES[job] + DEFAULTS,
        options=partial(_options, job),
        read=_read,
        run=partial(_run, job),
        unwinds=False,
    )


TRAIN = _command("train", "Train a model further on a file.", "--data FILE ")
PREDICT = _command("predict", "Answer prompts: texts, a text file with one a line, or - for standard input.", "TEXT ")
EVAL = _command("eval", "Perplexity of a model on a text, on the same tokens as transformers (--hf).", "--text FILE ")
CHAT = _command("chat", "Talk with a model in its own chat template.", "")
