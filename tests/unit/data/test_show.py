# SPDX-License-Identifier: Apache-2.0
"""Rows as text: the marks are where the network's loss is, and nothing of the text is lost or added."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.show import loss_mask, show
from mindformers_ext.data.tokenizers import SentencePieceTokenizer, train_sentencepiece
from mindformers_ext.formats.mindrecord_file import record_fields

BOS, EOS, PAD, IGNORE = 1, 2, 3, -100


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_sentencepiece(list(standard_library_text(300_000)), path, 600)


def conversation(tokenizer: SentencePieceTokenizer, *rounds: tuple[str, str]) -> tuple[list[int], list[int]]:
    ids, labels = [BOS], [IGNORE]
    for question, answer in rounds:
        asked, said = tokenizer.encode(question), [*tokenizer.encode(answer), EOS]
        ids += asked + said
        labels += [IGNORE] * len(asked) + said
    return ids, labels


def test_a_finetune_row_marks_the_answers_and_their_eos(tokenizer: SentencePieceTokenizer) -> None:
    ids, labels = conversation(tokenizer, ("One plus one?", "Two,\n  é!"), ("And more?", "Three"))
    shown = show(ids + [PAD] * 5, labels + [IGNORE] * 5, tokenizer, PAD, IGNORE)
    texts = [(segment.text.strip(" "), segment.loss, segment.special) for segment in shown.segments]
    assert texts == [
        ("<s>", False, True),
        ("One plus one?", False, False),
        ("Two,\n  é!", True, False),
        ("</s>", True, True),
        ("And more?", False, False),
        ("Three", True, False),
        ("</s>", True, True),
        ("<pad>x5", False, True),
    ]
    assert (shown.tokens, shown.padding, shown.unknown, shown.changed) == (len(ids) + 5, 5, 0, 0)
    assert shown.loss == sum(label != IGNORE for label in labels)


def test_a_pretrain_row_is_text_from_end_to_end(tokenizer: SentencePieceTokenizer) -> None:
    documents = ["The first text\nof two.", "  A second one, é."]
    ids = [token for text in documents for token in tokenizer.encode(text, bos=True, eos=True)]
    shown = show(ids, None, tokenizer, PAD, IGNORE)
    assert "".join(segment.text for segment in shown.segments) == f"<s>{documents[0]}</s><s>{documents[1]}</s>"
    assert [segment.loss for segment in shown.segments] == [False] + [True] * (len(shown.segments) - 1)
    assert shown.loss == len(ids) - 1


def test_the_text_between_marks_adds_up(tokenizer: SentencePieceTokenizer) -> None:
    """Wherever the marks fall between whole characters, the segments joined are the decoded text."""
    text = "Return the name of the file, or None where there is no file."
    ids = tokenizer.encode(text, bos=True)
    for cut in range(1, len(ids)):
        labels = [IGNORE] * cut + ids[cut:]
        shown = show(ids, labels, tokenizer, PAD, IGNORE)
        assert "".join(segment.text for segment in shown.segments) == f"<s>{text}"
        assert shown.loss == len(ids) - cut


def test_an_unknown_token_is_visible_and_counted(tokenizer: SentencePieceTokenizer) -> None:
    before, after = tokenizer.encode("before the"), tokenizer.encode("after")
    shown = show([BOS, *before, 0, *after], None, tokenizer, PAD, IGNORE)
    assert [segment.text for segment in shown.segments][2] == "<unk>"
    assert shown.unknown == 1 and shown.segments[-1].text.strip() == "after"
    # where padding is the unknown token, what follows one bears no loss, and only the run at the end is padding
    as_padding = show([BOS, *before, 0, *after, 0, 0], None, tokenizer, 0, IGNORE)
    assert (as_padding.padding, as_padding.unknown) == (2, 1)
    assert as_padding.loss == len(before) + 1 + len(after) - 1 + 1


def test_an_eos_that_also_pads_is_seen_where_it_has_a_label(tokenizer: SentencePieceTokenizer) -> None:
    ids, labels = conversation(tokenizer, ("One plus one?", "Two"))
    shown = show(ids + [EOS] * 3, labels + [IGNORE] * 3, tokenizer, EOS, IGNORE)
    assert [segment.text.strip() for segment in shown.segments][-2:] == ["</s>", "<pad>x3"]
    assert (shown.padding, shown.loss) == (3, sum(label != IGNORE for label in labels))


def test_loss_follows_the_networks_rule() -> None:
    assert loss_mask([1, 5, 6, 3, 3], None, 3, IGNORE) == [False, True, True, True, False]
    assert loss_mask([1, 5, 6, 3, 3], [1, 5, IGNORE, 3, 3], 3, IGNORE) == [False, True, False, True, False]
    assert loss_mask([1, 5, 6, 3, 3], None, -1, IGNORE) == [False, True, True, True, True]


def test_labels_that_are_not_the_token_are_counted(tokenizer: SentencePieceTokenizer) -> None:
    ids, labels = conversation(tokenizer, ("One plus one?", "Two"))
    labels[-1] = 7
    assert show(ids, labels, tokenizer, PAD, IGNORE).changed == 1


def test_ids_and_labels_that_do_not_fit_are_user_errors(tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(UserError, match="token id 600 is not in this tokenizer, which has ids 0 to 599"):
        show([BOS, 600], None, tokenizer, PAD, IGNORE)
    with pytest.raises(UserError, match="token id -1 is not"):
        show([BOS, -1], None, tokenizer, PAD, IGNORE)
    with pytest.raises(UserError, match="2 input_ids but 1 labels"):
        show([BOS, 5], [5], tokenizer, PAD, IGNORE)


def header(**words: object) -> bytes:
    text = json.dumps(words).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x05",
        b"hello, this is plain text",
        b"\xff" * 100,
        header(),
        header(schema=[]),
        header(schema=[{"a": 1}]),
        header(schema=[{"schema": ["input_ids"]}]),
        header(schema=[{"schema": {"input_ids": 3}}])[:-9],
    ],
)
def test_what_is_no_mindrecord_is_told(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.mindrecord"
    path.write_bytes(data)
    with pytest.raises(UserError, match="is not a MindRecord"):
        record_fields(path)


def test_the_header_names_the_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.mindrecord"
    path.write_bytes(header(schema=[{"schema": {"input_ids": {"type": "int32", "shape": [-1]}}}]) + bytes(99))
    assert record_fields(path) == {"input_ids": "int32"}
    for wrong, message in [(tmp_path, "is a folder"), (tmp_path / "b", "does not exist")]:
        with pytest.raises(UserError, match=message):
            record_fields(wrong)
    path.rename(tmp_path / "a.mindrecord.db")
    with pytest.raises(UserError, match=r"is the index of a MindRecord: give a\.mindrecord"):
        record_fields(tmp_path / "a.mindrecord.db")
