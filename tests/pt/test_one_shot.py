# SPDX-License-Identifier: Apache-2.0
"""Pruning in one shot: measures against direct computation, planted units, cuts against stock transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.parameters import parameter_count
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.jobs.prune.one_shot import measures
from mindformers_ext.jobs.prune.one_shot.importance import measured
from mindformers_ext.jobs.prune.one_shot.importance_file import read_importance_file
from mindformers_ext.jobs.prune.one_shot.targets import fewer_layers, sized, with_fewer
from mindformers_ext.jobs.prune.texts import ready
from mindformers_ext.surgery.prune.importance import METHODS
from tests.helpers.one_shot import (
    DEAD_CHANNEL,
    DEAD_LAYER,
    DEAD_NEURONS,
    HEAD,
    HIDDEN,
    LAYERS,
    TOKENS,
    WIDTH,
    Direct,
    make_model,
)
from tests.helpers.one_shot_runs import KINDS, load, loss_by_transformers, make_place, run, texts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and a text."""
    return make_place(tmp_path_factory.mktemp("one_shot"))


@pytest.mark.parametrize("tied", [False, True])
def test_every_measure_is_the_direct_one(place: Path, tied: bool, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tie_word_embeddings=tied)
    with ready(tmp_path / "model", texts(place / "text.txt")) as start:
        found = measured(start, tmp_path / "i.npz", KINDS, False, lambda line: None)
        rows = start.measured.rows
    direct = Direct(model, rows.ids, rows.lengths)
    for name, method in METHODS.items():
        ours = method.score(found.statistics, found.source)
        for part, wanted in direct.scores(name).items():
            value = getattr(ours, part)
            np.testing.assert_allclose(
                value, wanted, rtol=2e-4, atol=1e-5 * np.abs(wanted).max(), err_msg=f"{name} {part}"
            )
    assert (METHODS["flap"].score(found.statistics, found.source).hidden) is None


@pytest.mark.parametrize("method", METHODS)
def test_planted_dead_units_go_and_nothing_is_lost(place: Path, method: str, tmp_path: Path) -> None:
    sizes = [f"intermediate_size={WIDTH - 2}", "num_attention_heads=2", "num_key_value_heads=1", "num_hidden_layers=3"]
    importance = ["--importance", str(place / "planted.npz")]
    found = run(place, tmp_path / "out", "--method", method, "--target", *sizes, *importance, model="planted")
    kept = found["pruning"]["kept"]
    assert kept["layer"] == [n for n in range(LAYERS) if n != DEAD_LAYER]
    alive = [n for n in range(WIDTH) if n not in DEAD_NEURONS]
    for layer in kept["layer"]:  # of the dead layer every neuron is dead to those who look at its output
        assert kept["intermediate"][layer] == alive
        assert kept["kv_head"][layer] == [0] and kept["head"][layer] == [0, 1]
    losses = found["one_shot"]["losses"]["losses"]
    assert losses[method] == pytest.approx(losses["original"], abs=1e-5)
    assert losses["random"] > losses["original"] + 1e-3 or losses["random"] < losses["original"] - 1e-3
    assert loss_by_transformers(load(tmp_path / "out"), place) == pytest.approx(losses[method], abs=1e-5)
    if method != "flap":
        narrow = run(
            place, tmp_path / "narrow", "--method", method, "--target", f"hidden_size={HIDDEN - 1}", *importance,
            model="planted",
        )  # fmt: skip
        assert DEAD_CHANNEL not in narrow["pruning"]["kept"]["hidden"]


TARGETS = {
    "groups": ["num_attention_heads=2", "num_key_value_heads=1"],
    "queries in groups": ["num_attention_heads=2", "intermediate_size=16"],
    "everything": ["num_attention_heads=1", "num_key_value_heads=1", "intermediate_size=24", "hidden_size=20",
                   "num_hidden_layers=3"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "tied"), [*((name, False) for name in TARGETS), ("everything", True)])
def test_the_folder_is_the_model_cut_by_hand(place: Path, name: str, tied: bool, tmp_path: Path) -> None:
    dense = make_model(tmp_path / "model", tie_word_embeddings=tied)
    (tmp_path / "text.txt").symlink_to(place / "text.txt")
    found = run(tmp_path, tmp_path / "out", "--method", "minitron", "--target", *TARGETS[name])
    kept = found["pruning"]["kept"]
    hand = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    state = {key: value.clone() for key, value in dense.state_dict().items()}
    cut: dict[str, torch.Tensor] = {}
    hidden = torch.tensor(kept.get("hidden", range(HIDDEN)))
    for place_, layer in enumerate(kept.get("layer", range(LAYERS))):
        heads = torch.tensor([h * HEAD + p for h in kept["head"][layer] for p in range(HEAD)])
        groups = kept.get("kv_head", [range(2)] * LAYERS)[layer]
        keys = torch.tensor([g * HEAD + p for g in groups for p in range(HEAD)])
        neurons = torch.tensor(kept["intermediate"][layer] if "intermediate" in kept else range(WIDTH))
        rows = {"q": heads, "k": keys, "v": keys, "gate": neurons, "up": neurons}
        for key in (k for k in state if f"layers.{layer}." in k):
            part, value = key.split(".")[-2].removesuffix("_proj"), state[key]
            if part in rows:
                value = value[rows[part]][:, hidden]
            elif part in ("o", "down"):
                value = value[hidden][:, heads if part == "o" else neurons]
            else:
                value = value[hidden]
            cut[key.replace(f"layers.{layer}.", f"layers.{place_}.")] = value
    cut["model.norm.weight"] = state["model.norm.weight"][hidden]
    cut["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:, hidden]
    cut["lm_head.weight"] = state["lm_head.weight"][:, hidden]
    hand.load_state_dict(cut)
    found_state = load(tmp_path / "out").state_dict()
    assert all(torch.equal(found_state[key], value) for key, value in hand.state_dict().items())
    losses = found["one_shot"]["losses"]
    assert loss_by_transformers(hand, place) == pytest.approx(losses["losses"]["minitron"], abs=1e-5)
    assert losses["measured_tokens"] == TOKENS and losses["seed"] == 0
    assert {"original", "minitron", "magnitude", "random"} == set(losses["losses"])
    assert found["config"]["head_dim"] == HEAD
    assert found["pruning"]["parameters"]["after"] == parameter_count(model_spec_from_hf(found["config"]))


def test_the_share_of_the_whole_model_is_met() -> None:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    spec = ModelSpec(vocab_size=49152, num_hidden_layers=30, head_dim=64, tie_word_embeddings=True, **sizes)
    whole, step = parameter_count(spec), 16 * 3 * 576 * 30
    for share in (0.2, 0.4):
        shape = with_fewer(spec, share, ("intermediate_size",))
        assert (1 - share) * whole - step < parameter_count(sized(spec, shape)) <= (1 - share) * whole
        assert shape.intermediate_size % 16 == 0
        several = with_fewer(spec, share, ("intermediate_size", "num_attention_heads", "hidden_size"))
        assert (0.95 - share) * whole < parameter_count(sized(spec, several)) <= (1 - share) * whole
        assert several.num_attention_heads % 3 == 0 and several.hidden_size < 576 and several.num_key_value_heads == 3
    assert fewer_layers(spec, 0.2) == 30 - math.ceil(0.2 * whole / (3 * 576 * 1536 + 2 * 576 * 64 * 12 + 2 * 576))


def test_layers_that_change_least_or_are_least_missed_go(place: Path, tmp_path: Path) -> None:
    dense = load(place / "model")
    with ready(place / "model", texts(place / "text.txt")) as start:
        rows = start.measured.rows
    direct = Direct(load(place / "model"), rows.ids, rows.lengths)
    found = run(place, tmp_path / "bi", "--method", "bi", "--keep", "2", command="depth")
    assert found["pruning"]["layers"] == sorted(np.argsort(direct.influence())[-2:].tolist())
    order, losses, left = [], [], list(range(LAYERS))
    layers = dense.model.layers
    while len(order) < 2:
        tried = {}
        for layer in left:
            dense.model.layers = torch.nn.ModuleList(layers[n] for n in left if n != layer)
            tried[layer] = Direct(dense.float(), rows.ids, rows.lengths).loss.item() / rows.predicted
        best = min(tried, key=tried.get)
        order, losses, left = [*order, best], [*losses, tried[best]], [n for n in left if n != best]
    more = ["--method", "ppl", "--order_tokens", str(TOKENS), "--importance", str(tmp_path / "i.npz")]
    for keep in (3, 2):  # the second goes on where the first stopped
        found = run(place, tmp_path / f"ppl{keep}", *more, "--keep", str(keep), command="depth")
        assert found["pruning"]["layers"] == sorted(set(range(LAYERS)) - set(order[: LAYERS - keep]))
    kept = json.loads((tmp_path / "i.ppl.json").read_text())
    assert kept["layers"] == order
    np.testing.assert_allclose(kept["losses"], losses, atol=1e-5)


def test_least_squares_is_the_direct_solution_and_lowers_the_error(place: Path, tmp_path: Path) -> None:
    sizes = ["--target", "intermediate_size=24", "num_attention_heads=2"]
    found = run(place, tmp_path / "out", "--method", "minitron", *sizes, "--refit", "least_squares")
    fits = found["one_shot"]["fits"]
    assert len(fits) == 2 * LAYERS and all(fit["after"] < fit["before"] for fit in fits)
    losses = found["one_shot"]["losses"]["losses"]
    assert {"original", "minitron + least_squares", "minitron", "magnitude", "random"} == set(losses)
    fitted = load(tmp_path / "out")
    assert loss_by_transformers(fitted, place) == pytest.approx(losses["minitron + least_squares"], abs=1e-5)
    with ready(place / "model", texts(place / "text.txt")) as start:
        rows = start.measured.rows
    direct, kept = Direct(load(place / "model"), rows.ids, rows.lengths), found["pruning"]["kept"]
    inputs, state = direct.every(0, "c"), direct.every(0, "in")
    weight = direct.weight(0, "self_attn.o_proj")
    scale = 1 / np.linalg.norm(direct.every(0, "out"), axis=1, keepdims=True)
    places = [h * HEAD + p for h in kept["head"][0] for p in range(HEAD)]
    mine, target = (inputs * scale)[:, places], (inputs * scale) @ weight.T
    ridge = 0.03 * (mine**2).sum() / len(places)
    change = np.linalg.lstsq(
        np.vstack([mine, np.sqrt(ridge) * np.eye(len(places))]),
        np.vstack([target - mine @ weight[:, places].T, np.zeros((len(places), HIDDEN))]),
        rcond=None,
    )[0]
    ours = fitted.model.layers[0].self_attn.o_proj.weight.detach().numpy()
    np.testing.assert_allclose(ours, weight[:, places] + change.T, atol=2e-4)
    assert np.abs(change).max() > 0.01 and state.shape[1] == HIDDEN


def test_flaps_bias_makes_constant_neurons_exact(place: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_model(tmp_path / "model", mlp_bias=True, attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[:4] = 0
                linear.bias[:] = torch.randn(WIDTH)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").symlink_to(place / "text.txt")
    more = ["--method", "flap", "--target", f"intermediate_size={WIDTH - 4}"]
    found = run(tmp_path, tmp_path / "out", *more, "--bias")
    losses = found["one_shot"]["losses"]["losses"]
    assert losses["flap + bias"] == pytest.approx(losses["original"], abs=1e-5)
    assert abs(losses["flap"] - losses["original"]) > 1e-3
    assert loss_by_transformers(load(tmp_path / "out"), place) == pytest.approx(losses["original"], abs=1e-5)
    sizes = ["--target", "intermediate_size=24", "num_attention_heads=2", "--importance", str(tmp_path / "i.npz")]
    plain = run(place, tmp_path / "plain", *more[:2], *sizes, "--bias")
    assert plain["config"]["mlp_bias"] and plain["config"]["attention_bias"]
    losses = plain["one_shot"]["losses"]["losses"]
    assert loss_by_transformers(load(tmp_path / "plain"), place) == pytest.approx(losses["flap + bias"], abs=1e-5)


def test_a_pass_goes_on_and_its_file_serves_every_target(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, text = tmp_path / "i.npz", texts(place / "text.txt")
    with ready(place / "model", text) as start:
        whole = measured(start, tmp_path / "whole.npz", KINDS, False, lambda line: None)
    ended = []

    def stop(self: measures.TaylorMeasures, layer: int) -> None:
        ended.append(layer)
        if len(ended) == 2:
            raise KeyboardInterrupt
        original(self, layer)

    original = measures.TaylorMeasures.end
    monkeypatch.setattr(measures.TaylorMeasures, "end", stop)
    with ready(place / "model", text) as start, pytest.raises(KeyboardInterrupt):
        measured(start, path, KINDS, False, lambda line: None)
    assert not path.exists()
    with ready(place / "model", text) as start:
        found = measured(start, path, KINDS, False, lambda line: None)
    assert ended == [3, 2, 2, 1, 0]
    for name, value in whole.statistics.items():
        np.testing.assert_array_equal(found.statistics[name], value, err_msg=name)
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    monkeypatch.setattr(measures.ForwardMeasures, "take", None)
    more = ["--method", "taylor", "--target", "intermediate_size=24", "--importance", str(path)]
    run(place, tmp_path / "out", *more)
    assert "measured before" in capsys.readouterr().out
    assert set(read_importance_file(path).kinds) == set(KINDS)


def test_the_next_stage_has_the_sizes_of_the_cut(place: Path, tmp_path: Path, repo_root: Path) -> None:
    more = [
        "--train_yaml",
        str(repo_root / "configs/tiny/llama_pretrain.yaml"),
        "--next_yaml",
        str(tmp_path / "a.yaml"),
    ]
    run(place, tmp_path / "out", "--method", "magnitude", "--target", "intermediate_size=24", *more)
    given = load_yaml(tmp_path / "a.yaml")
    words_ = given["model"]["model_config"]
    assert [words_[key] for key in ("hidden_size", "intermediate_size", "n_kv_heads", "head_dim")] == [HIDDEN, 24, 2, 8]
    assert given["load_checkpoint"] == str(tmp_path / "out")


OTHERS = {
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    "qwen3": {},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_dense_families_are_cut_too(place: Path, family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        family, vocab_size=320, hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8 if family == "qwen3" else 6, initializer_range=0.25,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **OTHERS[family],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, value in model.named_parameters():
        torch.nn.init.normal_(value, std=0.2) if name.endswith("bias") else None
    model.save_pretrained(tmp_path / "model")
    for file in (place / "model").glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.txt").symlink_to(place / "text.txt")
    sizes = [*TARGETS["everything"][:3], "num_hidden_layers=3"]
    found = run(tmp_path, tmp_path / "out", "--method", "minitron", "--target", *sizes)
    losses = found["one_shot"]["losses"]["losses"]
    for folder, name in (("model", "original"), ("out", "minitron")):
        assert loss_by_transformers(load(tmp_path / folder), place) == pytest.approx(losses[name], abs=1e-5)
