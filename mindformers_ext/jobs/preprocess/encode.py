# SPDX-License-Identifier: Apache-2.0
"""Batches of text to token ids, here or in several processes; results come in the order of the batches."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import Queue
from typing import Any, NamedTuple

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.conversations import IGNORED, Conversation, Specials, encode_conversations
from mindformers_ext.data.readers import Fragment
from mindformers_ext.data.tokenizers import Tokenizer, encode_glued

WINDOW = 3  # batches per process that may be under way: enough to hide waiting, few enough for any memory


class TextBatch(NamedTuple):
    """Fragments of documents, in order."""

    fragments: list[Fragment]


class QaBatch(NamedTuple):
    """Conversations, in order."""

    conversations: list[Conversation]


@dataclass(frozen=True)
class Setup:
    """What a process needs to encode. ``framed``: documents get BOS and EOS."""

    special: Specials
    row_length: int
    framed: bool


@dataclass(frozen=True)
class Tokens:
    """An encoded batch. Running text: ``ids`` is flat. Conversations: ``ids`` and ``labels`` are (rows, row_length).

    ``truncated`` counts conversations that were cut, ``cut`` their lost tokens, ``masked`` rows without a label.
    """

    ids: np.ndarray
    labels: np.ndarray | None = None
    documents: int = 0
    truncated: int = 0
    cut: int = 0
    masked: int = 0
    padding: int = 0


class Encoder:
    """Encodes batches with one tokenizer."""

    def __init__(self, setup: Setup, tokenizer: Tokenizer) -> None:
        self.setup, self.tokenizer = setup, tokenizer
        self.bos, self.eos = (np.array([token], np.int32) for token in (setup.special.bos, setup.special.eos))

    def encode(self, batch: TextBatch | QaBatch) -> Tokens:
        """Token ids of a batch."""
        if isinstance(batch, TextBatch):
            return self._text(batch.fragments)
        return self._conversations(batch.conversations)

    def _text(self, fragments: list[Fragment]) -> Tokens:
        glued = iter(encode_glued(self.tokenizer, [item.text for item in fragments if item.glued]))
        plain = iter(self.tokenizer.encode_batch([item.text for item in fragments if not item.glued]))
        parts: list[Any] = []
        for item in fragments:
            if item.first and self.setup.framed:
                parts.append(self.bos)
            parts.append(next(glued if item.glued else plain))
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


def encode_all(
    setup: Setup, tokenizer: Tokenizer, batches: Iterable[TextBatch | QaBatch], workers: int
) -> Generator[Tokens, None, None]:
    """The encoded batches, in order and the same for any number of ``workers`` (1: in this process).

    Raises:
        UserError: a process was killed.
    """
    if workers == 1:
        yield from map(Encoder(setup, tokenizer).encode, batches)
        return
    # forked: no thread of Python runs yet, and a process that starts from nothing would first import everything again
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    team = [_start(Encoder(setup, tokenizer)) for _ in range(workers)]
    free: Queue[Connection] = Queue()
    for member in team:
        free.put(member.pipe)
    threads = ThreadPoolExecutor(workers)
    waiting: deque[Future[Tokens]] = deque()
    try:
        for batch in batches:
            waiting.append(threads.submit(_encoded, free, batch))
            if len(waiting) >= WINDOW * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for member in team:
            member.process.kill()  # whoever waits for it hears the end of its pipe
        threads.shutdown(wait=True, cancel_futures=True)
        for member in team:
            member.process.join()
            member.pipe.close()


@dataclass(frozen=True)
class _Member:
    """A process that encodes. Its pipe is its own, so that the end of the process is the end of the pipe: with one pipe
    for all, half a result of a killed process would be waited for without end."""

    process: BaseProcess
    pipe: Connection


def _start(encoder: Encoder) -> _Member:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(encoder, theirs, os.getpid()), daemon=True)
    process.start()
    theirs.close()
    return _Member(process, ours)


def _encoded(free: Queue[Connection], batch: TextBatch | QaBatch) -> Tokens:
    """The batch as one of the free processes encodes it."""
    pipe = free.get()
    try:
        pipe.send(batch)
        found = pipe.recv()
    except (EOFError, OSError) as error:
        raise UserError(
            "a tokenising process ended before its work was done, probably for want of memory: use fewer --workers"
        ) from error
    finally:
        free.put(pipe)
    if isinstance(found, UserError):
        raise found
    return found


def _work(encoder: Encoder, pipe: Connection, parent: int) -> None:
    """In the process: encode what comes through the pipe until it is closed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a fork it has its parent's handler, which unwinds
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while True:
        try:
            batch = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(encoder.encode(batch))
        except UserError as error:
            pipe.send(error)


def _end_with(parent: int) -> None:
    """A process whose parent was killed would wait for batches for ever."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
