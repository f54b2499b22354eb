# SPDX-License-Identifier: Apache-2.0
"""Importance of neurons: autograd's gradients, summed per cluster; two processes give what one does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from mindformers_ext.cli.experts import main
from mindformers_ext.jobs.experts import importance as job
from tests.helpers.tiny_llama import LAYERS, make_llama, sentences


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("importance")
    make_llama(folder / "llama_tiny", tied=True)
    (folder / "text.txt").write_text("\n".join(sentences(20, 5)), encoding="utf-8")
    return folder


def words(made: Path, out: Path, *more: str) -> list[str]:
    return [
        *("importance", "--model_path", str(made / "llama_tiny"), "--save_path", str(out), "--text"),
        *(str(made / "text.txt"), "--block_size", "24", "--batch_size", "3", "--num_clusters", "2", "--quiet", *more),
    ]


def vectors(out: Path, ending: str = "change") -> dict[str, np.ndarray]:
    (folder,) = (out / "Gradients2").iterdir()
    return {str(path.relative_to(folder)): torch.load(path).numpy() for path in folder.glob(f"*/*.{ending}")}


@pytest.mark.parametrize(
    ("kernel", "level", "kind"), [("l1_norm", "sample", "feature_change"), ("l2_norm", "total", "feature_grad")]
)
def test_equals_autograd(
    made: Path, tmp_path: Path, kernel: str, level: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    clusters = job._clusters

    def spy(request, start):
        seen["rows"], seen["clusters"] = start.every, clusters(request, start)
        return seen["clusters"]

    monkeypatch.setattr(job, "_clusters", spy)
    more = ("--kernel", kernel, "--accumulate_level", level, "--importance_type", kind)
    assert main(words(made, tmp_path, *more)) == 0
    found = vectors(tmp_path, kind.removeprefix("feature_"))
    assert len(found) == 2 * 2 * LAYERS
    rows = seen["rows"]
    judge = LlamaForCausalLM.from_pretrained(made / "llama_tiny").double().eval()
    kept: dict[str, list] = {}
    for layer, module in enumerate(judge.model.layers):
        for key, tap in (("gate_proj", module.mlp.gate_proj), ("up_proj", module.mlp.down_proj)):
            name = f"layers.{layer}.mlp.{key}.weight.{kind.removeprefix('feature_')}"

            def hook(module, given, left, name=name, entering=key == "up_proj"):
                tensor = given[0] if entering else left
                tensor.retain_grad()
                kept.setdefault(name, []).append(tensor)

            tap.register_forward_hook(hook)
    for row, length in zip(rows.ids, rows.lengths, strict=True):
        ids = torch.from_numpy(row[:length]).long()
        logits = judge(ids[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum").backward()
    apply = {"l1_norm": torch.abs, "l2_norm": torch.square}[kernel]
    for cluster in range(2):
        mine = [row for row in range(len(rows.ids)) if seen["clusters"][row] == cluster]
        count = sum(int(rows.lengths[row]) - 1 for row in mine)
        for name, tensors in kept.items():
            values = torch.cat(
                [
                    (tensors[row] * tensors[row].grad if kind == "feature_change" else tensors[row].grad)[0]
                    for row in mine
                ]
            )
            wanted = apply(values).sum(0) if level == "sample" else apply(values.sum(0))
            wanted = (wanted / count).detach().numpy()
            ours = found[f"{cluster}/{name}"]
            assert np.abs(ours - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_two_processes_equal_one_and_a_killed_run_goes_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(words(made, tmp_path / "one", "--specify_layer", "0", "2")) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    end = job.ImportanceSink.end
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with monkeypatch.context() as patch:

            def killed(sink, layer):
                if layer == 0:
                    raise KeyboardInterrupt
                end(sink, layer)

            patch.setattr(job.ImportanceSink, "end", killed)
            assert main(words(made, tmp_path / "two", "--specify_layer", "0", "2")) == 130
        assert main(words(made, tmp_path / "two", "--specify_layer", "0", "2")) == 0
        done = list((tmp_path / "two").glob("*/*/importance.json"))
        assert bool(done) == (rank == "1")
    one, two = vectors(tmp_path / "one"), vectors(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 8
    for name in one:
        assert np.abs(one[name] - two[name]).max() <= 1e-5 * np.abs(one[name]).max()
    (folder,) = (tmp_path / "two" / "Gradients2").iterdir()
    assert not list(folder.glob(".*"))
    assert json.loads((folder / "importance.json").read_text())["about"]["layers"] == [0, 2]


def test_overwriting_begins_anew_and_a_dry_run_touches_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(made, tmp_path)) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for more in (("--batch_size", "2"), ("--seed", "1")):
        assert main(words(made, tmp_path, *more)) == 2
        assert "holds others" in capsys.readouterr().err
        assert main(words(made, tmp_path, *more, "--overwrite", "--dry_run")) == 0
    assert main(words(made, tmp_path)) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    seen: list[int] = []
    take = job.ImportanceSink.take

    def counted(sink, layer, *given):
        seen.append(layer)
        if layer == 0 and seen.count(0) == 1:
            raise KeyboardInterrupt
        take(sink, layer, *given)

    monkeypatch.setattr(job.ImportanceSink, "take", counted)
    assert main(words(made, tmp_path, "--overwrite")) == 130  # also where the same stands there
    first = len(seen)
    assert main(words(made, tmp_path, "--overwrite")) == 0
    assert set(seen[first:]) == {0, 1, 2}  # layer 2 was done when the other run was killed, and is computed again
    assert main(words(made, tmp_path, "--overwrite", "--specify_layer", "2", "0")) == 0
    assert {name.split("/")[1].split(".")[1] for name in vectors(tmp_path)} == {"0", "2"}


def test_bad_options_leave_nothing(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (("--kernel", "l3"), "--kernel='l3' is unknown"),
        (("--accumulate_level", "token"), "--accumulate_level='token'"),
        (("--importance_type", "grad"), "--importance_type='grad'"),
        (("--num_clusters", "500"), "for 500 clusters"),
    ):
        assert main(words(made, tmp_path / "out", *more)) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
