# SPDX-License-Identifier: Apache-2.0
"""Conversations as calibration rows, one a row, with the tokens of answers marked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.chat_rows import read_chat_rows
from mindformers_ext.data.chat_template import ChatTemplate
from mindformers_ext.data.tokenizers import Tokenizer
from mindformers_ext.jobs.experts.probe import Rows
from mindformers_ext.jobs.experts.text_domains import padded, padding_of


def read_chats(path: Path, tokenizer: Tokenizer, folder: Path, length: int) -> tuple[Rows, list[str]]:
    """A file's conversations as rows of at most ``length`` tokens, and what to tell the user; one in which no answer
    is left is left out.

    Raises:
        UserError: no chat template in ``folder``, a malformed file, or no row.
    """
    template = ChatTemplate(folder)
    rows, lost, cut = [], 0, 0
    for row in read_chat_rows(path, tokenizer, template, length):
        if not row.trained[1:].any():
            lost += 1
            continue
        cut += row.whole > length
        rows.append(row)
    if not rows:
        raise UserError(f"'{path}' holds no answer within {length} tokens: give conversations, or raise --block_size")
    notes = [f"{len(rows)} conversations"]
    notes += [f"{cut} longer than {length} tokens were cut"] if cut else []
    notes += [f"{lost} without an answer in their first {length} tokens were left out"] if lost else []
    trained = np.zeros((len(rows), length), bool)
    for place, row in enumerate(rows):
        trained[place, : len(row.trained)] = row.trained
    found = padded([row.ids for row in rows], length, padding_of(tokenizer))
    return replace(found, trained=trained), notes
