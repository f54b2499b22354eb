# SPDX-License-Identifier: Apache-2.0
"""MindRecord: what is written is what MindSpore's own data set reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.mindrecord_file import MindRecordFile
from mindformers_ext.ms.mindrecord import BATCH_ROWS, read_mindrecord, write_mindrecord


def rows(count: int, length: int = 9) -> Iterator[dict[str, np.ndarray]]:
    generator = np.random.default_rng(3)
    for _ in range(count):
        yield {name: generator.integers(0, 2000, length, dtype=np.int32) for name in ("input_ids", "labels")}


def test_mind_dataset_reads_what_was_written(tmp_path: Path) -> None:
    import mindspore.dataset as ds

    count = 2 * BATCH_ROWS + 5  # three writes, the last one short
    path = tmp_path / "deep" / "train.mindrecord"
    assert write_mindrecord(path, rows(count), ("input_ids", "labels")) == count
    data = ds.MindDataset(str(path), columns_list=["labels", "input_ids"], shuffle=False)
    assert data.get_dataset_size() == count
    for got, want in zip(data.create_dict_iterator(num_epochs=1, output_numpy=True), rows(count), strict=True):
        assert got["input_ids"].dtype == np.int32
        np.testing.assert_array_equal(got["input_ids"], want["input_ids"])
        np.testing.assert_array_equal(got["labels"], want["labels"])


def test_writing_again_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "train.mindrecord"
    write_mindrecord(path, rows(7), ("input_ids",))
    write_mindrecord(path, rows(3), ("input_ids",))
    assert len(list(read_mindrecord(path, ("input_ids",)))) == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["train.mindrecord", "train.mindrecord.db"]


def test_a_failing_source_keeps_the_old_file(tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, np.ndarray]]:
        yield from rows(3)
        raise RuntimeError("the disk is gone")

    path = tmp_path / "train.mindrecord"
    write_mindrecord(path, rows(7), ("input_ids",))
    with pytest.raises(RuntimeError, match="the disk is gone"):
        write_mindrecord(path, broken(), ("input_ids",))
    assert len(list(read_mindrecord(path, ("input_ids",)))) == 7
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["train.mindrecord", "train.mindrecord.db"]


def test_no_rows_no_file_and_wrong_types_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.mindrecord"
    with pytest.raises(UserError, match="not one row to write"):
        write_mindrecord(path, [], ("input_ids",))
    with pytest.raises(ValueError, match="expected int32"):
        write_mindrecord(path, [{"input_ids": np.zeros(4, np.int64)}], ("input_ids",))
    with pytest.raises(UserError, match="no MindRecord at"):
        next(read_mindrecord(path, ("input_ids",)))
    assert not path.exists()


@pytest.mark.parametrize("fields", [("input_ids",), ("input_ids", "labels")])
def test_the_reader_without_mindspore_reads_the_same(tmp_path: Path, fields: tuple[str, ...]) -> None:
    """Numbers of every width, rows of every length, several pages."""
    from mindspore.mindrecord import FileWriter

    generator = np.random.default_rng(1)
    edges = [-128, 127, -129, 128, 32767, -32768, 32768, -32769, 2**31 - 1, -(2**31), 0]
    rows = [
        {name: generator.integers(-100, high, length, dtype=np.int32) for name in fields}
        for length in (1, 3, 4, 9, 130)
        for high in (100, 40_000, 2_000_000)
        for _ in range(60)
    ]
    rows[5][fields[0]] = np.array(edges, np.int32)
    path = tmp_path / "rows.mindrecord"
    writer = FileWriter(str(path), shard_num=1)
    writer.set_page_size(1 << 15)
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in fields}, "rows")
    for start in range(0, len(rows), 50):
        writer.write_raw_data(rows[start : start + 50])
    writer.commit()
    file = MindRecordFile(path)
    assert len(file) == len(rows) and file.fields == fields and path.stat().st_size > 16777216 + 2 * (1 << 15)
    for number, row in enumerate(rows):
        for name, found in zip(fields, file.read(number, fields), strict=True):
            np.testing.assert_array_equal(found, row[name])
    file.close()


def test_damaged_records_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train.mindrecord"
    write_mindrecord(path, rows(3), ("input_ids", "labels"))
    data = bytearray(path.read_bytes())
    data[16777216] ^= 0xFF  # the length of the first row
    path.write_bytes(data)
    with pytest.raises(UserError, match="row 0 is damaged"):
        MindRecordFile(path).read(0, ("input_ids",))
    assert len(MindRecordFile(path).read(1, ("labels",))[0]) == 9
    path.with_name(path.name + ".db").unlink()
    with pytest.raises(UserError, match="must both be there"):
        MindRecordFile(path)
