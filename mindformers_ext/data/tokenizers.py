# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: one opener for folders and files, loaded when one is used; many texts at a time.

The texts of special and added tokens inside a text (``<unk>`` of WikiText, ``</s>``, ``<|im_end|>``) become their ids,
and what stands between them is encoded on its own, as MindFormers' and Hugging Face's LLaMA tokenizers do.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.hf_tokenizer import HuggingFaceTokenizer
from mindformers_ext.data.sentencepiece_file import read_sentencepiece
from mindformers_ext.data.text_lines import lines_of
from mindformers_ext.data.tokenizer_settings import LLAMA, MODEL, NO_SETTINGS, TABLE, TokenizerSettings, read_settings
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
    def base_size(self) -> int:
        """The same without added tokens, which a network need not have rows for as long as no text uses them."""
        ...

    @property
    def special_ids(self) -> dict[str, int]:
        """``unk_id``, ``bos_id``, ``eos_id`` and ``pad_id``; -1 where there is none."""
        ...

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer itself puts in front of a plain text and behind it."""
        ...

    @property
    def byte_ids(self) -> frozenset[int]:
        """Ids of single bytes whose text depends on the bytes that follow."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """Token ids of each text (lists or int32 arrays), without what frames it."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model as SentencePiece itself encodes with it: text to ids and back."""

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
        self._marks = {self._model.id_to_piece(ids[name]): ids[name] for name in IN_TEXT if ids[name] >= 0}
        self._pattern = re.compile("(" + "|".join(map(re.escape, self._marks)) + ")")
        byte = self._model.piece_to_id("<0x0A>")  # with byte fallback, unknown tokens come from the text "<unk>" only
        self._byte_fallback = byte >= 0 and bool(self._model.is_byte(byte))

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id of ``encode`` is below it."""
        return int(self._model.vocab_size())

    @property
    def base_size(self) -> int:
        """The same: a SentencePiece model has no added tokens."""
        return self.vocab_size

    @property
    def special_ids(self) -> dict[str, int]:
        """``unk_id``, ``bos_id``, ``eos_id`` and ``pad_id``; -1 where the model has none."""
        return {name: int(getattr(self._model, name)()) for name in SPECIAL_IDS}

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """What LLaMA's tokenizers put in front of a text and behind it: BOS and nothing."""
        bos = self.special_ids["bos_id"]
        return ([bos] if bos >= 0 else []), []

    @property
    def byte_ids(self) -> frozenset[int]:
        """None: SentencePiece keeps the text of whole characters whatever follows."""
        return frozenset()

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of ``text``, between BOS and EOS where asked."""
        ids = self.special_ids
        return [*[ids["bos_id"]] * bos, *self.encode_batch([text])[0], *[ids["eos_id"]] * eos]

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """Token ids of each text; one call of the library for all of them."""
        plans = [[part for part in self._pattern.split(text) if part] for text in texts]
        sections = [part for plan in plans for part in plan if part not in self._marks]
        encoded = iter(self._model.encode(sections, num_threads=1, out_type=int))
        return [
            [token for part in plan for token in ([self._marks[part]] if part in self._marks else next(encoded))]
            for plan in plans
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


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder, with all that its files say of it, or of a lone file.

    A file that is called tokenizer.json or tokenizer.model stands for its folder, so that one folder has one tokenizer
    whoever opens it. A lone SentencePiece model of another kind than LLaMA's is encoded by SentencePiece.

    Raises:
        UserError: nothing of the kind is there, or the file is of another kind.
    """
    if stands_for_folder(path):
        folder = path if path.is_dir() else path.parent
        settings = read_settings(folder)
        path = path if not path.is_dir() and not path.is_file() else _main_file(folder, settings)
    else:
        settings = NO_SETTINGS
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}: give a {TABLE}, a {MODEL} or the folder that holds it")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, settings)
    model = read_sentencepiece(path)
    if settings.kind is None and not model.is_llamas:
        return SentencePieceTokenizer(path)
    return HuggingFaceTokenizer(path, settings, model)


def stands_for_folder(path: Path) -> bool:
    """Whether what lies beside a tokenizer belongs to it."""
    return path.is_dir() or path.name in (TABLE, MODEL)


def _main_file(folder: Path, settings: TokenizerSettings) -> Path:
    """tokenizer.json where there is one, unless the settings have transformers make the tokenizer anew."""
    table, model = folder / TABLE, folder / MODEL
    if not table.is_file() and not model.is_file():
        raise UserError(f"no {TABLE} and no {MODEL} in the folder {folder}: give a tokenizer file")
    anew = settings.kind is LLAMA and (settings.prefix_space is not None or settings.from_model)
    return model if model.is_file() and (anew or not table.is_file()) else table


def puts_blank(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer sees every text as if a blank stood before it (LLaMA's do)."""
    both, left, right = (list(ids) for ids in tokenizer.encode_batch(["a b", "a", "b"]))
    return both == left + right


def encode_framed(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a whole plain text, framed as the tokenizer does it."""
    before, after = tokenizer.frame
    return [*before, *(int(token) for token in tokenizer.encode_batch([text])[0]), *after]


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

    lines = (line for text in documents for line in lines_of(text) if line.strip())
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
