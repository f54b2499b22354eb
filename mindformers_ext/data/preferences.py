# SPDX-License-Identifier: Apache-2.0
"""Pairs of answers to one prompt, of which one is preferred: records to documents.

``{"prompt", "chosen", "rejected"}`` as texts; or lists of messages, that continue the prompt's or, without one, hold
all of the conversation twice, as the common data sets have them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.conversations import Conversation, Write, vicuna
from mindformers_ext.data.documents import IGNORED, Document, Ids
from mindformers_ext.data.json_records import Record, read_records
from mindformers_ext.data.readers import Progress
from mindformers_ext.data.turns import talk_of

CHOSEN, REJECTED = SIDES = ("chosen", "rejected")


class Pair(NamedTuple):
    """Two conversations that differ in their last answer, the only one with a place in ``answers``."""

    chosen: Conversation
    rejected: Conversation


def read_pairs(path: Path, progress: Progress | None = None, write: Write | None = None) -> Iterator[Pair]:
    """The pairs of a JSON list or of JSON lines, written by ``write`` (Vicuna's words by default).

    Raises:
        UserError: names file, record and line of what is malformed.
    """
    for record in read_records(path, progress):
        yield Pair(*(_side(record, side, write or vicuna) for side in SIDES))


def _side(record: Record, side: str, write: Write) -> Conversation:
    prompt, answer = record.value.get("prompt"), record.value.get(side)
    if answer is None:
        raise UserError(f"{record.where}: no field '{side}'; a pair has 'prompt', 'chosen' and 'rejected'")
    before = _messages(prompt, "user") if prompt is not None else []
    after = _messages(answer, "assistant")
    # a list that begins as the conversation does holds all of it, whatever the prompt says
    whole = isinstance(answer, list) and bool(after) and _speaker(after[0]) not in ("assistant", "gpt")
    talk = talk_of(record, after if whole else [*before, *after])
    if len(talk.said) < 2 or len(talk.said) % 2:
        raise UserError(f"{record.where}: '{side}' does not end with an answer to a prompt; give both")
    written = write(talk, record.where)
    return written._replace(answers=written.answers[-1:])


def _messages(given: Any, role: str) -> list[Any]:
    return given if isinstance(given, list) else [{"role": role, "content": given}]


def _speaker(turn: Any) -> Any:
    return (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None


def fitted(chosen: Document, rejected: Document, length: int, prompt: int) -> tuple[Document, Document]:
    """Both within ``length`` tokens: where one is longer, the prompts lose what is before their last ``prompt`` tokens,
    and then the answers what does not fit. As TRL does with its default ``keep_end``."""
    parts = [_parted(document) for document in (chosen, rejected)]
    if max(len(ids) + len(rest) for ids, rest in parts) > length:
        parts = [(ids[-prompt:], rest) for ids, rest in parts]
    found = []
    for ids, rest in parts:
        whole = np.concatenate((ids, rest))[:length]
        labels = whole.copy()
        labels[: max(len(ids), 1)] = IGNORED
        found.append(Document(whole, labels))
    return found[0], found[1]


def _parted(document: Document) -> Sequence[Ids]:
    """The prompt's tokens and the answer's."""
    bearing = np.flatnonzero(document.labels != IGNORED)
    start, end = (int(bearing[0]), int(bearing[-1]) + 1) if len(bearing) else (len(document.ids),) * 2
    return document.ids[:start], document.ids[start:end]
