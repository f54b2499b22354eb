# SPDX-License-Identifier: Apache-2.0
"""The commands of LLM-Shearing under their own names and arguments: ``python3 -m llmshearing.utils.MODULE COMMAND``."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from mindformers_ext.cli.command import Command, dtype
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import LLAMA

EPILOG = """examples:
  python3 -m llmshearing.utils.composer_to_hf save_hf_to_composer HF_FOLDER state_dict.pt
  python3 -m llmshearing.utils.composer_to_hf save_composer_to_hf state_dict.pt OUT hidden_size=2048 \\
      num_attention_heads=16 num_hidden_layers=24 intermediate_size=5504 num_key_value_heads=16
  python3 -m llmshearing.utils.post_pruning_processing prune_and_save_model latest-rank0.pt \\
      d_model=2048 n_heads=16 n_layers=24 intermediate_size=5504
  python3 -m llmshearing.utils.test_composer_hf_eq HF_FOLDER state_dict.pt 7B
Files of torch are read as data: no code in them is run.
"""
WORD = re.compile(r"(\w+)=(.*)", re.S)
NUMBERS = (
    *("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings"),
)
TARGET = ("d_model", "n_heads", "n_kv_heads", "head_dim", "n_layers", "intermediate_size", "num_attention_heads")
CLASS = LLAMA.hf_class
NAMED = {  # the seed's MODEL_SIZE: d, heads, layers, intermediate
    "1.3B": (2048, 16, 24, 5504),
    "2.7B": (2560, 20, 32, 6912),
    "7B": (4096, 32, 32, 11008),
    "13B": (5120, 40, 40, 13824),
    "30B": (6656, 52, 60, 17920),
    "65B": (8192, 64, 80, 22016),
}


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    commands = ("save_hf_to_composer", "save_composer_to_hf", "prune_and_save_model", "test_composer_hf_eq")
    parser.add_argument("command", choices=commands)
    parser.add_argument("words", nargs="+", metavar="PATH|KEY=VALUE", help="paths first, then keys")
    parser.add_argument("--config", type=Path, help="config.json of the source model, or its folder")
    parser.add_argument("--dtype", type=dtype, metavar="TYPE", help="of the written weights; default: the stored one")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--force", action="store_true", help="cut although the masks have not come to the target")


def _run(given: argparse.Namespace) -> int:
    paths = [word for word in given.words if not WORD.fullmatch(word)]
    keys = {match[1]: match[2] for word in given.words if (match := WORD.fullmatch(word))}
    return COMMANDS[given.command](given, paths, keys)


def _paths(found: list[str], *names: str) -> list[str]:
    if len(found) != len(names):
        raise UserError(f"give {', '.join(names)}; found {', '.join(found) or 'nothing'}")
    return found


def _numbers(keys: dict[str, str], known: tuple[str, ...]) -> dict[str, int]:
    numbers = {}
    for name, text in keys.items():
        if name not in known:
            raise UserError(f"{name}={text} is unknown: choose from {', '.join(known)}")
        if not text.isdecimal() or not 0 < int(text) < 2**31:
            raise UserError(f"{name}={text!r} is no number above 0")
        numbers[name] = int(text)
    return numbers


def _to_composer(given: argparse.Namespace, paths: list[str], keys: dict[str, str]) -> int:
    from mindformers_ext.jobs.checkpoint.composer import save_composer
    from mindformers_ext.jobs.checkpoint.hub import find_folder

    source, output = _paths(paths, "a Hugging Face folder", "an output (.pt)")
    _numbers(keys, ())
    report = save_composer(find_folder(Path(source)), Path(output), given.config, given.dtype, given.overwrite)
    return _say(output, report)


def _say(output: str, report: Any) -> int:
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{output}: {report.tensors} tensors, {report.nbytes / 1e9:.3f} GB")
    return 0


def _to_hf(given: argparse.Namespace, paths: list[str], keys: dict[str, str]) -> int:
    from mindformers_ext.jobs.checkpoint.composer import save_hugging_face
    from mindformers_ext.jobs.prune.composer import composer_of

    source, output = _paths(paths, "a Composer checkpoint", "an output folder")
    name = keys.pop("model_class", CLASS)
    if name != CLASS:
        raise UserError(f"model_class={name}: a Composer checkpoint becomes a {CLASS}")
    keys.pop("_name_or_path", None)  # transformers writes it anew whenever the model is loaded
    words = _numbers(keys, NUMBERS)
    with composer_of(Path(source)) as file:
        return _say(output, save_hugging_face(file, Path(output), words, given.config, given.dtype, given.overwrite))


def _prune(given: argparse.Namespace, paths: list[str], keys: dict[str, str]) -> int:
    from mindformers_ext.jobs.prune.composer import prune_composer, prune_run, run_beside
    from mindformers_ext.jobs.prune.report import NotReachedError, table

    (source,) = _paths(paths, "a Composer checkpoint with masks")
    words = _numbers(keys, TARGET)
    run = run_beside(Path(source))
    if run and words:
        raise UserError(f"'{run}' is a run of this package, whose YAML names the target: leave {', '.join(words)} out")
    try:
        if run:
            found = prune_run(run, Path(source), given.force, given.overwrite)
        else:
            found = prune_composer(Path(source), words, given.force, given.overwrite)
    except NotReachedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    print("\n".join(table(found.masks)))
    print(f"wrote {found.path}")
    return 0


def _equal(given: argparse.Namespace, paths: list[str], keys: dict[str, str]) -> int:
    from mindformers_ext.jobs.checkpoint.composer_parity import compare
    from mindformers_ext.jobs.checkpoint.hub import find_folder

    if not 2 <= len(paths) <= 3:
        raise UserError(f"give a Hugging Face folder, a Composer checkpoint and a size; found {', '.join(paths)}")
    folder, file, *size = paths
    if size and size[0] not in NAMED:
        raise UserError(f"MODEL_SIZE {size[0]} is unknown: choose one of {', '.join(NAMED)}, or leave it out")
    _numbers(keys, ())
    result = compare(find_folder(Path(folder)), Path(file), NAMED[size[0]] if size else None)
    print(result)
    return 0 if result.is_equal else 1


COMMANDS = {
    "save_hf_to_composer": _to_composer,
    "save_composer_to_hf": _to_hf,
    "prune_and_save_model": _prune,
    "test_composer_hf_eq": _equal,
}
COMMAND = Command(
    prog="llmshearing",
    description="LLM-Shearing's commands: Hugging Face folders and Composer checkpoints into each other, and the "
    "pruned model of a Composer checkpoint with masks.",
    epilog=EPILOG,
    options=_options,
    run=_run,
)
parser, main = COMMAND.parser, COMMAND.main
