# SPDX-License-Identifier: Apache-2.0
"""``run_mindformer.py --run_mode eval``: perplexity on MindRecord and text, with transformers as the judge."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mindformers_ext.cli.run_mindformer import main
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.data.tokenizers import SentencePieceTokenizer
from mindformers_ext.jobs.checkpoint.tiny_model import TinyModelRequest, make_tiny_model
from tests.helpers.tiny_run import SEQ, config_of, make_job, token_rows, write_rows

TEXTS = ["def check(value):\n    return value + 1\n" * 12, "import", "class Problems:\n    pass\n"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A YAML and a Hugging Face folder of its network whose capacity would drop tokens if it were obeyed."""
    path = make_job(tmp_path_factory.mktemp("eval"))
    path.write_text(path.read_text().replace("use_past: False", "use_past: True, init_method_std: 0.4"))
    spec = network_spec_from_yaml(config_of(path)).model
    make_tiny_model(
        TinyModelRequest(output_dir=path.parent / "hf", spec=spec, seed=5, tokenizer=path.parent / "tokenizer.model")
    )
    (path.parent / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def evaluate(job, tmp_path, *words):
    code = main(
        [
            "--config",
            str(job),
            "--run_mode",
            "eval",
            "--load_checkpoint",
            str(job.parent / "hf"),
            "--output_dir",
            str(tmp_path),
            *map(str, words),
        ]
    )
    return code, json.loads((tmp_path / "eval.json").read_text()) if code == 0 else None


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ms", "pt"])
def test_rows_count_as_in_training(job, tmp_path, capsys, engine):
    rows = token_rows()[:6]
    rows[0, 20:] = 3  # padding
    labels = rows.copy()
    labels[1, :10] = -100
    data = write_rows(tmp_path / "labelled.mindrecord", rows, labels=labels)
    code, found = evaluate(
        job,
        tmp_path,
        "--eval_data",
        data,
        "--hf",
        job.parent / "hf",
        "--engine",
        engine,
        "--eval_dataset.input_columns",
        "[input_ids, labels]",
    )
    shown = capsys.readouterr()
    assert code == 0 and f"windows of up to {SEQ} tokens, stride {SEQ}" in shown.out
    assert found["tokens"] == 6 * SEQ - 12 - 9 and found["windows"] == 6
    assert found["PerplexityMetric"]["PPL"] == pytest.approx(found["transformers"]["PPL"], rel=1e-5)
    assert f"perplexity: {found['PerplexityMetric']['PPL']:.6g}" in shown.out
    model = AutoModelForCausalLM.from_pretrained(job.parent / "hf", dtype=torch.float32)
    target = torch.from_numpy(np.where(rows[:, :-1] == 3, -100, labels[:, 1:]).astype(np.int64))
    with torch.no_grad():
        logits = model(torch.from_numpy(rows[:, :-1].astype(np.int64))).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.slow
def test_texts_in_windows(job, tmp_path, capsys):
    """A window as long as nearly all texts, and its half as stride: transformers' own loss on whole texts is near."""
    code, found = evaluate(
        job, tmp_path, "--eval_data", job.parent / "texts.jsonl", "--hf", job.parent / "hf", "--eval_stride", 8
    )
    tokenizer = SentencePieceTokenizer(job.parent / "tokenizer.model")
    texts = [[1, *tokenizer.encode(text)] for text in TEXTS]
    assert code == 0 and found["stride"] == 8 and found["window"] == SEQ
    assert found["tokens"] == sum(len(text) - 1 for text in texts) and len(texts[0]) > 3 * SEQ
    assert found["PerplexityMetric"]["PPL"] == pytest.approx(found["transformers"]["PPL"], rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(job.parent / "hf", dtype=torch.float32)
    nats = 0.0
    for text in texts:
        done = 1
        for start in range(0, len(text) - 1, 8):
            part = text[start : start + SEQ + 1]
            with torch.no_grad():
                odds = model(torch.tensor([part[:-1]])).logits[0].log_softmax(-1)
            nats -= sum(float(odds[i - start - 1, text[i]]) for i in range(done, start + len(part)))
            done = start + len(part)
            if done == len(text):
                break
    assert found["PerplexityMetric"]["PPL"] == pytest.approx(math.exp(nats / found["tokens"]), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_data", "none.txt"], "the data set none.txt (eval_dataset.data_loader.dataset_dir) does not exist"),
        (["--eval_data", "blank.txt"], "holds no token to predict"),
        (["--eval_data", "a.txt", "--eval_stride", "33"], "--eval_stride 33: give 1 to 32"),
        (["--eval_data", "a.txt", "--eval_stride", "0"], "--eval_stride 0"),
        (["--eval_data", "a.txt", "--hf", "nowhere"], "nowhere"),
        (["--eval_data", "a.txt", "--model.model_config.vocab_size", "300"], "has 400 pieces"),
        (["--eval_stride", "4"], "a row of MindRecord is a window of its own"),
    ],
)
def test_a_mistake_is_one_clear_message(job, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "a.txt").write_text("import this")
    data = [] if "--eval_data" in words else ["--eval_data", job.parent / "train.mindrecord"]
    code, _ = evaluate(job, tmp_path, *data, *words)
    shown = capsys.readouterr()
    assert code == 2 and message in shown.err and "Traceback" not in shown.err
