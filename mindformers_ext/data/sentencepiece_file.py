# SPDX-License-Identifier: Apache-2.0
"""A SentencePiece model file: its pieces, what kind of model it is, and the library's form of it by LLaMA's rules."""

from __future__ import annotations

import struct
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ext.core.errors import UserError

BLANK = "\u2581"  # how pieces write a blank
LARGEST = 64 << 20  # bytes; the largest of a public model (256,000 pieces) has 4 MB

# Field numbers and values in sentencepiece_model.proto (google/sentencepiece, Apache-2.0).
PIECE, TRAINER, NORMALIZER = 1, 2, 3
TEXT, SCORE, KIND = 1, 2, 3
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
MODEL_TYPE, UNIGRAM, BPE, SUFFIX_BLANKS, BYTE_FALLBACK = 3, 1, 2, 24, 35
IDS = {"unk_id": (40, 0), "bos_id": (41, 1), "eos_id": (42, 2), "pad_id": (43, -1)}
CHARSMAP, DUMMY_PREFIX, REMOVE_BLANKS, ESCAPE_BLANKS = 2, 3, 4, 5
_FLOAT = struct.Struct("<f").unpack_from
Fields = dict[int, int | float | bytes]


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceFile:
    """What a model file holds. ``is_llamas``: byte pairs and byte fallback, no normalisation, every blank kept and one
    put in front: then the library's form gives SentencePiece's own tokens."""

    path: Path
    pieces: Sequence[Piece]
    special_ids: Mapping[str, int]
    model_type: int
    is_llamas: bool


def read_sentencepiece(path: Path) -> SentencePieceFile:
    """Read the model file at ``path``.

    Raises:
        UserError: no file there, or one of another kind.
    """
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}: give a SentencePiece model file (tokenizer.model)")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} is no SentencePiece model ({path.stat().st_size} bytes): give a tokenizer.model")
    try:
        pieces, trainer, normalizer = _sections(path.read_bytes())
        if not pieces or not trainer:
            raise ValueError("it has no pieces, or no description of its training")
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise UserError(f"{path} is no SentencePiece model ({error}): give a tokenizer.model") from error
    size = len(pieces)
    ids = {name: _signed(trainer.get(number, default)) for name, (number, default) in IDS.items()}
    model_type = int(trainer.get(MODEL_TYPE, UNIGRAM))
    is_llamas = (
        model_type == BPE
        and bool(trainer.get(BYTE_FALLBACK, 0))
        and not trainer.get(SUFFIX_BLANKS, 0)
        and not normalizer.get(CHARSMAP, b"")
        and normalizer.get(DUMMY_PREFIX, 1) == 1
        and normalizer.get(REMOVE_BLANKS, 1) == 0
        and normalizer.get(ESCAPE_BLANKS, 1) == 1
    )
    special = {name: token if 0 <= token < size else -1 for name, token in ids.items()}
    return SentencePieceFile(path, pieces, special, model_type, is_llamas)


def merges_of(pieces: Container[str], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges of a byte-pair model, best first, as transformers orders them: by the score of the whole piece, then
    by the lengths of its parts, longest first.

    Args:
        pieces: their texts.
        scores: the score of each, in the order of their ids.
    """
    found = [
        (-score, -at, at - len(piece), piece[:at], piece[at:])
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if piece[:at] in pieces and piece[at:] in pieces
    ]
    found.sort(key=itemgetter(0, 1, 2))
    return [item[3:] for item in found]


def library_form(model: SentencePieceFile, legacy: bool, prefix_space: bool, names: Mapping[int, str]) -> Any:
    """The model as a ``tokenizers.Tokenizer``, by the rules of transformers' LLaMA converter.

    Args:
        model: what was read.
        legacy: a blank goes in front of every stretch of text between special tokens, not only of the first.
        prefix_space: whether a blank goes in front at all.
        names: texts that ids 0 to 2 have beside the model, where they do.

    Raises:
        UserError: a model of words or characters, which the library does not have.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers

    texts = [names.get(place, piece.text) if place < 3 else piece.text for place, piece in enumerate(model.pieces)]
    scores = [0.0 if place < 3 else piece.score for place, piece in enumerate(model.pieces)]
    result = Tokenizer(_algorithm(model, texts, scores))
    listed = [piece for piece in model.pieces if piece.kind in (CONTROL, USER_DEFINED)]
    result.add_tokens([AddedToken(piece.text, normalized=False, special=piece.kind == CONTROL) for piece in listed])
    if legacy:
        prepend = [normalizers.Prepend(BLANK)] if prefix_space else []
        result.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", BLANK)])
    else:
        scheme = "first" if prefix_space else "never"
        result.pre_tokenizer = pre_tokenizers.Metaspace(replacement=BLANK, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    result.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix_space else steps)
    return result


def _algorithm(model: SentencePieceFile, texts: Sequence[str], scores: Sequence[float]) -> Any:
    from tokenizers import models

    if model.model_type == UNIGRAM:
        return models.Unigram(list(zip(texts, scores, strict=True)), unk_id=0, byte_fallback=True)
    if model.model_type != BPE:
        raise UserError(f"{model.path} is a model of words or characters: give one of byte pairs or a unigram model")
    merges = merges_of({piece.text for piece in model.pieces}, dict(zip(texts, scores, strict=True)))
    vocabulary = {text: place for place, text in enumerate(texts)}
    unknown = model.pieces[model.special_ids["unk_id"]].text if model.special_ids["unk_id"] >= 0 else None
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def _piece(message: bytes) -> Piece:
    if len(message) > 6 and message[0] == 0x0A:  # as every trainer writes it: text, score, kind if it is not normal
        at = 2 + message[1]
        usual = message[1] < 0x80 and message[at : at + 1] == b"\x15"
        if usual and len(message) == at + 5:
            return Piece(message[2:at].decode("utf-8"), _FLOAT(message, at + 1)[0], NORMAL)
        if usual and len(message) == at + 7 and message[at + 5] == 0x18 and message[at + 6] < 0x80:
            return Piece(message[2:at].decode("utf-8"), _FLOAT(message, at + 1)[0], message[at + 6])
    fields = dict(_fields(message))
    text = fields.get(TEXT, b"")
    if not isinstance(text, bytes):
        raise ValueError("a piece has no text")
    return Piece(text.decode("utf-8"), float(fields.get(SCORE, 0.0)), int(fields.get(KIND, NORMAL)))


def _sections(data: bytes) -> tuple[list[Piece], Fields, Fields]:
    pieces: list[Piece] = []
    sections: dict[int, Fields] = {TRAINER: {}, NORMALIZER: {}}
    place = 0
    while place + 1 < len(data) and data[place] == 8 * PIECE + 2 and data[place + 1] < 0x80:  # the pieces, in a hurry
        end = place + 2 + data[place + 1]
        if end > len(data):
            break
        pieces.append(_piece(data[place + 2 : end]))
        place = end
    for number, value in _fields(data[place:]):
        if not isinstance(value, bytes):
            continue
        if number == PIECE:
            pieces.append(_piece(value))
        elif number in sections:
            sections[number].update(_fields(value))
    return pieces, sections[TRAINER], sections[NORMALIZER]


def _fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """The fields of a protobuf message: numbers as int, four bytes as a float, everything of a length as bytes."""
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
            if shift > 63:
                raise ValueError("a number is too long")

    while place < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
        elif kind == 2:
            size = varint()
            if place + size > len(message):
                raise ValueError("it is cut off")
            yield key >> 3, message[place : place + size]
            place += size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            (value,) = struct.unpack_from("<d" if kind == 1 else "<f", message, place)
            yield key >> 3, value
            place += size
        else:
            raise ValueError("an unknown kind of field")


def _signed(number: int | float | bytes) -> int:
    """A protobuf int32: negative ones are written as large ones."""
    if not isinstance(number, int):
        raise ValueError("a special token's id is no number")
    return number - (1 << 64) if number >= 1 << 63 else number
