# SPDX-License-Identifier: Apache-2.0
"""A dense LLaMA as a mixture and back, from one YAML: exact where it must be, and what it is worth beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from mindformers_ext.cli.experts import main
from mindformers_ext.formats.ms_file import open_checkpoint
from mindformers_ext.jobs.engine.door import read_plain, write_plain
from mindformers_ext.jobs.experts.gating import Gating, mixture_config
from mindformers_ext.surgery.experts.split import LayerSplit
from tests.helpers.tiny_llama import HIDDEN, LAYERS, WIDTH, make_llama, sentences

pytestmark = pytest.mark.slow  # all together more than 20 seconds

NAME = "layers.{}.mlp.gate_proj.weight"
EXPERTS = 8
BLOCK = 32  # tokens of a row that judges
Change = Callable[[int, torch.Tensor], torch.Tensor]  # of a layer's number and neurons


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
        write_plain(folder / "split" / NAME.format(layer), draws.permutation(labels).tolist())
        shapes = {"gate_network.0.weight": (EXPERTS, HIDDEN), "gate_network.2.weight": (EXPERTS, EXPERTS)}
        gate = {name: draws.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
        write_plain(folder / "gates" / NAME.format(layer), gate)
    return folder


def words(made: Path, out: Path, *more: object, gates: bool = True) -> list[str]:
    found = ["--select_file_path", made / "gates"] if gates else []
    parts = ("--model_path", made / "dense", "--split_file_path", made / "split", *found, "--save_path", out, "--quiet")
    return [*map(str, ("convert", *parts, *more))]


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def logits(model: PreTrainedModel | Path, ids: torch.Tensor) -> torch.Tensor:
    """Of a model, or of the one in a folder."""
    with torch.no_grad():
        return (opened(model) if isinstance(model, Path) else model)(ids).logits


def some_ids() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(3, 300, (2, 24)))


def test_all_experts_are_the_dense_model_and_the_way_back_is_exact(made: Path, tmp_path: Path) -> None:
    assert main(words(made, tmp_path / "moe", "--num_selects", EXPERTS)) == 0
    ids = some_ids()
    wanted = logits(made / "dense", ids)
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


def test_without_the_list_of_neurons_they_stay_in_the_experts_order(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(made, tmp_path / "moe")) == 0
    (tmp_path / "moe" / "expert_neurons.npz").unlink()
    back = ("convert", "--reversed", "--model_path", str(tmp_path / "moe"), "--save_path", str(tmp_path / "back"))
    assert main([*back]) == 0
    assert "no expert_neurons.npz: neurons stay in the experts' order" in capsys.readouterr().err
    first, last = (load_file(path / "model.safetensors") for path in (made / "dense", tmp_path / "back"))
    for layer in range(LAYERS):
        order = np.argsort(read_plain(made / "split" / NAME.format(layer)), kind="stable")
        for name in ("gate", "up"):
            key = f"model.layers.{layer}.mlp.{name}_proj.weight"
            assert torch.equal(last[key], first[key][order])
    wanted = logits(made / "dense", some_ids())
    assert (logits(tmp_path / "back", some_ids()) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    split = ("--split_file_path", str(made / "split"), "--overwrite", "--quiet")  # the folder that says the same
    assert main([*back, *split]) == 0
    last = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_the_checkpoint_for_mindspore_holds_the_same_neurons(made: Path, tmp_path: Path) -> None:
    """Of both ways: experts side by side, zeros behind the narrower ones; and the dense matrices."""
    dense = load_file(made / "dense" / "model.safetensors")
    assert main(words(made, tmp_path / "moe", "--to_mindspore", tmp_path / "moe.ckpt")) == 0
    back = ("--model_path", str(tmp_path / "moe"), "--save_path", str(tmp_path / "back"), "--quiet")
    assert main(["convert", "--reversed", *back, "--to_mindspore", str(tmp_path / "dense.ckpt")]) == 0
    splits = [np.array(read_plain(made / "split" / NAME.format(layer))) for layer in range(LAYERS)]
    widest = max(np.bincount(labels).max() for labels in splits)
    for layer, labels in enumerate(splits):
        for ours, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            matrix = dense[f"model.layers.{layer}.mlp.{name}_proj.weight"].numpy()
            rows = matrix.T if name == "down" else matrix
            inside = f"model.layers.{layer}.feed_forward"
            found = read_tensor(tmp_path / "moe.ckpt", f"{inside}.ffn.{ours}.weight")
            found = found.transpose(0, 2, 1) if name == "down" else found
            assert found.shape == (EXPERTS, widest, HIDDEN)
            for expert in range(EXPERTS):
                mine = rows[labels == expert]
                np.testing.assert_array_equal(found[expert, : len(mine)], mine)
                assert not found[expert, len(mine) :].any()
            np.testing.assert_array_equal(read_tensor(tmp_path / "dense.ckpt", f"{inside}.{ours}.weight"), matrix)


def read_tensor(path: Path, name: str) -> np.ndarray:
    reader = open_checkpoint(path)
    try:
        return np.array(reader.read(name))
    finally:
        reader.close()


def test_the_ladder_is_that_of_transformers(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The losses on the text's second half, against transformers: the gate's with the folder that was written, oracle,
    static cut and random with the dense model whose neurons are left out by hooks."""
    judged = ("--eval_text", made / "text.txt", "--block_size", BLOCK)
    rows = _rows(made)
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    dense = opened(made / "dense")
    wanted = {"dense": _loss(dense, second)}
    for name, change in (
        ("oracle", _oracle(made, 3)),
        ("random", _random(made, 3, len(second))),
        ("static", _static(dense, first, 3)),
    ):
        with _neurons(dense, change):
            wanted[name] = _loss(dense, second)
    for preset in ("moefication", "llama_moe"):
        found = _ladder(words(made, tmp_path / preset, "--preset", preset, "--num_selects", 3, *judged), capsys)
        assert set(found) == {"dense", "oracle", "gate", "static", "random"}
        wanted["gate"] = _loss(tmp_path / preset, second)
        for name, loss in wanted.items():
            assert found[name] == pytest.approx(loss, abs=6e-5), name
    assert len({round(loss, 3) for loss in wanted.values()}) == 5
    found = _ladder(words(made, tmp_path / "all", "--num_selects", EXPERTS, *judged), capsys)
    assert len(found) == 5 and all(loss == pytest.approx(wanted["dense"], abs=1e-4) for loss in found.values())


def _ladder(command: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    """Printed losses by way."""
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("  ")}


def _rows(made: Path) -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(made / "dense").encode(
        (made / "text.txt").read_text("utf-8"), add_special_tokens=False
    )
    return [[1, *ids[at : at + BLOCK - 1]] for at in range(0, len(ids), BLOCK - 1)]


def _loss(model: PreTrainedModel | Path, rows: list[list[int]]) -> float:
    model, total, count = opened(model) if isinstance(model, Path) else model, 0.0, 0
    for row in rows:
        found = logits(model, torch.tensor([row]))[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(found, torch.tensor(row[1:]), reduction="sum"))
        count += len(row) - 1
    return total / count


@contextmanager
def _neurons(model: PreTrainedModel, change: Change) -> Iterator[None]:
    """``change`` takes the place of the neurons (B, S, F) that enter each layer's down_proj."""
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given, number=number: (change(number, given[0]),))
        for number, layer in enumerate(model.model.layers)
    ]
    yield
    for handle in handles:
        handle.remove()


def _oracle(made: Path, chosen: int) -> Change:
    """Of each token the experts with the largest sums of squares."""
    labels = _labels(made)

    def change(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros(*hidden.shape[:-1], EXPERTS).index_add(-1, labels[layer], hidden**2)
        return hidden * _inside(labels[layer], scores.topk(chosen).indices)

    return change


def _random(made: Path, chosen: int, rows: int) -> Change:
    """The experts with the largest of numpy's numbers of seed 0: layer after layer, one for each token and expert."""
    labels, generator = _labels(made), np.random.default_rng(0)
    drawn = [iter(torch.from_numpy(generator.random((rows, BLOCK, EXPERTS)))) for _ in range(LAYERS)]

    def change(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * _inside(labels[layer], next(drawn[layer])[: hidden.shape[1]].topk(chosen).indices)

    return change


def _labels(made: Path) -> list[torch.Tensor]:
    return [torch.tensor(read_plain(made / "split" / NAME.format(layer))) for layer in range(LAYERS)]


def _inside(labels: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(..., F) of the experts (..., K) that are kept."""
    return (labels == kept[..., None]).any(-2)


def _static(model: PreTrainedModel, rows: list[list[int]], chosen: int) -> Change:
    """In each layer as many neurons as ``chosen`` mean experts have: those that add most on ``rows``."""
    sums = torch.zeros(LAYERS, WIDTH, dtype=torch.float64)

    def add(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        sums[layer] += hidden.abs().double().sum((0, 1))
        return hidden

    with _neurons(model, add):
        _loss(model, rows)
    kept = torch.zeros(LAYERS, WIDTH)
    for layer, block in enumerate(model.model.layers):
        added = sums[layer] * block.mlp.down_proj.weight.detach().double().norm(dim=0)
        kept[layer, added.topk(round(WIDTH * chosen / EXPERTS)).indices] = 1
    return lambda layer, hidden: hidden * kept[layer]


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
        "select": {"stream": True, "gate": "ridge", "workers": 1, "quiet": True, **text},
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
    assert capsys.readouterr().out.count("is there already") == 2  # convert and report
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.weight") if path.is_file()}
    assert all(stamps[path] == stamp for path, stamp in kept.items())
    assert stamps[tmp_path / "moe" / "model.safetensors"] == (tmp_path / "moe/model.safetensors").stat().st_mtime_ns


def test_what_stands_on_a_changed_stage_is_made_again(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_path": str(made / "dense"), "save_path": str(tmp_path / "work"), "num_experts": 4}
    config |= {"overwrite": True, "quiet": True, "convert": {"save_path": str(tmp_path / "moe")}}
    before = b""
    for seed, changed in ((0, True), (0, False), (1, True)):  # the words of convert stay the same
        path = tmp_path / "experts.yaml"
        path.write_text(yaml.safe_dump(config | {"split": {"method": "random", "seed": seed}}), encoding="utf-8")
        assert main(["run", str(path)]) == 0
        assert ("is there already" in capsys.readouterr().out) == (not changed)
        after = (tmp_path / "moe" / "expert_neurons.npz").read_bytes()
        assert (after != before) == changed
        before = after


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
    before = sorted(tmp_path.rglob("*"))
    asked = [str(word).replace("{dense}", str(made / "dense")) for word in more]
    assert main([*words(made, tmp_path / "out"), *asked]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
