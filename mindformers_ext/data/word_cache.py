# SPDX-License-Identifier: Apache-2.0
"""LLaMA's tokenizers word by word: each word of a language is encoded once and then looked up, with the same tokens.

Why the tokens are the same: byte-pair encoding merges neighbours, best pair first. If no piece of the vocabulary holds
a blank behind another character, no merge ever joins a word with the blank that follows, so each stretch of blanks and
the word behind it is encoded as if it stood alone; the same goes for a line break that no piece holds, whose token
nothing else gives. That is so for LLaMA's and Mixtral's models and is checked for every tokenizer: byte pairs with
bytes for unknown characters (unknown tokens in a row would be joined over a blank), no normalisation but a blank put in
front. Others are encoded text by text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from mindformers_ext.data.sentencepiece_file import BLANK

SEGMENT = re.compile(r" +[^ \n]*|\n[^ \n]*")  # blanks or one line break, and what follows
LINE_BREAK = "<0x0A>"  # the piece of a line break
MOST_WORDS, LONGEST = 200_000, 24  # kept words and their characters: some 40 MB
# the normaliser of a tokenizer that puts a blank in front of every text and writes blanks as pieces do
PLAIN = [{"type": "Prepend", "prepend": BLANK}, {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}]

TOGETHER = 64  # new words that the library is given as one text: a call costs it as much as some words

Encode = Callable[[Sequence[str]], list[list[int]]]


class WordEncoder:
    """Encodes texts with a tokenizer for which ``is_separable`` holds. Ids travel as the bytes of int32."""

    def __init__(self, encode: Encode, blank: int) -> None:
        """``encode``: texts to ids, many at a time; ``blank``: the id of a lone blank."""
        self._encode = encode
        self._lone = {" ": np.int32(blank).tobytes()}  # a last blank: alone, the library would take it for nothing
        self._known = dict(self._lone)
        self._break = encode(["\n"])[0][-1]

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Token ids of each text, as the bytes of int32: what the tokenizer itself gives."""
        split = [SEGMENT.findall(" " + text) if text and BLANK not in text else [] for text in texts]
        missing = [word for word in set(chain.from_iterable(split)) if word not in self._known]
        self._learn(missing)
        look_up = self._known.__getitem__
        result = [b"".join(map(look_up, words)) for words in split]
        for index, text in enumerate(texts):
            if BLANK in text:
                result[index] = np.array(self._encode([text])[0], np.int32).tobytes()
        self._forget(missing)
        return result

    def _learn(self, words: Sequence[str]) -> None:
        """Look up words as lines of a text: a line break is one token, which nothing else gives."""
        groups = [words[at : at + TOGETHER] for at in range(0, len(words), TOGETHER)]
        lines = ["".join("\n" + word if word[0] == " " else word for word in group) for group in groups]
        for group, found in zip(groups, self._encode(lines), strict=True):
            ids = np.array(found, np.int32)
            breaks = np.flatnonzero(ids == self._break)
            data, ends = ids.tobytes(), [*(4 * breaks[1:]).tolist(), 4 * len(ids)]
            for word, start, end in zip(group, (4 * breaks).tolist(), ends, strict=True):
                self._known[word] = data[start + 4 * (word[0] == " ") : end]

    def _forget(self, fresh: Sequence[str]) -> None:
        if len(self._known) > MOST_WORDS:
            self._known = dict(self._lone)
            return
        for word in fresh:
            if len(word) > LONGEST:
                del self._known[word]


def is_separable(model: Any) -> bool:
    """Whether the tokens of a ``tokenizers.Tokenizer`` can be found word by word."""
    inner = model.model
    if type(inner).__name__ != "BPE" or model.pre_tokenizer is not None or model.normalizer is None:
        return False
    plain = inner.byte_fallback and not inner.dropout and not inner.ignore_merges
    if not plain or inner.continuing_subword_prefix or inner.end_of_word_suffix:
        return False
    normalizer = json.loads(model.normalizer.__getstate__())
    if normalizer.get("type") != "Sequence" or normalizer.get("normalizers") != PLAIN:
        return False
    added = model.get_added_tokens_decoder().values()
    pieces = model.get_vocab(with_added_tokens=False)
    bytes_known = all(f"<0x{number:02X}>" in pieces for number in range(256))
    cuts = ((LINE_BREAK[:at], LINE_BREAK[at:]) for at in range(1, len(LINE_BREAK)))
    return (
        bytes_known
        and BLANK in pieces
        and not any(BLANK in piece.lstrip(BLANK) or "\n" in piece for piece in pieces)
        and not any(LINE_BREAK in piece and piece != LINE_BREAK for piece in pieces)
        and not any(left in pieces and right in pieces for left, right in cuts)
        and not any("\n" in token.content for token in added)
    )
