# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: SentencePiece models and Hugging Face's tokenizer.json, loaded when one is used; many texts at a time.

The texts of special tokens inside a text (``<unk>`` of WikiText, ``<s>``, ``</s>``) become their ids, and what stands
between them is encoded on its own, as MindFormers' and Hugging Face's LLaMA tokenizers do.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.hf_tokenizer import HuggingFaceTokenizer
from mindformers_ext.data.word_cache import WordEncoder, is_separable
from mindformers_ext.formats.atomic import fresh_file

# LLaMA's first three ids, and a padding id of its own: with pad == unk a loss that masks padding also drops every
# unknown token (found in MindFormers' preprocessing, spec section 6).
SPECIAL_IDS = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}
IN_TEXT = ("unk_id", "bos_id", "eos_id")  # special tokens that are recognised inside a text


class Tokenizer(Protocol):
    """Text to ids and back."""

    path: Path

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id of ``encode`` is below it."""
        ...

    @property
    def special_ids(self) -> dict[str, int]:
        """``unk_id``, ``bos_id``, ``eos_id`` and ``pad_id``; -1 where there is none."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """Token ids of each text (lists or int32 arrays), without BOS and EOS."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model: text to ids and back."""

    def __init__(self, path: Path) -> None:
        """Load the model file at ``path``; a missing or foreign file is a ``UserError``."""
        import sentencepiece

        if not path.is_file():
            raise UserError(f"no tokenizer at {path}: give a SentencePiece model file (tokenizer.model)")
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise UserError(f"{path} is no SentencePiece model ({error}): give a tokenizer.model") from error
        self.path = path
        ids = self.special_ids
        self._marks = {
            self._model.id_to_piece(ids[name]): np.int32(ids[name]).tobytes() for name in IN_TEXT if ids[name] >= 0
        }
        self._pattern = re.compile("(" + "|".join(map(re.escape, self._marks)) + ")")
        byte = self._model.piece_to_id("<0x0A>")  # with byte fallback, unknown tokens come from the text "<unk>" only
        self._byte_fallback = byte >= 0 and bool(self._model.is_byte(byte))
        self._words = WordEncoder(self._model) if is_separable(self._model) else None

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id of ``encode`` is below it."""
        return int(self._model.vocab_size())

    @property
    def special_ids(self) -> dict[str, int]:
        """``unk_id``, ``bos_id``, ``eos_id`` and ``pad_id``; -1 where the model has none."""
        return {name: int(getattr(self._model, name)()) for name in SPECIAL_IDS}

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of ``text``, between BOS and EOS where asked."""
        ids = self.special_ids
        return [ids["bos_id"]] * bos + [int(token) for token in self.encode_batch([text])[0]] + [ids["eos_id"]] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """Token ids of each text as an int32 array; one call of the library for all of them."""
        sections: list[str] = []
        plans: list[list[str] | None] = []  # None: the whole text is one section
        for text in texts:
            if "<" in text and self._pattern.search(text):
                parts = [part for part in self._pattern.split(text) if part]
                sections += (part for part in parts if part not in self._marks)
                plans.append(parts)
            else:
                sections.append(text)
                plans.append(None)
        encoded = iter(self._encoded(sections))
        return [
            np.frombuffer(next(encoded) if plan is None else self._joined(plan, encoded), np.int32) for plan in plans
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; control ids give nothing, an unknown token its own mark."""
        tokens = [int(token) for token in ids]
        unk = self.special_ids["unk_id"]
        if not self._byte_fallback or unk not in tokens:
            return str(self._model.decode(tokens))
        places = [-1, *(place for place, token in enumerate(tokens) if token == unk), len(tokens)]
        parts = [self._model.decode(tokens[a + 1 : b]) for a, b in zip(places, places[1:], strict=False)]
        return str(self._model.id_to_piece(unk)).join(parts)

    def _encoded(self, sections: list[str]) -> list[bytes]:
        if self._words is not None:
            return self._words.encode(sections)
        return [np.array(ids, np.int32).tobytes() for ids in self._model.encode(sections, num_threads=1, out_type=int)]

    def _joined(self, parts: list[str], encoded: Iterator[bytes]) -> bytes:
        return b"".join([self._marks[part] if part in self._marks else next(encoded) for part in parts])


def open_tokenizer(path: Path) -> Tokenizer:
    """A SentencePiece file, a tokenizer.json, or a folder that holds one of them (tokenizer.model goes first).

    Raises:
        UserError: nothing of the kind is there, or the file is of another kind.
    """
    if path.is_dir():
        for name in ("tokenizer.model", "tokenizer.json"):
            if (path / name).is_file():
                return open_tokenizer(path / name)
        raise UserError(f"no tokenizer.model and no tokenizer.json in the folder {path}: give a tokenizer file")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    return SentencePieceTokenizer(path)


def puts_blank(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer sees every text as if a blank stood before it (LLaMA's do)."""
    both, left, right = (list(ids) for ids in tokenizer.encode_batch(["a b", "a", "b"]))
    return both == left + right


def encode_glued(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Any]:
    """Token ids of texts that go on without a blank: encoded behind a line break, whose ids are then cut off."""
    mark, *found = tokenizer.encode_batch(["\n", *("\n" + text for text in texts)])
    size = len(mark)
    return [ids[size:] if list(ids[:size]) == list(mark) else ids for ids in found]


def train_sentencepiece(documents: Iterable[str], path: Path, vocab_size: int) -> SentencePieceTokenizer:
    """Train a byte-pair model with byte fallback (every text can be encoded and decoded) and load it.

    The same documents always give the same file: one thread, no sampling, no shuffling. Documents are cut into lines
    because the trainer skips sentences over a few thousand bytes; a line break is encoded through its byte.

    Raises:
        UserError: too little text for ``vocab_size`` pieces.
    """
    import sentencepiece

    lines = (line for text in documents for line in text.split("\n") if line.strip())
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=buffer,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            num_threads=1,
            minloglevel=2,
            unk_id=SPECIAL_IDS["unk_id"],
            bos_id=SPECIAL_IDS["bos_id"],
            eos_id=SPECIAL_IDS["eos_id"],
            pad_id=SPECIAL_IDS["pad_id"],
        )
    except RuntimeError as error:
        raise UserError(f"cannot train a tokenizer of {vocab_size} pieces: {error}; give more text or fewer") from error
    with fresh_file(path, overwrite=True) as beside:
        beside.write_bytes(buffer.getvalue())
    return SentencePieceTokenizer(path)
