# SPDX-License-Identifier: Apache-2.0
"""One YAML for all stages: what reaches each of them, in which order, and at which cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mindformers_ext.cli import experts_run
from mindformers_ext.cli.experts import main
from mindformers_ext.jobs.experts import split_methods
from tests.helpers.tiny_llama import LAYERS, make_llama, sentences


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama_tiny"
    make_llama(folder)
    return folder


def config(model: Path, out: Path, **sections: object) -> Path:
    path = out / "experts.yaml"
    path.write_text(yaml.safe_dump({"model_path": str(model), "save_path": str(out / "work"), **sections}))
    return path


@pytest.mark.parametrize("value", [True, False, None])
def test_a_switch_of_the_yaml_is_what_the_stage_gets(model: Path, tmp_path: Path, value: bool | None) -> None:
    names = ("use_softmax", "multiply_gate_scores", "use_random_gate", "quiet", "allow_pickle", "reversed")
    path = config(model, tmp_path, convert={"save_path": "moe", **dict.fromkeys(names, value)})
    (stage,) = experts_run.read_stages(path)
    words = experts_run._parsed("convert", stage.options)
    preset = {"use_softmax": None, "multiply_gate_scores": None}
    assert {name: getattr(words, name) for name in names} == {
        name: preset.get(name, False) if value is None else value for name in names
    }


@pytest.mark.parametrize(
    ("method", "order"),
    [
        ("random", ["split", "importance", "features"]),
        ("graph", ["features", "split", "importance"]),
        ("gradient", ["importance", "split", "features"]),
    ],
)
def test_what_a_split_reads_is_made_before_it(
    model: Path, tmp_path: Path, method: str, order: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "named"
    link.symlink_to(model)
    texts = {"text": str(tmp_path / "text.txt")}
    path = config(link, tmp_path, split={"method": method}, features=texts, importance={**texts, "num_clusters": 4})
    assert main(["run", str(path), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == order
    reads = {"graph": "hidden_features_path", "gradient": "score_file_path"}
    for line in lines:
        if line.split()[2] == "split" and method in reads:
            assert f"--{reads[method]} {tmp_path / 'work'}" in line and "named-" in line  # the link's own name


def test_the_folder_of_a_split_is_told_without_reading_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(model, tmp_path, split={"quiet": True}, convert={"save_path": "moe"})

    def read(*given: object) -> None:
        raise AssertionError("a matrix was read")

    monkeypatch.setattr(split_methods, "_cluster_mark", read)
    _, convert = experts_run.read_stages(path)
    assert convert.options["split_file_path"] == str(tmp_path / "work" / "llama_tiny-8Expert-Split-Clustering")


def test_a_gradient_split_is_made_from_the_importance_before_it(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(sentences(20, 5)), encoding="utf-8")
    importance = {"text": str(tmp_path / "text.txt"), "num_clusters": 4, "block_size": 24, "kernel": "l2_norm"}
    path = config(model, tmp_path, quiet=True, importance=importance, split={"method": "gradient"})
    assert main(["run", str(path)]) == 0
    (meta,) = (tmp_path / "work").glob("llama_tiny-Split-Gradient-max-l2_norm-*/4Experts-24Neurons/split_meta.json")
    assert len(json.loads(meta.read_text())["layers"]) == LAYERS


def test_overwriting_makes_what_was_made_otherwise_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, more, code in ((0, (), 0), (1, (), 2), (1, ("--overwrite",), 0)):
        path = config(model, tmp_path, split={"method": "random", "seed": seed, "quiet": True})
        assert main(["run", str(path), *more]) == code
    assert "seed 0 there, 1 here" in capsys.readouterr().err


def test_what_all_stages_share_goes_where_it_counts(model: Path, tmp_path: Path) -> None:
    shared = {"batch_size": 2, "engine": "pt", "lr": 0.5, "ridge_target": "norm", "workers": 2}
    path = config(model, tmp_path, **shared, split={"method": "random"}, select={"stream": True, "gate": "ridge"})
    split, select = experts_run.read_stages(path)
    assert "workers" in split.options
    assert not {"lr", "workers", "hidden_features_path"} & set(select.options)
    assert {"batch_size", "ridge_target"} <= set(select.options)
    path = config(model, tmp_path, split={"method": "random"}, select={"gate": "ridge", "lr": 0.5})
    _, select = experts_run.read_stages(path)
    assert select.options["lr"] == 0.5  # what a section says is judged by its stage
