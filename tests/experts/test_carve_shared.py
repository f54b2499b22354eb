# SPDX-License-Identifier: Apache-2.0
"""``build_experts.py carve --shared auto``: divergences beside transformers', what is chosen, written and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mindformers_ext.cli import experts
from mindformers_ext.jobs.experts.carve import shared
from mindformers_ext.jobs.experts.carve.losses import CARVED, DENSE
from mindformers_ext.jobs.experts.carve.run import digest_of
from mindformers_ext.jobs.experts.carve.shared import SharedLadder, halves, search
from mindformers_ext.jobs.experts.carve.walk import Walker
from mindformers_ext.jobs.experts.probe import Rows
from mindformers_ext.jobs.experts.texts import Texts, ready
from mindformers_ext.surgery.experts.carve.carved import CarvedLayer
from mindformers_ext.surgery.experts.carve.recipes import LayeredRecipe, Recipe, carve_layer
from mindformers_ext.surgery.experts.carve.sample import LayerSample
from tests.helpers.tiny_llama import LAYERS, model_and_text

RECIPE = Recipe(method="emp", experts=8, shared=1, active=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_text(tmp_path_factory.mktemp("carve"))


def texts_of(place: Path) -> Texts:
    return Texts(
        calibration=(place / "text.txt",), tokens=600, held_out_tokens=300, block_size=32, seed=0, quiet=True
    )  # fmt: skip


def searched(place: Path, folder: Path, recipe: Recipe) -> tuple[SharedLadder, Rows, Rows]:
    """What is found, and the rows that were carved on and that judged."""
    with ready(place / "model", texts_of(place)) as start:
        folder.mkdir(exist_ok=True)
        walker = Walker(start, folder, digest_of(start), tqdm(disable=True))
        walker.once(DENSE, None)
        first, second = halves(start.measured)
        return search(walker, recipe), first.rows, second.rows


class Part(torch.nn.Module):
    """A feed-forward part that a carved layer computes."""

    def __init__(self, dense: Any, carved: CarvedLayer) -> None:
        super().__init__()
        self.dense, self.carved = dense, carved

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(self.dense.gate_proj(x)) * self.dense.up_proj(x)
        return torch.from_numpy(self.carved.output(x[0].numpy(), hidden[0].numpy()))[None]


def token_rows(rows: Rows) -> list[torch.Tensor]:
    return [
        torch.from_numpy(row[:length].astype(np.int64))[None]
        for row, length in zip(rows.ids, rows.lengths, strict=True)
    ]


def sample_by_transformers(model: LlamaForCausalLM, rows: Rows, layer: int) -> LayerSample:
    block, found, numbers = model.model.layers[layer], [], []
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, given: found.append(given[0][0])),
        block.register_forward_hook(lambda *given: found.append(given[-1][0] if given[-1].ndim == 3 else given[-1])),
    ]
    for number, ids in enumerate(token_rows(rows)):
        model(ids)
        numbers += [number] * ids.shape[1]
    for hook in hooks:
        hook.remove()
    x, out = torch.cat(found[::2]), torch.cat(found[1::2]).double()
    hidden = F.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)
    matrices = (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj)
    weights = (1 / out.square().sum(1)).numpy()
    return LayerSample(x.numpy(), hidden.numpy(), weights, np.array(numbers), *(one.weight.numpy() for one in matrices))


def test_divergences_are_those_of_the_dense_model_with_one_layer_carved(place: Path, tmp_path: Path) -> None:
    found, carving, judging = searched(place, tmp_path / "work", RECIPE)
    assert [*found.tried] == [1, 2, 3] and found.found.shape == (LAYERS, 3)
    assert (len(carving.ids), len(judging.ids)) == (15, 4) and found.tokens == judging.tokens
    model = LlamaForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval().requires_grad_(False)
    rows = token_rows(judging)
    dense = [model(ids).logits[0].double().log_softmax(-1) for ids in rows]
    wanted = np.zeros((LAYERS, 3))
    for layer, block in enumerate(model.model.layers):
        sample, whole = sample_by_transformers(model, carving, layer), block.mlp
        for place_of, s in enumerate(found.tried):
            block.mlp = Part(whole, carve_layer(sample, replace(RECIPE, shared=s, active=4 - s), layer))
            for ids, p in zip(rows, dense, strict=True):
                q = model(ids).logits[0].double().log_softmax(-1)
                wanted[layer, place_of] += float((p.exp() * (p - q)).sum()) / judging.tokens
            block.mlp = whole
    np.testing.assert_allclose(found.found, wanted, rtol=1e-3)
    assert found.found.min() > 0


def test_all_experts_without_a_refit_diverge_from_nothing(place: Path, tmp_path: Path) -> None:
    found, _, _ = searched(place, tmp_path / "work", replace(RECIPE, experts=4, refit="none"))
    assert np.abs(found.found).max() < 1e-6


def test_what_is_chosen() -> None:
    ladder = SharedLadder(range(1, 4), np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 1.5], [2.0, 4.0, 0.5]]), 10)
    assert ladder.by_layer() == (2, 1, 3) and ladder.one() == 3
    layered = ladder.recipe(RECIPE, alike=False)
    assert isinstance(layered, LayeredRecipe)
    assert [(layered.at(n).shared, layered.at(n).active) for n in range(3)] == [(2, 2), (1, 3), (3, 1)]
    assert type(layered.at(0)) is Recipe and ladder.recipe(RECIPE, alike=True) == replace(RECIPE, shared=3, active=1)
    assert "each its best would be 2.5000 (S = 2 1 3), which no file holds" in ladder.words(alike=True)


def carve(place: Path, out: Path, *more: str, active: str = "4") -> int:
    words = ["--experts", "8", "--shared", "auto", "--active", active, "--calibration", str(place / "text.txt")]
    sizes = ["--tokens", "600", "--held_out_tokens", "300", "--block_size", "32", "--seed", "0", "--quiet"]
    return experts.main(["carve", str(place / "model"), str(out), *words, *sizes, *more])


class Killed(BaseException):
    """What no handler of ours catches."""


def test_the_command_measures_layers_of_their_own_and_goes_on_when_killed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _, _ = searched(place, tmp_path / "work", RECIPE)
    plain, calls = shared.carve_layer, list[int]()

    def dies(sample: Any, recipe: Recipe, layer: int) -> CarvedLayer:
        calls.append(layer)
        if len(calls) == 5:
            raise Killed
        return plain(sample, recipe, layer)

    monkeypatch.setattr(shared, "carve_layer", dies)
    with pytest.raises(Killed):
        carve(place, tmp_path / "out", "--format", "none")
    assert carve(place, tmp_path / "out", "--format", "none") == 0
    assert calls == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]  # of the second layer once more, not of the first
    told = json.loads((tmp_path / "out" / "ladder.json").read_text(encoding="utf-8"))
    np.testing.assert_array_equal(told["shared_ladder"]["divergences"], whole.found)
    assert told["recipe"]["by_layer"] == told["shared_ladder"]["by_layer"] == [*whole.by_layer()]
    said = capsys.readouterr().out
    assert "for --shared auto: 3 S in every layer" in said and whole.words(alike=False) in said
    assert "![" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "ladder.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*.carving"))


def test_a_file_has_one_number_for_all_layers(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert carve(place, tmp_path / "out", "--ladder", "none") == 0
    told = json.loads((tmp_path / "out" / "ladder.json").read_text(encoding="utf-8"))
    one = int(np.sum(told["shared_ladder"]["divergences"], axis=0).argmin()) + 1
    assert (told["recipe"]["shared"], told["recipe"]["active"]) == (one, 4 - one) and "by_layer" not in told["recipe"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["shared_expert_intermediate_size"] == 12 * one and config["num_experts"] == 8 - one
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model(torch.arange(3, 23)[None]).logits.isfinite().all()
    assert told["ways"][CARVED]["loss"] > 0 and not (tmp_path / "out" / "ladder.png").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("--shared auto") and lines[2] == told["verdict"]


@pytest.mark.parametrize(
    ("active", "more", "text"),
    [
        ("2", (), "--active counts the shared groups too"),
        ("9", (), "--active counts the shared groups too"),
        ("8", ("--ladder", "short"), "all of --experts 8 are active"),
        ("4", ("--format", "mixtral"), "it has no shared expert"),
        ("4", ("--method", "static", "--format", "none"), "nothing is chosen: give a number"),
        ("4", ("--tokens", "20"), "--shared auto keeps a row of the calibration apart"),
    ],
)
def test_bad_inputs_write_nothing(
    place: Path, active: str, more: tuple[str, ...], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert carve(place, tmp_path / "out", *more, active=active) == 2
    assert text in capsys.readouterr().err and not list(tmp_path.iterdir())
