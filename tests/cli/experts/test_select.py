# SPDX-License-Identifier: Apache-2.0
"""Gates on disk: the seed's files, the same whichever way they were fitted, and refusals that leave nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mindformers_ext.cli.experts import main
from mindformers_ext.jobs.engine.door import write_numbers
from mindformers_ext.jobs.experts import select as job
from mindformers_ext.jobs.experts.ranks import Share
from mindformers_ext.jobs.experts.sample import draw
from tests.helpers.tiny_llama import HIDDEN, LAYERS, WIDTH, make_llama, sentences

pytestmark = pytest.mark.slow  # all together more than 15 seconds

TEMPLATE = "layers.{}.mlp.gate_proj.weight"
EXPERTS = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, a split of every layer, and features."""
    folder = tmp_path_factory.mktemp("select")
    make_llama(folder / "llama_tiny")
    (folder / "text.txt").write_text("\n".join(sentences(40, 5)), encoding="utf-8")
    (folder / "split").mkdir()
    for layer in range(LAYERS):
        labels = np.random.default_rng(layer).permutation(np.arange(WIDTH) % EXPERTS)
        write_numbers(folder / "split" / TEMPLATE.format(layer), labels.tolist())
    assert main(["features", *model(folder), "--save_path", str(folder), *texts(folder), "--quiet"]) == 0
    return folder


def model(folder: Path) -> list[str]:
    return ["--model_path", str(folder / "llama_tiny")]


def texts(folder: Path) -> list[str]:
    return ["--text", str(folder / "text.txt"), "--block_size", "32", "--batch_size", "2"]


def words(folder: Path, out: Path, *more: str, stored: bool = True) -> list[str]:
    source = ["--hidden_features_path", str(folder / "llama_tiny-Hidden-Features")] if stored else []
    return [
        *("select", *model(folder), "--split_file_path", str(folder / "split"), "--save_path", str(out)),
        *("--num_experts", str(EXPERTS), *([] if "ridge" in more else ["--epochs", "4"]), "--quiet", *source, *more),
    ]


def gates(out: Path, kind: str = "MLP") -> dict[str, dict[str, torch.Tensor]]:
    folder = out / f"llama_tiny-{EXPERTS}Expert-Select-{kind}"
    return {path.name: torch.load(path) for path in folder.glob("*.weight")}


def test_the_seeds_files_and_any_way_to_the_same_gates(made: Path, tmp_path: Path) -> None:
    assert main(words(made, tmp_path / "all", "--workers", "1")) == 0
    wanted = gates(tmp_path / "all")
    assert set(wanted) == {TEMPLATE.format(layer) for layer in range(LAYERS)}
    shapes = {"gate_network.0.weight": (EXPERTS, HIDDEN), "gate_network.2.weight": (EXPERTS, EXPERTS)}
    assert all({name: tuple(w.shape) for name, w in gate.items()} == shapes for gate in wanted.values())
    folder = tmp_path / "all" / f"llama_tiny-{EXPERTS}Expert-Select-MLP"
    acc = (folder / (TEMPLATE.format(0) + ".acc")).read_text(encoding="utf-8").splitlines()
    assert [line.partition(":")[0] for line in acc] == ["best_acc", "best_loss", "save_epoch"]
    log = (folder / (TEMPLATE.format(0) + ".log")).read_text(encoding="utf-8").splitlines()
    names = ["train_epochs", "train_loss", "train_acc", "valid_epochs", "valid_loss", "valid_acc"]
    assert [line.partition(":")[0] for line in log] == names
    layers = json.loads((folder / "select.json").read_text(encoding="utf-8"))["layers"]
    assert [one["layer"] for one in layers] == [0, 1, 2]
    assert all(0 < one["recall"] <= 1 and one["captured"] <= one["oracle"] + 1e-9 for one in layers)
    assert (folder / "select.png").stat().st_size > 1000
    for layer in ("2", "0"):  # one by one, as the seed divides the layers among its commands
        assert main(words(made, tmp_path / "one", "--specify_layer", layer)) == 0
    for name, gate in gates(tmp_path / "one").items():
        assert all(torch.equal(gate[key], wanted[name][key]) for key in gate)
    stamp = (folder / TEMPLATE.format(1)).stat().st_mtime_ns
    (folder / TEMPLATE.format(0)).unlink()
    assert main(words(made, tmp_path / "all", "--workers", "1")) == 0  # only what is missing is fitted again
    assert (folder / TEMPLATE.format(1)).stat().st_mtime_ns == stamp
    again = gates(tmp_path / "all")[TEMPLATE.format(0)]
    assert all(torch.equal(again[key], wanted[TEMPLATE.format(0)][key]) for key in again)


@pytest.mark.slow
def test_processes_fit_what_one_does(made: Path, tmp_path: Path) -> None:
    for workers in ("1", "2"):
        assert main(words(made, tmp_path / workers, "--workers", workers)) == 0
    one, two = gates(tmp_path / "1"), gates(tmp_path / "2")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name][key], two[name][key]) for name in one for key in one[name])


@pytest.mark.parametrize(("kind", "criterion"), [("ridge", "l2_norm"), ("mlp", "output_norm")])
def test_stream_fits_the_same_without_features(made: Path, tmp_path: Path, kind: str, criterion: str) -> None:
    gate = ("--gate", kind, "--select_criterion", criterion)
    assert main(words(made, tmp_path / "stored", *gate)) == 0
    more = (*gate, "--stream", *texts(made))
    assert main(words(made, tmp_path / "stream", *more, stored=False)) == 0
    name = {"ridge": "Ridge", "mlp": "MLP"}[kind]
    stored, stream = (
        json.loads((tmp_path / out / f"llama_tiny-{EXPERTS}Expert-Select-{name}" / "select.json").read_text())["layers"]
        for out in ("stored", "stream")
    )
    for one, other in zip(stored, stream, strict=True):
        assert one["tokens"] == other["tokens"]
        assert abs(one["recall"] - other["recall"]) <= 0.01 and abs(one["captured"] - other["captured"]) <= 0.01
    assert not list((tmp_path / "stream").glob("*/.*")) and not list((tmp_path / "stream").glob("*Features"))
    if kind == "ridge":
        first, second = gates(tmp_path / "stored", name), gates(tmp_path / "stream", name)
        gate = TEMPLATE.format(1)
        torch.testing.assert_close(*(g[gate]["gate_network.weight"] for g in (first, second)), rtol=0.02, atol=0.02)


def test_processes_that_share_the_rows_fit_what_one_does(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--gate", "ridge", "--stream", *texts(made), "--reservoir", "200")
    assert main(words(made, tmp_path / "one", *more, stored=False)) == 0
    capsys.readouterr()
    folder = tmp_path / "many" / f"llama_tiny-{EXPERTS}Expert-Select-Ridge"

    def run(rank: str, *other: str) -> str:
        monkeypatch.setenv("RANK", rank)
        assert main(words(made, tmp_path / "many", *more, *other, stored=False)) == 0
        return capsys.readouterr().out

    monkeypatch.setenv("WORLD_SIZE", "3")
    run("0")
    monkeypatch.setenv("WORLD_SIZE", "2")  # what three would have written is of no use to two
    assert "gates of layers [0, 1, 2] are not there yet" in run("0")
    assert sorted(path.name.partition("_")[2][:5] for path in folder.glob(".sample_*")) == ["0_0of", "1_0of", "2_0of"]
    with monkeypatch.context() as patch:
        patch.setattr(job, "fit_and_write", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setenv("RANK", "1")
        assert main(words(made, tmp_path / "many", *more, stored=False)) == 130  # the one that fits is interrupted
    assert "3 gates fitted, 3 there" in run("1")
    assert run("0").count("recall@2") == 3 and not list(folder.glob(".*"))
    one, two = gates(tmp_path / "one", "Ridge"), gates(tmp_path / "many", "Ridge")
    for name, gate in one.items():
        for key, weight in gate.items():
            torch.testing.assert_close(two[name][key], weight, rtol=1e-5, atol=1e-5 * float(weight.abs().max()))


def test_a_sample_is_the_same_for_any_number_of_processes() -> None:
    lengths = np.array([3, 0, 5, 1, 9, 2, 7])
    ids = np.split(np.arange(27), np.cumsum(lengths)[:-1])
    whole = draw(lengths, Share(), 11, 3)
    assert len(whole.kept) == whole.count == 11 and whole.there == 27 and np.array_equal(whole.slots, np.arange(11))
    for size in (2, 3, 7):
        found = np.full(11, -1)
        for rank in range(size):
            part = draw(lengths, Share(rank, size), 11, 3)
            assert (np.diff(part.kept) > 0).all()
            found[part.slots] = np.concatenate(ids[rank::size])[part.kept]
        assert np.array_equal(found, whole.kept)
    assert np.array_equal(draw(lengths, Share(), 100, 3).kept, np.arange(27))


def _one_file_less(folder: Path) -> None:
    next((folder / "llama_tiny-Hidden-Features" / "hidden_inputs" / "layer1").iterdir()).unlink()


def _other_width(folder: Path) -> None:
    path = folder / "llama_tiny-Hidden-Features" / "hidden_gate_outputs" / "layer1" / "0_0.pth"
    write_numbers(path, np.ones((len(torch.load(path)), 7), np.float16), overwrite=True)


def _four_dimensions(folder: Path) -> None:
    for name in ("hidden_inputs", "hidden_gate_outputs"):
        path = folder / "llama_tiny-Hidden-Features" / name / "layer1" / "0_0.pth"
        write_numbers(path, np.ones((2, 2, 3, 4), np.float16), overwrite=True)


def _half_a_layer(folder: Path) -> None:
    (folder / "llama_tiny-Hidden-Features" / ".states_0").mkdir()
    (folder / "llama_tiny-Hidden-Features" / "features_0.json").unlink()


def _other_weights(folder: Path) -> None:
    weights = load_file(folder / "llama_tiny" / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "llama_tiny" / "model.safetensors", {"format": "pt"})


def _other_split(folder: Path) -> None:
    write_numbers(folder / "split" / TEMPLATE.format(1), [0, 1, 2, 3] * 5, overwrite=True)


def _no_split(folder: Path) -> None:
    (folder / "split" / TEMPLATE.format(1)).unlink()


@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        (_one_file_less, (), "files in hidden_inputs"),
        (_other_width, (), "7 wide"),
        (_four_dimensions, (), "4 dimensions"),
        (_other_split, (), "20"),
        (_no_split, (), "split layer 1 first"),
        (None, ("--select_criterion", "l3_norm"), "--select_criterion='l3_norm' is unknown"),
        (None, ("--num_selects", "5"), "--num_selects 5 of 4"),
        (None, ("--num_experts", "8"), "expert 4 is empty"),
        (None, ("--templates", "layers.{}.mlp.up_proj.weight"), "up_proj"),
        (None, ("--gate", "tree"), "--gate='tree' is unknown"),
        (None, ("--stream",), "--hidden_features_path (counts with --hidden_features_path)"),
        (None, ("--text", "text.txt"), "--text (counts with --stream)"),
        (None, ("--reservoir", "9", "--ridge_target", "norm"), "--reservoir (counts with --stream), --ridge_target"),
        (None, ("--mlp_init_criterion", "weight", "--ridge_lambda", "1"), "--ridge_lambda (counts with"),
        (None, ("--gate", "ridge", "--lr", "1", "--add_noise"), "--lr (counts with --gate mlp or linear), --add_noise"),
        (_half_a_layer, (), "not finished"),
        (_other_weights, (), "other weights"),
    ],
)
def test_bad_input_leaves_nothing(
    made: Path, tmp_path: Path, spoil, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made
    if spoil:
        folder = tmp_path / "made"
        shutil.copytree(made, folder)
        spoil(folder)
    assert main(words(folder, tmp_path / "out", "--specify_layer", "1", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_memory_decides_how_many_processes_and_never_how_many_tokens(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = ("--specify_layer", "0")
    assert main(words(made, tmp_path / "most", *layer, "--max_tokens", "100")) == 0
    assert "tokens (--max_tokens)" in capsys.readouterr().out
    nbytes, bytes_of = [], job._layer_bytes
    monkeypatch.setattr(job, "_layer_bytes", lambda *given: nbytes.append(bytes_of(*given)) or nbytes[-1])
    assert main(words(made, tmp_path / "roomy", *layer)) == 0
    for less, code in ((0, 0), (1, 2)):
        free = SimpleNamespace(available=nbytes[0] - less)
        monkeypatch.setattr(job.psutil, "virtual_memory", lambda free=free: free)
        assert main(words(made, tmp_path / str(code), *layer)) == code
    assert "GB of memory" in capsys.readouterr().err
    one, two = (gates(tmp_path / out)[TEMPLATE.format(0)] for out in ("roomy", "0"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_stream_knows_its_texts_by_what_they_hold(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences(40, 5)), encoding="utf-8")
    more = ("--stream", "--gate", "ridge", "--block_size", "32", "--text", str(text), "--specify_layer", "0")
    assert main(words(made, tmp_path / "out", *more, stored=False)) == 0
    assert main(words(made, tmp_path / "out", *more, "--batch_size", "2", stored=False)) == 2
    assert main(words(made, tmp_path / "out", *more, stored=False)) == 0  # it is there
    text.write_text("\n".join(sentences(40, 6)), encoding="utf-8")
    assert main(words(made, tmp_path / "out", *more, stored=False)) == 2
    assert "fitted otherwise" in capsys.readouterr().err


def test_other_gates_are_not_replaced(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = ("--specify_layer", "0")
    assert main(words(made, tmp_path, *layer)) == 0
    assert main(words(made, tmp_path, *layer, "--lr", "0.5")) == 2
    assert "fitted otherwise" in capsys.readouterr().err
    assert main(words(made, tmp_path, *layer, "--lr", "0.5", "--overwrite")) == 0


def test_a_folder_holds_the_gates_of_one_request(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ridge = ("--gate", "ridge", "--stream", *texts(made))

    def run(*more: str) -> int:
        return main(words(made, tmp_path, *ridge, *more, stored=False))

    assert run() == 0
    assert run("--specify_layer", "1", "--ridge_lambda", "0.5") == 2  # also where another layer's gate is replaced
    files = tmp_path / f"llama_tiny-{EXPERTS}Expert-Select-Ridge"
    (files / TEMPLATE.format(1)).unlink()
    assert run("--specify_layer", "1", "--ridge_lambda", "0.5") == 2
    assert "(layer 0)" in capsys.readouterr().err
    assert run("--specify_layer", "1", "--ridge_lambda", "0.5", "--overwrite") == 0
    assert {path.name.partition(".mlp")[0] for path in files.glob("layers.*")} == {"layers.1"}
    assert run("--specify_layer", "0", "--ridge_lambda", "0.5", "--overwrite") == 0
    assert set(gates(tmp_path, "Ridge")) == {TEMPLATE.format(0), TEMPLATE.format(1)}  # both of the same request
    assert not list(files.glob(".*"))
