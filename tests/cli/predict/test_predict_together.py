# SPDX-License-Identifier: Apache-2.0
"""``--run_mode predict`` by several processes that hold a network together: what one process alone answers."""

import json
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file

from mindformers_ext.cli import predict as command
from mindformers_ext.cli.run_mindformer import main
from mindformers_ext.core.config.run import run_spec_from_yaml
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.formats.strategy import read_strategy
from mindformers_ext.jobs.checkpoint.tiny_model import TinyModelRequest, make_tiny_model
from mindformers_ext.jobs.predict.predict import open_predictor
from mindformers_ext.weights.convert import to_mindspore
from tests.helpers.cluster import free_port, launch
from tests.helpers.sliced import cut, write_ranks, write_strategy
from tests.helpers.tiny_run import VOCAB, config_of, make_job

PROMPTS = ("def check(value):", "import the module and return", "x")
SPLIT = (
    "--use_parallel True --parallel_config.data_parallel 1 --parallel_config.expert_parallel 1 "
    "--parallel_config.pipeline_stage 1 --parallel_config.model_parallel 2"
)
LLAMA = {
    "expert_num: 4": "expert_num: 1",
    "LlamaConfig": "PortableLlamaConfig",
    "LlamaForCausalLM": "PortableLlamaForCausalLM",
}


def make(folder, **changes):
    """A YAML whose network's weights have preferences, and its Hugging Face folder."""
    path = make_job(folder)
    text = path.read_text().replace("use_past: False", "use_past: True, init_method_std: 0.4")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    spec = network_spec_from_yaml(config_of(path)).model
    make_tiny_model(TinyModelRequest(output_dir=folder / "hf", spec=spec, seed=5, tokenizer=folder / "tokenizer.model"))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return SimpleNamespace(folder=folder, yaml=path, spec=spec)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return make(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Dense, with a vocabulary that two processes cannot share, as the slices of two ranks."""
    job = make(tmp_path_factory.mktemp("llama"), **LLAMA, **{f"vocab_size: {VOCAB}": f"vocab_size: {VOCAB + 1}"})
    whole = to_mindspore(load_file(job.folder / "hf" / "model.safetensors"), job.spec)
    layouts = {
        name: {"matrix": [2], "tensor_map": [0 if "attention.w" in name else -1] + [-1] * (array.ndim - 1)}
        for name, array in whole.items()
    }
    strategy = write_strategy(job.folder / "strategy" / "ckpt_strategy_rank_0.ckpt", layouts)
    write_ranks(job.folder / "ranks", cut(read_strategy(strategy), whole))
    return job


def lines(folder):
    """Answers, and the summary's token counts."""
    *found, last = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return found, {name: last["summary"][name] for name in ("prompt_tokens", "new_tokens")}


def both(job, *words):
    """The same command in one process and in two; returns the output folders and the launcher's output."""
    line = ["--config", job.yaml, "--run_mode", "predict", "--predict_data", job.folder / "prompts.txt", *words]
    assert main([*map(str, line), "--output_dir", str(job.folder / "one")]) == 0
    text = launch(
        f"run_mindformer.py {' '.join(map(str, line))} {SPLIT} --output_dir two",
        2,
        free_port(),
        "log",
        "True",
        120,
        cwd=job.folder,
    )
    assert text.startswith("0\n"), text[-3000:]
    return job.folder / "one", job.folder / "two"


@pytest.mark.slow
@pytest.mark.turn("same figures")
def test_two_processes_answer_as_one(mixtral):
    one, two = both(mixtral, "--load_checkpoint", mixtral.folder / "hf", "--predict_batch_size", 2)
    assert lines(two) == lines(one) and all(line["answer"] for line in lines(one)[0])
    assert (two / "sample.txt").read_bytes() == (one / "sample.txt").read_bytes()
    logs = [(mixtral.folder / "log" / f"worker_{rank}.log").read_text() for rank in range(2)]
    first = lines(one)[0][0]
    assert first["prompt"] + first["answer"] in logs[0] and first["prompt"] + first["answer"] not in logs[1]
    assert "the first one has the answers" in logs[1]


@pytest.mark.long("two processes answer as one above; tests/cli/predict/test_predict.py samples in one")
@pytest.mark.slow
def test_sampled_from_slices_without_a_cache(llama):
    words = [
        "--load_checkpoint",
        llama.folder / "ranks",
        "--src_strategy_path_or_dir",
        llama.folder / "strategy",
        "--do_sample",
        True,
        "--top_k",
        0,
        "--top_p",
        0.9,
        "--temperature",
        0.7,
        "--seed",
        3,
        "--model.model_config.use_past",
        False,
        "--auto_trans_ckpt",
        True,
    ]
    one, two = both(llama, *words)
    assert lines(two) == lines(one)
    assert "auto_trans_ckpt is not needed" in (llama.folder / "log" / "worker_0.log").read_text()


# Two processes with equal and with different prompts, as ``jobs.predict.predict`` asks before it answers.
AGREE_SCRIPT = """
import sys
from mindspore import nn
from mindformers_ext.core.spec import DeviceSpec
from mindformers_ext.ms.engine import MindSporeEngine, MindSporeNetwork
engine = MindSporeEngine()
engine.use(DeviceSpec("CPU", together=True))
network = MindSporeNetwork(nn.Cell(), {}, engine.rank, engine.count)
found = [network.agree(bytes(range(32))), network.agree(bytes([255] * 31 + [engine.rank]))]
print("rank", engine.rank, "found", *found, flush=True)
"""


@pytest.mark.slow
@pytest.mark.turn("same figures")
def test_processes_with_different_prompts_notice_it(tmp_path):
    (tmp_path / "agree.py").write_text(AGREE_SCRIPT)
    text = launch("agree.py", 2, free_port(), "log", "True", 120, cwd=tmp_path)
    assert text.startswith("0\n"), text[-3000:]
    for rank in range(2):
        assert f"rank {rank} found True False" in (tmp_path / "log" / f"worker_{rank}.log").read_text()


def test_answers_are_kept_while_others_are_awaited(mixtral, monkeypatch):
    """The launcher kills its processes at Ctrl-C: what the first one has by then has to be on the disk."""
    monkeypatch.setattr(command, "SAVED_EVERY", -1.0)
    options = "run_mode=predict", f"load_checkpoint={mixtral.folder / 'hf'}", "predict_batch_size=1"
    config = config_of(mixtral.yaml, *options)
    predictor = open_predictor(run_spec_from_yaml(config), network_spec_from_yaml(config))
    saves, done = [], []
    assert command._answer(predictor, predictor.prompts(PROMPTS), done, lambda: saves.append(len(done))) == 0
    assert saves == [1, 2, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--parallel_config.data_parallel 2 --parallel_config.model_parallel 1", "all 2 devices by model_parallel"),
        ("--parallel.parallel_mode 0", "with parallel.parallel_mode: 1"),
        ("--predict_data -", "--predict_data - reads the standard input of one process"),
        ("--load_checkpoint ''", "needs load_checkpoint"),
        ("--model.model_config.n_kv_heads 1", "n_kv_heads=1 is not a multiple of model_parallel=2"),
        ("--engine pt", "not built for the PyTorch engine"),
    ],
)
def test_mistakes(mixtral, words, message, monkeypatch, capsys):
    monkeypatch.chdir(mixtral.folder)
    for name, value in {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "2", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    given = f"--load_checkpoint hf --predict_data x {SPLIT}".split()
    changed = [word.strip("'") for word in words.split()]
    before = sorted(mixtral.folder.rglob("*"))
    for place in range(0, len(changed), 2):
        if changed[place] in given:
            given[given.index(changed[place]) + 1] = changed[place + 1]
        else:
            given += changed[place : place + 2]
    assert main(["--config", str(mixtral.yaml), "--run_mode", "predict", *given]) == 2
    assert message in capsys.readouterr().err and sorted(mixtral.folder.rglob("*")) == before
