# SPDX-License-Identifier: Apache-2.0
"""llama_preprocess.py as a command: the files it writes, the same for any number of workers, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.cli.preprocess import main
from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.tokenizers import open_tokenizer, train_sentencepiece
from tests.helpers.records import rows_of

WIKI_TEXT = (
    ' \n = Title = \n \n A lobster , 5 @-@ year old ( 24 in ) , " red " <unk> . \n \n\n = = Part = = \n \n'
    " It 's 1 @,@ 000 N of the dogs ' . \n"
)
# sha256 of the input_ids (int32), made by running MindFormers r1.7's tokenize_wiki: WIKI_TEXT three times over at 17
# tokens a row, and WikiText-2's validation split at 513.
GOLDEN = {
    "llama2": (
        "7cf93099a194bba584c03c338ac76c220bbe28e89d84b2833fe6f74cdd836378",
        "9ecbb473f7b34001c4b99d4fc3bf0f2865d8d387eafac165a986fdce0a87f0ab",
    ),
    "mixtral": (
        "f10cdce064cc1ce90d06fd5f7bfac97728e18713fe9bec346936a1387da4e6c5",
        "6817ddd234740ce6a4da2b1c5927a93dd4481c64717ae5e606f73e56ab1a36ba",
    ),
}
TALK = [
    {"conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A file."}]},
    {"conversations": [{"from": "human", "value": "word " * 90}, {"from": "gpt", "value": "lost"}]},
    {"conversations": [{"from": "gpt", "value": "nobody asked"}]},
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(standard_library_text(400_000))


@pytest.fixture(scope="module")
def model(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(texts, path, 600)
    return path


@pytest.fixture
def corpus(texts: list[str], tmp_path: Path) -> Path:
    """Text, JSON lines and conversations in a folder."""
    (tmp_path / "a.txt").write_text("\n\n".join(texts[: len(texts) // 2]), encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n\n".join(texts[len(texts) // 2 :]), encoding="utf-8")
    with (tmp_path / "a.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"content": text}) + "\n" for text in texts[:200])
    (tmp_path / "talk.json").write_text(json.dumps(TALK * 40), encoding="utf-8")
    (tmp_path / "wiki.tokens").write_text(WIKI_TEXT, encoding="utf-8")
    return tmp_path


def run(kind: str, source: object, model: Path, output: Path, *more: object) -> int:
    argv = ["--dataset_type", kind, "--input_glob", source, "--model_file", model, "--output_file", output, *more]
    return main([str(word) for word in argv])


def summary_of(output: Path) -> dict:
    return json.loads(output.with_name(output.name + ".summary.json").read_text(encoding="utf-8"))


def test_wiki_is_mindformers(real_tokenizer: Path, wiki_file: Path, tmp_path: Path) -> None:
    golden = GOLDEN[real_tokenizer.name.split("_")[0]]
    (tmp_path / "tiny.tokens").write_text(WIKI_TEXT, encoding="utf-8")
    for number, (source, more) in enumerate(
        [(tmp_path / "tiny.tokens", ("--seq_length", 16, "--repeat", 3)), (wiki_file, ("--seq_length", 512))]
    ):
        output = tmp_path / f"{number}.mindrecord"
        assert run("wiki", source, real_tokenizer, output, "--workers", 1, *more) == 0
        rows = np.stack([row["input_ids"] for row in rows_of(output, "input_ids")])
        assert rows.dtype == np.int32
        assert sha256(rows.astype("<i4").tobytes()).hexdigest() == golden[number]


@pytest.mark.parametrize("document", ["file", "paragraph", "line"])
def test_text_comes_back(corpus: Path, texts: list[str], model: Path, document: str) -> None:
    output = corpus / "out" / "text.mindrecord"
    more = ("--seq_length", 64, "--document", document, "--workers", 1)
    assert run("text", corpus, model, output, *more) == 0
    tokenizer = open_tokenizer(model)
    stream = np.concatenate([row["input_ids"] for row in rows_of(output, "input_ids")])
    files = ["\n\n".join(texts[: len(texts) // 2]), "\n\n".join(texts[len(texts) // 2 :])]
    separator = {"file": "\0", "paragraph": "\n\n", "line": "\n"}[document]
    documents = [part for text in files for part in text.split(separator) if part.strip()]
    cut_at = np.flatnonzero(stream == 2)
    found = [part[part > 2] for part in np.split(stream, cut_at)][: len(cut_at)]
    assert [tokenizer.decode(part) for part in found] == documents[: len(found)]
    described = summary_of(output)
    assert described["documents"] == len(documents) >= len(found) >= len(documents) - 3
    assert described["tokens"] == described["records"] * 65 + described["dropped_tokens"]
    assert (described["row_length"], described["padding_tokens"]) == (65, 0)


@pytest.mark.parametrize(
    ("kind", "source", "more"),
    [
        ("text", "*.txt", ("--repeat", 2)),
        ("jsonl", "a.jsonl", ("--field", "content", "--split", "eval")),
        ("qa", "talk.json", ("--file_partition", 4)),
    ],
)
def test_any_number_of_workers_or_shards_writes_the_same_files(
    corpus: Path, model: Path, kind: str, source: str, more: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"SHARE": 1, "BATCH_CHARACTERS": 5000, "BATCH_CONVERSATIONS": 7}  # processes for an input of any size
    for name, value in small.items():
        monkeypatch.setattr(f"mindformers_ext.jobs.preprocess.batches.{name}", value)
    written = []
    output = corpus / "out" / "data.mindrecord"
    for workers in (1, 3, 2):
        more_here = ("--seq_length", 40, "--workers", workers, "--overwrite", *more)
        shards = ("1/3", "0/3", "2/3", "join") if workers == 2 else ()
        for word in (("--shard", shard) for shard in shards) if shards else ((),):
            assert run(kind, corpus / source, model, output, *more_here, *word) == 0
        described = summary_of(output)
        files = sorted(item for item in output.parent.iterdir() if not item.name.endswith(".json"))
        written.append((described, {item.name: sha256(item.read_bytes()).digest() for item in files}))
    assert written[0] == written[1] == written[2]
    described, files = written[0]
    assert described["row_length"] == (40 if "eval" in more else 41)
    assert len(files) == (8 if kind == "qa" else 2)
    first = output.with_name(output.name + "0") if kind == "qa" else output
    assert sum(1 for _ in rows_of(first, "input_ids")) == described["records"] > 50


def test_shards_that_do_not_fit_are_told(corpus: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = corpus / "out" / "data.mindrecord"

    def said(*words: object, source: str = "a.txt") -> str:
        assert run("text", corpus / source, model, output, "--workers", 1, *words) == 2
        return capsys.readouterr().err

    for word in ("3/3", "1", "a/b", "0/0", "1/999999", "whole"):
        assert f"--shard {word}: give i/n" in said("--shard", word)
    assert "no shard of" in said("--shard", "join")
    assert run("text", corpus / "a.txt", model, output, "--shard", "1/2", "--workers", 1) == 0
    assert "data.mindrecord.shard-00000-of-00002 of 2 is missing" in said("--shard", "join")
    assert run("text", corpus / "a.txt", model, output, "--shard", "0/2", "--workers", 1) == 0
    assert "made of another text or with other options" in said("--shard", "join", source="b.txt")
    assert "made of another text or with other options" in said("--shard", "join", "--bos_id", 3)
    damaged = output.with_name("data.mindrecord.shard-00001-of-00002")
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-9])
    assert "is damaged" in said("--shard", "join")
    assert sorted(path.name[:22] for path in output.parent.iterdir()) == ["data.mindrecord.shard-"] * 2
    damaged.write_bytes(data)
    assert run("text", corpus / "a.txt", model, output, "--shard", "join", "--workers", 1) == 0
    assert not list(output.parent.glob("*.shard-*"))


def test_qa_counts_what_bears_no_loss(corpus: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = corpus / "qa.mindrecord"
    assert run("qa", corpus / "talk.json", model, output, "--seq_length", 128, "--workers", 1) == 0
    described = summary_of(output)
    rows = list(rows_of(output, "input_ids", "labels"))
    assert len(rows) == described["records"] == 80
    assert (described["masked"], described["truncated"], described["no_question"]) == (40, 40, 40)
    labels = np.stack([row["labels"] for row in rows])
    assert described["loss_tokens"] == (labels != -100).sum() and (labels[1] == -100).all()
    assert described["padding_tokens"] == sum((row["input_ids"] == 3).sum() for row in rows)
    out = capsys.readouterr().out
    for text in ("40 records bear no loss", "40 conversations without a human turn", "40 records were longer than 129"):
        assert text in out
    more = ("--seq_length", 128, "--workers", 1, "--skip_masked", "--overwrite", "--pad_id", 0)
    assert run("qa", corpus / "talk.json", model, output, *more) == 0
    assert (summary_of(output)["records"], summary_of(output)["masked_skipped"]) == (40, 40)
    assert next(rows_of(output, "input_ids"))["input_ids"][-1] == 0


def test_wikipedia_from_parquet(corpus: Path, texts: list[str], model: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"id": list(range(50)), "text": texts[:50]})
    parquet.write_table(table, corpus / "wiki.parquet")
    output = corpus / "wikipedia.mindrecord"
    more = ("--seq_length", 31, "--field", "text", "--samples_num", 20, "--workers", 1)
    assert run("wikipedia", corpus / "wiki.parquet", model, output, *more) == 0
    rows = np.stack([row["input_ids"] for row in rows_of(output, "input_ids")])
    assert rows.shape == (20, 32) and (rows[:, 0] == 1).all() and (rows[:, -1] == 2).all()
    lines = [line.strip() for text in texts[:50] for line in text.split("\n") if line.strip()]
    stream = np.concatenate(open_tokenizer(model).encode_batch(lines))
    np.testing.assert_array_equal(rows[:, 1:-1].ravel(), stream[: 20 * 30])
    assert summary_of(output)["samples_left_out"]
    assert run("wikipedia", corpus / "wiki.parquet", model, output, "--overwrite", "--workers", 1) == 2  # ids, no text


def test_outputs_are_not_replaced_unasked(corpus: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = corpus / "x.mindrecord"
    more = ("--seq_length", 16, "--workers", 1)
    assert run("text", corpus / "a.txt", model, output, *more) == 0
    before = output.read_bytes()
    assert run("text", corpus / "b.txt", model, output, *more) == 2
    assert "exists: choose another path, or pass --overwrite" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert run("text", corpus / "b.txt", model, output, "--overwrite", *more) == 0
    assert output.read_bytes() != before and next(rows_of(output, "input_ids"))["input_ids"].size == 17


CONFIG = "configs/tiny/mixtral_pretrain.yaml"


@pytest.mark.parametrize(
    ("kind", "name", "content", "more", "message"),
    [
        ("jsonl", "x.jsonl", b'{"text": "a"}\n{"text": \n', (), r"x.jsonl, line 2: not JSON"),
        ("jsonl", "x.jsonl", b'{"text": "a"}\n{"body": "a"}\n', (), r"x.jsonl, record 2 (line 2): no field 'text'"),
        ("qa", "x.json", b'[{"conversations": []},\n {"conversations": [}]', (), r"x.json, line 2"),
        ("qa", "x.json", b'[\n{"id": "1"}]', (), "x.json, record 1 (line 2): no field 'conversations'"),
        ("text", "x.txt", b"", (), "x.txt is empty"),
        ("text", "x.txt", b"too short", (), "fills not one row of 2049 tokens"),
        ("wiki", "x.tokens", b"one\ntwo\ncaf\xe9\n", (), "x.tokens, line 3: not UTF-8"),
        ("jsonl", "x.jsonl", b'{"text": "caf\xe9"}\n', (), "x.jsonl, line 1: not UTF-8"),
        ("wikipedia", "x.parquet", b"no parquet", (), "x.parquet is no parquet file"),
        ("text", "x.txt", b"text", ("--seq_length", 7), "seq_length=7: give at least 8"),
        ("text", "x.txt", b"text", ("--repeat", 0, "--split", "test"), "repeat=0"),
        ("book", "x.txt", b"text", (), "choose one of wiki, wikipedia, qa, text, jsonl"),
        ("text", "x.txt", b"text", ("--field", "body"), "--field has no effect on text"),
        ("text", "x.txt", b"text", ("--config", CONFIG), "ids up to 2099 from the tokenizer, vocab_size=2000"),
        ("text", "x.txt", b"text", ("--config", CONFIG, "--seq_length", 64), "seq_length: 128 in the YAML"),
        ("text", "x.txt", b"text", ("--config", CONFIG, "--eos_id", 7), "eos_id 7, eos_token_id: 2 in the YAML"),
        ("qa", "x.json", b"[{}]", ("--config", CONFIG, "--pad_id", 0), "pad_id 0, pad_token_id: 3 in the YAML"),
        ("text", "x.txt", b"text", ("--bos_id", 99999), "bos_id=99999"),
        ("text", "x.txt", b"text", ("--model_file", "README.md"), "README.md is no SentencePiece model"),
        ("text", "x.txt", b"text", ("--model_file", "missing"), "no tokenizer at missing"),
        ("text", "x.txt", b"text", ("--input_glob", "no/*.txt"), "no input file at no/*.txt"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    kind: str,
    name: str,
    content: bytes,
    more: tuple,
    message: str,
    tmp_path: Path,
    repo_root: Path,
    large_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(repo_root)
    (tmp_path / name).write_bytes(content)
    output = tmp_path / "out" / "x.mindrecord"
    assert run(kind, tmp_path / name, large_model, output, "--workers", 1, *more) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not output.parent.exists() or not list(output.parent.iterdir())


@pytest.fixture(scope="module")
def large_model(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "tokenizer.model"
    train_sentencepiece(texts, path, 2100)
    return path


def test_sizes_come_from_the_yaml(corpus: Path, repo_root: Path, model: Path) -> None:
    output = corpus / "x.mindrecord"
    assert run("text", corpus / "a.txt", model, output, "--config", repo_root / CONFIG, "--workers", 1) == 0
    assert (summary_of(output)["row_length"], summary_of(output)["pad_id"]) == (129, 3)


def test_help_is_quick_and_loads_no_framework(repo_root: Path) -> None:
    script = repo_root / "tools" / "dataset_preprocess" / "llama" / "llama_preprocess.py"
    code = (
        "import runpy, sys; script = sys.argv[1]; sys.argv = ['x', '--help']\n"
        "try:\n    runpy.run_path(script, run_name='__main__')\nexcept SystemExit: pass\n"
        "print(sorted({'mindspore', 'torch', 'sentencepiece'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repo_root, check=True)
    assert "--dataset_type" in done.stdout and done.stdout.endswith("[]\n")
