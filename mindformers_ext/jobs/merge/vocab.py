# SPDX-License-Identifier: Apache-2.0
"""Vocabularies of merged models: read from tokenizer.json, united, written for the merge.

A union begins with the base's tokens under their own numbers; then come the ordinary tokens of the other models that it
lacks, then their added tokens. New ones are added tokens of the base's tokenizer, so its way of cutting text stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import TABLES, read_object

TABLE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# files that describe one vocabulary otherwise: a tokenizer made anew is tokenizer.json alone
OTHER_FORMS = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer.json: its whole ``table``, and the number of every token."""

    table: Mapping[str, Any]
    ids: Mapping[str, int]

    @property
    def added(self) -> dict[str, Mapping[str, Any]]:
        """The added tokens (special ones among them) by their text."""
        return {item["content"]: item for item in self.table.get("added_tokens") or []}


def read_vocabulary(folder: Path) -> Vocabulary:
    """The tokenizer of a model folder; a ``UserError`` where it has no tokenizer.json or it cannot be read."""
    path = folder / TABLE
    if not path.is_file():
        raise UserError(
            f"'{folder}' has no {TABLE}, which a union or another model's tokenizer needs: make one with transformers "
            "(AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)), or leave tokenizer_source out"
        )
    return Vocabulary(*_parsed(path))


def _parsed(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        table = read_object(path, "copy it again", TABLES)
        ids = table["model"]["vocab"]
        if isinstance(ids, list):
            ids = {item[0]: place for place, item in enumerate(ids)}
        added = {item["content"]: item["id"] for item in table.get("added_tokens") or []}
        result = {**ids, **added}
        if not all(isinstance(word, str) and type(number) is int and number >= 0 for word, number in result.items()):
            raise TypeError("a token without a number")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"'{path}' cannot be read as a tokenizer: copy it again") from error
    return table, result


def identity(folder: Path) -> object:
    """What decides the numbers of a folder's tokens: equal for equal vocabularies, None where it has no tokenizer."""
    if (folder / TABLE).is_file():
        return read_vocabulary(folder).ids
    model = folder / "tokenizer.model"
    return model.read_bytes() if model.is_file() else None


def limited(vocabulary: Vocabulary, rows: int, where: str) -> Vocabulary:
    """Without the added tokens that have no row in an embedding of ``rows`` rows."""
    beyond = {word for word, number in vocabulary.ids.items() if number >= rows}
    if not beyond:
        return vocabulary
    if beyond - set(vocabulary.added):
        raise UserError(
            f"the tokenizer of '{where}' numbers tokens beyond its embedding of {rows} rows: resize the "
            "embedding of that model first"
        )
    kept = [item for item in vocabulary.table["added_tokens"] if item["content"] not in beyond]
    ids = {word: number for word, number in vocabulary.ids.items() if word not in beyond}
    return Vocabulary({**vocabulary.table, "added_tokens": kept}, ids)


def united(base: Vocabulary, others: Sequence[Vocabulary]) -> Vocabulary:
    """The tokens of all."""
    special = {word for vocabulary in (base, *others) for word in vocabulary.added}
    plain = [word for other in others for word in _in_order(other.ids) if word not in special]
    result = with_tokens(base, [_entry(word) for word in plain])
    return with_tokens(result, [item for other in others for item in other.added.values()])


def with_tokens(vocabulary: Vocabulary, entries: Iterable[Mapping[str, Any]]) -> Vocabulary:
    """``vocabulary`` with added tokens; those it has keep their number, and their settings where they are added."""
    ids, added = dict(vocabulary.ids), dict(vocabulary.added)
    free = max(ids.values(), default=-1) + 1
    for entry in entries:
        word = entry["content"]
        if word in added:
            continue
        if word not in ids:
            ids[word] = free
            free += 1
        added[word] = {**entry, "id": ids[word]}
    table = {**vocabulary.table, "added_tokens": sorted(added.values(), key=lambda item: item["id"])}
    return Vocabulary(table, ids)


def with_texts(vocabulary: Vocabulary, texts: Iterable[str]) -> Vocabulary:
    """``vocabulary`` with ``texts`` as ordinary added tokens where it lacks them."""
    return with_tokens(vocabulary, [_entry(text) for text in texts if text not in vocabulary.ids])


def _in_order(ids: Mapping[str, int]) -> list[str]:
    return sorted(ids, key=ids.__getitem__)


def _entry(word: str) -> dict[str, Any]:
    """An added token as transformers' ``add_tokens`` makes it of a text."""
    return {
        "id": -1,
        "content": word,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": False,
    }


def write_vocabulary(vocabulary: Vocabulary, folder: Path) -> None:
    """Make ``vocabulary`` the tokenizer of ``folder``, whose settings are there already."""
    for name in OTHER_FORMS:
        (folder / name).unlink(missing_ok=True)
    (folder / TABLE).write_text(json.dumps(vocabulary.table, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    path = folder / SETTINGS
    settings = read_object(path) if path.is_file() else {}
    if "added_tokens_decoder" in settings:  # transformers adds what stands here, under these numbers
        settings["added_tokens_decoder"] = {
            str(item["id"]): {key: value for key, value in item.items() if key != "id"}
            for item in vocabulary.table.get("added_tokens") or []
        }
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
