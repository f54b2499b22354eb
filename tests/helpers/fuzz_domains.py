# SPDX-License-Identifier: Apache-2.0
"""Whole inputs of the formats of corpora by domain, and who reads them; for ``fuzz_formats``."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from mindformers_ext.data.domains.documents import document_of, plan_blocks, read_block
from mindformers_ext.data.domains.manifest import (
    SPLITS,
    DomainCounts,
    DomainFiles,
    Manifest,
    RecordFile,
    TokenizerFacts,
    read_manifest,
    split_files,
    write_manifest,
)
from mindformers_ext.formats.frames import FrameWriter, read_frames
from mindformers_ext.formats.mds_file import MdsFolder
from tests.helpers.mds_writer import write_mds


def write_domains(folder: Path) -> None:
    """Files of every format below ``folder``; beside it lies rows.mindrecord."""
    (folder / "prepared" / "eval").mkdir(parents=True)
    for name in ("rows.mindrecord", "rows.mindrecord.db"):
        shutil.copyfile(folder / name, folder / "prepared" / "eval" / name)
    size = (folder / "rows.mindrecord").stat().st_size
    there = DomainFiles((RecordFile("rows.mindrecord", 10, size, "0" * 64),))
    splits = {split: {"cc": there if split == "eval" else DomainFiles()} for split in SPLITS}
    counts = {"cc": DomainCounts(4, {"ads": 1}, 93, 3)}
    write_manifest(Manifest(TokenizerFacts("1" * 64, 100, 1, 2), 9, 42, ("cc",), splits, counts), folder / "prepared")
    write_mds(folder / "mds", [np.arange(9) + number for number in range(5)], "cc")
    with FrameWriter(folder / "part") as writer:
        writer.add({"documents": 2}, {"hash": np.arange(2, dtype=np.uint64), "ids": np.arange(9, dtype=np.uint16)})
        writer.ending["documents"] = 2
    table = pyarrow.Table.from_pylist([{"text": f"text {number}", "ids": [number]} for number in range(50)])
    parquet.write_table(table, folder / "rows.parquet", row_group_size=10)


def prepared(folder: Path, out: Path) -> None:
    for split in SPLITS:
        split_files(read_manifest(folder / "prepared"), split)


def mds(folder: Path, out: Path) -> None:
    for sample in MdsFolder(folder / "mds", {"set": "str", "tokens": "bytes"}).read():
        assert set(sample) == {"set", "tokens"}


def frames(folder: Path, out: Path) -> None:
    for frame in read_frames(folder / "part"):
        for name in ("hash", "ids"):
            if name in frame:
                frame.read(name)


def documents(folder: Path, out: Path) -> None:
    for block in plan_blocks({"cc": [folder / "rows.parquet"]}, 100):
        for record in read_block(block, None):
            document_of(record, None)
