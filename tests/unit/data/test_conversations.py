# SPDX-License-Identifier: Apache-2.0
"""Conversations: the tokens of MindFormers r1.7, loss on every answer and its EOS and on nothing else."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ext.data.conversations import (
    IGNORED,
    Conversation,
    QaRow,
    Specials,
    common_prefix,
    encode_conversations,
    read_conversations,
    vicuna,
)
from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.tokenizers import SentencePieceTokenizer, Tokenizer, open_tokenizer, train_sentencepiece
from mindformers_ext.data.turns import Talk

SPECIAL = Specials(1, 2, 0)
TURNS = [
    [("human", "What is a lobster?"), ("gpt", "A crustacean with claws.")],
    [("human", "Say yes."), ("gpt", "Yes."), ("human", "And é漢?"), ("gpt", "  two blanks\nand a line")],
    [("gpt", "left out"), ("human", "Count to 3"), ("gpt", "1 2 3")],
    [("human", "long " + "word " * 30), ("gpt", "answer " * 30)],
]
# sha256 of input_ids and labels (int32) as MindFormers r1.7's preprocess() of llama_preprocess.py gives them, made by
# running it: TURNS at 65 tokens; the 150 seed records, three to a conversation, at 257 tokens.
GOLDEN = {
    "llama2": (
        "83b3e9572f4dc16a11345e872ffb72b6834c729dbc5929750d6f415e80a21b0d",
        "3129029228e57ff3d02b03ad7ddd72def1227f2026d27d764317dc8e82d6b723",
        "16f1eaa4abc39cc78dbd625638731ab20dba54d9632c83f728d6e6a9fbef430a",
        "300ec19a0673535a070f42a2bd4128f63db92bb2122ccb36977164f669e35920",
    ),
    "mixtral": (
        "b7eedb9911b413853a5d52e5c9fc1d9df3ca9291eb31a0c732ff1f5e90722b3c",
        "a3388ee49b533ac21ea4d65f0c204cb67044a7357c68c19ef697c83012cc23c1",
        "b3db245395b5b2f031f7da42ebbc50a1a76c9b7986ce15a03f9387fbc460ee5e",
        "885c64710b4aefede2e4e83fdc85b8442eea7579427597115b9c35a5564ba19e",
    ),
}


def as_records(talks: list[list[tuple[str, str]]]) -> list[dict]:
    return [{"conversations": [{"from": who, "value": text} for who, text in turns]} for turns in talks]


def read(folder: Path, records: list) -> list[Conversation | None]:
    path = folder / "talk.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return list(read_conversations(path))


def hashes(rows: list[QaRow]) -> tuple[str, str]:
    arrays = np.stack([row.ids for row in rows]), np.stack([row.labels for row in rows])
    assert all(array.dtype == np.int32 for array in arrays)
    ids, labels = (sha256(array.astype("<i4").tobytes()).hexdigest() for array in arrays)
    return ids, labels


def answers_of(row: QaRow, tokenizer: Tokenizer) -> list[str]:
    """The runs of tokens with loss, each without its EOS, as text."""
    found, run = [], []
    for token, label in zip(row.ids.tolist(), row.labels.tolist(), strict=True):
        if label == IGNORED:
            assert not run, "an answer without EOS"
            continue
        assert label == token
        if token == SPECIAL.eos:
            found.append(tokenizer.decode(run))
            run = []
        else:
            run.append(token)
    return found


def test_rows_are_mindformers(real_tokenizer: Path, shared_data: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(real_tokenizer)
    golden = GOLDEN[real_tokenizer.name.split("_")[0]]
    tiny = encode_conversations(tokenizer, read(tmp_path, as_records(TURNS)), SPECIAL, 65)
    assert hashes(tiny) == golden[:2]
    seed = json.loads((shared_data / "alpaca_seed.json").read_text(encoding="utf-8"))
    pairs = [[("human", record["instruction"]), ("gpt", record["output"])] for record in seed]
    talks = [sum(pairs[start : start + 3], []) for start in range(0, 150, 3)]
    rows = encode_conversations(tokenizer, read(tmp_path, as_records(talks)), SPECIAL, 257)
    assert hashes(rows) == golden[2:]
    rows = encode_conversations(tokenizer, read(tmp_path, as_records(talks)), SPECIAL, 3000)
    assert [answers_of(row, tokenizer) for row in rows] == [
        [text for who, text in turns if who == "gpt"] for turns in talks
    ]


@pytest.mark.parametrize(
    ("turns", "answers"),
    [
        ([("human", "q"), ("gpt", "an <unk> word")], ["an <unk> word"]),
        ([("human", "an <unk> word"), ("gpt", "a")], ["a"]),
        ([("human", "q"), ("gpt", "say ASSISTANT: hello")], ["say ASSISTANT: hello"]),
        ([("human", "q"), ("gpt", "a"), ("human", "left open")], ["a"]),
        ([("human", "a</s>b"), ("gpt", "c")], ["c"]),
        ([("human", "q"), ("gpt", "a</s>b")], ["a", "b"]),
        ([("human", "q"), ("gpt", "a</s>"), ("human", "q"), ("gpt", "b")], ["a", "b"]),
        ([("human", "q"), ("gpt", "")], []),
    ],
)
def test_what_masks_a_whole_conversation_in_mindformers_does_not_here(
    turns: list[tuple[str, str]], answers: list[str], tmp_path: Path, small: SentencePieceTokenizer
) -> None:
    conversations = read(tmp_path, as_records([turns]))
    for special in (SPECIAL, Specials(1, 2, 3)):
        (row,) = encode_conversations(small, conversations, special, 600)
        assert answers_of(row, small) == answers
        assert row.ids[row.tokens :].tolist() == [special.pad] * (600 - row.tokens)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁</>"), min_size=1), min_size=1))
def test_every_answer_and_nothing_else(small: SentencePieceTokenizer, texts: list[str]) -> None:
    conversation = vicuna(Talk(tuple(part for text in texts for part in ("Question?", text))), "here")
    assert [conversation.text[start:end] for start, end in conversation.answers] == texts
    length = 300 + 8 * sum(map(len, texts)) * len(texts)
    (row,) = encode_conversations(small, [conversation], SPECIAL, length)
    assert answers_of(row, small) == texts


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_sentencepiece(standard_library_text(200_000), path, 500)


def test_rows_are_cut_at_the_end(small: SentencePieceTokenizer, tmp_path: Path) -> None:
    conversations = read(tmp_path, as_records(TURNS[3:]))
    (whole,) = encode_conversations(small, conversations, SPECIAL, 2000)
    (short,) = encode_conversations(small, conversations, SPECIAL, whole.tokens - 5)
    assert short.tokens == whole.tokens
    np.testing.assert_array_equal(short.ids, whole.ids[: whole.tokens - 5])
    np.testing.assert_array_equal(short.labels, whole.labels[: whole.tokens - 5])


def test_nobody_asks(tmp_path: Path) -> None:
    assert read(tmp_path, as_records([[], [("gpt", "only me")]])) == [None, None]


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(one: list[int], other: list[int]) -> None:
    size = common_prefix(np.array(one, np.int32), np.array(other, np.int32))
    assert one[:size] == other[:size]
    assert size == min(len(one), len(other)) or one[size] != other[size]
