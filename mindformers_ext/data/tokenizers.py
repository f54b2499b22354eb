# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: SentencePiece models, loaded or trained. ``sentencepiece`` is imported when one is used."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError

# LLaMA's first three ids, and a padding id of its own: with pad == unk a loss that masks padding also drops every
# unknown token (found in MindFormers' preprocessing, spec section 6).
SPECIAL_IDS = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}


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
        return list(self._model.encode(text, add_bos=bos, add_eos=eos))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; control ids give nothing."""
        return str(self._model.decode([int(token) for token in ids]))


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
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(buffer.getvalue())
    beside.replace(path)
    return SentencePieceTokenizer(path)
