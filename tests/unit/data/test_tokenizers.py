# SPDX-License-Identifier: Apache-2.0
"""A SentencePiece tokenizer trained on real text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.hf_tokenizer import HuggingFaceTokenizer
from mindformers_ext.data.readers import Cutting, cut
from mindformers_ext.data.tokenizers import (
    SPECIAL_IDS,
    SentencePieceTokenizer,
    encode_glued,
    open_tokenizer,
    puts_blank,
    train_sentencepiece,
)
from mindformers_ext.data.word_cache import WordEncoder


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


@pytest.fixture(scope="module")
def library(tokenizer: SentencePieceTokenizer) -> HuggingFaceTokenizer:
    """The same model as the library's tokenizer."""
    opened = open_tokenizer(tokenizer.path)
    assert isinstance(opened, HuggingFaceTokenizer) and opened._words is not None
    return opened


@given(st.lists(st.text(alphabet="  ab the\n\n\t.,'é漢\U0001f600▁\xa0\x00<>s/unk019", max_size=30), max_size=4))
def test_words_apart_give_the_models_own_tokens(
    library: HuggingFaceTokenizer, tokenizer: SentencePieceTokenizer, texts: list[str]
) -> None:
    """Those of the library, and of SentencePiece."""
    encoder = WordEncoder(library._plain, library._model.token_to_id("▁"))
    texts = [text for text in texts if not re.search("<s>|</s>|<unk>", text)]
    found = [np.frombuffer(ids, np.int32).tolist() for ids in encoder.encode(texts)]
    assert found == library._plain(texts) == tokenizer._model.encode(texts, out_type=int)


def test_a_line_breaks_token_that_other_texts_give_keeps_words_together(
    tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """Words are found apart by the token of a line break: none must hold it, in a piece or in an added token."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    texts = ["a <0x0A> b\n<0x0A>", "one\n\ntwo", "\n \n  \n"]
    assert isinstance(opened := open_tokenizer(folder), HuggingFaceTokenizer) and opened._words is not None
    assert [list(ids) for ids in opened.encode_batch(texts)] == opened._plain(texts)
    added = {"content": "one\n", "special": False, "normalized": False}
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {str(opened.vocab_size): added}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert isinstance(opened := open_tokenizer(folder), HuggingFaceTokenizer) and opened._words is None
    model = json.loads(opened._model.to_str())
    model["model"]["vocab"] |= {"<0x0A": opened.vocab_size, "<0": opened.vocab_size + 1}
    model["added_tokens"] = model["added_tokens"][:3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    assert isinstance(opened := open_tokenizer(tmp_path), HuggingFaceTokenizer) and opened._words is None


def test_real_text_gives_the_models_own_tokens(real_tokenizer: Path, wiki_file: Path) -> None:
    real, judge = open_tokenizer(real_tokenizer), SentencePieceTokenizer(real_tokenizer)
    texts = wiki_file.read_text(encoding="utf-8").split("\n")
    for _ in range(2):  # the second time from the cache
        assert [list(ids) for ids in real.encode_batch(texts)] == judge.encode_batch(texts)


def test_the_cache_is_bounded(library: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindformers_ext.data.word_cache.MOST_WORDS", 100)
    encoder = WordEncoder(library._plain, library._model.token_to_id("▁"))
    for start in range(0, 1000, 50):
        text = " ".join(f"w{number}" for number in range(start, start + 50)) + " " + "long" * 20 + " "
        assert np.frombuffer(encoder.encode([text])[0], np.int32).tolist() == library._plain([text])[0]
        assert len(encoder._known) <= 101 and max(map(len, encoder._known)) < 30


@pytest.mark.parametrize(
    "normal",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"model_type": "unigram"},
        {"split_by_whitespace": False},
        {"byte_fallback": False},
    ],
)
def test_other_models_are_encoded_by_sentencepiece(documents: list[str], tmp_path: Path, normal: dict) -> None:
    import sentencepiece

    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "vocab_size": 700,
        "minloglevel": 2,
    } | normal
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents[:200]), model_prefix=str(tmp_path / "other"), **settings
    )
    other = open_tokenizer(tmp_path / "other.model")
    if "split_by_whitespace" in normal:  # LLaMA's kind, but with words that hold blanks
        assert isinstance(other, HuggingFaceTokenizer) and other._words is None
        other = SentencePieceTokenizer(tmp_path / "other.model")
    assert isinstance(other, SentencePieceTokenizer)
    texts = ["Return the  name. ", "", " of a <unk> file", "plain"]
    for text, ids in zip(texts, other.encode_batch(texts), strict=True):
        if "<unk>" not in text:
            assert ids == other._model.encode(text)
    assert 0 in other.encode(texts[2])
    if "split_by_whitespace" in normal:
        assert [
            list(ids) for ids in open_tokenizer(tmp_path / "other.model").encode_batch(texts)
        ] == other.encode_batch(texts)


def test_special_tokens_in_a_text_become_their_ids(tokenizer: SentencePieceTokenizer) -> None:
    inner = tokenizer._model.encode
    text = "<unk> of <s>the</s></s> < unk>"
    expected = [0, *inner(" of "), 1, *inner("the"), 2, 2, *inner(" < unk>")]
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode([0, *inner(" of "), 0]) == "<unk> of <unk>"


def test_a_long_document_cut_between_words_keeps_its_tokens(real_tokenizer: Path, wiki_file: Path) -> None:
    real = open_tokenizer(real_tokenizer)
    assert puts_blank(real)
    text = wiki_file.read_text(encoding="utf-8")[:300_000].replace("<unk>", "lobster")
    parts = list(cut(text, Cutting(limit=500)))
    assert len(parts) > 500 and not any(part.glued for part in parts)
    cut_ids = np.concatenate(real.encode_batch([part.text for part in parts]))
    assert cut_ids.tolist() == real.encode_batch([text])[0].tolist()


def test_text_without_blanks_goes_on_without_one(tokenizer: SentencePieceTokenizer) -> None:
    text = "漢字仮名" * 50
    parts = list(cut(text, Cutting(limit=30)))
    first, *glued = parts
    ids = [*tokenizer.encode_batch([first.text]), *encode_glued(tokenizer, [part.text for part in glued])]
    assert tokenizer.decode(np.concatenate(ids)) == text


def test_wrong_tokenizer_files_are_named(tmp_path: Path) -> None:
    for name, content in (("a.json", b"{}"), ("b.json", b"not json"), ("c.json", b"\xff\xfe"), ("d.model", b"{}")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is no"):
            open_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match=r"no tokenizer\.json and no tokenizer\.model in the folder"):
        open_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no tokenizer at"):
        open_tokenizer(tmp_path / "missing.json")
