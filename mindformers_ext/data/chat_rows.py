# SPDX-License-Identifier: Apache-2.0
"""Conversations in the words of a tokenizer's own chat template, with labels on every answer and what ends it.

An answer is what the template writes behind the prompt for it (``add_generation_prompt``), up to where the next turn
begins, without white space at its end: the text, and the mark by which the model learns to stop (Llama 3's <|eot_id|>).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.chat_template import ChatTemplate
from mindformers_ext.data.conversations import Conversation, common_prefix
from mindformers_ext.data.documents import IGNORED, Document
from mindformers_ext.data.json_records import read_records
from mindformers_ext.data.packing import Ids
from mindformers_ext.data.tokenizers import Tokenizer
from mindformers_ext.data.turns import ASSISTANT, SYSTEM, USER, Talk, read_talk

Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]


def chat_of(template: ChatTemplate, talk: Talk, where: str) -> Conversation:
    """The text of a conversation and where its answers stand.

    Raises:
        UserError: the template refuses it, or writes the turns so far in another way once more follow.
    """
    speakers = [USER, ASSISTANT] * ((len(talk.said) + 1) // 2)
    messages = [{"role": who, "content": text} for who, text in zip(speakers, talk.said, strict=False)]
    first = 0 if talk.system is None else 1
    if first:
        messages.insert(0, {"role": SYSTEM, "content": str(talk.system)})
    text = template.render(messages, add_generation_prompt=False)
    answers = []
    for number in range(first + 1, len(messages), 2):
        lead = template.render(messages[:number])
        through = template.render(messages[: number + 1], add_generation_prompt=False).rstrip()
        if not (text.startswith(through) and through.startswith(lead.rstrip())):
            raise UserError(
                f"{where}: the chat template in {template.folder} writes turn {number} in another way once more follow "
                "(as templates do that leave out earlier thoughts): cut the conversation into one for each answer"
            )
        answers.append((min(len(lead), len(through)), len(through)))
    return Conversation(text, tuple(answers), where)


def encode_chats(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> list[Document]:
    """Tokens and labels. Which tokens are an answer's follows from the tokens of the texts up to it and through it."""
    texts: list[str] = []
    for conversation in conversations:
        texts.append(conversation.text)
        texts += [conversation.text[:place] for answer in conversation.answers for place in answer]
    encoded = iter(tokenizer.encode_batch(texts))
    found = []
    for conversation in conversations:
        ids = np.asarray(next(encoded), np.int32)
        labels = np.full(len(ids), IGNORED, np.int32)
        for _ in conversation.answers:
            start, end = (common_prefix(ids, np.asarray(next(encoded), np.int32)) for _ in range(2))
            labels[start:end] = ids[start:end]
        labels[:1] = IGNORED
        found.append(Document(ids, labels))
    return found


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
            ((ids, labels),) = encode_chats(tokenizer, [chat_of(template, talk, record.where)])
            yield ChatRow(ids[:length], (labels != IGNORED)[:length], len(ids))
