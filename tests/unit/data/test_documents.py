# SPDX-License-Identifier: Apache-2.0
"""Documents to rows: next-fit, order kept, whole or dropped; labels on answers and on what ends them; pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ext.core.documents import MOST_DOCUMENTS
from mindformers_ext.core.errors import UserError
from mindformers_ext.data.chat_rows import chat_of, encode_chats
from mindformers_ext.data.chat_template import ChatTemplate
from mindformers_ext.data.documents import IGNORED, Document, DocumentPacker, documents_of, wrong_documents
from mindformers_ext.data.preferences import fitted, read_pairs
from mindformers_ext.data.tokenizers import open_tokenizer
from mindformers_ext.data.turns import Talk
from tests.helpers.chat import LLAMA3, MARKS, chat_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("chat"))


def document(size: int, first: int = 10) -> Document:
    ids = np.arange(first, first + size, dtype=np.int32)
    labels = ids.copy()
    labels[0] = IGNORED
    return Document(ids, labels)


def packed(sizes: list[int], length: int, strategy: str = "pack") -> list[dict[str, np.ndarray]]:
    packer = DocumentPacker(length, 3, strategy)
    rows = [packer.add(document(size, 10 * (number + 1))) for number, size in enumerate(sizes)]
    return [row for row in [*rows, packer.close()] if row is not None]


@given(st.lists(st.integers(1, 20), max_size=30), st.sampled_from(["pack", "pad"]))
def test_rows_hold_all_documents_whole_and_in_order_and_close_when_the_next_does_not_fit(
    sizes: list[int], strategy: str
) -> None:
    rows = packed(sizes, 20, strategy)
    found = []
    for row in rows:
        assert wrong_documents(row["document_ids"][None]) is None
        numbers = row["document_ids"]
        assert (row["input_ids"][numbers == 0] == 3).all() and (row["labels"][numbers == 0] == IGNORED).all()
        for number in range(1, numbers.max() + 1):
            inside = numbers == number
            assert (
                row["labels"][inside][0] == IGNORED
                and (row["labels"][inside][1:] == row["input_ids"][inside][1:]).all()
            )
            found.append(row["input_ids"][inside].tolist())
    assert found == [list(range(10 * (n + 1), 10 * (n + 1) + size)) for n, size in enumerate(sizes)]
    held = [int((row["document_ids"] > 0).sum()) for row in rows]
    firsts = [int((row["document_ids"] == 1).sum()) for row in rows]
    if strategy == "pack":
        assert all(one + first > 20 for one, first in zip(held, firsts[1:], strict=False))
    else:
        assert len(rows) == len(sizes)


def test_a_row_closes_at_the_most_documents_that_a_kernel_is_given() -> None:
    rows = packed([1] * (MOST_DOCUMENTS + 1), 1000)
    assert [row["document_ids"].max() for row in rows] == [MOST_DOCUMENTS, 1]


@pytest.mark.parametrize(
    "row", [[2, 2], [1, 3], [1, 0, 1], [0, 1], [1, 2, 1], [-1, 0], [MOST_DOCUMENTS + 1] * 2, [1, 1, -1]]
)
def test_documents_that_are_not_numbered_in_order_are_found(row: list[int]) -> None:
    good = documents_of([1], len(row))
    assert wrong_documents(np.stack([good, row])) == 1


TALKS = [
    Talk(("What?", "A lobster."), None),
    Talk(("One", "two", "three", "four\nlines"), "be brief"),
    Talk(("Say yes", "yes", "and who asks last?"), None),
]


@pytest.mark.parametrize("talk", TALKS)
def test_labels_are_the_answers_and_the_mark_that_ends_them_in_every_turn(folder: Path, talk: Talk) -> None:
    tokenizer, template = open_tokenizer(folder), ChatTemplate(folder)
    (found,) = encode_chats(tokenizer, [chat_of(template, talk, "here")])
    spans = np.split(np.arange(len(found.ids)), np.flatnonzero(np.diff(found.labels != IGNORED)) + 1)
    answers = [tokenizer.decode(found.ids[span].tolist()) for span in spans if found.labels[span[0]] != IGNORED]
    end = tokenizer.encode_batch([MARKS[2]])[0]
    assert [text.replace(MARKS[2], "").strip() for text in answers] == list(talk.said[1::2])
    ends = [found.ids[span][-1] for span in spans if found.labels[span[0]] != IGNORED]
    assert ends == list(end) * (len(talk.said) // 2)
    assert found.ids[0] == tokenizer.special_ids["bos_id"] and (found.ids[1:] != found.ids[0]).all()
    assert ((found.labels == IGNORED) | (found.labels == found.ids)).all()


def test_a_template_that_writes_earlier_turns_otherwise_is_refused(tmp_path: Path) -> None:
    forgets = LLAMA3.replace("{{ message['content'] | trim }}", "{{ message['content'] if loop.last else '-' }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": forgets}))
    with pytest.raises(UserError, match=r"record 7: the chat template .* in another way"):
        chat_of(ChatTemplate(tmp_path), TALKS[1], "record 7")


PAIRS = {
    "texts": {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea"},
    "continued": {
        "prompt": [{"role": "user", "content": "Why?"}],
        "chosen": [{"role": "assistant", "content": "Because."}],
        "rejected": [{"role": "assistant", "content": "No idea"}],
    },
    "whole": {
        "prompt": "Why?",
        "chosen": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}],
        "rejected": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No idea"}],
    },
}


@pytest.mark.parametrize("form", PAIRS)
def test_pairs_of_every_form_are_the_same_two_conversations(tmp_path: Path, form: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([PAIRS[form]]))
    (pair,) = read_pairs(path)
    texts = [side.text[slice(*side.answers[0])] for side in pair]
    assert texts == ["Because.", "No idea"]
    assert pair.chosen.text[: pair.chosen.answers[0][0]] == pair.rejected.text[: pair.rejected.answers[0][0]]
    assert "Why?" in pair.chosen.text


@pytest.mark.parametrize("wrong", [{"prompt": "a", "chosen": "b"}, {"chosen": "b", "rejected": "c"}])
def test_a_pair_without_a_part_names_its_record(tmp_path: Path, wrong: dict) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(wrong) + "\n")
    with pytest.raises(UserError, match=r"pairs.jsonl"):
        list(read_pairs(path))


def pair_of(prompt: int, *answers: int) -> list[Document]:
    found = []
    for answer in answers:
        whole = np.arange(1, prompt + answer + 1, dtype=np.int32)
        labels = whole.copy()
        labels[:prompt] = IGNORED
        found.append(Document(whole, labels))
    return found


def test_a_pair_that_is_too_long_keeps_its_prompts_end_and_its_answers_beginning() -> None:
    short = fitted(*pair_of(10, 4, 6), length=16, prompt=3)
    assert [len(side.ids) for side in short] == [14, 16]
    cut = fitted(*pair_of(10, 4, 7), length=16, prompt=3)
    assert [side.ids.tolist() for side in cut] == [[8, 9, 10, 11, 12, 13, 14], [8, 9, 10, *range(11, 18)]]
    both = fitted(*pair_of(10, 4, 20), length=8, prompt=3)
    assert [side.ids.tolist() for side in both] == [[8, 9, 10, 11, 12, 13, 14], [8, 9, 10, 11, 12, 13, 14, 15]]
    assert [(side.labels != IGNORED).sum() for side in both] == [4, 5]
