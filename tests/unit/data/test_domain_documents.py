# SPDX-License-Identifier: Apache-2.0
"""Documents by domain: blocks hold each record once, errors name its line, filters and splits keep their rules."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.domains.documents import document_of, find_domains, plan_blocks, read_block, score_of
from mindformers_ext.data.domains.filters import Filter, ads, fluency, read_filters
from mindformers_ext.data.domains.splits import SLOTS, Amount, deal, document_hash, read_shares, wanted_rows

LINES = st.lists(st.text("aé\n{ ", max_size=12), min_size=1, max_size=30)


@given(LINES, st.integers(1, 200), st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_blocks_hold_each_record_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, end: str, last: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "blocks.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes((end.join(lines) + end * last).encode())
    blocks = plan_blocks({"a": [path]}, size)
    assert blocks[-1].end in (-1, path.stat().st_size) and len({block.start for block in blocks}) == len(blocks)
    found = [record.value["text"] for block in blocks for record in read_block(block, None)]
    assert found == texts


def write_all(folder: Path, values: list[dict]) -> None:
    """The same records in every kind of file."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in ("a", "b", "c"):
        (folder / name).mkdir()
    text = "".join(json.dumps(value) + "\n" for value in values)
    (folder / "a" / "x.jsonl").write_text(text)
    (folder / "b" / "x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    table = pyarrow.Table.from_pylist(values)
    parquet.write_table(table, folder / "c" / "x.parquet", row_group_size=2)
    (folder / "d.json").write_text(json.dumps(values))
    (folder / "notes.md").write_text("no data")


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    values = [{"content": f"text {number}", "input_ids": [1, number], "score": number / 2} for number in range(5)]
    write_all(tmp_path, values)
    domains, left = find_domains(str(tmp_path), ())
    assert list(domains) == ["a", "b", "c", "d"] and left == ["notes.md"]
    blocks = plan_blocks(domains, 100)
    assert len([block for block in blocks if block.domain == 2]) > 1
    for number in range(4):
        records = [
            record for block in blocks if block.domain == number for record in read_block(block, None, ("score",))
        ]
        assert [document_of(record, None) for record in records] == [value["content"] for value in values]
        assert [score_of(record, "score") for record in records] == [value["score"] for value in values]
        records = [record for block in blocks if block.domain == number for record in read_block(block, "input_ids")]
        assert [document_of(record, "input_ids").tolist() for record in records] == [[1, n] for n in range(5)]


def test_a_bad_record_is_named_by_its_line_in_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "x" * 40})
    path.write_text("\n".join([good] * 6 + ['{"text": 5}x', good]))
    *_, block = (block for block in plan_blocks({"a": [path]}, 60) if block.start < path.stat().st_size - 50)
    assert block.start > 0
    with pytest.raises(UserError, match="line 7: there is text after the object"):
        list(read_block(block, None))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"title": "x"}, r"record 1 \(line 1\): no field 'text', it has 'title'; name the field .*--field"),
        ({"text": None}, "'text' is null"),
        ({"text": 5}, "'text' is 5, not a string"),
        ({"input_ids": [1, "2"]}, "holds '2', which is no token id"),
        ({"input_ids": [1, True]}, "holds True"),
        ({"input_ids": [-1]}, "holds -1"),
        ({"input_ids": [2**31]}, "holds 2147483648"),
    ],
)
def test_what_is_no_document_is_told(tmp_path: Path, value: dict, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(value))
    (record,) = read_block(plan_blocks({"a": [path]})[0], None)
    with pytest.raises(UserError, match=message):
        document_of(record, None)


@pytest.mark.parametrize(
    ("source", "given_words", "message"),
    [
        ("", (), "give either --input_glob FOLDER"),
        ("here", ("a=here",), "give either --input_glob FOLDER"),
        ("nowhere", (), "is not a folder"),
        ("empty", (), "no sub-folder and no .jsonl"),
        ("", ("a",), "--domains a: give NAME=PATH"),
        ("", ("a=here", "a=here"), "'a' is given 2 times"),
        ("", ("../a=here",), "cannot be a domain's name"),
        ("", ("a=nowhere/*.jsonl",), "no input file at"),
        ("", ("a=here/a.txt",), "is of another kind"),
        ("", ("a=here/empty.jsonl",), "is empty"),
    ],
)
def test_domains_that_cannot_be_found_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, given_words: tuple, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("here", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "a.txt").write_text("x")
    (tmp_path / "here" / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=message):
        find_domains(source or None, given_words)


def test_filters_are_read_and_judge_by_their_range() -> None:
    found = read_filters(
        ["characters", "cc/fluency=0.5:", "ads=:0.2", "field.q=-1:3", "duplicates=0.7"], ["cc", "wiki"]
    )
    assert found == (
        Filter("characters", 200, math.inf),
        Filter("fluency", 0.5, math.inf, "cc"),
        Filter("ads", -math.inf, 0.2),
        Filter("field.q", -1, 3),
        Filter("duplicates", 0.0, 0.7),
    )
    assert found[1].keeps(0.5) and not found[1].keeps(0.49) and not found[3].keeps(math.nan)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("quality", "choose one of characters, tokens, fluency, ads, duplicates or field.NAME"),
        ("field.", "choose one of"),
        ("books/ads", "the domains are cc"),
        ("ads=0.2", "give ads=LOW:HIGH"),
        ("ads=3:1", "LOW not above HIGH"),
        ("ads=:", "give ads=LOW:HIGH"),
        ("ads=a:b", "give ads=LOW:HIGH"),
        ("ads=nan:1", "give ads=LOW:HIGH"),
        ("field.q", "give field.q=LOW:HIGH"),
        ("duplicates=1.5", "from 0 to 1"),
        ("cc/duplicates=0.5", "in all domains together"),
    ],
)
def test_a_filter_that_makes_no_sense_is_told(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_filters([word], ["cc"])
    with pytest.raises(UserError, match="asked for 2 times"):
        read_filters(["ads", "ads=:0.1"], ["cc"])


def test_scores_tell_texts_apart() -> None:
    prose = "The river runs to the sea.\nIt is long, and slow in summer."
    assert fluency(prose) == 1.0 and fluency("河水流向大海。夏天很慢。") == fluency("नदी समुद्र में जाती है।") == 1.0
    assert fluency("\n".join(["same line"] * 4)) == pytest.approx(1 / 4)
    assert fluency("@@## $$%% ^^&&") < 0.25 and fluency("") == 0.0
    assert ads(prose) == 0.0 and ads("Buy now!\nSubscribe to our newsletter\nA line of text") == pytest.approx(2 / 3)


@given(st.integers(0, 10**6), st.integers(0, 60), st.integers(0, SLOTS))
@settings(max_examples=50, deadline=None)
def test_a_range_is_as_wide_as_it_must_be(seed: int, rows: int, start: int) -> None:
    tokens = {"cc": np.random.default_rng(seed).integers(0, 40, SLOTS)}
    if tokens["cc"][start:].sum() < 16 * rows:
        return
    found = deal("eval", Amount(rows={"cc": rows}), tokens, {"cc": start}, 16)["cc"]
    assert found.start == start and found.rows == rows
    assert tokens["cc"][found.start : found.end].sum() >= 16 * rows, "enough for what was asked"
    assert not rows or tokens["cc"][found.start : found.end - 1].sum() < 16 * rows, "and no more"
    assert deal("for_ft", Amount(share=0.5), tokens, {"cc": start}, 16)["cc"].end == min(SLOTS, start + SLOTS // 2)
    assert deal("for_ft", Amount(rest=True), tokens, {"cc": start}, 16)["cc"].end == SLOTS


def test_what_a_domain_lacks_is_told() -> None:
    tokens = {"cc": np.zeros(SLOTS, np.int64), "wiki": np.full(SLOTS, 2)}
    tokens["cc"][9] = 1000
    with pytest.raises(UserError, match="eval wants 11 rows of 100 tokens of cc, which has 10 for it"):
        deal("eval", Amount(rows={"cc": 11, "wiki": 1}), tokens, {"cc": 0, "wiki": 0}, 100)


def test_copies_fall_into_one_split_and_the_seed_deals_anew() -> None:
    ids = np.array([1, 2, 70_000])
    assert document_hash(ids, 42) == document_hash(ids.astype(np.int32), 42) != document_hash(ids, 43)
    assert document_hash(ids[:2], 42) != document_hash(ids, 42)


def test_sizes_are_shared_out_as_the_reference_does() -> None:
    """LLM-Shearing: rows of a domain = int(1e9 // seq_length * size * its share)."""
    shares = read_shares(["0.67", "0.33"], ["cc", "wiki"])
    assert wanted_rows("for_prune", 0.001, 1e9, 4096, shares) == {"cc": 163, "wiki": 80}
    assert read_shares(["wiki=1", "cc=0"], ["cc", "wiki"]) == {"cc": 0.0, "wiki": 1.0}
    with pytest.raises(UserError, match="gives cc, wiki not one row of 4096 tokens"):
        wanted_rows("for_prune", 0.000001, 1e9, 4096, shares)
    for words, message in (
        (["0.5"], "have no share: wiki"),
        (["0.5", "0.2"], "sum to 0.7"),
        (["cc=0.5", "book=0.5"], "give each of cc, wiki once"),
        (["a", "1"], "give a share from 0 to 1"),
        (["0.5", "0.5", "0"], "give each of cc, wiki once"),
    ):
        with pytest.raises(UserError, match=message):
            read_shares(words, ["cc", "wiki"])
