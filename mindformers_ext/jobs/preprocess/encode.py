# SPDX-License-Identifier: Apache-2.0
"""Batches of text to token ids, here, in several processes or on a cluster, in the order of the batches."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mindformers_ext.data.chat_rows import encode_chats
from mindformers_ext.data.conversations import (
    IGNORED,
    Conversation,
    Specials,
    encode_conversations,
    encode_documents,
)
from mindformers_ext.data.documents import Document
from mindformers_ext.data.preferences import fitted
from mindformers_ext.data.readers import Fragment
from mindformers_ext.data.tokenizers import Tokenizer, encode_glued
from mindformers_ext.jobs.items.map_items import Place, Work, map_items


class TextBatch(NamedTuple):
    """Fragments of documents, in order."""

    fragments: list[Fragment]


class QaBatch(NamedTuple):
    """Conversations, in order; of pairs the preferred one and then the other."""

    conversations: list[Conversation]


@dataclass(frozen=True)
class Setup:
    """What a process needs to encode. ``framed``: documents get BOS and EOS.

    Of conversations: ``whole``, not cut to rows; ``chat``, as the template has written them; ``prompt``: they are pairs
    of answers, whose prompts keep so many tokens where a pair is longer than a row.
    """

    special: Specials
    row_length: int
    framed: bool
    whole: bool = False
    chat: bool = False
    prompt: int | None = None


@dataclass(frozen=True)
class Tokens:
    """An encoded batch. Running text: ``ids`` is flat. Conversations: ``ids`` and ``labels`` are (rows, row_length), or
    with ``lengths`` flat, whole documents one after the other.

    ``truncated`` counts conversations that were cut, ``cut`` their lost tokens, ``masked`` rows without a label.
    """

    ids: np.ndarray
    labels: np.ndarray | None = None
    documents: int = 0
    truncated: int = 0
    cut: int = 0
    masked: int = 0
    padding: int = 0
    lengths: np.ndarray | None = None

    def each(self) -> list[Document]:
        """The documents of a batch that has ``lengths``."""
        assert self.lengths is not None and self.labels is not None
        ends = np.cumsum(self.lengths)[:-1]
        pairs = zip(np.split(self.ids, ends), np.split(self.labels, ends), strict=True)
        return [Document(ids, labels) for ids, labels in pairs] if len(self.lengths) else []


class Encoder:
    """Encodes batches with one tokenizer."""

    def __init__(self, setup: Setup, tokenizer: Tokenizer) -> None:
        self.setup, self.tokenizer = setup, tokenizer
        self.bos, self.eos = (np.array([token], np.int32) for token in (setup.special.bos, setup.special.eos))

    def encode(self, batch: TextBatch | QaBatch) -> Tokens:
        """Token ids of a batch."""
        if isinstance(batch, TextBatch):
            return self._text(batch.fragments)
        if self.setup.whole:
            return self._documents(batch.conversations)
        return self._conversations(batch.conversations)

    def _documents(self, conversations: list[Conversation]) -> Tokens:
        if self.setup.chat:
            found = encode_chats(self.tokenizer, conversations)
        else:
            found = encode_documents(self.tokenizer, conversations, self.setup.special)
        truncated, before = 0, sum(len(document.ids) for document in found)
        if self.setup.prompt is not None:
            limits = self.setup.row_length, self.setup.prompt
            truncated = sum(len(document.ids) > limits[0] for document in found)
            pairs = zip(found[::2], found[1::2], strict=True)
            found = [document for chosen, rejected in pairs for document in fitted(chosen, rejected, *limits)]
        return Tokens(
            np.concatenate([document.ids for document in found]),
            np.concatenate([document.labels for document in found]),
            documents=len(found) // (1 if self.setup.prompt is None else 2),
            truncated=truncated,
            cut=before - sum(len(document.ids) for document in found),
            lengths=np.array([len(document.ids) for document in found], np.int64),
        )

    def _text(self, fragments: list[Fragment]) -> Tokens:
        parts: list[Any] = []
        for item, found in zip(fragments, fragment_ids(self.tokenizer, fragments), strict=True):
            if item.first and self.setup.framed:
                parts.append(self.bos)
            parts.append(found)
            if item.last and self.setup.framed:
                parts.append(self.eos)
        ids = np.concatenate(parts).astype(np.int32, copy=False)
        return Tokens(ids, documents=sum(item.first for item in fragments))

    def _conversations(self, conversations: list[Conversation]) -> Tokens:
        length = self.setup.row_length
        rows = encode_conversations(self.tokenizer, conversations, self.setup.special, length)
        labels = np.stack([row.labels for row in rows])
        return Tokens(
            np.stack([row.ids for row in rows]),
            labels,
            documents=len(rows),
            truncated=sum(row.tokens > length for row in rows),
            cut=sum(max(row.tokens - length, 0) for row in rows),
            masked=int((labels == IGNORED).all(axis=1).sum()),
            padding=sum(max(length - row.tokens, 0) for row in rows),
        )


def fragment_ids(tokenizer: Tokenizer, fragments: Sequence[Fragment]) -> Iterator[Any]:
    """Token ids of each fragment, in two calls of the tokenizer."""
    glued = iter(encode_glued(tokenizer, [item.text for item in fragments if item.glued]))
    plain = iter(tokenizer.encode_batch([item.text for item in fragments if not item.glued]))
    return (next(glued if item.glued else plain) for item in fragments)


def encode_all(
    setup: Setup, tokenizer: Tokenizer, batches: Iterable[TextBatch | QaBatch], place: Place
) -> Generator[Tokens, None, None]:
    """The encoded batches, in order and the same wherever they are encoded.

    Raises:
        UserError: a process was killed, or the cluster does not answer.
    """
    if place.workers > 1 or place.ray:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    work = Work("tokenising", Encoder.encode, Encoder, (setup, tokenizer))
    return map_items(work, batches, place)
