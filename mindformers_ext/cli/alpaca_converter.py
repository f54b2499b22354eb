# SPDX-License-Identifier: Apache-2.0
"""``python tools/dataset_preprocess/llama/alpaca_converter.py``: alpaca records to conversations."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mindformers_ext.cli.command import Command

EPILOG = """\
input, as a list or one object a line ("input" may be empty or left out):
  {"instruction": "Name the capital.", "input": "France", "output": "Paris"}
output, the text of MindFormers r1.7 byte for byte:
  [{"id": "1", "conversations": [{"from": "human", "value": "Below is an instruction ..."},
                                 {"from": "gpt", "value": "Paris"}]}]

example:
  python tools/dataset_preprocess/llama/alpaca_converter.py --data_path alpaca_data.json \\
      --output_path alpaca_conversations.json

Then: llama_preprocess.py --dataset_type qa. Exit code: 0 done, 2 a mistake in the input.
"""


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--data_path", type=Path, required=True, help="JSON list or JSON lines, UTF-8")
    parser.add_argument("--output_path", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.preprocess.alpaca import convert_alpaca

    counts = convert_alpaca(arguments.data_path, arguments.output_path, arguments.overwrite)
    print(f"{arguments.output_path}: {counts.records} conversations, {counts.with_input} of them with an input")
    notes = []
    if counts.blank_inputs:
        notes.append(f"{counts.blank_inputs} records have an input of blanks only; as in MindFormers it counts as one")
    if counts.empty_outputs:
        notes.append(f"{counts.empty_outputs} records have an empty output")
    for name, count in counts.left_out.items():
        notes.append(f"the field '{name}' of {count} records is no alpaca field and was left out")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


COMMAND = Command(
    prog="alpaca_converter.py",
    description="Turn alpaca records (instruction, input, output) into conversations, with Stanford's prompts.",
    epilog=EPILOG,
    options=_options,
    run=_run,
)
parser, main = COMMAND.parser, COMMAND.main
