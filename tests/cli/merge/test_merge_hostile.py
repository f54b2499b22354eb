# SPDX-License-Identifier: Apache-2.0
"""Configurations of models that somebody wrote to break a merge: a message and exit code 2, in no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mindformers_ext.cli.merge import main
from tests.helpers.merge_models import family, make_model

pytest.importorskip("torch", reason="merging computes with torch")
WRONG = {
    "layers": {"num_hidden_layers": 10**9},
    "layers of text": {"num_hidden_layers": "4"},
    "architectures": {"architectures": 5},
    "architecture": {"architectures": [["LlamaForCausalLM"]]},
    "type": {"architectures": None, "model_type": ["llama"]},
    "width": {"intermediate_size": [48]},
    "null": {"hidden_size": None},
    "negative": {"num_attention_heads": -4},
    "fraction": {"head_dim": 8.0},
}
HARMLESS = {
    "huge": {"vocab_size": 10**30},
    "rope": {"rope_scaling": ["linear"]},
    "nested": {"rope_parameters": "default"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    family(folder, layers=2)
    make_model(folder / "mix", kind="mixtral", layers=1)
    return folder


def changed(place, tmp_path, words, base="base"):
    folder = tmp_path / "model"
    make_model(folder, layers=2) if base == "base" else make_model(folder, kind="mixtral", layers=1)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | words))
    return folder


def run(command, config, tmp_path, capsys):
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    code = main([command, str(tmp_path / "c.yml"), str(tmp_path / "out"), "--quiet"])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return code, said


@pytest.mark.parametrize("name", [*WRONG, *HARMLESS])
def test_a_config_of_wrong_kinds(name, place, tmp_path, capsys):
    folder = str(changed(place, tmp_path, (WRONG | HARMLESS)[name]))
    parts = [{"model": n, "parameters": {"weight": 1}} for n in (folder, str(place / "ft1"))]
    code, said = run("yaml", {"models": parts, "merge_method": "linear"}, tmp_path, capsys)
    assert code == (2 if name in WRONG else 0), said
    experts = [{"source_model": n} for n in (str(place / "ft1"), folder)]
    for base in (folder, str(place / "base")):
        if name in WRONG and base == folder:
            config = {"base_model": base, "gate_mode": "random", "experts": experts}
            code, said = run("moe", config, tmp_path, capsys)
            assert code == 2, said


@pytest.mark.parametrize("experts", [10**9, -1, "4", None, [4]])
def test_a_number_of_experts_that_is_none(experts, place, tmp_path, capsys):
    folder = str(changed(place, tmp_path, {"num_local_experts": experts}, "mix"))
    parts = [{"model": n, "parameters": {"weight": 1}} for n in (folder, str(place / "mix"))]
    code, said = run("yaml", {"models": parts, "merge_method": "linear"}, tmp_path, capsys)
    assert code == 2 and ("experts" in said or "num_local_experts" in said)


@pytest.mark.parametrize(
    "name", [{"model": 5}, {"model": {"path": ["a"]}}, ["base"], {"model": "base", "lora": 3}, "+"]
)
def test_a_reference_of_wrong_kind(name, place, tmp_path, capsys):
    for command, config in (
        ("yaml", {"models": [{"model": name, "parameters": {"weight": 1}}], "merge_method": "linear"}),
        ("moe", {"base_model": name, "gate_mode": "random", "experts": [{"source_model": name}] * 2}),
    ):
        code, said = run(command, config, tmp_path, capsys)
        assert code == 2, said


def test_a_template_behind_a_link_is_not_written(place, tmp_path, capsys):
    (tmp_path / "secret").write_text("{{ secret }}")
    folder = make_model(tmp_path / "model", layers=2)
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    parts = [{"model": str(folder), "parameters": {"weight": 1}}]
    config = {"models": parts, "merge_method": "linear", "chat_template": "auto"}
    assert run("yaml", config, tmp_path, capsys)[0] == 0
    assert not any("secret" in path.read_text() for path in Path(tmp_path / "out").glob("*.j*"))
