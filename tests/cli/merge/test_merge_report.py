# SPDX-License-Identifier: Apache-2.0
"""``--report``, sizes of real models, and the chat templates a merge can be given."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindformers_ext.cli.merge import main
from tests.helpers.merge_models import config_of, family, make_model, shapes_of, tensors_of

pytest.importorskip("torch", reason="merging computes with torch")


def run(config, *flags, command="yaml", out="out"):
    Path("c.yml").write_text(yaml.safe_dump(config))
    return main([command, "c.yml", out, "--quiet", *flags])


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def cosine(a, b):
    a, b = a.astype(float).ravel(), b.astype(float).ravel()
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_the_report_holds_the_cosines(capsys):
    family(Path())
    parts = [{"model": name, "parameters": {"weight": 1}} for name in ("base", "ft1", "ft2")]
    config = {"merge_method": "ties", "base_model": "base", "models": parts}
    assert run(config, "--dry-run", "--report", "report") == 0
    assert not Path("out").exists() and (Path("report/cosines.png").stat().st_size > 10_000)
    base, one, two = (tensors_of(Path(name)) for name in ("base", "ft1", "ft2"))
    with Path("report/cosines.csv").open() as file:
        found = {
            (r["what"], r["tensor"], r["layer"], r["first"], r["second"]): float(r["cosine"])
            for r in csv.DictReader(file)
        }
    name = "model.layers.2.mlp.up_proj.weight"
    assert found["weights", "up_proj", "2", "base", "ft2"] == pytest.approx(cosine(base[name], two[name]), abs=1e-5)
    deltas = [model[name].astype(np.float32) - base[name].astype(np.float32) for model in (one, two)]
    assert found["task vectors", "up_proj", "2", "ft1", "ft2"] == pytest.approx(cosine(*deltas), abs=1e-2)
    assert "lm_head" in Path("report/report.md").read_text() and ("weights", "lm_head", "", "ft1", "ft2") in found
    assert run(config, "--report", "report") == 2 and "--overwrite" in capsys.readouterr().err


def test_strangers_are_warned_of_and_mixtures_compare_their_experts(capsys):
    make_model(Path("one"))
    make_model(Path("two"), seed=5)
    config = {"merge_method": "linear", "models": [{"model": n, "parameters": {"weight": 1}} for n in ("one", "two")]}
    Path("c.yml").write_text(yaml.safe_dump(config))
    assert main(["yaml", "c.yml", "out", "--report", "report"]) == 0
    assert "little in common" in capsys.readouterr().err and Path("out/model.safetensors").is_file()
    experts = [{"source_model": name} for name in ("one", "two")]
    assert (
        run(
            {"base_model": "one", "gate_mode": "random", "experts": experts},
            "--report",
            "moe_report",
            command="moe",
            out="moe",
        )
        == 0
    )
    assert "down_proj" in Path("moe_report/report.md").read_text()
    stack = {"slices": [{"sources": [{"model": "one", "layer_range": [0, 4]}]}], "merge_method": "passthrough"}
    assert run(stack, "--report", "none", out="stack") == 2
    assert "no tensor of this merge has two models" in capsys.readouterr().err and not Path("stack").exists()


def test_a_stack_of_two_7b_has_9b_parameters(capsys):
    """The tutorial's passthrough, on files with the headers of Mistral-7B and holes for data."""
    sizes = dict(layers=32, hidden=4096, ffn=14336, vocab=32000, num_attention_heads=32, num_key_value_heads=8)
    config = config_of("mistral", **sizes)
    header, at = {}, 0
    for name, shape in shapes_of(config).items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + 2 * int(np.prod(shape))]}
        at = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    names = ["OpenPipe/mistral-ft-optimized-1218", "mlabonne/NeuralHermes-2.5-Mistral-7B"]
    for name in names:
        Path(name).mkdir(parents=True)
        Path(name, "config.json").write_text(json.dumps(config))
        with Path(name, "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
    path = Path(__file__).resolve().parents[3] / "configs/merge/passthrough.yaml"
    assert main(["yaml", str(path), "out", "--dry_run"]) == 0
    layer = 2 * 4096 + 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336
    total = 40 * layer + 2 * 32000 * 4096 + 4096
    assert f"{total / 1e6:.1f} M parameters" in capsys.readouterr().out and 8.9e9 < total < 9.1e9
