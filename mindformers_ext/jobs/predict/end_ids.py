# SPDX-License-Identifier: Apache-2.0
"""Which tokens end an answer: those of the YAML and those that the model's own folder names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.tokenizer_settings import CONFIG, read_table

GENERATION = "generation_config.json"  # transformers' generate() reads it; without it config.json
NAME = "eos_token_id"


def end_ids(folders: Iterable[Path], vocab_size: int) -> tuple[tuple[int, ...], list[str]]:
    """The end ids in the files of ``folders``, each once, and a note for each that no token has.

    Raises:
        UserError: a file that is no JSON table, or an end id that is no number or list of numbers.
    """
    found: dict[int, Path] = {}
    for folder in folders:
        for path in (folder / GENERATION, folder / CONFIG):
            for token in _ids(read_table(path).get(NAME), path):
                found.setdefault(token, path)
    notes = [
        f"{NAME} {token} in {path} is left out: the vocabulary has ids 0 to {vocab_size - 1}"
        for token, path in found.items()
        if not 0 <= token < vocab_size
    ]
    return tuple(token for token in found if 0 <= token < vocab_size), notes


def _ids(value: Any, path: Path) -> list[int]:
    if value is None:
        return []
    listed = value if isinstance(value, list) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in listed):
        raise UserError(f"{path}: {NAME} is {value!r:.60}, neither a token id nor a list of them: correct it")
    return [token for token in listed if token != -1]
