# SPDX-License-Identifier: Apache-2.0
"""``run_mindformer.py --run_mode predict`` as a user runs it: weights and prompts of every kind, mistakes."""

from __future__ import annotations

import ast
import io
import json
import os
import pty
import select
import signal
import subprocess
import termios
import time

import numpy as np
import pytest

from mindformers_ext.cli import convert, transform_ckpt
from mindformers_ext.cli.run_mindformer import main
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.data.chat_template import ChatTemplate
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.jobs.checkpoint.tiny_model import TinyModelRequest, make_tiny_model
from mindformers_ext.jobs.predict import network as generate_model
from tests.helpers.sliced import write_strategy
from tests.helpers.tiny_run import ROOT, SEQ, command, config_of, environment, make_job

PROMPTS = ("def check(value):", "import the module and return", "x")
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A YAML whose network's weights are large enough to have preferences, in a Hugging Face folder beside it."""
    path = make_job(tmp_path_factory.mktemp("predict"))
    text = path.read_text().replace("use_past: False", "use_past: True, init_method_std: 0.4")
    path.write_text(text)
    spec = network_spec_from_yaml(config_of(path)).model
    make_tiny_model(
        TinyModelRequest(output_dir=path.parent / "hf", spec=spec, seed=5, tokenizer=path.parent / "tokenizer.model")
    )
    return path


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def predict(job, *words):
    try:
        return main(["--config", str(job), "--run_mode", "predict", *map(str, words)])
    except SystemExit as end:  # argparse
        return end.code


def answers(output):
    """The lines of predictions.jsonl, and its summary."""
    *lines, last = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    return lines, last["summary"]


def texts(output):
    return [line["answer"] for line in answers(output)[0]]


@pytest.fixture(scope="module")
def expected(job):
    """What the Hugging Face folder's weights answer."""
    output = job.parent / "expected"
    assert predict(job, "--load_checkpoint", job.parent / "hf", "--predict_data", *PROMPTS, "--output_dir", output) == 0
    return texts(output)


@pytest.mark.slow
def test_answers_are_shown_and_kept(job, expected, capsys, tmp_path):
    code = predict(
        job,
        "--load_checkpoint",
        job.parent / "hf",
        "--predict_data",
        *PROMPTS,
        "--output_dir",
        tmp_path,
        "--predict_batch_size",
        2,
    )
    shown = capsys.readouterr()
    assert code == 0 and shown.out == "".join(f"{p}{a}\n" for p, a in zip(PROMPTS, expected, strict=True))
    lines, summary = answers(tmp_path)
    assert [line["prompt"] for line in lines] == list(PROMPTS) and texts(tmp_path) == expected
    assert len(set(expected)) == 3 and all(expected)
    assert all(line["prompt_tokens"] + line["new_tokens"] == SEQ or line["finish"] == "eos" for line in lines)
    assert summary["new_tokens"] == sum(line["new_tokens"] for line in lines) and summary["tokens_per_second"] > 0
    assert (tmp_path / "sample.txt").read_bytes().decode() == shown.out
    listed = ast.literal_eval((tmp_path / "text_generation_result.txt").read_text())
    assert listed == [{"text_generation_text": [p + a]} for p, a in zip(PROMPTS, expected, strict=True)]
    assert "3 of 3 prompts answered" in shown.err and "tokens/s" in shown.err


def converted(job, folder, *words):
    path = folder / "model.ckpt"
    assert (
        convert.main(["--model", "mixtral", "--input_path", str(job.parent / "hf"), "--output_path", str(path), *words])
        == 0
    )
    return path


def cut(whole, folder):
    """Two ranks with the first axis of every tensor halved, and their strategy."""
    reader = CkptFile(whole)
    layouts = {
        name: {"matrix": [2], "tensor_map": [0] + [-1] * (len(info.shape) - 1)} for name, info in reader.infos.items()
    }
    reader.close()
    write_strategy(folder / "strategy" / "ckpt_strategy_rank_0.ckpt", layouts)
    assert (
        transform_ckpt.main(
            [
                "--src_ckpt_dir",
                str(whole),
                "--dst_ckpt_strategy",
                str(folder / "strategy"),
                "--dst_ckpt_dir",
                str(folder / "ranks"),
            ]
        )
        == 0
    )
    return folder / "ranks"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "gmm", "safetensors", "rank_0", "ranks"])
def test_weights_of_every_kind_give_the_same_answers(job, expected, tmp_path, kind):
    if kind == "safetensors":
        weights = tmp_path / "model.safetensors"
        assert (
            convert.main(["--model", "mixtral", "--input_path", str(job.parent / "hf"), "--output_path", str(weights)])
            == 0
        )
    else:
        weights = converted(job, tmp_path, *(["--use_gmm", "True"] if kind == "gmm" else []))
    if kind == "rank_0":
        (tmp_path / "checkpoint" / "rank_0").mkdir(parents=True)
        os.rename(weights, tmp_path / "checkpoint" / "rank_0" / "mixtral_rank_0-1_1.ckpt")
        weights = tmp_path / "checkpoint"
    if kind == "ranks":
        weights = cut(weights, tmp_path)
    assert predict(job, "--load_checkpoint", weights, "--predict_data", *PROMPTS, "--output_dir", tmp_path / "out") == 0
    assert texts(tmp_path / "out") == expected


@pytest.mark.slow
def test_prompts_of_every_kind(job, expected, tmp_path, monkeypatch):
    words = ["--load_checkpoint", job.parent / "hf", "--output_dir", tmp_path]
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    assert predict(job, "--predict_data", "prompts.txt", *words) == 0
    assert texts(tmp_path) == [expected[0], "", expected[1], "", expected[2]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS[:2])))
    assert predict(job, "--predict_data", "-", *words, "--model.model_config.use_past", False) == 0
    assert texts(tmp_path) == expected[:2]


@pytest.mark.slow
def test_sampling_is_reproducible_and_independent_of_the_batch(job, expected, tmp_path):
    words = [
        "--load_checkpoint",
        job.parent / "hf",
        "--predict_data",
        *PROMPTS,
        "--do_sample",
        "True",
        "--top_k",
        0,
        "--temperature",
        1.5,
    ]
    for name, more in {"a": [], "b": ["--predict_batch_size", 1], "c": ["--seed", 99]}.items():
        assert predict(job, *words, "--output_dir", tmp_path / name, *more) == 0
    assert texts(tmp_path / "a") == texts(tmp_path / "b") != expected
    assert texts(tmp_path / "c") != texts(tmp_path / "a")


@pytest.mark.slow
def test_chat_uses_the_tokenizers_template(job, tmp_path, capsys):
    folder = tmp_path / "instruct"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((job.parent / "tokenizer.model").read_bytes())
    words = [
        "--load_checkpoint",
        job.parent / "hf",
        "--predict_data",
        "hi",
        "--processor.tokenizer.vocab_file",
        folder / "tokenizer.model",
        "--output_dir",
        tmp_path,
    ]
    assert predict(job, *words, "--chat", "True") == 2
    assert "has no chat template" in capsys.readouterr().err
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": "<s>"}))
    assert ChatTemplate(folder).render([{"role": "user", "content": "hi"}]) == "<s>[user] hi\n[assistant]"
    assert predict(job, *words, "--chat", "True") == 0
    as_chat = answers(tmp_path)[0][0]
    whole = capsys.readouterr().out
    assert predict(job, *words[:2], "--predict_data", "[user] hi\\n[assistant]", "--output_dir", tmp_path) == 0
    plain = answers(tmp_path)[0][0]
    assert plain["answer"] == as_chat["answer"] and plain["prompt_tokens"] == as_chat["prompt_tokens"]
    assert whole == as_chat["answer"] + "\n" and as_chat["prompt"] == "hi"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predict_data", "a " * 200], "tokens, prompt and answer may have 32"),
        (["--predict_data", "x", " "], "prompt 2 is empty"),
        (["--predict_data", "none.txt"], "none.txt does not exist"),
        (["--predict_data", "x", "--predict_batch_size", "0"], "predict_batch_size=0"),
        (["--predict_data", "x", "--temperature", "0"], "temperature=0.0"),
        (
            ["--predict_data", "x", "--model.model_config.theta", "500"],
            "model.model_config.theta is 500.0, the weights' rope_theta is 10000.0: set it to 10000.0",
        ),
        (
            ["--predict_data", "x", "--model.model_config.vocab_size", "420"],
            "vocab_size is 420, the weights' vocab_size is 400",
        ),
        (["--predict_data", "x", "--model.model_config.vocab_size", "300"], "has 400 pieces"),
        (["--predict_data", "x", "--load_checkpoint", "nothing"], "load_checkpoint nothing does not exist"),
        (
            ["--predict_data", "x", "--processor.tokenizer.vocab_file", "n.model", "--load_checkpoint", "."],
            "n.model does not exist",
        ),
    ],
)
def test_a_mistake_is_one_clear_message(job, capsys, words, message):
    given = words if "--load_checkpoint" in words else ["--load_checkpoint", str(job.parent / "hf"), *words]
    assert predict(job, *given) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err and not shown.out
    assert not os.path.exists("output/predictions.jsonl")


def test_a_batch_larger_than_memory_is_refused_before_it_is_made(job, monkeypatch, capsys, tmp_path):
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 9 kB\nMemAvailable:      10 kB\n")
    monkeypatch.setattr(generate_model, "MEMORY", info)
    assert predict(job, "--load_checkpoint", job.parent / "hf", "--predict_data", *PROMPTS) == 2
    text = capsys.readouterr().err
    assert "a cache for 3 texts of 32 tokens takes" in text and "lower --predict_batch_size" in text


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(job, tmp_path):
    process = subprocess.Popen(
        command(
            job,
            "--run_mode",
            "predict",
            "--load_checkpoint",
            job.parent / "hf",
            "--predict_data",
            "-",
            "--predict_batch_size",
            1,
            "--output_dir",
            tmp_path,
        ),
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.write("import\n" * 50_000)
    process.stdin.close()
    for _ in range(3):
        assert process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest, errors = process.stdout.read(), process.stderr.read()
    assert process.wait(60) == 130 and "Traceback" not in errors and rest.endswith("\n")
    assert "stopped by Ctrl-C" in errors and len(answers(tmp_path)[0]) >= 3
    assert np.unique(texts(tmp_path)).size == 1


@pytest.mark.slow
def test_a_conversation_on_a_terminal(job, tmp_path):
    """Messages, the last too long for what was said before, and Ctrl-D; the terminal's modes are as before."""
    folder = tmp_path / "instruct"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((job.parent / "tokenizer.model").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": "<s>"}))
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    words = [
        "--run_mode",
        "predict",
        "--load_checkpoint",
        job.parent / "hf",
        "--predict_data",
        "-",
        "--chat",
        "True",
        "--max_new_tokens",
        3,
        "--model.model_config.seq_length",
        72,
        "--output_dir",
        tmp_path,
        "--processor.tokenizer.vocab_file",
        folder / "tokenizer.model",
    ]
    process = subprocess.Popen(
        command(job, *words), cwd=ROOT, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs
    )
    shown = b""
    for turn, keys in enumerate((b"hi\n", b"you\n", b"and a long message\n", b"\x04"), 1):
        while shown.count(b"\n> ") + shown.startswith(b"> ") < turn and select.select([ours], [], [], 100)[0]:
            shown += os.read(ours, 1000)
        os.write(ours, keys)
    assert process.wait(60) == 0
    while select.select([ours], [], [], 0)[0]:
        shown += os.read(ours, 1000)
    assert termios.tcgetattr(theirs) == before
    os.close(ours), os.close(theirs)
    text = shown.decode(errors="replace")
    assert text.count(" tokens in ") == 3 and "Traceback" not in text
    assert "the oldest messages are left out" in text
