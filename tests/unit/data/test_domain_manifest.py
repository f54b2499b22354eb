# SPDX-License-Identifier: Apache-2.0
"""The manifest of a prepared corpus: what is written is read, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mindformers_ext.core.errors import UserError
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

HASH = "0" * 64
FILES = DomainFiles((RecordFile("cc.mindrecord", 3, 4, HASH),))
MANIFEST = Manifest(
    TokenizerFacts(HASH, 128256, 1, 2),
    8,
    42,
    ("cc", "c4-rp"),
    {split: {"cc": FILES if split == "eval" else DomainFiles(), "c4-rp": DomainFiles()} for split in SPLITS},
    {"cc": DomainCounts(9, {"length": 2}, 29, 5), "c4-rp": DomainCounts()},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A prepared folder."""
    write_manifest(MANIFEST, tmp_path)
    (tmp_path / "eval").mkdir()
    for name in ("cc.mindrecord", "cc.mindrecord.db"):
        (tmp_path / "eval" / name).write_bytes(b"rows")
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    found = read_manifest(folder)
    assert found == MANIFEST and found.splits["eval"]["cc"].rows == 3
    assert split_files(found, "eval") == {"cc": (folder / "eval" / "cc.mindrecord",), "c4-rp": ()}
    assert split_files(found, "for_ft") == {"cc": (), "c4-rp": ()}
    text = (folder / "manifest.json").read_text()
    assert text == found.as_json() and found.digest != replace(found, seed=43).digest


def test_the_example_of_the_documentation_has_these_names() -> None:
    value = json.loads(MANIFEST.as_json())
    assert value["format"] == "mindformers_ext domains 1"
    assert value["splits"]["eval"]["cc"]["files"] == [{"name": "cc.mindrecord", "rows": 3, "bytes": 4, "sha256": HASH}]
    assert set(value["counts"]["cc"]) >= {"documents", "filtered", "tokens", "dropped_tokens"}


def spoiled(change: Callable[[dict[str, Any]], object]) -> str:
    value = json.loads(MANIFEST.as_json())
    change(value)
    return json.dumps(value)


FILE = ("splits", "eval", "cc", "files", 0)


def put(place: tuple[Any, ...], new: Any) -> Callable[[dict[str, Any]], object]:
    def change(value: Any) -> None:
        for key in place[:-1]:
            value = value[key]
        value[place[-1]] = new

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(("format",), "other"), "known is 'mindformers_ext domains 1'"),
        (put(("seq_length",), 0), "seq_length=0 is no whole number from 1"),
        (put(("seq_length",), True), "seq_length=True"),
        (put(("seed",), 1.5), "seed=1.5"),
        (put(("more",), 1), "unknown: more"),
        (put(("domains",), ["cc", "cc"]), "named twice"),
        (put(("domains",), ["../cc", "c4-rp"]), "domain '../cc'"),
        (put(("domains",), [1, "c4-rp"]), "domain 1"),
        (put(("tokenizer", "eos"), 128256), "tokenizer.eos=128256"),
        (put((*FILE, "name"), "../cc.mindrecord"), "no plain name"),
        (put((*FILE, "name"), ".cc.mindrecord"), "no plain name"),
        (put((*FILE, "name"), "cc.mindrecord.db"), "no plain name"),
        (put((*FILE, "rows"), 2**63), "rows=9223372036854775808"),
        (put((*FILE, "sha256"), "00"), "64 hexadecimal digits"),
        (put(("splits", "eval", "cc", "rows"), 4), "rows=4, its files have 3"),
        (put(("splits", "eval"), []), "splits.eval is [], not a table"),
        (put(("counts", "cc", "tokens"), 30), "are not 30 tokens"),
        (put(("counts", "cc", "filtered"), {"length": -1}), "filtered.length=-1"),
        (lambda value: value.pop("splits"), "missing in the manifest: splits"),
    ],
)
def test_a_spoiled_field_is_named(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    (folder / "manifest.json").write_text(spoiled(change))
    with pytest.raises(UserError) as error:
        read_manifest(folder)
    assert message in str(error.value)


def test_files_are_those_that_were_written(folder: Path) -> None:
    manifest = read_manifest(folder)
    data, index = folder / "eval" / "cc.mindrecord", folder / "eval" / "cc.mindrecord.db"
    index.rename(folder / "away")
    with pytest.raises(UserError, match="cc.mindrecord.db' is missing"):
        split_files(manifest, "eval")
    index.symlink_to(folder / "away")
    with pytest.raises(UserError, match="link"):
        split_files(manifest, "eval")
    index.unlink()
    (folder / "away").rename(index)
    data.write_bytes(b"more rows")
    with pytest.raises(UserError, match="has 9 bytes, the manifest says 4"):
        split_files(manifest, "eval")
    with pytest.raises(UserError, match="split='train' is unknown"):
        split_files(manifest, "train")
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no manifest.json"):
        read_manifest(folder)
