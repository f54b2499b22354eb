# SPDX-License-Identifier: Apache-2.0
"""The input of a data set in batches, and the batches encoded: here, elsewhere, or by shards that ran before."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path

from mindformers_ext.data.chat_rows import chat_of
from mindformers_ext.data.chat_template import ChatTemplate
from mindformers_ext.data.conversations import Conversation, read_conversations
from mindformers_ext.data.parquet import read_parquet
from mindformers_ext.data.preferences import read_pairs
from mindformers_ext.data.readers import Cutting, Fragment, Progress, read_jsonl, read_text, read_wiki
from mindformers_ext.data.tokenizers import Tokenizer, puts_blank
from mindformers_ext.jobs.items.map_items import Place
from mindformers_ext.jobs.preprocess.encode import QaBatch, Setup, TextBatch, Tokens, encode_all
from mindformers_ext.jobs.preprocess.request import Checked
from mindformers_ext.jobs.preprocess.shards import find_shards, joined, what_makes

BATCH_CHARACTERS = 1 << 19  # of text that a process encodes at once
BATCH_CONVERSATIONS = 64
SHARE = 4_000_000  # bytes of input that make one more process worth its start


class EncodedText:
    """A checked input, encoded; ``counts`` gets what is left out while it is read."""

    def __init__(self, checked: Checked, tokenizer: Tokenizer, counts: dict[str, int]) -> None:
        self.checked, self.request, self.tokenizer, self.counts = checked, checked.request, tokenizer, counts
        self.framed_rows = self.request.dataset_type == "wikipedia"  # BOS and EOS around rows, not around documents
        self.tokenizer_sha256 = sha256(tokenizer.path.read_bytes()).hexdigest()

    @property
    def made_of(self) -> str:
        """What makes the encoded batches the same."""
        return what_makes(self.checked, self.tokenizer_sha256)

    def encoded(self, progress: Progress) -> Generator[Tokens, None, None]:
        """The encoded batches in order; with ``--shard i/n`` this shard's alone."""
        request = self.request
        if request.is_join:
            return joined(find_shards(request, self.made_of), self.counts)
        setup = Setup(
            self.checked.special,
            self.checked.row_length,
            not self.framed_rows,
            whole=request.by_document,
            chat=bool(request.chat),
            prompt=request.prompt_length if request.is_pairs else None,
        )
        workers = min(request.workers, 1 + sum(path.stat().st_size for path in self.checked.files) // SHARE)
        number, count = request.own_shard or (0, 1)
        batches = islice(self._batches(progress), number, None, count)
        return encode_all(setup, self.tokenizer, batches, Place(workers, request.ray, fork=True))

    def _batches(self, progress: Progress) -> Iterator[TextBatch | QaBatch]:
        if self.request.dataset_type in ("qa", "dpo"):
            yield from self._conversation_batches(progress)
            return
        cutting = Cutting(blank=puts_blank(self.tokenizer))
        for path in self.checked.files:
            yield from _text_batches(self._reader(path, cutting, progress))

    def _reader(self, path: Path, cutting: Cutting, progress: Progress) -> Iterator[Fragment]:
        request = self.request
        readers: dict[str, Callable[[], Iterator[Fragment]]] = {
            "wiki": lambda: read_wiki(path, cutting, progress),
            "wikipedia": lambda: read_parquet(path, request.field, cutting, progress),
            "text": lambda: read_text(path, request.document or "file", cutting, progress),
            "jsonl": lambda: read_jsonl(path, request.field or "text", cutting, progress),
        }
        return readers[request.dataset_type]()

    def _conversation_batches(self, progress: Progress) -> Iterator[QaBatch]:
        batch: list[Conversation] = []
        for path in self.checked.files:
            for found in self._conversations(path, progress):
                batch += found
                if len(batch) == BATCH_CONVERSATIONS:
                    yield QaBatch(batch)
                    batch = []
        if batch:
            yield QaBatch(batch)

    def _conversations(self, path: Path, progress: Progress) -> Iterator[Sequence[Conversation]]:
        """The conversations of a file one by one, or in pairs."""
        write = None
        if self.request.chat:
            write = partial(chat_of, ChatTemplate(self.tokenizer.path.parent))
        if self.request.is_pairs:
            yield from read_pairs(path, progress, write)
            return
        for conversation in read_conversations(path, progress, write, alpaca=write is not None):
            if conversation is None:
                self.counts["no_question"] += 1
            else:
                yield (conversation,)


def _text_batches(fragments: Iterable[Fragment]) -> Iterator[TextBatch]:
    batch, size = [], 0
    for fragment in fragments:
        batch.append(fragment)
        size += len(fragment.text) + 1
        if size >= BATCH_CHARACTERS:
            yield TextBatch(batch)
            batch, size = [], 0
    if batch:
        yield TextBatch(batch)
