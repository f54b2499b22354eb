# SPDX-License-Identifier: Apache-2.0
"""From instruction records to a finetuned tiny Mixtral, by the commands that a user types."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mindformers_ext.cli import alpaca_converter, preprocess, show_record
from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.tokenizers import train_sentencepiece
from tests.helpers.tiny_run import ROOT, rows_of, run_job

CONFIG = ROOT / "configs" / "tiny" / "finetune_mixtral.yaml"
SHARED = ROOT.parent / "shared" / "data"
COLOURS = ["red", "blue", "green"]


def prepare(folder: Path, records: Path, tokenizer: Path, *sizes: str) -> Path:
    """Records to conversations to a MindRecord file, whose path is returned."""
    conversations, data = folder / "conversations.json", folder / "train.mindrecord"
    assert alpaca_converter.main(["--data_path", str(records), "--output_path", str(conversations)]) == 0
    argv = ["--dataset_type", "qa", "--input_glob", str(conversations), "--model_file", str(tokenizer), *sizes]
    assert preprocess.main([*argv, "--output_file", str(data)]) == 0
    return data


def losses(folder: Path, data: Path, *options: str) -> list[float]:
    """Finetune on ``data``; the language model's loss of every step."""
    done = run_job(CONFIG, "--train_data", data, "--output_dir", folder / "run", *options, cwd=folder, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [row["lm_loss"] for row in rows_of(folder / "run")]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.slow
def test_a_handful_of_records_packed(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.model"
    train_sentencepiece(list(standard_library_text(300_000)), tokenizer, 600)
    records = [{"instruction": f"Say {word}.", "input": "", "output": f"It is {word}."} for word in COLOURS * 8]
    (tmp_path / "records.json").write_text(json.dumps(records), encoding="utf-8")
    data = prepare(tmp_path, tmp_path / "records.json", tokenizer, "--seq_length", "640", "--pack_strategy", "pack")
    sizes = {"seq_length": 640, "vocab_size": 600, "pad_token_id": 3, "hidden_size": 64, "intermediate_size": 64}
    options = [word for key, value in sizes.items() for word in (f"--model.model_config.{key}", str(value))]
    options += ["--train_dataset.input_columns", "[input_ids,labels,document_ids]", "--engine", "pt"]
    found = losses(tmp_path, data, *options, "--runner_config.epochs", "15")
    assert mean(found[-5:]) < 0.5 * found[0]


@pytest.mark.slow
def test_a_handful_of_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tmp_path / "tokenizer.model"
    train_sentencepiece(list(standard_library_text(300_000)), tokenizer, 600)
    records = [{"instruction": f"Say {word}.", "input": "", "output": f"It is {word}."} for word in COLOURS * 4]
    (tmp_path / "records.json").write_text(json.dumps(records), encoding="utf-8")
    data = prepare(tmp_path, tmp_path / "records.json", tokenizer, "--seq_length", "320")
    capsys.readouterr()
    assert show_record.main([str(data), "--model_file", str(tokenizer), "--n", "12"]) == 0
    marked = re.findall(r"ASSISTANT:\[\[(.*)\]\]<pad>", capsys.readouterr().out)
    assert marked == [f" It is {word}.</s>" for word in COLOURS * 4]
    sizes = {"seq_length": 320, "vocab_size": 600, "pad_token_id": 3, "hidden_size": 64, "intermediate_size": 64}
    options = [word for key, value in sizes.items() for word in (f"--model.model_config.{key}", str(value))]
    found = losses(tmp_path, data, *options, "--runner_config.epochs", "15")
    assert len(found) == 45
    assert mean(found[-5:]) < 0.5 * found[0]


@pytest.mark.long("tests/cli/run/test_finetune.py finetunes on a handful of records")
@pytest.mark.slow
def test_the_seed_tasks_halve_the_loss_within_200_steps(tmp_path: Path) -> None:
    records, tokenizer = SHARED / "alpaca_seed.json", SHARED / "mixtral_tokenizer.model"
    if not records.is_file() or not tokenizer.is_file():
        pytest.skip("needs ../shared/data")
    data = prepare(tmp_path, records, tokenizer, "--config", str(CONFIG))
    found = losses(tmp_path, data)
    assert len(found) <= 200
    assert mean(found[-10:]) < 0.5 * found[0]
