# SPDX-License-Identifier: Apache-2.0
"""A dense LLaMA as a mixture and back, from one YAML: exact where it must be, and what it is worth beside it."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mindformers_ext.cli.experts import main
from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.engine.door import write_numbers
from mindformers_ext.jobs.experts import probe
from mindformers_ext.jobs.experts.gating import Gating, mixture_config
from mindformers_ext.jobs.experts.splits import open_split, split_sha
from mindformers_ext.surgery.experts.split import LayerSplit
from tests.helpers.tiny_llama import HIDDEN, LAYERS, WIDTH, make_llama, sentences

pytestmark = pytest.mark.slow  # all together more than 20 seconds

NAME = "layers.{}.mlp.gate_proj.weight"
EXPERTS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, remote_code: Path) -> Path:
    """A model, a text, a split into experts of different sizes, random gates."""
    folder = tmp_path_factory.mktemp("convert")
    make_llama(folder / "dense")
    (folder / "text.txt").write_text("\n".join(sentences(60, 5)), encoding="utf-8")
    (folder / "split").mkdir()
    (folder / "gates").mkdir()
    for layer in range(LAYERS):
        draws = np.random.default_rng(layer)
        labels = np.sort(draws.integers(0, EXPERTS, WIDTH)) if layer == 1 else np.arange(WIDTH) % EXPERTS
        labels[:EXPERTS] = np.arange(EXPERTS)  # none is empty
        write_numbers(folder / "split" / NAME.format(layer), draws.permutation(labels).tolist())
        shapes = {"gate_network.0.weight": (EXPERTS, HIDDEN), "gate_network.2.weight": (EXPERTS, EXPERTS)}
        gate = {name: draws.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
        write_numbers(folder / "gates" / NAME.format(layer), gate)
    return folder


def words(made: Path, out: Path, *more: object, gates: bool = True) -> list[str]:
    found = ["--select_file_path", made / "gates"] if gates else []
    parts = ("--model_path", made / "dense", "--split_file_path", made / "split", *found, "--save_path", out, "--quiet")
    return [*map(str, ("convert", *parts, *more))]


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        return model(ids).logits


def test_all_experts_are_the_dense_model_and_the_way_back_is_exact(made: Path, tmp_path: Path) -> None:
    assert main(words(made, tmp_path / "moe", "--num_selects", EXPERTS)) == 0
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 300, (2, 24)))
    dense = LlamaForCausalLM.from_pretrained(made / "dense").eval()
    with torch.no_grad():
        wanted = dense(ids).logits
    assert (logits(tmp_path / "moe", ids) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    weights = load_file(tmp_path / "moe" / "model.safetensors")
    sizes = json.loads((tmp_path / "moe" / "config.json").read_text())["size_experts"]
    assert [len(weights[f"model.layers.1.mlp.calculator.experts.weight_up.{e}"]) for e in range(EXPERTS)] == sizes[1]
    assert len(set(sizes[1])) > 1
    assert AutoTokenizer.from_pretrained(tmp_path / "moe").encode("a gate") == AutoTokenizer.from_pretrained(
        made / "dense"
    ).encode("a gate")
    back = ["--reversed", "--quiet", "--model_path", str(tmp_path / "moe"), "--save_path", str(tmp_path / "back")]
    assert main(["convert", *back]) == 0
    first, last = (load_file(path / "model.safetensors") for path in (made / "dense", tmp_path / "back"))
    assert set(first) == set(last) and all(torch.equal(first[name], last[name]) for name in first)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "back").config.intermediate_size == WIDTH


def test_the_ladder_is_that_of_the_written_model(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gate's loss on the text's second half, against transformers with the folder that was written."""
    judged = ("--eval_text", made / "text.txt", "--block_size", 32, "--num_selects", 3)
    for preset in ("moefication", "llama_moe"):
        assert main(words(made, tmp_path / preset, "--preset", preset, *judged)) == 0
        lines = capsys.readouterr().out.splitlines()
        losses = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("  ")}
        assert set(losses) == {"dense", "oracle", "gate", "static", "random"}
        rows = _rows(made)
        for name, folder in (("dense", made / "dense"), ("gate", tmp_path / preset)):
            assert losses[name] == pytest.approx(_loss(folder, rows[len(rows) // 2 :]), abs=6e-5)


def test_residual_experts_count_in_the_model_and_in_the_ladder(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "split").mkdir()
    (tmp_path / "gates").mkdir()
    for layer in range(LAYERS):  # two residual experts, then four routed ones
        draws = np.random.default_rng(layer)
        write_numbers(tmp_path / "split" / NAME.format(layer), draws.permutation(WIDTH).reshape(6, -1).tolist())
        write_numbers(tmp_path / "gates" / NAME.format(layer), {
            "gate_network.weight": draws.normal(0, 1, (4, HIDDEN)).astype(np.float32)})  # fmt: skip
    parts = ("--num_experts", 4, "--split_file_path", tmp_path / "split", "--select_file_path", tmp_path / "gates")
    assert main(words(made, tmp_path / "all", *parts, "--num_selects", 4)) == 0
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 300, (2, 24)))
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained(made / "dense").eval()(ids).logits
    assert (logits(tmp_path / "all", ids) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    back = ["convert", "--reversed", "--quiet", "--model_path", str(tmp_path / "all"), "--save_path"]
    assert main([*back, str(tmp_path / "back")]) == 0
    (tmp_path / "all" / "expert_neurons.npz").unlink()
    assert main([*back, str(tmp_path / "back2"), "--split_file_path", str(tmp_path / "split")]) == 0
    first = load_file(made / "dense" / "model.safetensors")
    for name in ("back", "back2"):
        last = load_file(tmp_path / name / "model.safetensors")
        assert set(first) == set(last) and all(torch.equal(first[name], last[name]) for name in first)
        assert json.loads((tmp_path / name / "config.json").read_text()).keys().isdisjoint(RESIDUAL)
    judged = ("--eval_text", made / "text.txt", "--block_size", 32, "--num_selects", 2)
    assert main(words(made, tmp_path / "two", *parts, *judged)) == 0
    losses = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    rows = _rows(made)
    assert float(losses["gate"]) == pytest.approx(_loss(tmp_path / "two", rows[len(rows) // 2 :]), abs=6e-5)


RESIDUAL = ("num_experts_residual", "size_experts_residual", "intermediate_size_residual", "use_weighting")


def test_gates_of_another_split_or_of_two_requests_are_not_taken(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "gates", tmp_path / "gates")
    about = [{"split": split_sha(open_split(made / "split", NAME, layer)), "lr": 0.5} for layer in range(LAYERS)]
    for change, code, message in (
        ({}, 0, ""),
        ({"lr": 0.1}, 2, "gates of layers [2] that were fitted otherwise than that of layer 0"),
        ({"split": "1"}, 2, "fitted to another split than --split_file_path (layers [2])"),
    ):
        for layer, told in enumerate(about):
            text = json.dumps({"about": told | change if layer == 2 else told})
            (tmp_path / "gates" / (NAME.format(layer) + ".json")).write_text(text)
        assert main(words(made, tmp_path / "moe", "--select_file_path", tmp_path / "gates", "--dry_run")) == code
        assert message in capsys.readouterr().err


def _rows(made: Path) -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(made / "dense").encode(
        (made / "text.txt").read_text("utf-8"), add_special_tokens=False
    )
    return [[1, *ids[at : at + 31]] for at in range(0, len(ids), 31)]


def _loss(folder: Path, rows: list[list[int]]) -> float:
    total, count = 0.0, 0
    for row in rows:
        found = logits(folder, torch.tensor([row]))[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(found, torch.tensor(row[1:]), reduction="sum"))
        count += len(row) - 1
    return total / count


def test_rope_is_written_as_transformers_4_and_5_read_it() -> None:
    split = {0: LayerSplit.from_labels([0, 1], 2)}
    dense = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}, "hidden_size": 4}
    assert mixture_config(dense, split, Gating(chosen=1), "float32")["rope_theta"] == 5e3


def test_one_yaml_makes_all_of_it_and_does_nothing_twice(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"text": str(made / "text.txt"), "block_size": 32}
    judged = {"eval_text": str(made / "text.txt"), "block_size": 32, "eval_tokens": 400, "quiet": True}
    config = {
        "model_path": str(made / "dense"),
        "save_path": str(tmp_path / "work"),
        "num_experts": 4,
        "split": {"method": "random", "quiet": True},
        "select": {"stream": True, "gate": "ridge", "quiet": True, **text},
        "convert": {"save_path": str(tmp_path / "moe"), **judged},
        "report": {"save_path": str(tmp_path / "page"), **judged},
    }
    path = tmp_path / "experts.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["run", str(path)]) == 0
    figures = json.loads((tmp_path / "page" / "report.json").read_text())
    assert set(figures["losses"]) == {"dense", "oracle", "gate", "static", "random"}
    assert np.allclose(np.sum(figures["load"], 1), 1) and np.shape(figures["load"]) == (LAYERS, 4)
    assert {path.name for path in (tmp_path / "page").iterdir()} == {
        *("report.html", "report.json", "gates.png", "ladder.png", "load.png")
    }
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["run", str(path)]) == 0
    assert "is there already" in capsys.readouterr().out
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.weight") if path.is_file()}
    assert all(stamps[path] == stamp for path, stamp in kept.items())
    assert stamps[tmp_path / "moe" / "model.safetensors"] == (tmp_path / "moe/model.safetensors").stat().st_mtime_ns


EXPERT = "model.layers.2.mlp.calculator.experts.weight_{}.7"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda weights: weights.pop(EXPERT.format("up")), {}, "weight_up.7' is missing"),
        (lambda weights: weights.pop(EXPERT.format("gate")), {}, "have 84 neurons, config.json says 96"),
        (lambda weights: weights.update({EXPERT.format("down"): weights[EXPERT.format("down")].half()}), {},
         "one dense matrix has one type"),
        (lambda weights: weights.update({EXPERT.format("gate")[:-1] + "x": torch.zeros(2)}), {}, "no whole row"),
        (None, {"num_hidden_layers": None}, "lacks num_hidden_layers"),
        (None, {"num_hidden_layers": "three"}, "lacks num_hidden_layers"),
        (None, {"intermediate_size": 95}, "config.json says 95"),
    ],
)  # fmt: skip
def test_a_mixture_that_is_not_whole_is_told_before_anything_is_written(
    made: Path, tmp_path: Path, change, config: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(made, tmp_path / "moe")) == 0
    if change:
        weights = load_file(tmp_path / "moe" / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "moe" / "model.safetensors", {"format": "pt"})
    path = tmp_path / "moe" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    back = ["--reversed", "--quiet", "--model_path", str(tmp_path / "moe"), "--save_path", str(tmp_path / "back")]
    assert main(["convert", *back]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "back").exists()


def no_room(folder: Path, nbytes: int, inside: bool) -> None:
    raise UserError(f"no room beside the output in {folder}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_selects", 9], "choose 1 to all of them"),
        (["--num_experts", 4], "give the --num_experts of the split"),
        (["--gate_type", "linear"], "pass --gate_type mlp"),
        (["--score_scale_factor_file_path", "factors"], "2 score scale factors for 3 layers"),
        (["--save_path", "{dense}", "--overwrite"], "which is read"),
        (["--score_scale_factor", 4], "without multiply_gate_scores"),
        (["--score_scale_factor", 4, "--score_scale_factor_file_path", "factors"], "give one of them"),
        (["--reversed"], "--select_file_path mean nothing with --reversed"),
        (["--select_file_path", "few"], "lacks the gates of layers [1, 2]"),
        (["--model_path", "moe"], "give a dense llama folder"),
        (["--eval_text", "nowhere"], "the text 'nowhere' is no file"),
        (["--eval_text", "short.txt", "--block_size", 32], "1 rows of 32 tokens"),
        (["--eval_text", "short.txt", "--eval_tokens", 0], "--eval_tokens 0"),
        (["--eval_text", "{text}", "--block_size", 32], "no room beside the output"),
        (["--eval_tokens", 9, "--seed", 1], "--eval_tokens (counts with --eval_text), --seed (counts with random"),
        (["--block_size", 32], "--block_size (counts with --eval_text)"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "factors").mkdir()
    (tmp_path / "factors" / "score_scale_factors.txt").write_text("[1.0, 2.0]")
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / NAME.format(0)).write_bytes((made / "gates" / NAME.format(0)).read_bytes())
    if "moe" in more:
        assert main(words(made, tmp_path / "moe")) == 0
    (tmp_path / "short.txt").write_text("a gate")
    if "{text}" in more:
        monkeypatch.setattr(probe, "check_space", no_room)
    before = sorted(tmp_path.rglob("*"))
    places = {"{dense}": str(made / "dense"), "{text}": str(made / "text.txt")}
    asked = [functools.reduce(lambda text, item: text.replace(*item), places.items(), str(word)) for word in more]
    assert main([*words(made, tmp_path / "out"), *asked]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
