# SPDX-License-Identifier: Apache-2.0
"""What the header of a MindRecord file says, read without MindSpore: which fields its rows have.

The file begins with the length of a JSON text (8 bytes, little endian) and the text; rows follow in pages.
"""

from __future__ import annotations

import json
from pathlib import Path

from mindformers_ext.core.errors import UserError

LONGEST_HEADER = 1 << 24  # bytes; the writer's own default


def record_fields(path: Path) -> dict[str, str]:
    """Type by name of the fields of every row, for example ``{"input_ids": "int32", "labels": "int32"}``.

    Raises:
        UserError: no such file, or not a MindRecord.
    """
    if not path.is_file():
        what = "is a folder: give one of its files" if path.is_dir() else "does not exist: give a .mindrecord file"
        raise UserError(f"{path} {what}")
    if path.suffix == ".db":
        raise UserError(f"{path} is the index of a MindRecord: give {path.stem}")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = file.read(length) if 0 < length <= LONGEST_HEADER else b""
    try:
        described = json.loads(head)["schema"][0]["schema"]
        return {str(name): str(words["type"]) for name, words in described.items()}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a MindRecord (its header cannot be read): give a file that llama_preprocess.py wrote"
        ) from error
