# SPDX-License-Identifier: Apache-2.0
"""The commands of research/sheared_llama/README.md as written, with a small model; and its two scripts' variables."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.cli import convert, mfext, mix, preprocess, prune, run_mindformer, shearing
from mindformers_ext.core.config.file import dump_yaml, load_yaml
from mindformers_ext.core.config.overrides import apply_overrides
from mindformers_ext.core.pruning import LOGA_LIMITS
from tests.cli.docs.test_readme import commands

RESEARCH = "research/sheared_llama"
SOURCE = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 4, "n_kv_heads": 4, "head_dim": 8}
TARGET = {"d_model": 16, "n_heads": 2, "n_layers": 2, "intermediate_size": 24}
SMALL = {
    **{f"model.model_config.{name}": size for name, size in SOURCE.items()},
    **{f"model.model_config.l0_module.target_model.{name}": size for name, size in TARGET.items()},
    "model.model_config.l0_module.target_model.vocab_size": 320,
    "model.model_config.vocab_size": 320,
    "model.model_config.max_position_embedding": 64,
    "model.model_config.compute_dtype": "float32",
}
VARIABLES = {  # of the scripts
    "gpus": "1", "device_target": "CPU", "max_seq_len": "32", "device_train_microbatch_size": "2",
    "global_train_batch_size": "4", "max_duration": "6ba", "save_interval": "3ba", "t_warmup": "1ba",
    "eval_interval": "3ba", "lagr_warmup": "2ba",
}  # fmt: skip
SHORT = {  # six steps bring no mask to its shape: --force; sizes are those of the small model
    "--seq_length 4097": "--seq_length 33",
    "--eval_seq 500": "--eval_seq 4",
    "--for_prune 0.42": "--for_prune 0.000003",
    "prune.py cut output/pruning": "prune.py cut output/pruning --force",
    "1_48000.ckpt": "1_6.ckpt",
    "composer.pt 7B": "composer.pt",
    "d_model=2048 n_heads=16 n_layers=24 intermediate_size=5504": (
        "d_model=16 n_heads=2 n_layers=2 intermediate_size=24"
    ),
    "hidden_size=2048 num_attention_heads=16 num_hidden_layers=24 intermediate_size=5504 num_key_value_heads=16": (
        "hidden_size=16 num_attention_heads=2 num_hidden_layers=2 intermediate_size=24 num_key_value_heads=2"
    ),
}


def bash(folder: Path, command: str, **variables: str) -> subprocess.CompletedProcess:
    """A command of the launcher's, which then only says what it would run."""
    return subprocess.run(
        ["bash", "-c", command], cwd=folder,
        env=os.environ | {"TORCHRUN_DRY_RUN": "1", "PYTHON": sys.executable} | variables,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def readme(repo_root: Path, name: str = "README.md") -> list[str]:
    return commands((repo_root / RESEARCH / name).read_text("utf-8"))


def composer_equal(words: Sequence[str]) -> int:
    return shearing.main(["test_composer_hf_eq", *words])


PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {
    "python tools/dataset_preprocess/llama/llama_preprocess.py": preprocess.main,
    "python tools/mix.py": mix.main,
    "python tools/prune.py": prune.main,
    "python convert_weight.py": convert.main,
    "python -m mindformers_ext": mfext.main,
    "python3 -m llmshearing.utils.composer_to_hf": shearing.main,
    "python3 -m llmshearing.utils.post_pruning_processing": shearing.main,
    "python3 -m llmshearing.utils.test_composer_hf_eq": composer_equal,
}


@pytest.fixture
def tree(repo_root: Path, tmp_path: Path) -> Path:
    """The repository with small networks in research/, and the folder data/ as the README names it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.helpers.tiny_llama import sentences, write_tokenizer

    for name in ("scripts", "tools", "mindformers_ext", "llmshearing", "run_mindformer.py"):
        (tmp_path / name).symlink_to(repo_root / name)
    shutil.copytree(repo_root / RESEARCH, tmp_path / RESEARCH)
    path = tmp_path / RESEARCH / "prune_llama2_7b_to_1_3b.yaml"
    small = [(name, str(value)) for name, value in SMALL.items()]
    path.write_text(dump_yaml(apply_overrides(load_yaml(path), small)), encoding="utf-8")
    data = tmp_path / "data"
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, rms_norm_eps=1e-5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(data / "Llama-2-7b-hf")
    write_tokenizer(data / "Llama-2-7b-hf")
    for number, name in enumerate(("cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4-rp")):
        (data / "redpajama" / name).mkdir(parents=True)
        lines = [json.dumps({"text": text}) for text in sentences(60, number)]
        (data / "redpajama" / name / "0.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (data / "held_out.txt").write_text("\n".join(sentences(9, 9)), encoding="utf-8")
    return tmp_path


def add_masks(data: Path) -> None:
    """data/shearing/latest-rank0.pt, as the pruning stage of LLM-Shearing leaves it, from the converted model."""
    import torch

    state, rng = torch.load(data / "Llama-2-7b-composer.pt", weights_only=True), np.random.default_rng(0)
    for name, shape, keep in (
        ("hidden", (32,), 16),
        ("head", (3, 4), 2),
        ("intermediate", (3, 48), 24),
        ("layer", (3,), 2),
    ):
        loga = np.full(shape, 4.0, np.float32)
        for row in np.atleast_2d(loga):
            row[rng.permutation(shape[-1])[keep:]] = LOGA_LIMITS[0]
        state[f"model.l0_module.masks.{name}.z_loga"] = torch.from_numpy(loga)
    (data / "shearing").mkdir()
    torch.save(state, data / "shearing" / "latest-rank0.pt")


def test_the_commands_run_in_their_order(
    repo_root: Path, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tree)
    assert readme(repo_root) == readme(repo_root, "README_CN.md")
    for command in readme(repo_root):
        for long, short in SHORT.items():
            command = command.replace(long, short)
        if "scripts/" in command:
            told = bash(tree, command, **VARIABLES)
            assert told.returncode == 0, told.stderr
            *_, script = told.stdout.partition("run_mindformer.py ")
            code = run_mindformer.main(shlex.split(script))
        else:
            if "prune_and_save_model" in command:
                add_masks(tree / "data")
            program = next(name for name in PROGRAMS if command.startswith(name + " "))
            code = PROGRAMS[program](shlex.split(command.removeprefix(program)))
        assert code == 0, f"{command}\n{capsys.readouterr()}"
    said = capsys.readouterr().out
    assert "relative difference of the perplexities: " in said and "equal: 30 tensors" in said
    for folder in ("Sheared-LLaMA-1.3B", "Sheared-LLaMA-1.3B-Pruned", "hf-latest_rank0"):
        config = json.loads((tree / "data" / folder / "config.json").read_text())
        assert (config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]) == (16, 2, 2)
    steps = (tree / "output" / "continued" / "metrics" / "rank_0.jsonl").read_text().splitlines()
    assert len(steps) == 6 and "expected_sparsity" not in steps[0]
    the_seeds_file_names_stand_for_our_runs(tree)


def the_seeds_file_names_stand_for_our_runs(tree: Path) -> None:
    """Its commands behind either script are typed with latest-rank0.pt, which a run of ours does not have."""
    from safetensors.numpy import load_file

    assert shearing.main(["prune_and_save_model", "output/pruning/latest-rank0.pt", "--force"]) == 0
    path = "path=output/pruning/pruned-latest-rank0.pt config_file=output/continue.yaml data_local=data/prepared"
    told = bash(tree, f"{path} save_dir=output/again bash scripts/continue_pretraining.sh", **VARIABLES)
    *_, script = told.stdout.partition("run_mindformer.py ")
    assert run_mindformer.main(shlex.split(script)) == 0
    words = ["hidden_size=16", "num_attention_heads=2", "num_hidden_layers=2", "intermediate_size=24"]
    files = ["output/again/latest-rank0.pt", "output/again_hf", "model_class=LlamaForCausalLM"]
    assert shearing.main(["save_composer_to_hf", *files, *words, "num_key_value_heads=2"]) == 0
    path = "output/again/checkpoint/rank_0/prune_llama2_7b_to_1_3b_rank_0-1_6.ckpt"
    like = ["--config", "data/Sheared-LLaMA-1.3B-Pruned", "--output_path", "output/plain_hf"]
    assert convert.main(["--reversed", "--input_path", path, *like]) == 0
    found, plain = (load_file(tree / "output" / name / "model.safetensors") for name in ("again_hf", "plain_hf"))
    assert found.keys() == plain.keys() and all(np.array_equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("folder", ["scripts", "llmshearing/scripts"])
def test_the_scripts_say_what_their_variables_mean(repo_root: Path, folder: str, tmp_path: Path) -> None:
    """Also as sbatch runs them: a copy elsewhere, started where the job was submitted."""
    shutil.copyfile(repo_root / folder / "pruning.sh", tmp_path / "slurm_script")
    given = {"SLURM_SUBMIT_DIR": str(repo_root), "path": "my model", "data_local": "d", "gpus": "2", "lag_lr": "0.5"}
    given |= {"set_names": "[a,b]", "target_d_model": "1024", "autoresume": "True", "max_duration": "2ep"}
    told = bash(repo_root, f"bash {tmp_path}/slurm_script --seed 3", **given)
    assert told.returncode == 0, told.stderr
    words = shlex.split(told.stdout)
    assert "--nproc-per-node=2" in words and words[-2:] == ["--seed", "3"]
    for option, value in {
        "--config": f"{repo_root}/{RESEARCH}/prune_llama2_7b_to_1_3b.yaml",
        "--load_checkpoint": "my model",
        "--gradient_accumulation_steps": "4",  # 32 rows of a step, 4 at a time on 2 GPUs
        "--epochs": "2",
        "--train_dataset.data_loader.num_samples": "null",
        "--lr_schedule.warmup_steps": "320",
        "--train_dataset.data_loader.set_names": "[a,b]",
        "--model.model_config.l0_module.lag_lr": "0.5",
        "--model.model_config.l0_module.lagrangian_warmup_steps": "640",
        "--model.model_config.l0_module.target_model.d_model": "1024",
        "--resume_training": "True",
    }.items():
        assert words[words.index(option) + 1] == value


def test_wrong_variables_are_named(repo_root: Path) -> None:
    good = {"path": "p", "data_local": "d"}
    for script, wrong, said in (
        ("pruning", {"path": ""}, "path is empty"),
        ("pruning", {"gpus": "3"}, "is no multiple of 12"),
        ("pruning", {"gpus": "0"}, "gpus=0 is no number above 0"),
        ("pruning", {"gpus": "08"}, "gpus=08 is no number above 0: write 1 to"),
        ("pruning", {"nodes": "9" * 20}, "is no number above 0: write 1 to"),
        ("pruning", {"max_duration": "9" * 20 + "ba"}, "is no number of steps"),
        ("pruning", {"to_model": "3b"}, "prune_llama2_7b_to_3b.yaml is no file"),
        ("pruning", {"lagr_warmup": "1ep"}, "lagr_warmup=1ep is no number of steps"),
        ("pruning", {"dynamic": "maybe"}, "dynamic=maybe is neither True nor False"),
        ("continue_pretraining", {"data_local": ""}, "data_local is empty"),
        ("continue_pretraining", {"save_interval": "-1"}, "save_interval=-1 is no number of steps"),
    ):
        told = bash(repo_root, f"bash scripts/{script}.sh", **(good | wrong))
        assert told.returncode == 2 and told.stderr.startswith("error: ") and said in told.stderr, told
