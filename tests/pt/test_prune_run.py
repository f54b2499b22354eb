# SPDX-License-Identifier: Apache-2.0
"""A pruning run over domains from its YAML: resume, cut, the next stage, and stock transformers at the end."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mindformers_ext.cli.prune import main
from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.pruning import ModelShape, shape_of_model
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.jobs.prune.one_shot.importance_file import Importance, write_importance_file
from mindformers_ext.jobs.run.checks import check_run
from mindformers_ext.jobs.train.train import train
from mindformers_ext.surgery.prune.importance import FORWARD, shape_of_statistic
from tests.helpers.mixtures import NAMES, mixture_job
from tests.helpers.prune_cases import MHA
from tests.helpers.tiny_run import VOCAB, config_of, rows_of, token_rows, write_rows

TIMES = ("seconds", "tokens_per_second")
STEPS, KEPT = 8, "checkpoint/rank_0/tiny_rank_0-1_{}.ckpt"
WORDS = ("engine=pt", "callbacks.1.save_checkpoint_steps=1", "model.model_config.tie_word_embeddings=False")
L0 = {
    "pruning_modules": ["head", "intermediate", "layer", "hidden"],
    "lagrangian_warmup_steps": "4ba",
    "eval_target_model": False,
    "target_model": {"d_model": 16, "n_heads": 2, "n_layers": 1, "intermediate_size": 24, "vocab_size": VOCAB},
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A YAML of eight steps over three domains; one thread, so that equal steps are equal to the last bit."""
    threads = torch.get_num_threads()
    path = mixture_job(tmp_path_factory.mktemp("prune"), num_samples=32)
    torch.set_num_threads(1)
    yield path
    torch.set_num_threads(threads)


def config(job: Path, output: str, *options: str, **l0: Any) -> dict[str, Any]:
    found = config_of(job, *WORDS, f"output_dir={job.parent / output}", *options)
    del found["moe_config"]
    found["model"]["model_config"]["l0_module"] = copy.deepcopy(L0) | l0
    return found


def run(given: dict[str, Any], output: Path) -> list[dict]:
    """Metrics of a run, without times."""
    checked = check_run(given, "test")
    train(checked.run, checked.config, checked.build.network, checked.notes)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(output)]


@pytest.fixture(scope="module")
def whole(job: Path) -> list[dict]:
    return run(config(job, "whole"), job.parent / "whole")


def test_the_metrics_tell_sizes_penalty_and_proportions(whole: list[dict]) -> None:
    assert len(whole) == STEPS
    row = whole[2]  # the end of a window
    assert row["loss"] == pytest.approx(row["lm_loss"] + row["lagrangian_loss"], abs=1e-5)
    assert row["target_hidden_sparsity"] == pytest.approx(0.25) and whole[-1]["target_layer_sparsity"] == 0.5
    assert {f"domain_loss.{name}" for name in NAMES} <= {*row}
    assert whole[-1]["expected_hidden_sparsity"] > whole[0]["expected_hidden_sparsity"]


@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_is_as_if_it_had_not_stopped(job: Path, whole: list[dict], step: int) -> None:
    folder = job.parent / f"again{step}"
    shutil.copytree(job.parent / "whole", folder)
    for later in range(step + 1, STEPS + 1):
        (folder / KEPT.format(later)).unlink()
    assert run(config(job, folder.name, "resume_training=True"), folder) == whole
    last = KEPT.format(STEPS)
    assert (folder / last).read_bytes() == (job.parent / "whole" / last).read_bytes()


def test_prune_cut_continue_and_transformers(
    job: Path, whole: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, next_yaml = tmp_path / "pruned", tmp_path / "continue.yaml"
    words = ["cut", str(job.parent / "whole"), "--output", str(output), "--next_yaml", str(next_yaml), "--quiet"]
    assert main(words) == 3 and not output.exists() and not next_yaml.exists()
    assert main([*words, "--force"]) == 0
    assert "output_dir is" in capsys.readouterr().err
    report = json.loads((output / "pruning.json").read_text())
    assert report["pruned"] == {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
    }
    given = load_yaml(next_yaml)
    assert "l0_module" not in given["model"]["model_config"] and given["load_checkpoint"] == str(output)
    proportions = [whole[-1][f"proportion.{name}"] for name in NAMES]
    assert given["train_dataset"]["data_loader"]["proportion"] == proportions
    given["output_dir"] = str(tmp_path / "continued")
    more = run(given, tmp_path / "continued")
    assert len(more) == STEPS and "lagrangian_loss" not in more[0]
    assert more[0]["proportion.web"] == pytest.approx(proportions[2], abs=1e-12)
    _same_as_transformers(tmp_path / "continued" / KEPT.format(STEPS), output, tmp_path / "hf")


def _same_as_transformers(checkpoint: Path, pruned: Path, folder: Path) -> None:
    from mindformers_ext.cli.convert import main as convert
    from mindformers_ext.core.config.hf import model_spec_from_hf
    from mindformers_ext.core.spec import NetworkSpec
    from mindformers_ext.pt import names
    from mindformers_ext.pt.causal_lm import build_causal_lm
    from tests.helpers.prune_folders import transformers_logits

    words = ["--reversed", "--input_path", str(checkpoint), "--output_path", str(folder), "--config", str(pruned)]
    assert convert(words) == 0
    ids = np.arange(12) % 300 + 5
    model = model_spec_from_hf(json.loads((pruned / "config.json").read_text()))
    network = build_causal_lm(NetworkSpec(model=model, seq_length=12)).eval()
    file = CkptFile(checkpoint)
    held = {name: file.read(name) for name in file.infos if name.startswith(("model.", "lm_head."))}
    file.close()
    names.load(network, held)
    with torch.no_grad():
        ours = network(torch.from_numpy(ids)[None])[0].numpy()
    np.testing.assert_allclose(transformers_logits(folder, ids), ours, rtol=0, atol=1e-4)


def test_a_masked_checkpoint_becomes_no_model_folder(
    job: Path, whole: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mindformers_ext.cli.convert import main as convert

    masked = str(job.parent / "whole" / KEPT.format(STEPS))
    assert convert(["--reversed", "--input_path", masked, "--output_path", str(tmp_path / "hf")]) == 2
    assert "tools/prune.py" in capsys.readouterr().err and not (tmp_path / "hf").exists()


def test_checkpoints_without_whole_masks_are_refused(
    job: Path, whole: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.helpers.sliced import write_file

    file = CkptFile(job.parent / "whole" / KEPT.format(STEPS))
    held = {name: file.read(name) for name in file.infos}
    file.close()
    name = "model.l0_module.masks.hidden.z_loga"
    yaml = str(job.parent / "whole" / "run_config" / "train.yaml")
    for case, change, message in (
        ("nan", {name: np.full(32, np.nan, np.float32)}, "values that are no numbers"),
        ("shape", {name: np.ones(31, np.float32)}, "has shape [31]"),
        ("lacking", {name: None}, f"has no {name}"),
        ("weights", {"model.norm_out.weight": None}, "norm"),
    ):
        path = tmp_path / f"{case}.ckpt"
        write_file(path, {key: array for key, array in (held | change).items() if array is not None})
        out = tmp_path / "out"
        assert main(["cut", str(path), "--config", yaml, "--output", str(out), "--force", "--quiet"]) == 2, case
        assert message in capsys.readouterr().err and not out.exists(), case
    assert main(["masks", str(tmp_path / "nan.ckpt"), "--output", str(tmp_path / "m.npz")]) == 2
    assert "give the run's YAML with --config" in capsys.readouterr().err
    for case in ("shape", "lacking"):
        words = ("resume_training=True", f"load_checkpoint={tmp_path / case}.ckpt")
        with pytest.raises(UserError, match="its masks are not those of l0_module"):
            check_run(config(job, "resumed", *words), "test")
    check_run(config(job, "resumed", "resume_training=True", f"load_checkpoint={tmp_path / 'nan.ckpt'}"), "test")


def test_slices_of_ranks_are_cut_as_the_whole_checkpoint(
    job: Path, whole: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mindformers_ext.formats.strategy import read_strategy
    from tests.helpers.sliced import cut, write_ranks, write_strategy

    file = CkptFile(job.parent / "whole" / KEPT.format(STEPS))
    held = {name: file.read(name) for name in file.infos}
    file.close()
    maps = {(".wo.weight", ".w2.weight"): [-1, 0], (".wq.weight", ".wk.weight", ".wv.weight", ".w1.weight"): [0, -1]}
    rows = {
        name: dict(
            matrix=[2, 2], tensor_map=next((row for ends, row in maps.items() if name.endswith(ends)), whole_map)
        )
        for name, array in held.items()
        if name.startswith(("model.", "lm_head.")) and ".values" not in name  # not in the graph of training
        for whole_map in [[-1] * array.ndim]
    }
    output = tmp_path / "run"
    shutil.copytree(job.parent / "whole" / "run_config", output / "run_config")
    write_strategy(output / "ranks" / "s.ckpt", rows)
    parts = cut(read_strategy(output / "ranks"), held, {name: held[name] for name in held if name not in rows})
    write_ranks(output / "checkpoint", parts, name=f"tiny_rank_{{}}-1_{STEPS}")
    words = ["--force", "--quiet"]
    assert main(["cut", str(output), "--output", str(tmp_path / "refused"), *words]) == 2
    assert "holds the slices of 4 ranks" in capsys.readouterr().err and not (tmp_path / "refused").exists()
    (output / "ranks").rename(output / "strategy")
    for name, place in (("slices", output), ("file", job.parent / "whole")):
        more = ["--next_yaml", str(tmp_path / f"{name}.yaml")]
        assert main(["cut", str(place), "--output", str(tmp_path / name), *words, *more]) == 0
    first, second = (tmp_path / name / "model.safetensors" for name in ("slices", "file"))
    assert first.read_bytes() == second.read_bytes()
    loaders = [load_yaml(tmp_path / f"{name}.yaml")["train_dataset"]["data_loader"] for name in ("slices", "file")]
    assert loaders[0]["proportion"] == loaders[1]["proportion"]
    capsys.readouterr()
    assert main(["masks", str(output / "checkpoint"), "--output", str(tmp_path / "m.npz"), "--strategy_dir",
                 str(tmp_path / "none")]) == 2  # fmt: skip
    assert f"--strategy_dir '{tmp_path / 'none'}' does not exist" in capsys.readouterr().err


REFUSED = {
    "unknown module": ({"pruning_modules": ["heads"]}, "pruning_modules='heads' is unknown"),
    "head width": ({"pruning_modules": ["head", "qk_head_dim"]}, "qk_head_dim: a head's width stays as it is"),
    "layer twice": ({"pruning_modules": ["layer", "mlp"]}, "has layer beside its halves"),
    "head twice": ({"pruning_modules": ["head", "kv_head"]}, "has head beside its parts"),
    "none": ({"pruning_modules": []}, "name each module once, and at least one"),
    "no list": ({"pruning_modules": "head"}, "give a list of names"),
    "larger": ({"target_model": {"d_model": 64, "n_heads": 8}}, "target_model.d_model=64 is above the model's 32"),
    "head_dim": ({"target_model": {"d_model": 16, "n_heads": 4}}, "say head_dim: 8 where that is meant"),
    "other head_dim": ({"target_model": {"head_dim": 4}}, "a head's width stays: 8"),
    "groups": ({"target_model": {"d_model": 24, "n_heads": 3}}, "n_heads=3 is no multiple of n_kv_heads=2"),
    "wider groups": (
        {"target_model": {"d_model": 32, "n_heads": 4, "n_kv_heads": 1}},
        "has 4 query heads to a key head, the model 2",
    ),
    "unlisted": ({"pruning_modules": ["hidden", "head"]}, "add intermediate to pruning_modules"),
    "too far": ({"target_model": {"intermediate_size": 3}}, "masks reach 0.9529: prune in two runs"),
    "nothing": ({"target_model": {"d_model": 32}}, "has the sizes of the model itself"),
    "vocabulary": ({"target_model": {"vocab_size": 100}}, f"the vocabulary stays: {VOCAB}"),
    "unknown size": ({"target_model": {"n_layer": 1}}, "unknown key 'n_layer' in target_model"),
    "zero": ({"target_model": {"n_layers": 0}}, "target_model.n_layers=0"),
    "unit": ({"lagrangian_warmup_steps": "1ep"}, "lagrangian_warmup_steps='1ep': give a number of steps"),
    "sparsity": ({"target_model": None, "target_sparsity": 1.5}, "target_sparsity=1.5 is out of range"),
    "rate": ({"lag_lr": 0}, "lag_lr=0.0 is out of range"),
    "unknown key": ({"warmup": 3}, "unknown key 'warmup' in model.model_config.l0_module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_words_have_their_own_messages(name: str, job: Path) -> None:
    words, message = REFUSED[name]
    with pytest.raises(UserError) as error:
        check_run(config(job, "refused", **words), "test")
    assert message in str(error.value)
    assert not (job.parent / "refused").exists()


@pytest.mark.parametrize("section", [{}, False, "on"])
def test_an_empty_section_is_not_passed_over(section: object, job: Path) -> None:
    given = config(job, "refused")
    given["model"]["model_config"]["l0_module"] = section
    with pytest.raises(UserError, match="is no section: write keys below it"):
        check_run(given, "test")


def test_runs_that_cannot_prune_are_refused(job: Path) -> None:
    late = check_run(config(job, "refused", lagrangian_warmup_steps=9), "test")
    with pytest.raises(UserError, match="of a run of 8 steps: the target would not be reached"):
        train(late.run, late.config, late.build.network)
    experts = config(job, "refused")
    experts["moe_config"] = {"expert_num": 4, "num_experts_chosen": 2, "routing_policy": "TopkRouterV2"}
    for given, message in (
        (experts, "masks of a mixture of experts are not built"),
        (config(job, "refused", "run_mode=predict"), "cut the model first"),
        (config(job, "refused", "model.model_config.return_extra_loss=False"), "return_extra_loss=False"),
    ):
        with pytest.raises(UserError, match=message):
            check_run(given, "test")


def test_the_tiny_yaml_and_the_readmes_commands(tmp_path: Path, repo_root: Path) -> None:
    from mindformers_ext.cli.convert import main as convert

    rows = write_rows(tmp_path / "rows.mindrecord", token_rows(width=129, rows=64, high=1990))
    output, pruned, next_yaml = tmp_path / "prune", tmp_path / "pruned", tmp_path / "continue.yaml"
    given = config_of(
        repo_root / "configs" / "tiny" / "llama_prune.yaml",
        "engine=pt",
        f"output_dir={output}",
        f"train_dataset.data_loader.dataset_dir={rows}",
        "model.model_config.l0_module.lagrangian_warmup_steps=2",
    )
    assert len(run(given, output)) == 4
    words = ["cut", str(output), "--output", str(pruned), "--next_yaml", str(next_yaml), "--quiet"]
    assert main(words) == 3  # four steps are too few
    assert main([*words, "--force"]) == 0
    assert main(["report", str(pruned)]) == 0
    assert main(["masks", str(output), "--output", str(tmp_path / "masks.npz")]) == 0
    assert main(["cut", str(output), "--masks", str(tmp_path / "masks.npz"), "--output", str(pruned)]) == 2  # exists
    form = ["--model", "llama", "--format", "composer"]
    assert convert([*form, "--input_path", str(pruned), "--output_path", str(tmp_path / "state_dict.pt")]) == 0
    assert len(run(load_yaml(next_yaml) | {"output_dir": str(tmp_path / "on")}, tmp_path / "on")) == 4


def importance(place: Path, source: ModelShape) -> dict[str, np.ndarray]:
    """What was measured of a model of these sizes: numbers drawn at random, in the file ``place``."""
    draw, found = np.random.default_rng(7).random, {}
    for name, dims in FORWARD.items():
        found[name] = draw(shape_of_statistic(dims, source))
    write_importance_file(place, Importance(source, found, {"weights": "drawn"}))
    return found


def test_masks_begin_in_the_order_of_what_was_measured(job: Path) -> None:
    place, folder = job.parent / "drawn.npz", job.parent / "warm"
    given = config(job, "warm", importance=str(place), start_sparsity=0.1, lag_lr=1e-6)
    source = shape_of_model(check_run(given, "test").build.network.model)
    found = importance(place, source)
    first = run(given, folder)
    assert first[0]["expected_intermediate_sparsity"] == pytest.approx(0.1, abs=1e-3)
    loga = CkptFile(folder / KEPT.format(1)).read("model.l0_module.masks.intermediate.z_loga")
    strongest, weakest = found["neuron_absolute"].argmax(1), found["neuron_absolute"].argmin(1)
    np.testing.assert_array_equal(loga.argmax(1), strongest)
    np.testing.assert_array_equal(loga.argmin(1), weakest)
    for later in range(4, STEPS + 1):
        (folder / KEPT.format(later)).unlink()
    assert run(given | {"resume_training": True}, folder) == first


def test_what_masks_cannot_begin_from_is_refused(job: Path) -> None:
    place = job.parent / "other.npz"
    importance(place, MHA)
    with pytest.raises(UserError, match="is of another model"):
        run(config(job, "other", importance=str(place), start_sparsity=0.1), job.parent / "other")
    with pytest.raises(UserError, match="have no order"):
        check_run(config(job, "other", importance=str(place)), "test")
    with pytest.raises(UserError, match=r"give the \.npz file"):
        check_run(config(job, "other", importance=3, start_sparsity=0.1), "test")
    assert not (job.parent / "other").exists()
