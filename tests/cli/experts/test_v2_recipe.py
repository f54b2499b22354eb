# SPDX-License-Identifier: Apache-2.0
"""The published scripts' names, by bash and as sbatch runs them; and the whole recipe from one YAML."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from mindformers_ext.cli import convert as convert_weight
from mindformers_ext.cli import experts
from mindformers_ext.cli.experts import main
from mindformers_ext.core.config.hf import model_spec_from_hf
from tests.cli.docs.test_readme import commands
from tests.cli.experts.test_gates_grads import CHAT, write_chats
from tests.helpers.llama_moe_v2_models import read_folder
from tests.helpers.tiny_llama import make_llama, sentences

SCRIPTS = "scripts/expert_construction"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    make_llama(folder / "llama_tiny")
    settings = folder / "llama_tiny" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": CHAT}))
    write_chats(folder / "chats.jsonl")
    return folder


def bash(repo_root: Path, script: Path, **variables: object) -> subprocess.CompletedProcess:
    """The script with ``echo`` for a Python: what it would run."""
    environment = os.environ | {"PYTHON": "echo"} | {name: str(value) for name, value in variables.items()}
    return subprocess.run(
        ["bash", str(script)], cwd=repo_root, env=environment, capture_output=True, text=True, check=False
    )


def test_the_scripts_make_both_models_one_after_the_other(repo_root: Path, made: Path, tmp_path: Path) -> None:
    out, same = tmp_path / "files", {"model_path": made / "llama_tiny"}
    texts = {**same, "dataset_dir_or_path": made / "chats.jsonl", "model_max_length": 40, "save_path": out}
    gates, scores = {"gate_weights_file": out / "gate_weights.pt"}, {"score_file": out / "importance_scores.pt"}
    neurons = {"neuron_indices_file": out / "neuron_indices.pt"}
    steps = {
        "get_gates/random_selection.sh": {**texts, "save_path": tmp_path / "drawn"},
        "get_gates/hidden_clustering.sh": {**texts, "n_jobs": 2, "num_experts": 3},
        "split/split_gradient_get_grads_v2.sh": {**texts, **gates},
        "split/split_gradient_residual_v2.sh": {**same, **scores, "num_experts_moe": 3, "save_path": out},
        "convert/convert_mixtral_residual_v2.sh": {**same, **gates, **neurons, "save_path": tmp_path / "residual"},
        "split/split_gradient_v2.sh": {**same, **scores, "num_experts": 3, "save_path": tmp_path / "vanilla"},
        "convert/convert_mixtral_attn_moe.sh": {
            "model_path": tmp_path / "residual",
            "save_path": tmp_path / "heads",
            "folder_name": "Top1-Scale2.0",
            "top_k_attn": 1,
            "scale_factor_attn": 2.0,
        },
        "convert/convert_mixtral_v2.sh": {**same, "save_path": tmp_path / "moe", "scale_factor": ""},
    }
    assert {str(path.relative_to(repo_root / SCRIPTS)) for path in (repo_root / SCRIPTS).rglob("*.sh")} == {*steps}
    for name, variables in steps.items():
        path, more = repo_root / SCRIPTS / name, {}
        if name.startswith("split"):  # as sbatch does: a copy elsewhere, started where the job was submitted
            path, more = tmp_path / "slurm_script", {"SLURM_SUBMIT_DIR": repo_root}
            shutil.copyfile(repo_root / SCRIPTS / name, path)
        done = bash(repo_root, path, **variables, **more)
        assert done.returncode == 0, done.stderr
        program, *words = done.stdout.split()
        assert program == f"{repo_root}/tools/build_experts.py"
        assert main([*words, "--quiet"] if words[0] != "split" else words) == 0, name
    config, tensors = read_folder(tmp_path / "residual")
    spec = model_spec_from_hf(config)
    assert (spec.family, spec.dense_layers, config["num_local_experts"]) == ("llama_moe_v2_residual", (0, 2), 3)
    assert tensors["model.layers.1.mlp_residual.w1.weight"].shape == (24, 48)
    assert read_folder(tmp_path / "moe")[0]["scale_factor"] == 4.0
    heads = model_spec_from_hf(read_folder(tmp_path / "heads" / "Top1-Scale2.0")[0])
    assert (heads.attn_experts, heads.top_k_attn, heads.scale_factor_attn) == (2, 1, 2.0)


def test_an_empty_variable_is_named(repo_root: Path) -> None:
    for path in sorted((repo_root / SCRIPTS).rglob("*.sh")):
        done = bash(repo_root, path, model_path="")
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "is empty" in done.stderr
        assert os.access(path, os.X_OK)


def test_the_readmes_commands_are_understood(repo_root: Path) -> None:
    """Both languages have the same; each script's words are those of a stage."""
    english, chinese = (
        commands((repo_root / "research/llama_moe_v2" / name).read_text("utf-8"))
        for name in ("README.md", "README_CN.md")
    )
    assert english == chinese
    # what follows is run by tests/cli/run/test_v2_finetuning.py
    made = [command for command in english if "preprocess" not in command and "run_mindformer" not in command]
    assert len(made) == 10
    for command in made:
        if command.startswith("python convert_weight.py"):
            convert_weight.parser().parse_args(command.split()[2:])  # run by test_v2_convert.py, as a call
            continue
        if command.startswith("python tools/"):
            experts.parser().parse_args(command.split()[2:])  # run by test_align.py
            continue
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=repo_root,
            env=os.environ | {"PYTHON": "echo"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        words = experts.parser().parse_args(done.stdout.split()[1:])
        assert str(words.model_path).startswith("data/")


def test_one_yaml_runs_the_whole_recipe_once(
    repo_root: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((repo_root / "configs/experts/llama_moe_v2.yaml").read_text("utf-8"))
    (tmp_path / "text.txt").write_text("\n".join(sentences(30, 5)), encoding="utf-8")
    config |= {"model_path": str(made / "llama_tiny"), "save_path": str(tmp_path / "work"), "num_experts": 3}
    config |= {"text": str(tmp_path / "text.txt"), "block_size": 32, "quiet": True}
    config["convert"]["save_path"] = str(tmp_path / "moe")
    config["align"]["save_path"] = str(tmp_path / "aligned")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["run", str(path)]) == 0
    said = capsys.readouterr().out
    assert [line.split()[2] for line in said.splitlines() if line.startswith("+")] == [
        *("gates", "grads", "distribution", "split", "convert", "align")
    ]
    words, tensors = read_folder(tmp_path / "moe")
    assert (words["intermediate_size"], words["intermediate_size_residual"], words["scale_factor"]) == (24, 24, 1.0)
    before = (tmp_path / "moe" / "config.json").stat().st_mtime_ns
    assert main(["run", str(path)]) == 0
    assert capsys.readouterr().out.count("is there already") == 6
    assert (tmp_path / "moe" / "config.json").stat().st_mtime_ns == before and len(tensors) > 40
    assert read_folder(tmp_path / "aligned")[0] == {**words, "add_rescale_bias": True}
