# SPDX-License-Identifier: Apache-2.0
"""The stage split: its files, resuming, every method, and what it refuses."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mindformers_ext.cli.experts import main
from mindformers_ext.core.errors import UserError
from mindformers_ext.formats import disk
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.jobs.experts import run_split
from mindformers_ext.jobs.experts.dense_model import open_dense
from mindformers_ext.jobs.experts.metis import graph_bytes
from mindformers_ext.jobs.experts.splits import open_split
from mindformers_ext.jobs.items import ray_cluster
from tests.helpers.tiny_llama import LAYERS, WIDTH, make_llama

NAME = "layers.{}.mlp.gate_proj.weight"
EXPERTS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama_tiny"
    make_llama(folder)
    return folder


def split(model: Path, out: Path, *more: object) -> int:
    return main([*map(str, ("split", "--model_path", model, "--save_path", out, "--quiet", *more))])


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.glob("layers*"))}


def spoiled(model: Path, out: Path, layer: int, change) -> Path:
    """A copy of the model whose gate of one layer is ``change(weight)``."""
    out.mkdir()
    (out / "config.json").write_bytes((model / "config.json").read_bytes())
    weights = load_file(model / "model.safetensors")
    name = f"model.{NAME.format(layer)}"
    weights[name] = change(weights[name])
    if weights[name] is None:
        del weights[name]
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def test_a_clustering_is_a_file_per_layer_that_torch_loads_by_default(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert split(model, tmp_path) == 0
    folder = tmp_path / "llama_tiny-8Expert-Split-Clustering"
    assert sorted(path.name for path in folder.iterdir()) == [*map(NAME.format, range(LAYERS)), "split_meta.json"]
    meta = json.loads((folder / "split_meta.json").read_text())
    weights = load_file(model / "model.safetensors")
    for layer in range(LAYERS):
        labels = torch.load(folder / NAME.format(layer))
        assert type(labels) is list and {type(label) for label in labels} == {int} and len(labels) == WIDTH
        assert np.bincount(labels).tolist() == [WIDTH // EXPERTS] * EXPERTS
        rows = torch.nn.functional.normalize(weights[f"model.{NAME.format(layer)}"].double())
        parts = [rows[[label == expert for label in labels]] for expert in range(EXPERTS)]
        judge = sum(((part - part.mean(0)) ** 2).sum() for part in parts)
        assert meta["layers"][str(layer)]["inertia"] == pytest.approx(float(judge), rel=1e-5)
        assert open_split(folder, NAME, layer).labels().tolist() == labels
    before = files(folder)
    assert split(model, tmp_path) == 0 and files(folder) == before  # all is kept
    assert "3 layers are finished" in capsys.readouterr().err
    begun = tmp_path / "begun"
    assert split(model, begun, "--specify_layer", 1, "--init_labels", folder) == 0
    assert torch.load(begun / folder.name / NAME.format(1)) == torch.load(folder / NAME.format(1))
    assert split(model, tmp_path / "other", "--workers", 2) == 0
    other = files(tmp_path / "other" / folder.name)
    assert {name: data for name, (data, _) in other.items()} == {name: data for name, (data, _) in before.items()}


def test_a_killed_split_goes_on_and_keeps_what_is_finished(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, done = run_split.write_split, []

    def killed(folder, template, layer, *rest):
        written(folder, template, layer, *rest)
        done.append(layer)
        if len(done) == 2:  # layers end in any order
            (folder / template.format(layer)).unlink()  # the entry without its file
            raise KeyboardInterrupt

    monkeypatch.setattr(run_split, "write_split", killed)
    assert split(model, tmp_path) == 130
    monkeypatch.undo()
    folder = tmp_path / "llama_tiny-8Expert-Split-Clustering"
    first = files(folder)[NAME.format(done[0])]
    (left,) = {0, 1, 2} - {*done}
    assert (
        split(model, tmp_path, "--specify_layer", *done) == 0 and split(model, tmp_path, "--specify_layer", left) == 0
    )
    assert files(folder)[NAME.format(done[0])] == first
    assert split(model, tmp_path / "whole") == 0
    whole = files(tmp_path / "whole" / folder.name)
    assert {name: data for name, (data, _) in files(folder).items()} == {n: data for n, (data, _) in whole.items()}


def test_what_was_made_otherwise_is_refused_unless_overwritten(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--method", "random")
    folder = tmp_path / "llama_tiny-8Expert-Split-Random"
    assert split(model, tmp_path, *words) == 0
    before = files(folder)
    assert split(model, tmp_path, *words, "--seed", 1) == 2 and files(folder) == before
    assert "seed 0 there, 1 here" in capsys.readouterr().err
    torch.save([0] * WIDTH, folder / NAME.format(1))
    assert split(model, tmp_path, *words) == 2 and "is empty" in capsys.readouterr().err
    torch.save(torch.load(folder / NAME.format(0)), folder / NAME.format(1))
    assert split(model, tmp_path, *words) == 2 and "is not what split wrote" in capsys.readouterr().err
    assert split(model, tmp_path, *words, "--overwrite", "--seed", 1, "--specify_layer", 0) == 0
    assert list(files(folder)) == [NAME.format(0)] != before  # of the other split nothing stays
    (folder / "split_meta.json").unlink()
    assert split(model, tmp_path, *words) == 2 and "without split_meta.json" in capsys.readouterr().err
    assert split(model, tmp_path / "c", "--specify_layer", 1) == 0
    again = spoiled(model, tmp_path / "llama_tiny", 1, lambda weight: weight * 2)
    assert split(again, tmp_path / "c", "--specify_layer", 1) == 2
    assert "other inputs" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "name"), [("random", "Random"), ("clustering", "Clustering")])
def test_the_seeds_scripts_are_the_stage(
    method: str, name: str, model: Path, tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "llama_7B"  # its folders are called after the name given
    link.symlink_to(model)
    script = repo_root / "research" / "llama_moe" / f"llama_split_{method}.py"
    words = ("--model_path", link, "--save_path", tmp_path / "temp", "--num_experts", 4, "--specify_layer", 2)
    monkeypatch.setattr("sys.argv", [str(script), *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    labels = torch.load(tmp_path / "temp" / f"llama_7B-4Expert-Split-{name}" / NAME.format(2))
    assert np.bincount(labels).tolist() == [WIDTH // 4] * 4


BAD = [
    (("--num_experts", 7), "choose a divisor of 96"),
    (("--num_experts", 97), "choose a divisor of 96"),
    (("--num_experts", 0), "choose a divisor of 96"),
    (("--specify_layer", LAYERS), "layers 0 to 2"),
    (("--templates", "layers.{}.mlp.down_proj.weight"), "names no matrix"),
    (("--templates", "../{}"), "names no matrix"),
    (("--metric", "l1"), "--metric 'l1' is unknown"),
    (("--starts", 0), "--starts 0"),
    (("--seed", -1), "--seed -1"),
    (("--workers", -2), "--workers -2"),
    (("--method", "random", "--metric", "l2"), "has no --metric"),
    (("--method", "graph"), "needs --hidden_features_path"),
    (("--method", "gradient"), "needs --score_file_path"),
    (("--init_labels", "nowhere"), "does not exist"),
    (("--model_path", "nowhere"), "is no folder"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(map(str, words)) for words, _ in BAD])
def test_wrong_options_end_with_2_and_nothing_is_written(
    words: tuple, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert split(model, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.index_fill(0, torch.tensor([5]), float("nan")), "layer 1, gate_proj: row 5 holds NaN"),
        (lambda weight: weight.index_fill(0, torch.tensor([6]), float("inf")), "row 6"),
        (lambda weight: None, "layers.1.mlp.gate_proj.weight"),
    ],
)
def test_damaged_weights_end_with_2_and_nothing_is_written(
    change, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = spoiled(model, tmp_path / "damaged", 1, change)
    assert split(damaged, tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_rows_of_zeros_are_split_and_a_place_that_cannot_be_written_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zeros = spoiled(model, tmp_path / "zeros", 0, lambda weight: weight * (torch.arange(WIDTH)[:, None] > 40))
    assert split(zeros, tmp_path / "out", "--specify_layer", 0) == 0
    meta = json.loads((tmp_path / "out" / "zeros-8Expert-Split-Clustering" / "split_meta.json").read_text())
    assert 0 < meta["layers"]["0"]["inertia"] < WIDTH
    (tmp_path / "file").write_text("")
    assert split(model, tmp_path / "file") == 2 and "is a file" in capsys.readouterr().err


def test_every_form_of_a_split_file_is_read(tmp_path: Path) -> None:
    labels = [0, 1, 1, 0]
    folder = tmp_path / "m-2Expert-Split-Clustering-l2"
    folder.mkdir()
    named = tmp_path / "m-2Expert-Split-Clustering"  # as the seed names it
    old = ([np.int32(label) for label in labels], np.array(labels, float), torch.tensor(labels), tuple(labels))
    for value in (labels, *old):
        for protocol in (2, 5):
            torch.save(value, folder / NAME.format(0), pickle_protocol=protocol)
            assert open_split(named, NAME, 0, 2, allow_pickle=True).labels().tolist() == labels
    torch.save([[3, 1], [1, 0]], folder / NAME.format(0))
    shared = open_split(folder, NAME, 0, 2, width=6)
    assert [ids.tolist() for ids in shared.experts] == [[3, 1], [1, 0]] and shared.width == 6
    with_residual = open_split(folder, NAME, 0, 1)
    assert with_residual.residual[0].tolist() == [3, 1] and with_residual.experts[0].tolist() == [1, 0]
    torch.save(old[0], folder / NAME.format(0), pickle_protocol=5)
    with pytest.raises(UserError, match="--allow_pickle"):
        open_split(folder, NAME, 0)
    torch.save([Path("x")], folder / NAME.format(0))
    for allow in (False, True):
        with pytest.raises(UserError, match="asks to run 'pathlib"):
            open_split(folder, NAME, 0, allow_pickle=allow)


def features(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for layer in range(LAYERS):
        for name, width in (("hidden_inputs", 48), ("hidden_gate_outputs", WIDTH)):
            place = folder / "f" / name / f"layer{layer}"
            place.mkdir(parents=True)
            values = rng.random((2, 40, width)) * np.repeat(rng.random((2, 40, 4)) < 0.3, width // 4, 2)
            for number, shard in enumerate(values.astype(np.float16)):
                torch.save(torch.from_numpy(shard), place / f"0_{number}.pth")
    return folder / "f"


def test_a_graph_split_uses_gpmetis_where_it_is_and_its_own_parts_elsewhere(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--method", "graph", "--num_experts", 4, "--specify_layer", 0, "--hidden_features_path")
    words = (*words, features(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert split(model, tmp_path / "own", *words) == 0
    graph = tmp_path / "own" / "llama_tiny-4Expert-Split-Graph-l1_norm"
    found = open_split(graph, NAME, 0)
    assert found.sizes == (24,) * 4
    assert json.loads((graph / "gp_split" / "split_meta.json").read_text())["layers"]["0"]["by"] == "spectral"
    lines = (graph / NAME.format(0)).read_text().splitlines()
    assert lines[0].split()[0] == "96" and lines[0].endswith(" 001") and len(lines) == 97
    program = tmp_path / "gpmetis"
    parts = "".join(f"{part}\\n" for part in (0, 1, 2, 0, 1, 2, 0, 1) * 12)
    program.write_text(f'#!/bin/sh\nprintf "{parts}" > "$2.part.$3"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    assert split(model, tmp_path / "metis", *words) == 0
    graph = tmp_path / "metis" / graph.name
    found = open_split(graph, NAME, 0)
    assert json.loads((graph / "gp_split" / "split_meta.json").read_text())["layers"]["0"]["by"] == "gpmetis"
    assert found.sizes == (24,) * 4  # part 3, which it left empty, is filled
    raw = np.tile([0, 1, 2, 0, 1, 2, 0, 1], 12)
    assert (found.labels() != raw).sum() == 24
    program.unlink()
    assert split(model, tmp_path / "metis", *words, "--overwrite") == 0  # its file of parts is of this graph
    meta = graph / "gp_split" / "split_meta.json"
    assert "part.4" in json.loads(meta.read_text())["layers"]["0"]["by"]
    assert np.array_equal(open_split(graph, NAME, 0).labels(), found.labels())
    assert split(model, tmp_path / "metis", *words, "--overwrite", "--seed", 1) == 0  # and of another seed
    assert json.loads(meta.read_text())["layers"]["0"]["by"] == "spectral"
    (graph / f"{NAME.format(0)}.part.4").write_text("".join(f"{part}\n" for part in range(4) for _ in range(24)))
    assert (
        split(model, tmp_path / "metis", *words, "--overwrite", "--seed", 2) == 0
    )  # whose parts they are, nobody says
    assert "part.4" in json.loads(meta.read_text())["layers"]["0"]["by"]


def test_the_disk_of_all_graphs_is_asked_for_before(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--method", "graph", "--num_experts", 4, "--hidden_features_path", features(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert split(model, tmp_path / "own", *words) == 0
    graph = tmp_path / "own" / "llama_tiny-4Expert-Split-Graph-l1_norm"
    sizes = [(graph / NAME.format(layer)).stat().st_size for layer in range(LAYERS)]
    assert max(sizes) <= graph_bytes(WIDTH) <= 4 * max(sizes)
    monkeypatch.setattr(disk, "free_bytes", lambda path: LAYERS * graph_bytes(WIDTH) - 1)
    assert split(model, tmp_path / "out", *words) == 2
    assert "make room there" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_gradient_splits_take_importance_by_the_number_of_its_folder(model: Path, tmp_path: Path) -> None:
    scores = np.random.default_rng(1).random((12, WIDTH)).astype(np.float32)
    for cluster, row in enumerate(scores):
        place = tmp_path / "Gradients12" / "kind" / str(cluster)
        place.mkdir(parents=True)
        torch.save(torch.from_numpy(row), place / f"{NAME.format(0)}.change")
    words = ("--method", "gradient", "--score_file_path", tmp_path / "Gradients12" / "kind", "--specify_layer", 0)
    assert split(model, tmp_path, *words) == 0
    base = tmp_path / "llama_tiny-Split-Gradient-max-l1_norm-sample-feature_change"
    labels = torch.load(base / "12Experts-8Neurons" / NAME.format(0))
    assert np.bincount(labels).tolist() == [8] * 12
    assert np.mean([scores[label, i] for i, label in enumerate(labels)]) > 0.75  # of folder 10 as the eleventh
    shared = ("--share_neurons", "True", "--expert_size", 10, "--visualization_path", tmp_path / "seen")
    assert split(model, tmp_path, *words, *shared) == 0
    lists = torch.load(base / "12Experts-10Neurons-Share" / NAME.format(0))
    assert lists == [np.argsort(-row, kind="stable")[:10].tolist() for row in scores]
    held = len({neuron for ids in lists for neuron in ids})
    assert (tmp_path / "seen" / "total_neurons.txt").read_text() == f"layer 0: {held} of {WIDTH}\n"
    assert (tmp_path / "seen" / "overlap_layer0.png").read_bytes()[:4] == b"\x89PNG"
    residual = ("--expert_num_moe", 6, "--expert_num_residual", 2, "--expert_size", 12)
    assert split(model, tmp_path, *words, *residual) == 0
    found = open_split(base / "6Experts-2Residuals-12Neurons", NAME, 0, 6)
    assert found.sizes == (12,) * 6 and found.residual_sizes == (12, 12) and found.is_partition
    assert split(model, tmp_path, *words, "--expert_size", 9) == 2


def test_importance_that_tells_what_it_is_must_fit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "scores"
    for cluster in range(2):
        (place / str(cluster)).mkdir(parents=True)
        scores = torch.from_numpy(np.random.default_rng(cluster).random(WIDTH).astype(np.float32))
        torch.save(scores, place / str(cluster) / f"{NAME.format(0)}.change")
    reader = open_dense(model).reader
    about = {"kernel": "l2_norm", "level": "total", "type": "feature_change", "layers": [0]}
    words = ("--method", "gradient", "--score_file_path", place, "--specify_layer", 0)
    for more, message in (
        ({}, "was made with --kernel l2_norm, --accumulate_level total"),
        ({"kernel": "l1_norm", "level": "sample", "weights": "others"}, "other weights"),
        ({"kernel": "l1_norm", "level": "sample", "layers": [1]}, "no importance of layer 0"),
    ):
        told = {"about": {**about, "weights": fingerprint(reader), **more}}
        (place / "importance.json").write_text(json.dumps(told))
        assert split(model, tmp_path / "out", *words) == 2 and message in capsys.readouterr().err
    (place / "importance.json").unlink()
    (place / ".sums_0.json").write_text("{}")
    assert split(model, tmp_path / "out", *words) == 2 and "not finished" in capsys.readouterr().err
    (place / ".sums_0.json").unlink()
    assert split(model, tmp_path / "out", *words, "--share_neurons", "--exact") == 2
    assert "--exact has no effect" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert split(model, tmp_path / "out", *words) == 0


def test_a_cluster_that_cannot_be_used_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
    assert split(model, tmp_path, "--method", "random", "--ray", "auto") == 2
    assert "pip install 'mindformers_ext[ray]'" in capsys.readouterr().err
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: name)
    assert split(model, tmp_path, "--method", "random", "--ray", "127.0.0.1:1") == 2
    assert "nobody answers" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_machines_of_a_ray_cluster_give_the_same_splits(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'mindformers_ext[ray]'")
    from ray.cluster_utils import Cluster

    each = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=each)
    try:
        cluster.add_node(**each)
        cluster.wait_for_nodes()
        assert split(model, tmp_path / "ray", "--ray", cluster.address) == 0
    finally:
        cluster.shutdown()
    assert split(model, tmp_path / "here") == 0
    name = "llama_tiny-8Expert-Split-Clustering"
    there, here = (files(tmp_path / place / name) for place in ("ray", "here"))
    assert {file: data for file, (data, _) in there.items()} == {file: data for file, (data, _) in here.items()}
