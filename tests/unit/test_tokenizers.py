# SPDX-License-Identifier: Apache-2.0
"""A SentencePiece tokenizer trained on real text."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.tokenizers import SPECIAL_IDS, SentencePieceTokenizer, train_sentencepiece


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(standard_library_text(300_000))


@pytest.fixture(scope="module")
def tokenizer(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_sentencepiece(documents, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 600)


def test_special_ids_are_llamas_and_padding_is_not_unknown(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.vocab_size == 600
    assert tokenizer.special_ids == SPECIAL_IDS
    assert len(set(tokenizer.special_ids.values())) == 4


def test_every_text_survives(tokenizer: SentencePieceTokenizer, documents: list[str]) -> None:
    for text in [*documents[::7], "  two blanks\n\ttab é 漢字 \U0001f600", ""]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(3 < token < 600 for token in ids)


def test_bos_and_eos_only_where_asked(tokenizer: SentencePieceTokenizer) -> None:
    plain = tokenizer.encode("Return the name.")
    assert tokenizer.encode("Return the name.", bos=True, eos=True) == [1, *plain, 2]


def test_training_again_gives_the_same_bytes(documents: list[str], tmp_path: Path) -> None:
    train_sentencepiece(documents, tmp_path / "a.model", 500)
    train_sentencepiece(documents, tmp_path / "b.model", 500)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "b.model"]


def test_too_little_text_and_wrong_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot train a tokenizer of 5000 pieces"):
        train_sentencepiece(["a few words only"], tmp_path / "a.model", 5000)
    with pytest.raises(UserError, match="no tokenizer at"):
        SentencePieceTokenizer(tmp_path / "a.model")
    (tmp_path / "a.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="no SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "a.model")
