# SPDX-License-Identifier: Apache-2.0
"""The commands of research/mixtral/README.md: run as written in a copy of the repository whose networks are small."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from mindformers_ext.core.config.file import dump_yaml, load_yaml
from mindformers_ext.core.config.overrides import apply_overrides
from tests.cli.docs.test_readme import commands
from tests.helpers.cluster import MASTER, end, launch_environment, namespaces_missing, start, two_machines, wait_for

SMALL = {
    "model.model_config.hidden_size": "32",
    "model.model_config.intermediate_size": "64",
    "model.model_config.num_layers": "2",
    "model.model_config.num_heads": "4",
    "model.model_config.n_kv_heads": "2",
    "model.model_config.pad_token_id": "3",
    "model.model_config.vocab_size": "400",
    "model.model_config.seq_length": "64",
    "model.model_config.max_decode_length": "40",
    "model.model_config.compute_dtype": "float32",
    "model.model_config.softmax_compute_type": "float32",
    "model.model_config.rotary_dtype": "float32",
    "model.model_config.param_init_type": "float32",
}
MODELS = ("mixtral", "llama_moe")  # the commands of the second are those of the first with other files
DATA_PARALLEL = {"parallel.parallel_mode": "0"}
RUN_ELSEWHERE = {
    "python tools/transform_ckpt.py": "tests/cli/checkpoint/test_transform_ckpt.py",
    "--strategy_dir output/strategy": "tests/cli/checkpoint/test_convert_layouts.py and test_transform_ckpt.py",
    "python tools/dryrun.py": "tests/cli/dryrun/test_dryrun.py and test_dryrun_predict.py",
    "python tools/merge_lora.py": "tests/mf/test_lora.py",
}


@pytest.fixture(scope="module")
def tree(repo_root: Path, tmp_path_factory) -> Path:
    """The repository with small networks in research/, and a folder data/ as the README names it."""
    from mindformers_ext.data.tokenizers import train_sentencepiece

    folder = tmp_path_factory.mktemp("tree")
    for name in os.listdir(repo_root):
        if name not in ("output", ".git", "research", "data"):
            (folder / name).symlink_to(repo_root / name)
    shutil.copytree(repo_root / "research", folder / "research")
    for path in (folder / "research").rglob("*.yaml"):
        path.write_text(dump_yaml(apply_overrides(load_yaml(path), list(SMALL.items()))), encoding="utf-8")
    data = folder / "data"
    data.mkdir()
    sources = [path.read_text(encoding="utf-8") for path in sorted((repo_root / "mindformers_ext").rglob("*.py"))]
    train_sentencepiece(sources[:40], data / "tokenizer.model", 400)
    (data / "wiki.train.tokens").write_text(" = Title = \n\n" + "\n\n".join(sources[:20]), encoding="utf-8")
    records = [{"instruction": f"Count to {number}.", "input": "", "output": "one two"} for number in range(3)]
    (data / "alpaca_data.json").write_text(json.dumps(records), encoding="utf-8")
    made = run(
        "python tools/make_tiny_model.py --config research/mixtral/mixtral_8x7b/pretrain_mixtral-8x7b.yaml "
        "--tokenizer data/tokenizer.model --output_dir data/Mixtral-8x7B-v0.1",
        folder,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return folder


def run(command: str, folder: Path, **more: str) -> subprocess.CompletedProcess:
    """A command of the README, with this Python first on the PATH."""
    variables = launch_environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=variables, capture_output=True, text=True, timeout=400, check=False
    )


def readme(repo_root: Path, name: str = "README.md", model: str = "mixtral") -> list[str]:
    return commands((repo_root / "research" / model / name).read_text("utf-8"))


@pytest.mark.parametrize("model", MODELS)
def test_both_languages_give_the_same_commands(repo_root: Path, model: str) -> None:
    assert readme(repo_root, model=model) == readme(repo_root, "README_CN.md", model)


@pytest.mark.parametrize("model", MODELS)
def test_every_named_file_exists(repo_root: Path, model: str) -> None:
    for command in readme(repo_root, model=model):
        for word in re.findall(r"(?:scripts|tools|configs|research)/[\w/.-]+|\b\w+\.py\b", command):
            assert (repo_root / word).exists(), f"{word} in: {command}"


@pytest.mark.slow
def test_the_commands_run_in_their_order(repo_root: Path, tree: Path) -> None:
    """Jobs of many processes only as far as their command line; their workers run in the other tests."""
    for command in readme(repo_root):
        if any(word in command for word in RUN_ELSEWHERE):
            continue
        launches = command.startswith("bash scripts/msrun_launcher.sh")
        result = run(command, tree, **({"MSRUN_DRY_RUN": "1"} if launches else {}))
        assert result.returncode == 0, f"{command}\n{result.stdout[-1500:]}\n{result.stderr[-2500:]}"
        if launches:
            assert "msrun --bind_core" in result.stdout
    assert list((tree / "data" / "hf").glob("*.safetensors")) and (tree / "data" / "ms" / "gmm_mixtral.ckpt").exists()
    assert "I love Beijing, because" in (tree / "output" / "sample.txt").read_text()


def on_cpus(tree: Path, name: str, split: Mapping[str, str] = DATA_PARALLEL) -> str:
    """The YAML of ``name``, cut for two processes without NPUs; its path as the commands give it."""
    path = tree / "research" / "mixtral" / "mixtral_8x7b" / f"{name}_mixtral-8x7b.yaml"
    changes = {**split, "context.device_target": "CPU", "runner_config.epochs": "1"}
    path.write_text(dump_yaml(apply_overrides(load_yaml(path), list(changes.items()))), encoding="utf-8")
    return str(path.relative_to(tree))


def start_two_nodes(tree: Path, names: tuple[str, str], words: str, log: str) -> list[subprocess.Popen]:
    """The two commands of a job on two machines: as the seed has them, with 2 workers instead of 16 and 1 instead of 8.

    The machines here share their disk, so each has a log folder of its own.
    """
    return [
        start(
            words,
            2,
            1,
            MASTER,
            8118,
            rank,
            f"output/{log}{rank}",
            "False",
            300,
            cwd=tree,
            log=tree / f"{log}{rank}.out",
            namespace=name,
        )
        for rank, name in enumerate(names)
    ]


def wait_for_jobs(tree: Path, launchers: list[subprocess.Popen], logs: list[str]) -> None:
    """Launchers return at once and their jobs end well."""
    try:
        assert [launcher.wait(60) for launcher in launchers] == [0] * len(launchers)  # in the background
        for log in logs:
            ended = tree / "output" / log / "launcher.log"
            wait_for(lambda log=ended: "the job ended" in log.read_text(), 200, f"the end of {log}")
            assert "the job ended with exit code 0" in ended.read_text(), ended.read_text()[-3000:]
    finally:
        for launcher in launchers:
            end(launcher)


def steps_of(tree: Path, output: str, rank: int) -> list[dict]:
    text = (tree / output / "metrics" / f"rank_{rank}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.long(
    "tests/cli/docs/test_research_readme.py has the launcher read these commands, tests/mf/test_distributed.py trains "
    "on two machines"
)
@pytest.mark.slow
def test_the_seed_s_commands_run_on_two_machines(repo_root: Path, tree: Path) -> None:
    """Pretraining, then finetuning from its ranks' checkpoints, and prediction by the six-argument form."""
    reason = namespaces_missing()
    if reason:
        pytest.skip(reason)
    from tests.helpers.tiny_run import token_rows, write_rows

    rows = token_rows(width=65, rows=8)
    write_rows(tree / "data" / "rows.mindrecord", rows)
    write_rows(tree / "data" / "answers.mindrecord", rows, labels=rows)
    with two_machines() as names:
        words = (
            f"run_mindformer.py \\\n --config {on_cpus(tree, 'pretrain')} \\\n --run_mode train \\\n "
            "--use_parallel True \\\n --train_data data/rows.mindrecord"
        )
        wait_for_jobs(tree, start_two_nodes(tree, names, words, "pretrain"), ["pretrain0", "pretrain1"])
        (tree / "output" / "checkpoint").rename(tree / "data" / "model_dir")
        words = (
            f"run_mindformer.py \\\n--config {on_cpus(tree, 'finetune')} \\\n--load_checkpoint data/model_dir "
            "\\\n--run_mode finetune \\\n--use_parallel True \\\n--train_data data/answers.mindrecord "
            "\\\n--output_dir tuned"
        )
        tuning = start_two_nodes(tree, names, words, "finetune")
        split = {"parallel_config.model_parallel": "2"}
        words = (
            f"run_mindformer.py \\\n--config {on_cpus(tree, 'predict', split)} \\\n--run_mode predict \\\n"
            "--use_parallel True \\\n--load_checkpoint data/model_dir \\\n--auto_trans_ckpt True \\\n"
            '--predict_data "I love Beijing, because" \\\n--output_dir told '
            "--processor.tokenizer.vocab_file data/tokenizer.model"
        )
        asking = start(words, 2, 8119, "output/predict", "False", 300, cwd=tree, log=tree / "predict.out")
        wait_for_jobs(tree, [*tuning, asking], ["finetune0", "finetune1", "predict"])
    pretrained = steps_of(tree, "output", 1)
    assert len(pretrained) == 4 and pretrained[0]["expert_load"][0] and not pretrained[0]["overflow"]
    tuned = [steps_of(tree, "tuned", rank) for rank in range(2)]
    assert len(tuned[0]) == 4 and [row["loss"] for row in tuned[0]] == [row["loss"] for row in tuned[1]]
    assert tuned[0][0]["lm_loss"] < pretrained[0]["lm_loss"]  # it went on from the pretrained weights
    assert (tree / "told" / "sample.txt").read_text(errors="replace").startswith("I love Beijing, because")
