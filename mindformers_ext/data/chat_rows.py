# SPDX-License-Identifier: Apache-2.0
"""Conversations to rows by the tokenizer's own chat template, with a mark on the tokens of every answer.

An answer reaches from where the template asks for it to where its turn ends, the token that ends it included. Texts are
encoded from their beginning, so that a row's tokens are those of the whole text; where an answer begins among them is
found by comparing them with the tokens of the text up to there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.chat_template import ChatTemplate
from mindformers_ext.data.conversations import common_prefix
from mindformers_ext.data.json_records import read_records
from mindformers_ext.data.packing import Ids
from mindformers_ext.data.tokenizers import Tokenizer
from mindformers_ext.data.turns import ASSISTANT, SYSTEM, USER, Talk, read_talk

Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]


@dataclass(frozen=True, eq=False)
class ChatRow:
    """ids int32 (n), at most a row's length; ``trained`` bool (n): the tokens of answers. ``whole``: tokens before it
    was cut."""

    ids: Ids
    trained: Mask
    whole: int


def read_chat_rows(path: Path, tokenizer: Tokenizer, template: ChatTemplate, length: int) -> Iterator[ChatRow]:
    """A row per conversation in which an answer is given, in the file's order; a longer one is cut at the end.

    Raises:
        UserError: names file, record and line of what is malformed, or what the template refuses.
    """
    for record in read_records(path):
        talk = read_talk(record)
        if len(talk.said) > 1:
            yield _row(talk, record.where, tokenizer, template, length)


def _row(talk: Talk, where: str, tokenizer: Tokenizer, template: ChatTemplate, length: int) -> ChatRow:
    messages = [{"role": SYSTEM, "content": talk.system}] if talk.system is not None else []
    before = len(messages)
    messages += [{"role": (USER, ASSISTANT)[n % 2], "content": text} for n, text in enumerate(talk.said)]
    whole = template.render(messages, add_generation_prompt=False)
    texts = [whole]
    for place in range(before + 1, len(messages), 2):
        texts += [template.render(messages[:place]), template.render(messages[: place + 1], False)]
    if not all(whole.startswith(text) for text in texts):
        raise UserError(
            f"{where}: the chat template in {template.folder} writes a conversation's beginning otherwise when it goes "
            "on, so that answers cannot be found in it: give a tokenizer with another template"
        )
    every, *ends = (np.asarray(ids, np.int32) for ids in tokenizer.encode_batch(texts))
    trained = np.zeros(len(every), bool)
    places = [common_prefix(every, ids) for ids in ends]
    for first, last in zip(places[::2], places[1::2], strict=True):
        trained[first:last] = True
    return ChatRow(every[:length], trained[:length], len(every))
