# SPDX-License-Identifier: Apache-2.0
"""llama_preprocess.py --dataset_type domains and mds: tokens kept, splits disjoint, same bytes however it is run."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.cli.preprocess import main
from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.domains.documents import Block
from mindformers_ext.data.domains.manifest import SPLITS, Manifest, read_manifest, split_files
from mindformers_ext.data.tokenizers import open_tokenizer, train_sentencepiece
from mindformers_ext.jobs.preprocess.domains.blocks import BlockEncoder
from tests.helpers.mds_writer import write_mds
from tests.helpers.merge_models import tokenizer_json
from tests.helpers.records import rows_of

LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains and a tokenizer. "ids" holds token ids, "copies" texts of "docs" and each of its own twice."""
    result = tmp_path_factory.mktemp("corpus")
    texts = [text[:1500] for text in standard_library_text(400_000)][:60]
    assert len(texts) == 60
    train_sentencepiece(texts, result / "tokenizer.model", 600)
    for name in ("docs", "copies", "ids"):
        (result / "corpus" / name).mkdir(parents=True)
    lines = [json.dumps({"text": text, "quality": len(text) % 5}) + "\n" for text in texts[:40]]
    (result / "corpus" / "docs" / "a.jsonl").write_text("".join(lines[:25]))
    (result / "corpus" / "docs" / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[25:]).encode()))
    copies = [json.dumps({"content": text, "quality": 3}) + "\n" for text in [*texts[40:] * 2, *texts[:5], ""]]
    (result / "corpus" / "copies" / "a.jsonl").write_text("".join(copies))
    encoded = open_tokenizer(result / "tokenizer.model").encode_batch(texts[:20])
    lines = [json.dumps({"input_ids": [int(token) for token in ids]}) + "\n" for ids in encoded]
    (result / "corpus" / "ids" / "a.jsonl").write_text("".join(lines))
    return result


def run(folder: Path, output: Path, *more: object, source: Path | None = None, kind: str = "domains") -> int:
    argv = ["--dataset_type", kind, "--model_file", folder / "tokenizer.model", "--output_file", output, *more]
    if "--domains" not in more:
        argv += ["--input_glob", source or folder / "corpus"]
    return main([str(word) for word in argv])


SIZES = ("--seq_length", LENGTH, "--for_prune", 0.000003, "--eval_seq", 5)


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Path:
    """The corpus prepared by one process."""
    assert run(folder, folder / "out" / "one", *SIZES, "--workers", 1) == 0
    return folder / "out" / "one"


def rows(made: Manifest, split: str, domain: str) -> np.ndarray:
    """The rows of a split, of which MindSpore reads set and idx too."""
    found = [row for path in split_files(made, split)[domain] for row in rows_of(path, "input_ids", "set", "idx")]
    assert [int(row["idx"]) for row in found] == list(range(len(found))), "without gaps"
    assert {int(row["set"]) for row in found} <= {made.domains.index(domain)}
    return np.array([row["input_ids"] for row in found], np.int32).reshape(-1, made.seq_length)


def hashes(place: Path) -> dict[str, str]:
    return {
        str(path.relative_to(place)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


def test_no_token_and_no_document_is_lost(folder: Path, prepared: Path) -> None:
    made = read_manifest(prepared)
    tokenizer = open_tokenizer(folder / "tokenizer.model")
    assert made.domains == ("copies", "docs", "ids") and made.seq_length == LENGTH and made.seed == 42
    assert made.tokenizer.vocab_size == 600 and (made.tokenizer.bos, made.tokenizer.eos) == (1, 2)
    for name in made.domains:
        count = made.counts[name]
        found = {split: made.splits[split][name].rows for split in SPLITS}
        assert sum(found.values()) * LENGTH + count.dropped_tokens == count.tokens
        assert count.dropped_tokens < LENGTH, "the tail of for_ft alone: the others are full"
        assert found["eval"] == 5 and found["for_prune"] == int(1e9) // LENGTH * 0.000003 // 3
        files = sorted((folder / "corpus" / name).iterdir())
        data = [gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes() for path in files]
        values = [json.loads(line) for part in data for line in part.splitlines()]
        texts = [value.get("text", value.get("content")) for value in values]
        lengths = [
            len(value["input_ids"] if text is None else tokenizer.encode_batch([text])[0]) + 2
            for value, text in zip(values, texts, strict=True)
            if text != ""
        ]
        assert count.documents == len(values) and dict(count.filtered) == ({"empty": 1} if "" in texts else {})
        assert count.tokens + count.unused_tokens == sum(lengths)


def test_a_document_is_in_one_split_with_its_copies(folder: Path, prepared: Path) -> None:
    """Of every text, its first whole tokens: they stand in the rows of one split alone, whichever domain has it."""
    made = read_manifest(prepared)
    tokenizer = open_tokenizer(folder / "tokenizer.model")
    streams = {split: [rows(made, split, name).tobytes() for name in made.domains] for split in SPLITS}
    lines = (folder / "corpus" / "copies" / "a.jsonl").read_text().splitlines()
    texts = {json.loads(line)["content"] for line in lines} - {""}
    found = []
    for text in texts:
        piece = np.array([1, *tokenizer.encode_batch([text])[0][:40]], np.int32).tobytes()
        found.append([split for split in SPLITS if any(piece in stream for stream in streams[split])])
    assert all(len(splits) <= 1 for splits in found)
    assert {split for splits in found for split in splits} == set(SPLITS)
    assert sum(map(len, found)) > len(texts) // 2, "but for those that full splits did not take"


def test_processes_blocks_and_shards_write_the_same_bytes(
    folder: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mindformers_ext.data.domains.documents.SMALLEST", 3000)
    monkeypatch.setattr("mindformers_ext.data.domains.documents.LARGEST", 3000)
    expected = hashes(prepared)
    two, three = folder / "out" / "two", folder / "out" / "three"
    # a shard's parts, then the rest without shards, as after a kill: what is there is kept
    assert run(folder, two, *SIZES, "--shard", "1/2", "--workers", 1) == 0
    assert run(folder, two, *SIZES, "--workers", 3) == 0
    assert "parts were there from an earlier run" in capsys.readouterr().out
    assert hashes(two) == expected
    for shard in ("2/3", "0/3"):
        assert run(folder, three, *SIZES, "--shard", shard, "--workers", 1) == 0
    assert run(folder, three, *SIZES, "--shard", "join") == 2
    assert "parts are not in" in capsys.readouterr().err and not three.exists()
    assert run(folder, three, *SIZES, "--shard", "1/3", "--workers", 1) == 0
    assert run(folder, three, *SIZES, "--shard", "join") == 0
    assert hashes(three) == expected
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["one", "three", "two"]


def test_filters_leave_out_what_they_say(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mindformers_ext.jobs.preprocess.domains.pack.FILE_BYTES", 30 * 4 * LENGTH)
    words = ("--filter", "characters=900:", "field.quality=1:3", "docs/ads=:0.5", "copies/tokens=:600")
    domains = [f"docs={folder / 'corpus' / 'docs'}", f"copies={folder / 'corpus' / 'copies'}"]
    sizes = ("--seq_length", LENGTH, "--eval_seq", 0, "--for_ft_share", 0.7)
    assert run(folder, tmp_path / "out", *sizes, *words, "--domains", *domains) == 0
    made = read_manifest(tmp_path / "out")
    assert made.domains == ("docs", "copies")
    written = made.splits["for_ft"]["copies"].files
    assert [file.rows for file in written[:-1]] == [30] * (len(written) - 1) and len(written) > 1
    assert written[1].name == f"copies-00001-of-{len(written):05}.mindrecord"
    assert len(rows(made, "for_ft", "copies")) == made.splits["for_ft"]["copies"].rows
    texts = [json.loads(line)["content"] for line in (folder / "corpus/copies/a.jsonl").read_text().splitlines()]
    tokenizer = open_tokenizer(folder / "tokenizer.model")
    long = [text for text in texts if len(text) >= 900]
    many = [text for text in long if len(tokenizer.encode_batch([text])[0]) + 2 > 600]
    assert many and made.counts["copies"].filtered == {
        "empty": 1,
        "characters": len(texts) - len(long) - 1,
        "tokens": len(many),
    }
    assert made.counts["docs"].filtered["field.quality"] > 0
    assert sum(count.unused_documents for count in made.counts.values()) > 0
    assert "documents were not used: the splits were full" in capsys.readouterr().out


def test_near_duplicates_are_left_out(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasketch", reason="pip install 'mindformers_ext[dedup]'")
    words = ("--seq_length", LENGTH, "--filter", "duplicates=0.8", "--eval_seq", 1)
    domains = [f"{name}={folder / 'corpus' / name}" for name in ("docs", "copies")]
    assert run(folder, tmp_path / "out", *words, "--domains", *domains, "--workers", 1) == 0
    made = read_manifest(tmp_path / "out")
    assert made.counts["copies"].filtered["duplicates"] >= 25 and made.counts["copies"].documents == 46
    assert made.counts["docs"].filtered.get("duplicates", 0) <= 3


def test_an_mds_import_equals_direct_preparation(folder: Path, prepared: Path, tmp_path: Path) -> None:
    made = read_manifest(prepared)
    for split in SPLITS:
        for name in made.domains:
            write_mds(tmp_path / "mds" / split / name, list(rows(made, split, name)), name, per_shard=40)
    write_mds(tmp_path / "mds" / "eval" / "eval_merge", [np.arange(LENGTH)], "docs")
    assert run(folder, tmp_path / "out", source=tmp_path / "mds", kind="mds") == 0
    imported = read_manifest(tmp_path / "out")
    assert imported.splits == made.splits, "names, rows, bytes and hashes"
    for path in (path for split in SPLITS for path in (tmp_path / "out" / split).iterdir()):
        assert (
            sha256(path.read_bytes()).digest()
            == sha256((prepared / path.relative_to(tmp_path / "out")).read_bytes()).digest()
        )
    shutil.rmtree(tmp_path / "out")


def test_a_vocabulary_beyond_16_bits(tmp_path: Path) -> None:
    """As LLaMA 3 has it: where the reference's uint16 overflows."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(70_000)))
    (tmp_path / "corpus").mkdir()
    ids = [[1, *range(69_900, 69_999), 2], [5, 65_535, 65_536, 69_999] * 9]
    (tmp_path / "corpus" / "big.jsonl").write_text("".join(json.dumps({"input_ids": line}) + "\n" for line in ids))
    words = (
        "--dataset_type",
        "domains",
        "--input_glob",
        tmp_path / "corpus",
        "--model_file",
        tmp_path / "tokenizer.json",
    )
    more = ("--output_file", tmp_path / "out", "--seq_length", 8, "--eval_seq", 0, "--bos_id", 1, "--eos_id", 2)
    assert main([str(word) for word in (*words, *more)]) == 0
    stream = rows(read_manifest(tmp_path / "out"), "for_ft", "big").reshape(-1).tolist()
    assert stream == ([*ids[0], 1, *ids[1], 2])[: len(stream)] and len(stream) == 136


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--eval_seq", 9000), "eval wants 9000 rows of 32 tokens of docs, which has"),
        (("--eval_seq", -1), "--eval_seq -1"),
        (("--eval_seq", 3, "--eval_share", 0.1), "--eval_seq and --eval_share: give one of the two"),
        (("--eval_share", 0.6, "--for_ft_share", 0.6), "the shares sum to 1.2"),
        (("--for_prune", -1), "--for_prune -1.0"),
        (("--for_prune", "nan"), "--for_prune nan"),
        (("--for_prune_share", 2), "--for_prune_share 2.0"),
        (("--proportion", 0.5, 0.5), "--proportion has no effect"),
        (("--seed", -1), "--seed -1"),
        (("--filter", "nothing"), "choose one of characters"),
        (("--filter", "field.missing=0:"), "wants a number in 'missing'"),
        (("--field", "title"), "docs/a.jsonl, record 1 (line 1): no field 'title'"),
        (("--seq_length", 4), "seq_length=4"),
        (("--seq_length", 9_000_000, "--eval_seq", 0), "not one row of 9000000 tokens"),
        (("--repeat", 2), "--repeat has no effect on domains"),
        (("--split", "eval"), "--split has no effect on domains"),
        (("--summary", "x.json"), "--summary has no effect on domains"),
        (("--shard", "join"), "parts are not in"),
        (("--config", "configs/tiny/mixture_pretrain.yaml"), "trains on rows of 129 tokens"),
        (("--ray", "127.0.0.1:1"), "ay"),
        (("--domains", "docs=nowhere"), "no input file at nowhere"),
    ],
)
def test_a_bad_option_is_told_and_nothing_is_written(
    folder: Path, tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture[str], words: tuple, message: str
) -> None:
    (tmp_path / "corpus").mkdir()
    shutil.copytree(folder / "corpus" / "docs", tmp_path / "corpus" / "docs")
    words = [repo_root / word if str(word).startswith("configs/") else word for word in words]
    given = ("--seq_length", LENGTH, "--workers", 1, *words)
    assert run(folder, tmp_path / "out", *given, source=tmp_path / "corpus") == 2
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: not JSON"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ('{"text": 1}', "record 3 (line 3): 'text' is 1, not a string"),
        ('{"text": "a", "text": "b"}', "holds the name 'text' twice"),
        ('{"input_ids": [600]}', "record 3 (line 3) holds token id 600, the vocabulary has ids 0 to 599"),
        ("\xff", "line 3: not UTF-8"),
    ],
)
def test_a_bad_record_is_told_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    (tmp_path / "corpus").mkdir()
    good = '{"text": "a text of some words"}\n'
    (tmp_path / "corpus" / "a.jsonl").write_bytes((good * 2).encode() + line.encode("latin-1") + b"\n" + good.encode())
    assert run(folder, tmp_path / "out", "--seq_length", 8, "--workers", 1, source=tmp_path / "corpus") == 2
    errors = capsys.readouterr().err
    assert "a.jsonl" in errors and message in errors
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_an_input_that_changes_meanwhile_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus").mkdir()
    shutil.copy(folder / "corpus" / "docs" / "a.jsonl", tmp_path / "corpus" / "a.jsonl")
    plain = BlockEncoder.encode

    def encode(encoder: BlockEncoder, block: Block) -> int:
        read = plain(encoder, block)
        os.utime(block.path, (1, 1))
        return read

    monkeypatch.setattr(BlockEncoder, "encode", encode)
    assert run(folder, tmp_path / "out", "--seq_length", LENGTH, "--workers", 1, source=tmp_path / "corpus") == 2
    assert "a.jsonl' has changed while it was read" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_bad_mds_folders_and_options_of_others_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: object, kind: str = "mds") -> str:
        assert run(folder, tmp_path / "out", *words, source=tmp_path / "mds", kind=kind) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "is not a folder" in said()
    (tmp_path / "mds").mkdir()
    assert "has no rows in eval/DOMAIN/index.json" in said()
    write_mds(tmp_path / "mds" / "for_ft" / "cc", [np.arange(8), np.arange(8)], "cc")
    assert "have 8 tokens, asked are 16" in said("--seq_length", 16)
    assert "have no effect on mds: --filter, --seed, --shard" in said("--filter", "ads", "--seed", 1, "--shard", "0/2")
    write_mds(tmp_path / "mds" / "for_ft" / "wiki", [np.arange(8)], "cc")
    assert "row 0 is of the domain 'cc', its folder is 'wiki'" in said()
    shutil.rmtree(tmp_path / "mds" / "for_ft" / "wiki")
    write_mds(tmp_path / "mds" / "for_ft" / "wiki", [np.arange(9)], "wiki")
    assert "has 18 bytes, not 16" in said()
    shutil.rmtree(tmp_path / "mds" / "for_ft" / "wiki")
    write_mds(tmp_path / "mds" / "eval" / "cc", [np.arange(8) + 600], "cc")
    assert "holds the id 607, the vocabulary has 600" in said()
    assert "--eval_seq, --seed has no effect on jsonl" in said("--eval_seq", 0, "--seed", 0, kind="jsonl")
