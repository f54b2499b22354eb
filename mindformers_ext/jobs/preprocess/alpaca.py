# SPDX-License-Identifier: Apache-2.0
"""From a file of alpaca records to a file of conversations, one record in memory at a time."""

from __future__ import annotations

from pathlib import Path

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.alpaca import AlpacaCounts, conversation, json_list
from mindformers_ext.data.json_records import read_records
from mindformers_ext.formats.atomic import fresh_file


def convert_alpaca(data_path: Path, output_path: Path, overwrite: bool = False) -> AlpacaCounts:
    """Write the conversations of ``data_path`` (JSON list or JSON lines) to ``output_path``; returns the counts.

    The output appears whole or not at all. Both files are UTF-8 in every locale.

    Raises:
        UserError: an input that cannot be read or a record that does not fit (file, record and line are named), an
            output that exists, or one that cannot be written.
    """
    from tqdm import tqdm

    if not data_path.is_file():
        what = "is not a file" if data_path.exists() else "does not exist"
        raise UserError(f"--data_path {data_path} {what}: give a JSON list or JSON lines of alpaca records")
    if output_path.exists() and output_path.samefile(data_path):
        raise UserError(f"--output_path {output_path} is the input itself: give another name")
    counts = AlpacaCounts()
    size = data_path.stat().st_size
    bar = tqdm(total=size, desc="converting", unit="B", unit_scale=True, delay=1, mininterval=0.5, dynamic_ncols=True)
    records = (conversation(record, counts) for record in read_records(data_path, bar.update))
    try:
        with (
            fresh_file(output_path, overwrite) as beside,
            bar,
            beside.open("w", encoding="utf-8", newline="\n") as file,
        ):
            file.writelines(json_list(records))
    except OSError as error:
        raise UserError(f"cannot write {output_path}: {error.strerror}; choose another --output_path") from error
    return counts
