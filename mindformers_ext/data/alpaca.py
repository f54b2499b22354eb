# SPDX-License-Identifier: Apache-2.0
"""Alpaca records to conversations: the two prompts that Stanford's Alpaca was trained with, in FastChat's JSON.

The text is, byte for byte, that of MindFormers r1.7 (tools/dataset_preprocess/llama/alpaca_converter.py). As there, an
``input`` of blanks only counts as an input and gets its "### Input:" block, so that a data set comes out as it did with
r1.7. Such records are counted: a command can name them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mindformers_ext.data.json_records import Record

FIELDS = ("instruction", "input", "output")
_REQUEST = "Write a response that appropriately completes the request.\n\n"
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    f"{_REQUEST}### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n### Response:"
)
WITHOUT_INPUT = (
    f"Below is an instruction that describes a task. {_REQUEST}### Instruction:\n{{instruction}}\n\n### Response:"
)


@dataclass
class AlpacaCounts:
    """What was converted; ``left_out`` counts the fields that alpaca records do not have, by name."""

    records: int = 0
    with_input: int = 0
    blank_inputs: int = 0
    empty_outputs: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def conversation(record: Record, counts: AlpacaCounts) -> dict[str, object]:
    """The conversation of one alpaca record: an id from "1" on, a turn of "human", a turn of "gpt".

    Raises:
        UserError: ``instruction`` or ``output`` is missing, or one of the three fields is no string; an ``input`` of
            null is none.
    """
    instruction, output = record.text("instruction"), record.text("output")
    given = "" if record.value.get("input") is None else record.text("input")
    prompt = (WITH_INPUT if given else WITHOUT_INPUT).format(instruction=instruction, input=given)
    counts.records += 1
    counts.with_input += given != ""
    counts.blank_inputs += given != "" and not given.strip()
    counts.empty_outputs += not output.strip()
    counts.left_out.update(name for name in record.value if name not in FIELDS)
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": output}]
    return {"id": str(counts.records), "conversations": turns}


def json_list(items: Iterable[object]) -> Iterator[str]:
    """The text that ``json.dump(list(items), file, ensure_ascii=False, indent=2)`` writes, item by item."""
    opening = "[\n  "
    for item in items:
        # A newline inside a string is written as \n, so each one here is the layout's.
        yield opening + json.dumps(item, ensure_ascii=False, indent=2).replace("\n", "\n  ")
        opening = ",\n  "
    yield "[]" if opening.startswith("[") else "\n]"
