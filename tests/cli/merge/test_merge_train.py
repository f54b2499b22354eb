# SPDX-License-Identifier: Apache-2.0
"""A mixture out of tiny chat models that were trained here: read by transformers, converted, trained on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindformers_ext.cli import alpaca_converter, check_parity, convert, merge, preprocess
from mindformers_ext.core.config.file import parse_yaml
from mindformers_ext.core.config.hf import hf_config_from_spec, model_spec_from_hf
from mindformers_ext.core.config.view import yaml_from_network_spec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.tokenizers import train_sentencepiece
from tests.helpers.merge_models import family
from tests.helpers.tiny_run import BATCH, ROOT, ROWS, SEQ, YAML, rows_of, run_job, token_rows, write_rows

CONFIG = ROOT / "configs" / "tiny" / "finetune_mixtral.yaml"
TOPICS = {"colours": ["red", "blue"], "numbers": ["one", "seven"], "animals": ["cat", "bird"], "tools": ["saw", "nail"]}
SIZES = {"seq_length": 320, "vocab_size": 600, "pad_token_id": 3, "hidden_size": 64, "intermediate_size": 96}
PEER = os.environ.get("MERGEKIT_PYTHON")  # a Python with transformers 5, see test_merge_peer.py
# The logits of a folder in whatever transformers runs this; a missing or an unexpected key is an error.
LOGITS = """
import sys, numpy, torch, transformers
model, report = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32,
                                                                  output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
with torch.no_grad():
    numpy.save(sys.argv[2], model.eval()(torch.arange(60).reshape(2, 30) * 7 % 600).logits.numpy())
"""


def told(words: Sequence[object]) -> list[str]:
    return [str(word) for word in words]


def sizes(experts: int) -> list[str]:
    options = [word for key, value in SIZES.items() for word in (f"--model.model_config.{key}", str(value))]
    return [*options, "--moe_config.expert_num", str(experts), "--moe_config.num_experts_chosen", str(min(2, experts))]


def conversations(folder: Path, tokenizer: Path, words: Sequence[str]) -> Path:
    """Questions and answers about ``words`` as a MindRecord file."""
    records = [{"instruction": f"Say {word}.", "input": "", "output": f"It is {word}."} for word in words] * 20
    (folder / "records.json").write_text(json.dumps(records[:40]), encoding="utf-8")
    data = folder / "train.mindrecord"
    words = ["--data_path", folder / "records.json", "--output_path", folder / "c.json"]
    assert alpaca_converter.main(told(words)) == 0
    assert (
        preprocess.main(
            told(
                [
                    "--dataset_type",
                    "qa",
                    "--input_glob",
                    folder / "c.json",
                    "--model_file",
                    tokenizer,
                    "--seq_length",
                    SIZES["seq_length"],
                    "--output_file",
                    data,
                ]
            )
        )
        == 0
    )
    return data


def train(folder: Path, data: Path, experts: int, steps: int, *more: object) -> list[float]:
    done = run_job(
        CONFIG,
        "--train_data",
        data,
        "--output_dir",
        folder / "run",
        *sizes(experts),
        "--runner_config.epochs",
        steps // 10,
        *more,
        cwd=folder,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    losses = [row["lm_loss"] for row in rows_of(folder / "run")]
    assert len(losses) == steps
    return losses


def chat_models(folder: Path, tokenizer: Path) -> list[Path]:
    """Four models of one run, after 10, 20, 30 and 40 steps; with ALL_FOUR set, each trained on a topic of its own."""
    names = list(TOPICS)
    if os.environ.get("ALL_FOUR"):
        found = []
        for name in names:
            (folder / name).mkdir()
            train(folder / name, conversations(folder / name, tokenizer, TOPICS[name]), 1, 40)
            found += sorted((folder / name).glob("run/checkpoint/rank_0/*.ckpt"))
    else:
        data = conversations(folder, tokenizer, [word for words in TOPICS.values() for word in words])
        train(folder, data, 1, 40, "--callbacks.1.save_checkpoint_steps", 10, "--callbacks.1.keep_checkpoint_max", 4)
        found = sorted((folder / "run/checkpoint/rank_0").glob("*.ckpt"))
    assert len(found) == 4
    spec = ModelSpec(
        vocab_size=600,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        pad_token_id=3,
    )
    (folder / "config.json").write_text(json.dumps(hf_config_from_spec(spec)))
    for name, checkpoint in zip(names, found, strict=True):
        words = ["--reversed", "--input_path", checkpoint, "--output_path", folder / f"hf_{name}", "--dtype", "fp32"]
        assert convert.main(told([*words, "--config", folder / "config.json"])) == 0
        (folder / f"hf_{name}/tokenizer.model").write_bytes(tokenizer.read_bytes())
    return [folder / f"hf_{name}" for name in names]


@pytest.mark.slow
def test_merging_is_measured_against_cp(tmp_path: Path) -> None:
    """Without mergekit, which has an environment of its own."""
    command = told([sys.executable, ROOT / "tools/bench/merge.py", "--width", 40, "--folder", tmp_path])
    environment = {name: value for name, value in os.environ.items() if name != "MERGEKIT_PYTHON"}
    done = subprocess.run([*command, "--only", "ties", "moe_random"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = r"^(?:ties|moe_random) .* ours wall .* peak +\d+ MB .* CPU ours/cp \d+"
    assert len(re.findall(line, done.stdout, re.M)) == 2
    assert not any(tmp_path.iterdir())


@pytest.mark.long("tests/cli/merge/test_merge_train.py trains one with a shared expert in both engines")
@pytest.mark.slow
def test_a_mixture_of_trained_models_is_read_converted_and_trained_on(tmp_path: Path, capsys) -> None:
    tokenizer, out, checkpoint = tmp_path / "tokenizer.model", tmp_path / "moe", tmp_path / "moe.ckpt"
    train_sentencepiece(list(standard_library_text(300_000)), tokenizer, 600)
    models = chat_models(tmp_path, tokenizer)
    experts = [
        {"source_model": str(model), "positive_prompts": [f"Say {word}." for word in words]}
        for model, words in zip(models, TOPICS.values(), strict=True)
    ]
    config = {"base_model": str(models[0]), "gate_mode": "hidden", "dtype": "float32", "experts": experts}
    (tmp_path / "moe.yml").write_text(yaml.safe_dump(config))
    assert merge.main(told(["moe", tmp_path / "moe.yml", out, "--to-mindspore", checkpoint])) == 0

    logits = {}
    for name, python in {"4": sys.executable, "5": PEER}.items():
        if python:
            subprocess.run([python, "-c", LOGITS, str(out), str(tmp_path / f"{name}.npy")], check=True, cwd=tmp_path)
            logits[name] = np.load(tmp_path / f"{name}.npy")
    if "5" in logits:
        np.testing.assert_allclose(logits["5"], logits["4"], atol=1e-4)
    capsys.readouterr()
    words = ["--hf", out, "--ckpt", checkpoint, "--text", "Say red.", "--text", "Say nail."]
    assert check_parity.main(told(words)) == 0
    print(capsys.readouterr().out)

    (tmp_path / "more").mkdir()
    data = conversations(tmp_path / "more", tokenizer, ["moon", "house", "river", "window"])  # nothing they have seen
    losses = train(tmp_path / "more", data, 4, 50, "--load_checkpoint", checkpoint)
    print(f"loss {losses[0]:.3f} at first, {np.mean(losses[-5:]):.3f} over the last five steps")
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.5 * losses[0]


def mixture_job(folder: Path, hf: Path, steps: int) -> Path:
    """A training YAML whose network is that of a Hugging Face folder, and rows of its vocabulary."""
    spec = model_spec_from_hf(json.loads((hf / "config.json").read_text(encoding="utf-8")))
    data = write_rows(folder / "train.mindrecord", token_rows(high=spec.vocab_size - 4))
    network = NetworkSpec(model=spec, seq_length=SEQ, batch_size=BATCH)
    words = parse_yaml(YAML.replace("dataset_dir: ''", f"dataset_dir: {data}"), "YAML") | yaml_from_network_spec(
        network
    )
    words["runner_config"] |= {"epochs": steps * BATCH // ROWS}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(words | {"use_parallel": False, "processor": None}), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.turn("mixture trains")
@pytest.mark.parametrize("engine", ["ms", "pt"])
def test_a_mixture_with_a_shared_expert_trains(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Qwen2-MoE out of Qwen2 models, biases included: our own loop trains what tools/merge.py has written."""
    family(tmp_path, count=2, kind="qwen2", dtype="float32")
    monkeypatch.chdir(tmp_path)
    expert = {"positive_prompts": ["w60 w61"]}
    experts = [{"source_model": name, **expert} for name in ("ft1", "ft2")]
    config = {"base_model": "base", "gate_mode": "random", "dtype": "float32", "experts": experts}
    Path("moe.yml").write_text(yaml.safe_dump(config | {"shared_experts": [{"source_model": "base", **expert}]}))
    flags = ["--i-understand-this-is-not-useful-without-training"]
    assert merge.main(["moe", "moe.yml", "moe", "--to-mindspore", "moe.ckpt", *flags]) == 0
    if engine == "ms":
        assert check_parity.main(["--hf", "moe", "--ckpt", "moe.ckpt", "--text", "w1 w2 w3 w40 w50"]) == 0
    job = mixture_job(tmp_path, tmp_path / "moe", 50)
    words = ["--trainer", "own", "--engine", engine, "--load_checkpoint", "moe.ckpt", "--output_dir", "run"]
    done = run_job(job, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [row["lm_loss"] for row in rows_of(tmp_path / "run")]
    assert len(losses) == 50 and np.isfinite(losses).all() and np.mean(losses[-5:]) < losses[0] - 0.3
