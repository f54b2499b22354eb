# SPDX-License-Identifier: Apache-2.0
"""tools/show_record.py: what a person sees of MindRecord files that MindSpore wrote."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.cli.show_record import main
from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.tokenizers import SentencePieceTokenizer, train_sentencepiece
from mindformers_ext.ms.mindrecord import write_mindrecord
from tests.helpers.tiny_run import write_rows

ANSWERS = ["Two.", "Blue [[really]]", "A bell \x07 \x1b[31m", "漢字 é", "five"]
WIDTH = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 600 pieces, five finetune records, two pretrain records."""
    path = tmp_path_factory.mktemp("records")
    tokenizer = train_sentencepiece(list(standard_library_text(300_000)), path / "tokenizer.model", 600)
    ids = np.full((len(ANSWERS), WIDTH), 3, np.int32)
    labels = np.full((len(ANSWERS), WIDTH), -100, np.int32)
    for place, answer in enumerate(ANSWERS):
        asked, said = tokenizer.encode("Why?", bos=True), [*tokenizer.encode(answer), 2]
        ids[place, : len(asked) + len(said)] = asked + said
        labels[place, len(asked) : len(asked) + len(said)] = said
    write_rows(path / "qa.mindrecord", ids, labels=labels)
    text = tokenizer.encode("Return the name of the file. " * 20, bos=True)
    write_rows(path / "text.mindrecord", np.array([text[:WIDTH], text[WIDTH : 2 * WIDTH]], np.int32))
    return path


def shown(folder: Path, name: str, *more: str) -> int:
    return main([str(folder / name), "--model_file", str(folder / "tokenizer.model"), *more])


def test_finetune_records(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(folder, "qa.mindrecord", "--n", "9") == 0
    first, *records = capsys.readouterr().out.split("\n\n")
    assert first == (
        f"{folder / 'qa.mindrecord'}: 5 records of input_ids and labels; loss is on what stands between [[ and ]]"
    )
    answers = ["Two.", "Blue [[really]]", "A bell \\x07 \\x1b[31m", "漢字 é", "five"]
    assert len(records) == 5
    for number, (record, answer) in enumerate(zip(records, answers, strict=True), start=1):
        line, text = record.strip("\n").split("\n")
        counts = re.fullmatch(rf"-- record {number}: 40 tokens, (\d+) padding, (\d+) bear loss", line)
        assert counts and int(counts[1]) > 0 and int(counts[2]) > 1
        assert text == f"<s>Why?[[ {answer}</s>]]<pad>x{counts[1]}"  # SentencePiece puts a blank before a text


def test_pretrain_records_and_a_later_start(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(folder, "text.mindrecord", "--n", "1") == 0
    out = capsys.readouterr().out
    assert (
        "2 records of input_ids; " in out and "-- record 1: 40 tokens, 0 padding, 39 bear loss\n<s>[[Return the" in out
    )
    assert shown(folder, "text.mindrecord", "--skip", "1") == 0
    out = capsys.readouterr().out
    assert "-- record 2: 40 tokens, 0 padding, 39 bear loss" in out and "-- record 1" not in out


def test_colours_mark_the_same_part(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(folder, "qa.mindrecord", "--n", "1", "--color", "always") == 0
    out = capsys.readouterr().out
    assert "Why?\x1b[32m Two.\x1b[0m\x1b[32m\x1b[2m</s>\x1b[0m\x1b[2m<pad>x" in out
    assert "[[" not in out


def test_one_shard_shows_its_own_records(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mindspore.mindrecord import FileWriter

    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    writer = FileWriter(str(tmp_path / "x.mindrecord"), shard_num=2)
    writer.add_schema({"input_ids": {"type": "int32", "shape": [-1]}}, "token rows")
    texts = ["first", "second", "third", "fourth"]
    writer.write_raw_data([{"input_ids": np.array(tokenizer.encode(text, bos=True), np.int32)} for text in texts])
    writer.commit()
    seen = []
    for shard in (0, 1):
        argv = [str(tmp_path / f"x.mindrecord{shard}"), "--model_file", str(folder / "tokenizer.model")]
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert "2 records" in out
        seen.append([text for text in texts if f"[[{text}]]" in out])
    assert sorted(sum(seen, [])) == sorted(texts) and len(seen[0]) == len(seen[1]) == 2


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("none.mindrecord", [], "none.mindrecord does not exist"),
        ("tokenizer.model", [], "is not a MindRecord"),
        ("qa.mindrecord.db", [], "is the index of a MindRecord: give qa.mindrecord"),
        ("qa.mindrecord", ["--n", "0"], "--n 0: give 1 or more"),
        ("qa.mindrecord", ["--skip", "-1"], "--skip -1: give 0 or more"),
        ("qa.mindrecord", ["--skip", "5"], "holds 5 records"),
    ],
)
def test_wrong_arguments(folder: Path, capsys: pytest.CaptureFixture[str], name, more, message) -> None:
    assert shown(folder, name, *more) == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err and not said.out


def test_a_wrong_tokenizer_and_wrong_fields(folder: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "large.mindrecord"
    write_rows(path, np.full((1, 8), 31_999, np.int32))
    assert main([str(path), "--model_file", str(folder / "tokenizer.model")]) == 2
    assert "record 1: token id 31999 is not in this tokenizer, which has ids 0 to 599" in capsys.readouterr().err
    assert main([str(path), "--model_file", str(path)]) == 2
    assert "SentencePiece" in capsys.readouterr().err
    other = tmp_path / "other.mindrecord"
    write_mindrecord(other, [{"tokens": np.zeros(3, np.int32)}], ("tokens",))
    assert main([str(other), "--model_file", str(folder / "tokenizer.model")]) == 2
    assert "has the fields tokens, no input_ids" in capsys.readouterr().err


def test_a_damaged_file_and_a_lost_index(folder: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "qa.mindrecord"
    for name in ("qa.mindrecord", "qa.mindrecord.db"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    argv = [str(path), "--model_file", str(folder / "tokenizer.model")]
    whole = path.read_bytes()
    path.write_bytes(whole[: 1 << 24])  # the header is whole, the pages are gone
    assert main(argv) == 2
    assert "cannot be read" in capsys.readouterr().err
    path.write_bytes(whole)
    (tmp_path / "qa.mindrecord.db").unlink()
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "qa.mindrecord.db" in said and "Traceback" not in said
