# SPDX-License-Identifier: Apache-2.0
"""``distribution`` and ``align``: what layers add is measured again by the float64 oracle, which knows neither."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mindformers_ext.cli.experts import main
from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.jobs.checkpoint.convert import ConvertRequest, convert
from mindformers_ext.jobs.experts.v2.layer_tables import (
    DISTRIBUTION,
    GATE,
    GATES,
    LayerTable,
    beside_of,
    read_table,
    write_table,
)
from mindformers_ext.surgery.experts.alignment import Moments, rescale
from tests.cli.experts.test_gates_grads import CHAT, rows_of, write_chats
from tests.helpers import llama_moe_v2_oracle as oracle
from tests.helpers.llama_moe_v2_models import read_folder
from tests.helpers.tiny_llama import HIDDEN, LAYERS, make_llama

LENGTH = 40
Found = dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]  # mean and variance of "attn" or "mlp" of a layer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, conversations, its distribution, and four mixtures of it."""
    folder = tmp_path_factory.mktemp("align")
    make_llama(folder / "llama_tiny")
    settings = folder / "llama_tiny" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": CHAT}))
    write_chats(folder / "chats.jsonl")
    assert main(words("distribution", folder, "llama_tiny", folder)) == 0
    neurons = {layer: {"residual": list(range(24))} for layer in range(LAYERS)}
    for layer in neurons.values():
        layer |= {str(e): list(range(24 + 24 * e, 48 + 24 * e)) for e in range(3)}
    (folder / "neurons.json").write_text(json.dumps(neurons))
    zeros = {layer: {GATE: np.zeros((4, HIDDEN), np.float32)} for layer in range(LAYERS)}
    write_table(folder / "zeros.npz", LayerTable(GATES, zeros))
    residual = ("--style", "mixtral-residual", "--neuron_indices_file", folder / "neurons.json", "--top_k", 2)
    made_by: dict[str, tuple[object, ...]] = {
        "same": ("--num_experts", 4, "--top_k", 4, "--scale_factor", 4, "--gate_weights_file", folder / "zeros.npz"),
        "vanilla": ("--num_experts", 4, "--top_k", 2, "--scale_factor", 1),
        "residual": (*residual, "--scale_factor", 1.5, "--num_moe_contract_layers", 1),
        "heads": ("--style", "attention", "--top_k_attn", 1, "--scale_factor_attn", 2.0),
    }
    for name, more in made_by.items():
        style = () if "--style" in more else ("--style", "mixtral")
        source = "residual" if name == "heads" else "llama_tiny"
        assert (
            main([*map(str, ("convert", "--model_path", folder / source, "--save_path", folder / name, *style, *more))])
            == 0
        )
    return folder


def words(stage: str, made: Path, model: str, out: Path, *more: object) -> list[str]:
    if stage == "align" and "--distribution_file" not in more:
        more = ("--distribution_file", made / "distribution.pt", *more)
    texts = () if "--text" in more else ("--conversations", made / "chats.jsonl")
    parts = ("--model_path", made / model, "--save_path", out, *texts, "--block_size", LENGTH, "--quiet")
    return [*map(str, (stage, *parts, *more))]


def kept(original: Callable[..., torch.Tensor], seen: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
    def function(*given: Any) -> torch.Tensor:
        out = original(*given)
        seen.append(out.reshape(-1, HIDDEN))
        return out

    return function


def measured(folder: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> Found:
    """By the oracle, text after text without padding."""
    config, tensors = read_folder(folder)
    double = {name: torch.from_numpy(array.astype(np.float64)) for name, array in tensors.items()}
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    with monkeypatch.context() as patch:
        for function, part in (("attention", "attn"), ("expert_attention", "attn"), ("feed_forward", "mlp")):
            patch.setattr(oracle, function, kept(getattr(oracle, function), seen[part]))
        for ids, _ in rows_of(made):
            oracle.logits(config, double, torch.tensor([ids]))
    found: Found = {}
    for part, outputs in seen.items():
        for layer in range(LAYERS):
            tokens = torch.cat(outputs[layer::LAYERS]).numpy()
            found[part, layer] = tokens.mean(0), tokens.var(0)
    return found


def test_the_distribution_is_what_the_dense_model_adds(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, wanted = read_table(made / "distribution.pt", DISTRIBUTION), measured(made / "llama_tiny", made, monkeypatch)
    assert table.about["model"] and table.about["texts"] and len(wanted) == 2 * LAYERS
    assert min(len(ids) for ids, _ in rows_of(made)) < LENGTH  # rows have padding
    for (part, layer), (mean, variance) in wanted.items():
        arrays = table.layers[layer]
        assert arrays[f"{part}.number"].tolist() == [sum(len(ids) for ids, _ in rows_of(made))]
        np.testing.assert_allclose(arrays[f"{part}.mean"], mean, atol=2e-6)
        np.testing.assert_allclose(arrays[f"{part}.variance"], variance, rtol=1e-4)
    published = torch.load(made / "distribution.pt", weights_only=True)
    assert [*published[1]] == ["attn", "mlp"] and published[1]["mlp"]["mean"].shape == (HIDDEN,)


def test_a_model_that_is_the_dense_one_stays_as_it_is(made: Path, tmp_path: Path) -> None:
    assert main(words("align", made, "same", tmp_path / "out")) == 0
    (_, before), (config, after) = read_folder(made / "same"), read_folder(tmp_path / "out")
    biases = [name for name in after if name.endswith("w2.bias")]
    assert config["add_rescale_bias"] is True and len(biases) == 4 * LAYERS == len(after) - len(before)
    assert max(np.abs(after[name]).max() for name in biases) <= 1e-5
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("model", "engine"),
    [
        ("vanilla", "pt"),
        ("residual", "pt"),
        ("heads", "pt"),
        pytest.param("heads", "ms", marks=[pytest.mark.slow, pytest.mark.turn("llama_moe_v2")]),
    ],
)
def test_an_aligned_model_adds_what_the_dense_one_adds(
    made: Path, tmp_path: Path, model: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(words("align", made, model, tmp_path / "out", "--engine", engine)) == 0
    assert not list(tmp_path.glob(".*")) and (tmp_path / "out" / "tokenizer.json").is_file()
    wanted, before, found = (
        measured(folder, made, monkeypatch) for folder in (made / "llama_tiny", made / model, tmp_path / "out")
    )
    spec = model_spec_from_hf(read_folder(tmp_path / "out")[0])
    compared = 0
    for (part, layer), (mean, variance) in wanted.items():
        if spec.layer(layer).moe is None or (part == "attn" and not spec.attn_experts):
            continue
        compared += 1
        size = np.abs(mean).max()
        assert np.abs(before[part, layer][1] / variance - 1).max() > 0.2
        np.testing.assert_allclose(found[part, layer][0], mean, atol=1e-3 * size)
        np.testing.assert_allclose(found[part, layer][1], variance, rtol=1e-3)
    assert compared == {"vanilla": 3, "residual": 1, "heads": 2}[model]


def test_an_aligned_model_goes_to_mindspore_and_back(made: Path, tmp_path: Path) -> None:
    out, ckpt, back = tmp_path / "out", tmp_path / "out.ckpt", tmp_path / "back"
    assert main(words("align", made, "heads", out, "--to_mindspore", ckpt)) == 0
    convert(ConvertRequest(input_path=ckpt, output_path=back, direction="to_hf"))
    (config, tensors), (again, found) = read_folder(out), read_folder(back)
    assert found.keys() == tensors.keys() and all(np.array_equal(found[name], tensors[name]) for name in tensors)
    assert model_spec_from_hf(again) == model_spec_from_hf(config) and again["add_rescale_bias"] is True
    assert main(words("align", made, "../" + str(out.name), out)) == 2  # no such model


def test_channels_that_do_not_vary_are_only_moved() -> None:
    wanted = Moments(5, np.array([1.0, 2.0]), np.array([4.0, 4.0]))
    found = rescale(wanted, Moments(5, np.array([3.0, 3.0]), np.array([1.0, 0.0])))
    assert found.scale.tolist() == [2.0, 1.0] and found.bias.tolist() == [-5.0, -1.0]
    draws = np.random.default_rng(0).normal(3, 2, (40, 5))
    both = Moments.of(draws[:7]).merged(Moments.of(draws[7:]))
    np.testing.assert_allclose(both.mean, draws.mean(0))
    np.testing.assert_allclose(both.variance, draws.var(0))


def spoiled(made: Path, folder: Path, **layers: Any) -> Path:
    """The distribution as .json with something changed."""
    table = read_table(made / "distribution.pt", DISTRIBUTION)
    content: dict[str, Any] = {str(n): {k: a.tolist() for k, a in layer.items()} for n, layer in table.layers.items()}
    for key, value in layers.items():
        if value is None:
            del content[key[1:]]
        else:
            content[key[1:]] = content[key[1:]] | value
    (folder / "d.json").write_text(json.dumps(content))
    return folder / "d.json"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_2": None}, "tells of layers 0 to 1, 2 in all, the model has 3"),
        ({"_1": {"mlp.mean": [0.0], "mlp.variance": [1.0]}}, "layer 1: 1 channels, the model has 48"),
        ({"_1": {"mlp.variance": [-1.0] * 48}}, "variances from 0"),
        ({"_1": {"mlp.mean": [float("nan")] * 48}}, "NaN"),
        ({"_1": {"mlp.more": [1.0]}}, "expected attn and mlp"),
    ],
)
def test_distributions_of_another_model(
    made: Path, tmp_path: Path, change: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = spoiled(made, tmp_path, **change)
    assert main(words("align", made, "vanilla", tmp_path / "out", "--distribution_file", file)) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["d.json"]


@pytest.mark.parametrize(("stage", "model"), [("distribution", "llama_tiny"), ("align", "vanilla")])
def test_weights_that_are_no_numbers_leave_no_result(
    made: Path, tmp_path: Path, stage: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copytree(made / model, tmp_path / model)
    weights = load_file(tmp_path / model / "model.safetensors")
    name = next(name for name in weights if "layers.1." in name and ("w2" in name or "down_proj" in name))
    weights[name][0, 0] = float("nan")
    save_file(weights, tmp_path / model / "model.safetensors")
    assert main(words(stage, made, str(tmp_path / model), tmp_path / "out")) == 2
    assert "layer 1, mlp gives values that are no numbers" in capsys.readouterr().err
    assert not (tmp_path / "out" / ("config.json" if stage == "align" else "distribution.pt")).exists()


def test_one_token_has_no_distribution(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the loss of the model")
    more = ("--text", tmp_path / "text.txt", "--max_tokens", 1)
    assert main(words("distribution", made, "llama_tiny", tmp_path / "out", *more)) == 2
    assert "one token has no variance" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_aligned(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the loss of the model")
    moe = ("convert", "--style", "mixtral", "--model_path", made / "llama_tiny", "--num_experts", 4, "--top_k", 2)
    assert main([*map(str, (*moe, "--fold_scale", "--save_path", tmp_path / "folded"))]) == 0
    (tmp_path / "folded" / "tokenizer.json").write_bytes((made / "llama_tiny" / "tokenizer.json").read_bytes())
    for model, more, said in (
        ("llama_tiny", (), "is a llama: give what convert --style wrote"),
        (tmp_path / "folded", (), "is a mixtral: give what convert --style wrote without --fold_scale"),
        ("vanilla", ("--text", tmp_path / "text.txt"), "was made from other texts"),
        ("nowhere", (), "is no folder"),
    ):
        assert main(words("align", made, str(model), tmp_path / "out", *more)) == 2
        assert said in capsys.readouterr().err
    assert main(words("align", made, "vanilla", tmp_path / "out", "--dry_run")) == 0
    assert not (tmp_path / "out").exists()
    note = beside_of(made / "distribution.pt")
    assert json.loads(note.read_text())["kind"] == DISTRIBUTION
