# SPDX-License-Identifier: Apache-2.0
"""Conversations to rows: Vicuna v1.1 text, its tokens, and labels on the answers only.

The tokens are those of MindFormers' ``llama_preprocess.py --dataset_type qa`` (r1.3 to r1.7): the text is cut at the
template's ``</s>``, each part is encoded on its own and gets EOS, BOS stands once in front. The labels follow from
where the answers stand in the text, by comparing token lists; MindFormers counts tokens that are not padding, which
masks a whole conversation wherever padding is ``<unk>`` and the text holds one, or an answer says "ASSISTANT: ".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindformers_ext.data.documents import IGNORED as IGNORED
from mindformers_ext.data.documents import Document
from mindformers_ext.data.json_records import read_records
from mindformers_ext.data.packing import Ids
from mindformers_ext.data.readers import Progress
from mindformers_ext.data.tokenizers import Tokenizer
from mindformers_ext.data.turns import Talk, read_talk

TEMPLATE = "vicuna_v1.1"
Write = Callable[[Talk, str], "Conversation"]  # a talk and where it stands


class Conversation(NamedTuple):
    """A conversation as text, and the (start, end) of each answer in it; ``where`` names its record."""

    text: str
    answers: tuple[tuple[int, int], ...]
    where: str


class TurnPart(NamedTuple):
    """What is encoded on its own: a text that ends with EOS, and how it begins before the answer.

    ``lead`` is None where all of the part is answer, and the part's own text where none of it is.
    """

    text: str
    lead: str | None


@dataclass(frozen=True)
class Specials:
    """The ids that frame and fill rows."""

    bos: int
    eos: int
    pad: int


@dataclass(frozen=True)
class QaRow:
    """A row: token ids and labels of the same length, and the conversation's length before it was cut or padded."""

    ids: Ids
    labels: Ids
    tokens: int


def read_conversations(
    path: Path, progress: Progress | None = None, write: Write | None = None, alpaca: bool = False
) -> Iterator[Conversation | None]:
    """The conversations of a JSON list or of JSON lines; None for one in which nobody asks anything.

    Args:
        path: the file.
        progress: hears how many bytes were read.
        write: makes the text, by default Vicuna's: there a turn of the system stands in place of the template's words.
        alpaca: records of an instruction and an output are conversations too.

    Raises:
        UserError: names file, record and line of what is malformed.
    """
    for record in read_records(path, progress):
        talk = read_talk(record, alpaca)
        yield (write or vicuna)(talk, record.where) if talk.said else None


def encode_documents(tokenizer: Tokenizer, conversations: Sequence[Conversation], special: Specials) -> list[Document]:
    """Every conversation whole."""
    rows = encode_conversations(tokenizer, conversations, special, 0)
    return [Document(row.ids[: row.tokens], row.labels[: row.tokens]) for row in rows]


def encode_conversations(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], special: Specials, length: int
) -> list[QaRow]:
    """One row of ``length`` tokens per conversation, padded or cut at the end; 0: as long as it is."""
    parts = [_parts(conversation) for conversation in conversations]
    flat = [part for found in parts for part in found]
    encoded = iter(tokenizer.encode_batch([part.text for part in flat]))
    leads = iter(tokenizer.encode_batch([part.lead for part in flat if part.lead is not None]))
    return [_row(found, encoded, leads, special, length) for found in parts]


def separator() -> str:
    """What the template writes after each answer."""
    return str(_template().sep2)


def _template() -> Any:
    from fastchat.conversation import get_conv_template

    return get_conv_template(TEMPLATE)


def vicuna(talk: Talk, where: str) -> Conversation:
    """The conversation in Vicuna's words."""
    template = _template()
    if talk.system is not None:
        template.set_system_message(talk.system)
    answers = []
    for number, message in enumerate(talk.said):
        template.append_message(template.roles[number % 2], message)
        if number % 2 and message:
            end = len(template.get_prompt()) - len(template.sep2)
            answers.append((end - len(message), end))
    return Conversation(template.get_prompt(), tuple(answers), where)


def _parts(conversation: Conversation) -> list[TurnPart]:
    """The text between the separators. An answer that holds a separator itself spreads over several parts."""
    mark, start, parts = separator(), 0, []
    for text in conversation.text.split(mark):
        end = start + len(text)
        if text:
            parts.append(TurnPart(text, _lead(conversation, start, end)))
        start = end + len(mark)
    return parts


def _lead(conversation: Conversation, start: int, end: int) -> str | None:
    for first, last in conversation.answers:
        if first < end and start < last:
            # the blank before the answer belongs to the answer's first token
            return conversation.text[start : first - 1] if first > start else None
    return conversation.text[start:end]


def _row(
    parts: Iterable[TurnPart], encoded: Iterator[Any], leads: Iterator[Any], special: Specials, length: int
) -> QaRow:
    ids, labels = [np.array([special.bos], np.int32)], [np.array([IGNORED], np.int32)]
    for part in parts:
        own = np.append(np.asarray(next(encoded), np.int32), np.int32(special.eos))
        target = own.copy()
        if part.lead is not None:
            lead = np.asarray(next(leads), np.int32)
            target[: len(own) if part.lead == part.text else common_prefix(own, lead)] = IGNORED
        ids.append(own)
        labels.append(target)
    tokens = sum(map(len, ids))
    length = length or tokens
    missing = max(length - tokens, 0)
    ids.append(np.full(missing, special.pad, np.int32))
    labels.append(np.full(missing, IGNORED, np.int32))
    return QaRow(np.concatenate(ids)[:length], np.concatenate(labels)[:length], tokens)


def common_prefix(one: Ids, other: Ids) -> int:
    """How many ids two lists begin with alike."""
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size
