# SPDX-License-Identifier: Apache-2.0
"""``tools/prune.py experts``: scores beside a loop over tokens, and folders beside models that are cut by hand."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from mindformers_ext.cli.prune import main
from mindformers_ext.data.tokenizers import open_tokenizer
from mindformers_ext.jobs.experts.probe import Rows
from mindformers_ext.jobs.experts.text_domains import read_plain_text
from mindformers_ext.jobs.experts.texts import Texts, with_texts
from mindformers_ext.jobs.prune.experts_cut import open_mixture
from mindformers_ext.surgery.prune.experts import FREQUENCY, REAP, SCORES, ExpertSums, highest, narrower_gate
from tests.helpers import llama_moe_v2_models
from tests.helpers.llama_moe_models import folder_of, model_of
from tests.helpers.tiny_llama import VOCAB, sentences, write_tokenizer

EXPERTS, LENGTH = 8, 16
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
QWEN: dict[str, Any] = {"num_experts": EXPERTS, "moe_intermediate_size": 20, "intermediate_size": 40, "head_dim": 6}
CONFIGS = {
    "mixtral": MixtralConfig(**COMMON, num_local_experts=EXPERTS, intermediate_size=20),
    "qwen2_moe": Qwen2MoeConfig(**COMMON, **QWEN, shared_expert_intermediate_size=12, norm_topk_prob=False),
    "qwen3_moe": Qwen3MoeConfig(**COMMON, **QWEN, mlp_only_layers=[0], norm_topk_prob=True),
}
EXPERT_NAMES = {  # prefix of a layer's mixture, then what numbers an expert
    "mixtral": ("block_sparse_moe", "experts"),
    "qwen2_moe": ("mlp", "experts"),
    "qwen3_moe": ("mlp", "experts"),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What scores and what judges."""
    folder = tmp_path_factory.mktemp("texts")
    for name, seed in (("scores", 3), ("judges", 4)):
        (folder / f"{name}.txt").write_text("\n".join(sentences(12, seed)), encoding="utf-8")
    return folder / "scores.txt", folder / "judges.txt"


def mixture(kind: str, folder: Path, useless: int | None = None) -> Path:
    """A folder of random weights; in every layer the expert ``useless`` adds nothing to any token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    if useless is not None:
        for layer in model.model.layers:
            layer.block_sparse_moe.experts[useless].w2.weight.data.zero_()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def pruned(model: Path, out: Path, texts: tuple[Path, Path], *words: object) -> dict[str, Any]:
    """The report of a run of the command on all of both texts."""
    counts = [sum(map(len, rows_of(model, text))) for text in texts]
    given = ["experts", model, out, "--calibration", texts[0], "--tokens", counts[0], "--held_out", texts[1]]
    given += ["--held_out_tokens", counts[1], "--block_size", LENGTH, "--quiet"]
    assert main([str(word) for word in (*given, *words)]) == 0
    return json.loads((out / "expert_pruning.json").read_text())


def loaded(folder: Path, **words: Any) -> Any:
    """The stock model; every tensor of it is in the folder, and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **words)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def rows_of(folder: Path, text: Path) -> list[torch.Tensor]:
    """The token rows of a text, padding taken off."""
    return [torch.from_numpy(ids).long() for ids in _unpadded(read_plain_text(text, open_tokenizer(folder), LENGTH))]


def _unpadded(rows: Rows) -> list[np.ndarray]:
    return [ids[:count] for ids, count in zip(rows.ids, rows.lengths, strict=True)]


@torch.no_grad()
def loss(model: Any, rows: list[torch.Tensor]) -> float:
    """Mean cross entropy of the predicted tokens, in float64."""
    total = 0.0
    for ids in rows:
        logits = model.double()(ids[None]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
    return total / sum(len(ids) - 1 for ids in rows)


@torch.no_grad()
def looped(model: Any, rows: list[torch.Tensor], kind: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """REAP and frequency of a layer: token by token, expert by expert."""
    block = getattr(model.double().model.layers[layer], EXPERT_NAMES[kind][0])
    entered: list[torch.Tensor] = []
    hook = block.register_forward_pre_hook(lambda module, given: entered.append(given[0][0]))
    for ids in rows:
        model(ids[None])
    hook.remove()
    total, count = np.zeros(EXPERTS), np.zeros(EXPERTS)
    for x in torch.cat(entered):
        values, places = torch.softmax(block.gate.weight @ x, -1).topk(2)
        for value, expert in zip((values / values.sum()).tolist(), places.tolist(), strict=True):
            count[expert] += 1
            total[expert] += value * float(torch.linalg.vector_norm(block.experts[expert](x[None])))
    return total / np.maximum(count, 1), count


def by_hand(folder: Path, kept: dict[int, list[int]], kind: str) -> dict[str, torch.Tensor]:
    """The state of a stock mixture that has the ``kept`` experts of every layer alone."""
    state = load_file(folder / "model.safetensors")
    block, experts = EXPERT_NAMES[kind]
    for layer, numbers in kept.items():
        start = f"model.layers.{layer}.{block}."
        own = {name: state.pop(name) for name in list(state) if name.startswith(f"{start}{experts}.")}
        for new, old in enumerate(numbers):
            before = f"{start}{experts}.{old}."
            moved = {name: tensor for name, tensor in own.items() if name.startswith(before)}
            state |= {name.replace(before, f"{start}{experts}.{new}."): tensor for name, tensor in moved.items()}
        state[f"{start}gate.weight"] = state[f"{start}gate.weight"][numbers]
    return state


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_scores_are_those_of_a_loop_and_the_folder_that_of_a_model_cut_by_hand(
    kind: str, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    source = mixture(kind, tmp_path / "source")
    report = pruned(source, tmp_path / "out", texts, "--keep", 6)
    original = loaded(source)
    for layer, found in report["layers"].items():
        reap, count = looped(original, rows_of(source, texts[0]), kind, int(layer))
        np.testing.assert_allclose(found["reap"], reap, rtol=2e-5)
        np.testing.assert_array_equal(found["frequency"], count)
        assert found["kept"] == sorted(np.argsort(-reap, kind="stable")[:6].tolist())
    assert list(report["layers"]) == (["1"] if kind == "qwen3_moe" else ["0", "1"])
    kept = {int(layer): found["kept"] for layer, found in report["layers"].items()}
    written, wanted = load_file(tmp_path / "out" / "model.safetensors"), by_hand(source, kept, kind)
    assert written.keys() == wanted.keys() and all(torch.equal(written[name], wanted[name]) for name in wanted)
    small = loaded(tmp_path / "out")
    judges = rows_of(source, texts[1])
    assert report["losses"]["reap"] == pytest.approx(loss(small, judges), abs=1e-5)
    assert report["losses"]["original"] == pytest.approx(loss(original, judges), abs=1e-5)
    assert set(report["losses"]) == {"original", "reap", "frequency", "random"}


def test_the_useless_expert_goes_although_tokens_choose_it(
    texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = mixture("mixtral", tmp_path / "source", useless=5)
    report = pruned(source, tmp_path / "reap", texts, "--keep", 7)
    for found in report["layers"].values():
        assert found["reap"][5] == 0 and found["frequency"][5] > min(found["frequency"])
        assert found["kept"] == [0, 1, 2, 3, 4, 6, 7]
    by_count = pruned(source, tmp_path / "frequency", texts, "--keep", 7, "--method", "frequency")
    assert all(5 in found["kept"] for found in by_count["layers"].values())
    assert by_count["losses"] == report["losses"]  # the same ways, whichever is written
    said = capsys.readouterr().out
    assert "written: frequency" in said and "perplexity" in said


def test_a_fused_mixture_loses_the_same_rows(texts: tuple[Path, Path], tmp_path: Path) -> None:
    """Frankenmoe and published Mixtrals lie expert by expert; newer transformers write them fused."""
    source = mixture("mixtral", tmp_path / "source")
    state, fused = load_file(source / "model.safetensors"), tmp_path / "fused"
    for layer in range(2):
        start, new = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        parts = {w: [state.pop(f"{start}experts.{e}.{w}.weight") for e in range(EXPERTS)] for w in ("w1", "w2", "w3")}
        pairs = [torch.cat(pair) for pair in zip(parts["w1"], parts["w3"], strict=True)]
        state[new + "experts.gate_up_proj"] = torch.stack(pairs)
        state[new + "experts.down_proj"] = torch.stack(parts["w2"])
        state[new + "gate.weight"] = state.pop(start + "gate.weight")
    fused.mkdir()
    save_file(state, fused / "model.safetensors", {"format": "pt"})
    (fused / "config.json").write_text((source / "config.json").read_text())
    write_tokenizer(fused)
    plain = pruned(source, tmp_path / "plain_out", texts, "--keep", 3)
    found = pruned(fused, tmp_path / "fused_out", texts, "--keep", 3)
    assert found == plain
    for one, other in zip(*(_layers(tmp_path / name) for name in ("plain_out", "fused_out")), strict=True):
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def _layers(folder: Path) -> list[dict[str, np.ndarray]]:
    """Our weights of every layer."""
    with closing(open_mixture(folder)) as model:
        return [dict(model.layer(layer)) for layer in range(model.spec.num_hidden_layers)]


LLAMA_MOES: dict[str, dict[str, Any]] = {
    "mlp": {"gate_network": "mlp"},
    "linear": {"gate_network": "linear", "size_experts": [[5] * EXPERTS] * 3},
    "residual": {"gate_network": "mlp", "num_experts_residual": 2, "intermediate_size": 50}
    | {"intermediate_size_residual": 10},
}


@pytest.mark.parametrize("case", list(LLAMA_MOES))
def test_a_llama_moe_keeps_its_experts_and_a_gate_as_wide_as_they_are_many(
    case: str, texts: tuple[Path, Path], tmp_path: Path, remote_code: Path
) -> None:
    folder, words = tmp_path / "source", LLAMA_MOES[case]
    folder_of(model_of(vocab_size=VOCAB, num_experts=EXPERTS, **words), folder)
    write_tokenizer(folder)
    report = pruned(folder, tmp_path / "out", texts, "--keep", 5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_experts"], config["intermediate_size"]) == (5, 35 if case == "residual" else 25)
    small = loaded(tmp_path / "out", trust_remote_code=True)
    assert report["losses"]["reap"] == pytest.approx(loss(small, rows_of(folder, texts[1])), abs=1e-5)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    inner = "moe_layer." if case == "residual" else ""
    for layer, found in report["layers"].items():
        start = f"model.layers.{layer}.mlp.{inner}"
        for new, old in enumerate(found["kept"]):
            for part in ("gate", "up", "down"):
                name = f"{start}calculator.experts.weight_{part}."
                assert torch.equal(after[f"{name}{new}"], before[f"{name}{old}"])
        rows = found["kept"] if case == "linear" else found["gate_units"]
        name = start + f"gate.gate_network{'' if case == 'linear' else '.0'}.weight"
        assert torch.equal(after[name], before[name][rows])


@pytest.mark.parametrize("case", ["contract", "attention, residual"])
def test_a_llama_moe_v2_keeps_its_factor_its_dense_layers_and_what_every_token_passes(
    case: str, texts: tuple[Path, Path], tmp_path: Path, remote_code: Path
) -> None:
    words = llama_moe_v2_models.v2_words(case)
    folder = llama_moe_v2_models.write_folder(
        tmp_path / "source", words, llama_moe_v2_models.random_tensors(words, std=0.3)
    )
    write_tokenizer(folder)
    report = pruned(folder, tmp_path / "out", texts, "--keep", 4)
    assert list(report["layers"]) == ["1", "2"]
    config, tensors = llama_moe_v2_models.read_folder(tmp_path / "out")
    kept = {**words, "num_local_experts": 4, "intermediate_size_dense": 224}
    assert all(config[name] == value for name, value in kept.items() if name not in ("architectures", "model_type"))
    assert {name: array.shape for name, array in tensors.items()} == llama_moe_v2_models.tensor_shapes(kept)
    small = loaded(tmp_path / "out", trust_remote_code=True)
    assert report["losses"]["reap"] == pytest.approx(loss(small, rows_of(folder, texts[1])), abs=1e-5)


def test_what_cannot_be_is_refused(
    texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = mixture("mixtral", tmp_path / "source"), tmp_path / "out"
    few = ("--tokens", "40", "--held_out_tokens", "20")
    for words, said in (
        (("--keep", "1", "--method", "random"), "a token chooses 2, so keep 2 to 7"),
        (("--keep", "8", "--method", "random"), "a token chooses 2, so keep 2 to 7"),
        (("--keep", "6"), "only 'random' needs none"),
        (("--keep", "6", "--method", "loudest"), "reap, frequency, random"),
        (("--keep", "6", "--calibration", str(tmp_path / "none.txt")), "none.txt"),
        (("--keep", "6", "--calibration", str(texts[0]), "--block_size", "65"), "64 tokens a row"),
        (("--keep", "6", *few, "--calibration", str(texts[0]), "--held_out_tokens", "99999"), "behind those that are"),
        (
            ("--keep", "6", *few, "--calibration", *map(str, texts), "--tokens", "99999"),
            "equal share of --tokens 99999",
        ),
        (("--keep", "6", *few, "--calibration", *map(str, texts), "--tokens", "1"), "--tokens 1 of 2 texts"),
        (("--keep", "6", "--method", "random", "--held_out", str(texts[0])), "--held_out without --calibration"),
        (("--keep", "6", "--method", "random", "--seed", "-1"), "--seed -1"),
        (("--keep", "6", "--method", "random", "--device_target", "Ascend"), "choose one of CPU, GPU"),
        (("--keep", "6", "--method", "random", "--engine", "ms"), "choose one of pt"),
    ):
        assert main(["experts", str(source), str(out), *words]) == 2
        assert said in capsys.readouterr().err
        assert not out.exists() and not list(tmp_path.glob(".*"))
    assert main(["experts", str(source), str(out), "--keep", "6", "--method", "random", "--seed", "3"]) == 0
    assert json.loads((out / "expert_pruning.json").read_text())["losses"] == {}
    assert main(["experts", str(source), str(source), "--keep", "6", "--method", "random", "--overwrite"]) == 2


def test_a_mixture_by_threshold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    off = ("gate_use_softmax", "multiply_gate_scores", "gate_use_balance", "gate_add_noise")
    words: dict[str, Any] = {"gate_network": "threshold", **dict.fromkeys(off, False)}
    folder = folder_of(model_of(vocab_size=VOCAB, num_experts=8, num_selects=8, **words), tmp_path / "source")
    assert main(["experts", str(folder), str(tmp_path / "out"), "--keep", "6", "--method", "random"]) == 2
    assert "every expert above a threshold" in capsys.readouterr().err


def test_without_held_out_text_the_rows_behind_the_measured_ones_judge_in_equal_shares(
    texts: tuple[Path, Path], tmp_path: Path
) -> None:
    source = mixture("mixtral", tmp_path / "source")
    with closing(open_mixture(source)) as model:
        asked = Texts(calibration=texts, tokens=41, held_out_tokens=30, block_size=LENGTH)
        start = with_texts(model, asked)
        alone = with_texts(model, replace(asked, held_out=texts))
    found = [[list(map(int, row)) for row in _unpadded(course.rows)] for course in (start.measured, start.judged)]
    rows = [[list(map(int, row)) for row in rows_of(source, text)] for text in texts]
    assert found[0] == [*rows[0][:1], rows[0][1][:5], *rows[1][:1], rows[1][1][:4]]
    assert found[1] == [rows[0][2][:15], rows[1][2][:15]]
    assert [list(map(int, row)) for row in _unpadded(alone.judged.rows)] == [rows[0][0][:15], rows[1][0][:15]]


def test_scores_do_not_know_the_order_of_experts_nor_count_a_token_twice() -> None:
    generator = np.random.default_rng(0)
    chosen = np.zeros((50, 6), np.float32)
    for row in chosen:
        row[generator.choice(5, 2, replace=False)] = 1  # nobody chooses the last
    weights, norms = (generator.random((50, 6)).astype(np.float32) * chosen for _ in range(2))
    order = generator.permutation(6)
    one, other = ExpertSums(), ExpertSums()
    one.add(chosen, weights, norms)
    for part in np.split(np.arange(50), 5):
        other.add(chosen[part][:, order], 7 * weights[part][:, order], norms[part][:, order])
    for name in (REAP, FREQUENCY):
        np.testing.assert_allclose(SCORES[name](one)[order], SCORES[name](other), rtol=1e-6)
        assert SCORES[name](one)[5] == 0
    assert highest([1.0, 2.0, 2.0, 2.0], 2) == (1, 2)


def test_a_gate_whose_hidden_units_say_the_same_loses_nothing() -> None:
    """Three units that are multiples of others can go; least squares finds what the rest must say instead."""
    generator = np.random.default_rng(1)
    free = generator.normal(size=(200, 3))
    hidden = np.concatenate((free, free @ generator.normal(size=(3, 3))), 1)
    out, kept = generator.normal(size=(6, 6)), (0, 3, 5)
    gate = narrower_gate(out, hidden.T @ hidden, kept)
    assert len(gate.units) == 3 and gate.lost < 1e-12
    np.testing.assert_allclose(hidden[:, gate.units] @ gate.out.T, hidden @ out[list(kept)].T, atol=1e-4)
    whole = generator.normal(size=(200, 6))
    assert narrower_gate(out, whole.T @ whole, kept).lost > 0.01
