# SPDX-License-Identifier: Apache-2.0
"""SentencePiece word by word: each word of a language is encoded once and then looked up, with the same tokens.

Why the tokens are the same: byte-pair encoding merges neighbours, best pair first. If no piece of the vocabulary holds
a blank behind another character, no merge ever joins a word with the blank that follows, so each stretch of blanks and
the word behind it is encoded as if it stood alone; the same goes for a line break that no piece holds. That is so for
LLaMA's and Mixtral's models and is checked for every model: byte pairs, no normalisation, blanks kept and one put in
front, unknown characters as bytes (consecutive unknown tokens would be joined over a blank). Other models are encoded
text by text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

BLANK = "\u2581"  # how pieces write a blank
SEGMENT = re.compile(r" +[^ \n]*|\n[^ \n]*")  # blanks or one line break, and what follows
MOST_WORDS, LONGEST = 200_000, 24  # kept words and their characters: some 40 MB

# Field numbers in sentencepiece_model.proto (google/sentencepiece, Apache-2.0).
TRAINER, NORMALIZER = 2, 3
MODEL_TYPE, BPE, SUFFIX_BLANKS = 3, 2, 24
CHARSMAP, DUMMY_PREFIX, REMOVE_BLANKS, ESCAPE_BLANKS = 2, 3, 4, 5
DENORMALIZER = 5


class WordEncoder:
    """Encodes texts with a model for which ``is_separable`` holds. Ids travel as the bytes of int32."""

    def __init__(self, model: Any) -> None:
        self._model = model
        # a last blank: alone, the model would take it for nothing
        self._lone = {" ": np.int32(model.piece_to_id(BLANK)).tobytes()}
        self._known = dict(self._lone)
        self._break = len(model.encode("\n"))

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Token ids of each text, as the bytes of int32: what SentencePiece's own ``encode`` gives."""
        split = [SEGMENT.findall(" " + text) if text and BLANK not in text else [] for text in texts]
        missing = [word for word in set(chain.from_iterable(split)) if word not in self._known]
        # the model puts the first blank of each segment back
        # (and before a line break, one more line break keeps it away)
        asked = [word[1:] if word[0] == " " else "\n" + word for word in missing]
        ids = self._model.encode(asked, num_threads=1, out_type=int)
        for word, found in zip(missing, ids, strict=True):
            self._known[word] = np.array(found if word[0] == " " else found[self._break :], np.int32).tobytes()
        look_up = self._known.__getitem__
        result = [b"".join(map(look_up, words)) for words in split]
        for index, text in enumerate(texts):
            if BLANK in text:
                result[index] = np.array(self._model.encode(text, out_type=int), np.int32).tobytes()
        self._forget(missing)
        return result

    def _forget(self, fresh: Sequence[str]) -> None:
        if len(self._known) > MOST_WORDS:
            self._known = dict(self._lone)
            return
        for word in fresh:
            if len(word) > LONGEST:
                del self._known[word]


def is_separable(model: Any) -> bool:
    """Whether the model's tokens can be found word by word."""
    sections: dict[int, dict[int, int | bytes]] = {TRAINER: {}, NORMALIZER: {}, DENORMALIZER: {}}
    for number, value in _fields(model.serialized_model_proto()):
        if number in sections and isinstance(value, bytes):
            sections[number].update(_fields(value))
    trainer, normalizer = sections[TRAINER], sections[NORMALIZER]
    plain = (
        trainer.get(MODEL_TYPE, 1) == BPE
        and not trainer.get(SUFFIX_BLANKS, 0)
        and not normalizer.get(CHARSMAP, b"")
        and normalizer.get(DUMMY_PREFIX, 1) == 1
        and normalizer.get(REMOVE_BLANKS, 1) == 0
        and normalizer.get(ESCAPE_BLANKS, 1) == 1
    )
    if not plain or not model.is_byte(model.piece_to_id("<0x0A>")):
        return False
    pieces = model.id_to_piece(list(range(model.vocab_size())))
    return BLANK in pieces and not any(BLANK in piece.lstrip(BLANK) or "\n" in piece for piece in pieces)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: numbers as int, everything of a length as bytes, fixed ones left out."""
    place = 0

    def varint() -> int:
        nonlocal place
        result = shift = 0
        while True:
            byte = message[place]
            place += 1
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result
            shift += 7

    while place < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
        elif kind == 2:
            size = varint()
            yield key >> 3, message[place : place + size]
            place += size
        else:
            place += 8 if kind == 1 else 4
