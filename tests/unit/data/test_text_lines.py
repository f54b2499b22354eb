# SPDX-License-Identifier: Apache-2.0
"""Lines of text files: what ends one, what belongs to one, whichever command reads it."""

from __future__ import annotations

import ast
import gzip
import io
import json
from pathlib import Path

import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.json_records import read_records
from mindformers_ext.data.readers import Cutting, find_files, read_jsonl, read_text, read_wiki
from mindformers_ext.data.text_lines import decode_lines, lines_of, read_lines
from mindformers_ext.jobs.predict.prompts import read_prompts

INSIDE = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g"  # str.splitlines cuts at each of these


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("a", ["a"]),
        ("a\n", ["a"]),
        ("a\r\nb\r\n", ["a", "b"]),
        ("a\rb", ["a", "b"]),
        ("\n\na\n\n", ["", "", "a", ""]),
        ("\ufeffa\n\ufeffb", ["a", "\ufeffb"]),
        (INSIDE + "\n", [INSIDE]),
        (" a \n\t\n", [" a ", "\t"]),
    ],
)
def test_lines(text: str, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_bytes(text.encode())
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert lines_of(text) == decode_lines(text.encode(), "x") == lines
    assert read_lines(tmp_path / "p.txt") == read_lines(tmp_path / "p.txt.gz") == lines
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii"))
    for where in ("-", str(tmp_path / "p.txt"), str(tmp_path / "p.txt.gz")):
        if any(line.strip() for line in lines):
            assert read_prompts([where]) == lines
        else:
            with pytest.raises(UserError, match="holds no prompt"):
                read_prompts([where])


def test_documents_and_prompts_have_the_same_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(f"\ufeffone\r\n\r\n{INSIDE}\r\nthree".encode())
    documents = [item.text for item in read_text(path, "line", Cutting())]
    assert documents == [line for line in read_prompts([str(path)]) if line] == ["one", INSIDE, "three"]


def test_what_is_no_text_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(UserError, match=r"p\.txt, line 3: not UTF-8"):
        read_prompts([str(tmp_path / "p.txt")])
    with pytest.raises(UserError, match="standard input, line 2: not UTF-8"):
        decode_lines(b"one\n\xff", "standard input")
    with pytest.raises(UserError, match="prompt 2 is empty"):
        read_prompts(["x", " "])


def test_packed_files_are_read_as_the_others(tmp_path: Path) -> None:
    """Each reader, the search in a folder, and a progress that ends at the file's size."""
    lines = [json.dumps({"content": f"text {number} " * 30}) for number in range(200)]
    wiki = " = Title = \n\n Some ( odd ) text , here . \n" * 3
    for name, text in {"a.jsonl": "\n".join(lines), "a.json": f"[{','.join(lines)}]", "a.tokens": wiki}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / "packed").mkdir(exist_ok=True)
        (tmp_path / f"packed/{name}.gz").write_bytes(gzip.compress(text.encode()))
    found = find_files(str(tmp_path / "packed"), (".jsonl", ".json"))
    assert [path.name for path in found] == ["a.json.gz", "a.jsonl.gz"]
    for path in found:
        read: list[int] = []
        values = [record.value for record in read_records(path, read.append)]
        assert values == [record.value for record in read_records(tmp_path / path.stem)] and len(values) == 200
        assert sum(read) == path.stat().st_size
    packed = read_wiki(tmp_path / "packed/a.tokens.gz", Cutting())
    assert list(packed) == list(read_wiki(tmp_path / "a.tokens", Cutting()))


@pytest.mark.parametrize("damage", ["cut", "foreign", "flipped"])
def test_damaged_packed_files_are_named(tmp_path: Path, damage: str) -> None:
    data = gzip.compress(b'{"text": "' + b"abc " * 5000 + b'"}')
    data = {"cut": data[:-20], "foreign": b"plain text", "flipped": data[:40] + bytes([data[40] ^ 255]) + data[41:]}[
        damage
    ]
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is no whole gzip file"):
        list(read_records(tmp_path / "a.jsonl.gz"))


def test_a_missing_text_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(UserError, match="no field 'text', it has 'content'; name the field that holds the text"):
        list(read_jsonl(tmp_path / "a.jsonl", "text", Cutting()))
    assert [item.text for item in read_jsonl(tmp_path / "a.jsonl", "content", Cutting())] == ["x"]


READERS = ("data", "jobs/predict", "jobs/preprocess", "jobs/merge")  # folders that read users' texts


def test_nothing_there_splits_text_otherwise(repo_root: Path) -> None:
    for folder in READERS:
        for path in sorted((repo_root / "mindformers_ext" / folder).glob("*.py")):
            names = {node.attr for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Attribute)}
            assert "splitlines" not in names or path.name == "network.py", path  # which reads /proc/meminfo
