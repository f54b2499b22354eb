# SPDX-License-Identifier: Apache-2.0
"""MindSpore's door to MindRecord files: rows in, rows out."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import UserError

BATCH_ROWS = 1024  # rows handed to the writer at once; one by one is several times slower


def write_mindrecord(path: Path, rows: Iterable[Mapping[str, np.ndarray]], fields: tuple[str, ...]) -> int:
    """Write ``rows`` to the MindRecord file ``path`` and return how many.

    Written in a folder beside and moved into place, so a killed run leaves no half file. MindRecord keeps an index
    next to the data (``<path>.db``) and notes the file's own name inside: the pair cannot be renamed later, only moved.

    Args:
        path: ends with ``.mindrecord``; an older file of that name is replaced.
        rows: one mapping per row, each field an int32 array of one dimension.
        fields: the names every row has, for example ``("input_ids",)``.

    Raises:
        UserError: no row at all.
    """
    from mindspore.mindrecord import FileWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        beside = Path(folder) / path.name
        writer = FileWriter(file_name=str(beside), shard_num=1, overwrite=False)
        writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in fields}, "token rows")
        stream, count = iter(rows), 0
        while batch := [_checked(row, fields) for row in islice(stream, BATCH_ROWS)]:
            writer.write_raw_data(batch)
            count += len(batch)
        if not count:
            raise UserError(f"{path}: not one row to write; the text is shorter than one row, give more text")
        writer.commit()
        for name in (path.name + ".db", path.name):
            shutil.move(str(Path(folder) / name), path.with_name(name))
    return count


def read_mindrecord(path: Path, fields: tuple[str, ...]) -> Iterator[dict[str, np.ndarray]]:
    """The rows of ``path`` in file order, each field as an int32 array."""
    import mindspore.dataset as ds

    if not path.is_file() or not path.with_name(path.name + ".db").is_file():
        raise UserError(f"no MindRecord at {path}: the file and its index {path.name}.db must both be there")
    # In a list: a plain name would also open every other shard of the same data set in that folder.
    rows = ds.MindDataset([str(path)], columns_list=list(fields), shuffle=False, num_parallel_workers=1)
    yield from rows.create_dict_iterator(num_epochs=1, output_numpy=True)


def _checked(row: Mapping[str, np.ndarray], fields: tuple[str, ...]) -> dict[str, np.ndarray]:
    for name in fields:
        if row[name].dtype != np.int32 or row[name].ndim != 1:
            raise ValueError(f"field {name}: expected int32 of one dimension, got {row[name].dtype} {row[name].shape}")
    return {name: row[name] for name in fields}


class MindRecordStore:
    """``write_mindrecord`` and ``read_mindrecord`` as jobs ask for them (``jobs.engine.protocols.RecordStore``)."""

    def write(self, path: Path, rows: Iterable[Mapping[str, np.ndarray]], fields: tuple[str, ...]) -> int:
        """See ``write_mindrecord``."""
        return write_mindrecord(path, rows, fields)

    def read(self, path: Path, fields: tuple[str, ...]) -> Iterator[dict[str, np.ndarray]]:
        """See ``read_mindrecord``."""
        return read_mindrecord(path, fields)
