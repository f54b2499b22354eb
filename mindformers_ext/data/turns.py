# SPDX-License-Identifier: Apache-2.0
"""What a record of a conversation says, whichever of the usual forms it has.

FastChat's ``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}`` and OpenAI's
``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}``; each list may also hold turns of the
other form, and begin with a turn of the system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.json_records import Record

LISTS = ("conversations", "messages")
WORDS = (("from", "value"), ("role", "content"))  # what a turn calls its speaker and its text
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
SPEAKERS = {
    "human": USER,
    "user": USER,
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "system": SYSTEM,
}


@dataclass(frozen=True)
class Talk:
    """A conversation: ``said`` in turn, a user first. ``system`` None: the template's own words."""

    said: tuple[str, ...]
    system: str | None = None


def read_talk(record: Record, alpaca: bool = False) -> Talk:
    """The turns of ``record``. One turn of the assistant before anybody asks is left out, as MindFormers does.

    ``alpaca``: a record of an instruction, perhaps an input, and an output is a question and its answer.

    Raises:
        UserError: names record and turn of what is malformed, or of turns that do not alternate.
    """
    if alpaca and "instruction" in record.value and not any(name in record.value for name in LISTS):
        given = "" if record.value.get("input") is None else record.text("input")
        asked = record.text("instruction")
        return Talk((f"{asked}\n\n{given}" if given.strip() else asked, record.text("output")))
    return talk_of(record, _turns(record))


def talk_of(record: Record, found: Sequence[Any]) -> Talk:
    """The same of the turns ``found`` in ``record``."""
    turns = [_turn(record, number, turn) for number, turn in enumerate(found, start=1)]
    system = turns.pop(0)[2] if turns and turns[0][0] == SYSTEM else None
    if turns and turns[0][0] == ASSISTANT:
        turns = turns[1:]
    for number, (speaker, word, _) in enumerate(turns):
        if speaker == SYSTEM:
            raise UserError(f"{record.where}: a turn of '{word}' after the first one; put it in front, or take it out")
        if speaker != (USER, ASSISTANT)[number % 2]:
            raise UserError(
                f"{record.where}: two turns of '{word}' in a row; human and gpt (user, assistant) must take turns"
            )
    return Talk(tuple(text for _, _, text in turns), system)


def _turns(record: Record) -> list[Any]:
    names = [name for name in LISTS if name in record.value]
    if not names:
        raise UserError(
            f"{record.where}: no field 'conversations' and no 'messages'; alpaca_converter.py makes conversations "
            "from alpaca records"
        )
    if len(names) > 1:
        raise UserError(f"{record.where}: both 'conversations' and 'messages'; leave one")
    turns = record.value[names[0]]
    if not isinstance(turns, list):
        raise UserError(f"{record.where}: '{names[0]}' is no list; write one table for each turn")
    return turns


def _turn(record: Record, number: int, turn: Any) -> tuple[str, str, str]:
    """The speaker, the record's word for it, and the text."""
    where = f"{record.where}, turn {number}"
    if not isinstance(turn, dict):
        raise UserError(f"{where}: it is {turn!r:.40}, not a table with 'from' and 'value', or 'role' and 'content'")
    speaker, content = next((words for words in WORDS if words[0] in turn), WORDS[0])
    word = turn.get(speaker)
    if not isinstance(word, str) or word not in SPEAKERS:
        raise UserError(f"{where}: '{speaker}' is {word!r:.40}; it must be one of {', '.join(SPEAKERS)}")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise UserError(f"{where}: it calls a tool, which the template of this data set type cannot say; take it out")
    value = turn.get(content)
    if isinstance(value, list):  # OpenAI's parts
        turn = {**turn, content: "".join(_part(where, part) for part in value)}
    return SPEAKERS[word], word, Record(record.path, record.number, record.line, turn).text(content)


def _part(where: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise UserError(f"{where}: a part of its content is {part!r:.60}, not text; only text can be trained on")
