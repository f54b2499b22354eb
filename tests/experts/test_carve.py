# SPDX-License-Identifier: Apache-2.0
"""``build_experts.py carve``: the folders it writes in transformers, its losses, runs that are killed, bad inputs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mindformers_ext.cli import experts
from mindformers_ext.jobs.experts.carve import walk
from mindformers_ext.jobs.experts.carve.losses import CARVED, DENSE, MEANING, Judged, ways
from mindformers_ext.jobs.experts.texts import Texts, ready
from mindformers_ext.surgery.experts.carve.recipes import Recipe
from tests.helpers.tiny_llama import HIDDEN, LAYERS, WIDTH, make_llama, model_and_text, sentences

BLOCK, TOKENS, JUDGED = 32, 600, 300
IDS = torch.arange(3, 51).reshape(2, 24)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_text(tmp_path_factory.mktemp("carve"))


def words(place: Path, out: Path, *more: str, **own: object) -> list[str]:
    """The command's words: 8 groups, 2 shared, 2 active, unless told otherwise."""
    known: dict[str, object] = {
        "experts": 8, "shared": 2, "active": 2, "tokens": TOKENS, "held_out_tokens": JUDGED, "block_size": BLOCK,
        "calibration": place / "text.txt", "ladder": "none", **own,
    }  # fmt: skip
    options = [text for name, value in known.items() if value is not None for text in (f"--{name}", str(value))]
    return ["carve", str(place / "model"), str(out), "--quiet", *options, *more]


def carved(place: Path, out: Path, **own: object) -> dict[str, Any]:
    """Carve; what ladder.json says."""
    assert experts.main(words(place, out, **own)) == 0
    assert not list(out.parent.glob("*.carving"))
    found: dict[str, Any] = json.loads((out / "ladder.json").read_text(encoding="utf-8"))
    return found


def logits(folder: Path, **more: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
    with torch.no_grad():
        return model(IDS).logits


class PlainSum(nn.Module):
    """A layer of a stock file with weights that are exactly one: its tensors, none of its arithmetic."""

    def __init__(self, tensors: dict[str, Tensor], layer: int, chosen: int) -> None:
        super().__init__()
        start = f"model.layers.{layer}."
        self.own = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
        self.router = next(x for name, x in self.own.items() if name.endswith(("mlp.gate.weight", "moe.gate.weight")))
        self.chosen = chosen

    def part(self, x: Tensor, at: str, names: tuple[str, str, str]) -> Tensor:
        gate, up, down = (self.own[f"{at}.{name}.weight"] for name in names)
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def forward(self, x: Tensor) -> Tensor:
        best = (x @ self.router.T).topk(self.chosen, -1).indices
        mask = torch.zeros(*x.shape[:-1], len(self.router)).scatter_(-1, best, 1.0 / self.chosen)
        stock = "mlp.experts.{}" if "mlp.gate.weight" in self.own else "block_sparse_moe.experts.{}"
        names = ("gate_proj", "up_proj", "down_proj") if "mlp.gate.weight" in self.own else ("w1", "w3", "w2")
        total = sum(mask[..., [e]] * self.part(x, stock.format(e), names) for e in range(len(self.router)))
        if "mlp.gate.weight" in self.own:
            assert not self.own["mlp.shared_expert_gate.weight"].any()
            total = total + 0.5 * self.part(x, "mlp.shared_expert", names)
        return total


def plain(place: Path, folder: Path, chosen: int) -> LlamaForCausalLM:
    """The stock file with exact weights, on the dense model's attention."""
    model = LlamaForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
    tensors = load_file(folder / "model.safetensors")
    for number, layer in enumerate(model.model.layers):
        layer.mlp = PlainSum(tensors, number, chosen)
    return model


def row_losses(place: Path, model: LlamaForCausalLM) -> list[float]:
    texts = Texts(
        calibration=(place / "text.txt",), tokens=TOKENS, held_out_tokens=JUDGED, block_size=BLOCK, seed=0, quiet=True
    )
    with ready(place / "model", texts) as start, torch.no_grad():
        rows = start.judged.rows
        found = []
        for row, length in zip(rows.ids, rows.lengths, strict=True):
            ids = torch.from_numpy(row[:length].astype(np.int64))
            found.append(float(F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum")))
    return found


@pytest.mark.parametrize(("form", "shared"), [("qwen2_moe", 2), ("mixtral", 0)])
def test_a_stock_file_is_the_mixture_within_the_weight_error_it_states(
    place: Path, form: str, shared: int, tmp_path: Path
) -> None:
    told = carved(place, tmp_path / "out", format=form, shared=shared, seed=0)
    model = plain(place, tmp_path / "out", 2)
    with torch.no_grad():
        exact = model(IDS).logits
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == form
    found, figures = logits(tmp_path / "out"), told["figures"]
    off = float((found - exact).abs().max() / exact.abs().max())
    assert 0 < off < 2 * figures["weight_largest"] < 0.1
    assert figures["weight_same"] > 0.99 and 0 < figures["weight_mean"] < figures["weight_largest"]
    assert row_losses(place, model) == pytest.approx(told["ways"][CARVED]["rows"], abs=1e-3)
    assert all(one["error_refitted"] < one["error_plain"] for one in told["layers"]) and len(told["layers"]) == LAYERS
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"{figures['weight_largest']:.2%}" in card and f"{told['ways'][CARVED]['loss']:.4f}" in card


@pytest.mark.usefixtures("remote_code")
def test_our_form_is_the_same_mixture_exactly(place: Path, tmp_path: Path) -> None:
    first = carved(place, tmp_path / "stock", seed=0)
    second = carved(place, tmp_path / "ours", format="ours", seed=0)
    assert first["ways"][CARVED]["rows"] == second["ways"][CARVED]["rows"]
    with torch.no_grad():
        exact = plain(place, tmp_path / "stock", 2)(IDS).logits
    torch.testing.assert_close(logits(tmp_path / "ours", trust_remote_code=True), exact, atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("remote_code")
@pytest.mark.parametrize("shared", [0, 2])
def test_our_form_holds_a_threshold(
    place: Path, shared: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = carved(place, tmp_path / "out", format="ours", router="threshold", shared=shared, seed=0)
    printed = capsys.readouterr().out
    assert "2 of the other" in (card := (tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
    assert all("above the layer's threshold" in text for text in (printed, card)) and "MindSpore's training" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, trust_remote_code=True).eval()
    measured, tokens = told["ways"][CARVED]["rows"], told["row_tokens"]
    for found, wanted, length in zip(row_losses(place, model), measured, tokens, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5 * length)
    config, tensors = model.config, load_file(tmp_path / "out" / "model.safetensors")
    start = "model.layers.{}.mlp." + ("moe_layer." if shared else "") + "gate.gate_network."
    biases = torch.stack([tensors[start.format(layer) + "bias"] for layer in range(LAYERS)])
    assert config.num_selects == 8 - shared == biases.shape[1] and len(biases[:, 0].unique()) == LAYERS
    assert torch.equal(biases, biases[:, :1].expand_as(biases))


@pytest.mark.usefixtures("remote_code")
@pytest.mark.parametrize("shared", [0, 2])
def test_all_experts_without_a_refit_are_the_dense_model(place: Path, shared: int, tmp_path: Path) -> None:
    told = carved(place, tmp_path / "out", format="ours", shared=shared, active=8 - shared, refit="none")
    dense = logits(place / "model")
    torch.testing.assert_close(logits(tmp_path / "out", trust_remote_code=True), dense, atol=1e-5, rtol=1e-4)
    assert told["ways"][CARVED]["rows"] == pytest.approx(told["ways"][DENSE]["rows"], abs=1e-3)


class Killed(BaseException):
    """What no handler of ours catches."""


def test_a_killed_run_goes_on_with_the_next_layer(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = carved(place, tmp_path / "whole")
    carve, calls = walk.carve_layer, list[int]()

    def dies(sample: Any, recipe: Any, layer: int) -> Any:
        calls.append(layer)
        if layer == 2 and len(calls) == 3:
            raise Killed
        return carve(sample, recipe, layer)

    monkeypatch.setattr(walk, "carve_layer", dies)
    with pytest.raises(Killed):
        experts.main(words(place, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert carved(place, tmp_path / "out") == whole and calls == [0, 1, 2, 2]
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in set(names) - {"README.md"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # another recipe takes nothing of what is left there
    calls.clear()
    with pytest.raises(Killed):
        experts.main(words(place, tmp_path / "again"))
    carved(place, tmp_path / "again", active=3)
    assert calls == [0, 1, 2, 0, 1, 2]


def test_the_whole_ladder_says_in_its_first_line_who_wins(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = carved(place, tmp_path / "out", ladder="full", format="none")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "carving.yml",
        "ladder.json",
        "ladder.png",
    ]
    recipe = Recipe(method="emp", experts=8, shared=2, active=2)
    assert {*told["ways"]} == {DENSE, *ways(recipe, "full")} and {*told["ways"]} | {"router ridge"} == {*MEANING}
    assert {*ways(recipe, "short")} < {*ways(recipe, "full")} and [*ways(recipe, "none")] == [CARVED]
    printed = capsys.readouterr().out.splitlines()
    assert "about" in printed[0] and printed[1] == told["verdict"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"\n**{told['verdict']}.**\n" in card and "](ladder.png)" in card
    best = min((one["loss"], name) for name, one in told["ways"].items() if name.startswith("static"))
    assert told["verdict"].startswith("A STATIC CUT") == (best[0] <= told["ways"][CARVED]["loss"])
    assert f"'{best[1]}'" in told["verdict"] and told["judged_tokens"] == JUDGED - len(told["row_tokens"])


def test_differences_are_paired_and_their_errors_those_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    tokens = np.full(12, 511)
    base, apart = rng.normal(3.0, 0.5, 12), rng.normal(0.1, 0.01, 12)
    judged = Judged({DENSE: base * 511, CARVED: (base + apart) * 511, "static rel": (base + 0.05) * 511}, tokens)
    mean, error = judged.difference(CARVED, DENSE)
    assert (mean, error) == pytest.approx((apart.mean(), apart.std(ddof=1) / math.sqrt(12)))
    assert judged.verdict().startswith("A STATIC CUT") and judged.lines()[0] == judged.verdict()
    better = Judged({**judged.losses, CARVED: base * 511 + 1}, tokens)
    assert better.verdict().startswith("this mixture loses")
    assert math.isnan(Judged({DENSE: base[:1], CARVED: base[:1]}, tokens[:1]).difference(CARVED, DENSE)[1])


@pytest.mark.parametrize("method", ["cmoe", "expertweaver", "static"])
def test_other_methods_are_measured(place: Path, method: str, tmp_path: Path) -> None:
    told = carved(place, tmp_path / "out", method=method, format="none")
    assert math.isfinite(told["ways"][CARVED]["loss"]) and ("no mixture" in told["verdict"]) == (method == "static")
    wanted = {"cmoe": ("representative", "none"), "expertweaver": ("mean_gate", "none")}
    assert (told["recipe"]["router"], told["recipe"]["refit"]) == wanted.get(method, ("ridge", "least_squares"))


BAD: list[tuple[dict[str, object], str]] = [
    ({"experts": 7}, "--experts 7: intermediate_size=96 is not a multiple of it: give a divisor, such as 3, 4, 6, 8"),
    ({"experts": 0}, "--experts=0"),
    ({"active": 0}, "--active=0"),
    ({"active": 7}, "both together are at most all"),
    ({"active": 6, "ladder": "short"}, "all of --experts 8 are active: a static cut would be no cut"),
    ({"shared": -1}, "--shared -1"),
    ({"shared": 0, "format": "qwen2_moe"}, "give --format mixtral"),
    ({"format": "mixtral"}, "no shared expert"),
    ({"format": "gguf"}, "choose one of"),
    ({"method": "dot"}, "choose one of emp"),
    ({"method": "static"}, "a static cut is no mixture"),
    ({"method": "static", "format": "none", "router": "ridge"}, "nothing is chosen"),
    ({"router": "oracle"}, "no file holds such a router"),
    ({"router": "oracle", "format": "ours"}, "no file holds such a router"),
    ({"router": "threshold"}, "no stock file holds such a router: give --format ours"),
    ({"router": "threshold", "format": "mixtral", "shared": 0}, "no stock file holds such a router"),
    ({"method": "cmoe"}, "no file holds such a router"),
    ({"router": "best"}, "choose one of ridge"),
    ({"refit": "ridge"}, "choose one of none, least_squares"),
    ({"ladder": "long"}, "choose one of short"),
    ({"dtype": "float8"}, "float8"),
    ({"format": "none", "dtype": "float32"}, "leave them out"),
    ({"calibration": "nothing.txt"}, "is no file"),
    ({"tokens": 10**7}, "the text is too short"),
    ({"held_out_tokens": 10**7}, "the text is too short"),
    ({"block_size": 4096}, "4096"),
    ({"seed": -1}, "--seed -1"),
    ({"engine": "jax"}, "jax"),
    ({"device_id": 7}, "there is one CPU"),
    ({"max_shard_size": "much"}, "much"),
]


@pytest.mark.parametrize(("own", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_inputs_write_nothing(
    place: Path, own: dict[str, object], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experts.main(words(place, tmp_path / "out", **own)) == 2
    assert text in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_bad_places_and_models(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for more in ({}, {"format": "none"}):
        for switch in ((), ("--overwrite",)):
            assert experts.main(words(place, tmp_path / "out", *switch, **more)) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    told = carved(place, tmp_path / "moe")
    assert told["recipe"]["experts"] == 8
    (tmp_path / "model").symlink_to(tmp_path / "moe")
    (tmp_path / "text.txt").symlink_to(place / "text.txt")
    capsys.readouterr()
    assert experts.main(words(tmp_path, tmp_path / "twice")) == 2
    assert "mixture of experts already" in capsys.readouterr().err
    (tmp_path / "biased").mkdir()
    make_llama(tmp_path / "biased" / "model")
    path = tmp_path / "biased" / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": True}))
    (tmp_path / "biased" / "text.txt").symlink_to(place / "text.txt")
    for form in ("qwen2_moe", "ours"):  # before anything is computed
        assert experts.main(words(tmp_path / "biased", tmp_path / "biased" / "out", format=form)) == 2
        assert not list((tmp_path / "biased").glob("out*"))


def test_a_model_with_values_that_are_not_finite_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_llama(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(". ".join(sentences(120, 0)), encoding="utf-8")
    assert experts.main(words(tmp_path, tmp_path / "out")) == 2
    assert "layer 1 has values that are not finite" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_mistral_of_bfloat16_is_carved_and_its_type_kept(tmp_path: Path) -> None:
    make_llama(tmp_path / "model", tied=True, dtype=torch.bfloat16)
    path = tmp_path / "model" / "config.json"
    other = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    (tmp_path / "text.txt").write_text(". ".join(sentences(120, 0)), encoding="utf-8")
    carved(tmp_path, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {name: x.dtype for name, x in tensors.items()}
    assert {kinds[name] for name in kinds if "gate.weight" not in name} == {torch.bfloat16}
    shapes = {tuple(x.shape) for name, x in tensors.items() if ".experts.0.down_proj" in name}
    assert shapes == {(HIDDEN, WIDTH // 8)} and "lm_head.weight" not in tensors
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert model(IDS).logits.isfinite().all()
