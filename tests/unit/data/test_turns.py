# SPDX-License-Identifier: Apache-2.0
"""Conversations in every form that people have them: who speaks, what is left out, what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.alpaca import AlpacaCounts, conversation
from mindformers_ext.data.conversations import Conversation, read_conversations
from mindformers_ext.data.json_records import Record

TURNS = [("human", "Hi?"), ("gpt", "Yes."), ("human", "So?"), ("gpt", "")]


def read(folder: Path, *records: dict) -> list[Conversation | None]:
    path = folder / "talk.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    return list(read_conversations(path))


def fastchat(turns: list[tuple[str, str]]) -> dict:
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


def openai(turns: list[tuple[str, object]], name: str = "messages") -> dict:
    return {name: [{"role": who, "content": text} for who, text in turns]}


def renamed(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [({"human": "user", "gpt": "assistant"}.get(who, who), text) for who, text in turns]


@pytest.mark.parametrize("system", [None, "", "You are a <pirate>.\nTalk so."])
def test_all_forms_are_one_conversation_and_fastchats_own_text(system: str | None, tmp_path: Path) -> None:
    from fastchat.conversation import get_conv_template

    turns = ([("system", system)] if system is not None else []) + TURNS
    parts = [
        (who, [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]) for who, text in renamed(turns)
    ]
    forms = [fastchat(turns), fastchat(renamed(turns)), openai(renamed(turns)), openai(turns), openai(parts)]
    found = read(tmp_path, *forms, openai(renamed(turns), "conversations"))
    judge = get_conv_template("vicuna_v1.1")
    if system is not None:
        judge.set_system_message(system)
    for number, (_, text) in enumerate(TURNS):
        judge.append_message(judge.roles[number % 2], text)
    for one in found:
        assert one is not None and one.text == judge.get_prompt()
        assert [one.text[start:end] for start, end in one.answers] == ["Yes."]


def test_nobody_asks(tmp_path: Path) -> None:
    assert read(tmp_path, fastchat([]), fastchat([("gpt", "only me")]), openai([("system", "only told")])) == [None] * 3


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, r"talk\.jsonl\.gz, record 1 \(line 1\): no field 'conversations' and no 'messages'"),
        ({"conversations": [], "messages": []}, "both 'conversations' and 'messages'"),
        ({"conversations": "x"}, "'conversations' is no list"),
        ({"messages": {"role": "user"}}, "'messages' is no list"),
        ({"conversations": ["x"]}, "turn 1: it is 'x', not a table"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "turn 1: 'from' is 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"turn 1: 'role' is \['user'\]"),
        ({"conversations": [{"from": "human"}]}, "no field 'value'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "'value' is 3, not a string"),
        ({"messages": [{"role": "user", "content": None}]}, "'content' is null"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text can be trained on"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "it calls a tool"),
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "two turns of 'human' in a row"),
        (openai([("user", "a"), ("system", "b")]), "a turn of 'system' after the first one"),
        (openai([("system", "a"), ("system", "b")]), "a turn of 'system' after the first one"),
    ],
)
def test_malformed_records_are_named(record: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, record)


def test_an_input_of_null_is_none(tmp_path: Path) -> None:
    fields = {"instruction": "Say yes.", "output": "Yes."}
    counts = AlpacaCounts()
    made = [
        conversation(Record(tmp_path, 1, 1, fields | more), counts) for more in ({}, {"input": ""}, {"input": None})
    ]
    assert made[0]["conversations"] == made[1]["conversations"] == made[2]["conversations"] and not counts.with_input
    with pytest.raises(UserError, match="'output' is null; give it a text") as error:
        conversation(Record(tmp_path, 1, 1, fields | {"output": None}), counts)
    assert "quotes" not in str(error.value)
