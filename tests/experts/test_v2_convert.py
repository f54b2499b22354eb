# SPDX-License-Identifier: Apache-2.0
"""A dense LLaMA as a LLaMA-MoE v2: exact where it must be, judged by transformers' LLaMA and the float64 oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ml_dtypes import bfloat16
from transformers import AutoModelForCausalLM

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.config.schedule import Schedule
from mindformers_ext.core.config.train import FROZEN_GATES, OptimizerSpec, TrainSpec
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.checkpoint.convert import ConvertRequest
from mindformers_ext.jobs.checkpoint.convert import convert as convert_weights
from mindformers_ext.jobs.experts import writing
from mindformers_ext.jobs.experts.v2.attention import AttentionRequest, convert_attention
from mindformers_ext.jobs.experts.v2.layer_tables import GATE, GATES, INDICES, LayerTable, write_table
from mindformers_ext.jobs.experts.v2.mixtral import MixtralRequest, convert
from mindformers_ext.jobs.experts.v2.parts import MixtralParts
from mindformers_ext.jobs.merge.output import OutputRequest
from mindformers_ext.pt.trainer import TorchTrainer
from mindformers_ext.surgery.experts.gradient_plus import plus_split
from mindformers_ext.weights.convert import to_mindspore
from tests.helpers import llama_moe_v2_oracle as oracle
from tests.helpers.llama_moe_v2_models import DENSE, random_tensors, read_folder, token_ids, write_folder

LAYERS, WIDTH, HIDDEN = DENSE["num_hidden_layers"], DENSE["intermediate_size"], DENSE["hidden_size"]
IDS = torch.from_numpy(token_ids(2, 16))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("v2") / "dense", DENSE, random_tensors(DENSE))


def gates_of(folder: Path, experts: int, value: float | None = 0.0) -> Path:
    """A file of gates: all of one value, or random ones."""
    draws = np.random.default_rng(4)
    layers = {
        layer: {GATE: (draws.normal(size=(experts, HIDDEN)) if value is None else np.full((experts, HIDDEN), value))}
        for layer in range(LAYERS)
    }
    path = folder / f"gates_{experts}_{value}.npz"
    write_table(path, LayerTable(GATES, {n: {GATE: a[GATE].astype(np.float32)} for n, a in layers.items()}), True)
    return path


def indices_of(folder: Path, experts: int, residual: int = 0, share: bool = False) -> Path:
    """A file of neurons, split by random scores."""
    layers = {}
    for layer in range(LAYERS):
        scores = np.random.default_rng(layer).random((experts, WIDTH))
        split = plus_split(scores, WIDTH // (experts + residual), residual, share)
        always = {"residual": np.concatenate(split.residual)} if residual else {}
        layers[layer] = always | {str(n): ids for n, ids in enumerate(split.experts)}
    path = folder / "neurons.json"
    write_table(path, LayerTable(INDICES, layers), True)
    return path


def made(dense: Path, out: Path, fold: bool = False, **words: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Words and tensors of the mixture."""
    parts = MixtralParts(**{"style": "mixtral", "experts": None, "chosen": None, **words})
    output = OutputRequest(folder=out, shard_bytes=10**9, quiet=True)
    convert(MixtralRequest(model=dense, parts=parts, output=output, fold=fold))
    return read_folder(out)


def logits(words: dict[str, Any], tensors: dict[str, np.ndarray]) -> torch.Tensor:
    double = {name: torch.from_numpy(array.astype(np.float64)) for name, array in tensors.items()}
    return oracle.logits(words, double, IDS)


def of_transformers(folder: Path, dtype: torch.dtype = torch.float64, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **more).to(dtype).eval()(IDS).logits


def assert_dense(dense: Path, words: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    wanted = of_transformers(dense)
    assert wanted.abs().max() > 1
    torch.testing.assert_close(logits(words, tensors), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("ends", [0, 1])
def test_one_expert_is_the_dense_model_whatever_its_gate(dense: Path, tmp_path: Path, ends: int) -> None:
    assert_dense(dense, *made(dense, tmp_path / "moe", experts=1, chosen=1, scale=1.0, ends=ends))


def test_all_experts_with_gates_of_zero_are_the_dense_model(dense: Path, tmp_path: Path) -> None:
    files = {"gates": gates_of(tmp_path, 8), "indices": indices_of(tmp_path, 8)}
    words, tensors = made(dense, tmp_path / "moe", chosen=8, scale=8.0, **files)
    assert_dense(dense, words, tensors)
    assert words["num_local_experts"] == 8
    files = {"gates": gates_of(tmp_path, 7), "indices": indices_of(tmp_path, 7, 1)}
    words, tensors = made(dense, tmp_path / "residual", style="mixtral-residual", chosen=7, scale=7.0, **files)
    assert_dense(dense, words, tensors)
    assert (words["intermediate_size"], words["intermediate_size_residual"]) == (28, 28)


def test_experts_beside_each_other_are_the_dense_matrices(dense: Path, tmp_path: Path) -> None:
    """Also of a model in several files; bfloat16 stays, but for the gates."""
    source = {name: array.astype(bfloat16) for name, array in random_tensors(DENSE).items()}
    half = write_folder(tmp_path / "half", {**DENSE, "torch_dtype": "bfloat16"}, source, shards=3)
    one = write_folder(tmp_path / "one", {**DENSE, "torch_dtype": "bfloat16"}, source)
    words, tensors = made(half, tmp_path / "moe", experts=8, chosen=2, ends=1)
    assert (words["torch_dtype"], words["sliding_window"], words["scale_factor"]) == ("bfloat16", None, 4.0)
    assert (words["intermediate_size"], words["intermediate_size_dense"]) == (28, 224)
    for old, new, axis in (("gate_proj", "w1", 0), ("down_proj", "w2", 1), ("up_proj", "w3", 0)):
        parts = [tensors[f"model.layers.2.block_sparse_moe.experts.{e}.{new}.weight"] for e in range(8)]
        np.testing.assert_array_equal(np.concatenate(parts, axis), source[f"model.layers.2.mlp.{old}.weight"])
        for end in (0, 3):
            name = f"model.layers.{end}.block_sparse_moe.{new}.weight"
            np.testing.assert_array_equal(tensors[name], source[f"model.layers.{end}.mlp.{old}.weight"])
    gate = tensors["model.layers.1.block_sparse_moe.gate.weight"]
    assert gate.dtype == np.float32 and 0.12 < np.abs(gate).max() <= HIDDEN**-0.5
    assert not np.array_equal(gate, tensors["model.layers.2.block_sparse_moe.gate.weight"])
    again = made(one, tmp_path / "again", experts=8, chosen=2, ends=1)[1]
    assert all(np.array_equal(again[name], array) for name, array in tensors.items()) and again.keys() == tensors.keys()


def test_padding_adds_neurons_of_zeros(dense: Path, tmp_path: Path) -> None:
    words, tensors = made(
        dense, tmp_path / "moe", experts=9, chosen=9, scale=9.0, pad=True, gates=gates_of(tmp_path, 9)
    )
    assert (
        words["intermediate_size"] == 25
        and not tensors["model.layers.0.block_sparse_moe.experts.8.w1.weight"][24:].any()
    )
    assert_dense(dense, words, tensors)


def same(folded: Path, own: Path, wanted: torch.Tensor) -> None:
    """transformers' own class (its router is float32 in any type) beside the saved code, which is the oracle."""
    ours = of_transformers(own, torch.float32, trust_remote_code=True)
    torch.testing.assert_close(of_transformers(folded, torch.float32), ours, rtol=0, atol=2e-6)
    torch.testing.assert_close(of_transformers(own, trust_remote_code=True), wanted, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("remote_code")
def test_folded_transformers_computes_the_same(dense: Path, tmp_path: Path) -> None:
    """Mixtral of experts alone; Qwen2-MoE of a residual model with dense ends."""
    files = {"gates": gates_of(tmp_path, 8, None), "indices": indices_of(tmp_path, 8)}
    words = {"chosen": 2, **files}  # a factor of 4, which rounds nothing
    plain, folded = (made(dense, tmp_path / f"v{fold}", fold, **words) for fold in (False, True))
    assert "scale_factor" not in folded[0] and not list((tmp_path / "vTrue").glob("*.py"))
    same(tmp_path / "vTrue", tmp_path / "vFalse", logits(*plain))
    files = {"gates": gates_of(tmp_path, 7, None), "indices": indices_of(tmp_path, 7, 1)}
    words = {"style": "mixtral-residual", "chosen": 1, "ends": 1, **files}
    own, shared = (made(dense, tmp_path / f"r{fold}", fold, **words) for fold in (False, True))
    assert own[0]["scale_factor"] == 1.0 and shared[0]["model_type"] == "qwen2_moe"
    same(tmp_path / "rTrue", tmp_path / "rFalse", logits(*own))
    assert model_spec_from_hf(shared[0]).dense_layers == (0, 3)


@pytest.mark.parametrize("residual", [0, 1])
def test_to_mindspore_and_back_every_byte_is_the_same(dense: Path, tmp_path: Path, residual: int) -> None:
    files = {"gates": gates_of(tmp_path, 7, None), "indices": indices_of(tmp_path, 7, residual, share=not residual)}
    style = "mixtral-residual" if residual else "mixtral"
    words, tensors = made(dense, tmp_path / "moe", style=style, chosen=2, ends=1, share=not residual, **files)
    convert_weights(ConvertRequest(input_path=tmp_path / "moe", output_path=tmp_path / "moe.ckpt"))
    convert_weights(ConvertRequest(input_path=tmp_path / "moe.ckpt", output_path=tmp_path / "back", direction="to_hf"))
    found_words, found = read_folder(tmp_path / "back")
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], array) for name, array in tensors.items())
    assert model_spec_from_hf(found_words) == model_spec_from_hf(words)
    assert found_words["auto_map"] == words["auto_map"] and (tmp_path / "back" / "modeling_llama_moe_v2.py").is_file()


def test_a_run_that_stops_leaves_nothing(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_write", broken)
    with pytest.raises(KeyboardInterrupt):
        made(dense, tmp_path / "moe", experts=8, chosen=2)
    assert not list(tmp_path.iterdir())


def heads_made(model: Path, out: Path, **words: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    output = OutputRequest(folder=out, shard_bytes=10**9, quiet=True)
    convert_attention(AttentionRequest(model=model, output=output, **words))
    return read_folder(out)


@pytest.mark.parametrize(("experts", "ends"), [(None, 0), (8, 1)])
def test_all_heads_as_experts_with_gates_of_zero_are_the_dense_model(
    dense: Path, tmp_path: Path, experts: int | None, ends: int
) -> None:
    count = experts or 4
    asked = {"chosen": count, "scale": float(count), "ends": ends, "experts": experts}
    words, tensors = heads_made(dense, tmp_path / "moe", gates=gates_of(tmp_path, count), **asked)
    assert_dense(dense, words, tensors)
    assert (words["attn_experts"], words["num_local_experts"], words["intermediate_size"]) == (count, 1, WIDTH)
    plain = [name for name in tensors if name.endswith("self_attn.q_proj.weight")]
    assert plain == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 3) if ends]
    source = random_tensors(DENSE)
    for name in plain:
        np.testing.assert_array_equal(tensors[name], source[name])
    own = tensors["model.layers.1.self_attn.k_proj.3.weight"]
    start = 3 // (count // 4) * 8
    np.testing.assert_array_equal(own, source["model.layers.1.self_attn.k_proj.weight"][start : start + 8])


@pytest.mark.usefixtures("remote_code")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_hides_from_heads_what_it_hides_from_the_dense_model(
    dense: Path, tmp_path: Path, side: str
) -> None:
    heads_made(dense, tmp_path / "moe", gates=gates_of(tmp_path, 4), chosen=4, scale=4.0)
    mask = torch.ones_like(IDS)
    mask[0, slice(5) if side == "left" else slice(-5, None)] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    found, wanted = (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()(IDS, **given).logits
        for folder in (tmp_path / "moe", dense)
    )
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=0, atol=1e-5)


def test_a_converted_model_learns_with_balance_and_frozen_gates(dense: Path, tmp_path: Path) -> None:
    """Fifty steps on sixteen rows."""
    files = {"gates": gates_of(tmp_path, 7, None), "indices": indices_of(tmp_path, 7, 1)}
    made(dense, tmp_path / "moe", style="mixtral-residual", chosen=2, ends=1, **files)
    words, tensors = heads_made(tmp_path / "moe", tmp_path / "heads", chosen=3)
    spec = NetworkSpec(model=model_spec_from_hf(words), seq_length=16)
    schedule = Schedule(kind="ConstantWarmUpLR", learning_rate=2e-3, lr_end=2e-3, warmup_steps=0, total_steps=50)
    train = TrainSpec(optimizer=OptimizerSpec(), schedule=schedule, steps=50, max_grad_norm=1.0, groups=(FROZEN_GATES,))
    torch.set_num_threads(1)
    trainer = TorchTrainer(spec, train, torch.device("cpu"))
    start = to_mindspore(tensors, spec.model)
    trainer.fill(start.items())
    trainer.open()
    rows = token_ids(16, 17, seed=5)
    steps = [trainer.step((rows.astype(np.int32),)) for _ in range(50)]
    assert steps[-1].lm_loss < 0.7 * steps[0].lm_loss and steps[0].aux_loss > 0.01
    assert steps[-1].expert_load.sum(1).tolist() == [16 * 16 * 2] * 2
    after = dict(trainer.state(False))
    gates = {name for name in start if ".router." in name}
    assert len(gates) == 4 and gates == {name for name, array in start.items() if np.array_equal(array, after[name])}


@pytest.mark.usefixtures("remote_code")
def test_heads_of_a_residual_mixture_become_experts_there_and_back(dense: Path, tmp_path: Path) -> None:
    files = {"gates": gates_of(tmp_path, 7, None), "indices": indices_of(tmp_path, 7, 1)}
    made(dense, tmp_path / "moe", style="mixtral-residual", chosen=2, ends=1, **files)
    words, tensors = heads_made(tmp_path / "moe", tmp_path / "attn", chosen=3)
    assert (words["scale_factor"], words["scale_factor_attn"], words["intermediate_size_residual"]) == (1.0, 4 / 3, 28)
    found = of_transformers(tmp_path / "attn", torch.float32, trust_remote_code=True)
    torch.testing.assert_close(found.double(), logits(words, tensors), rtol=0, atol=5e-5)
    convert_weights(ConvertRequest(input_path=tmp_path / "attn", output_path=tmp_path / "attn.ckpt"))
    convert_weights(ConvertRequest(input_path=tmp_path / "attn.ckpt", output_path=tmp_path / "back", direction="to_hf"))
    back_words, back = read_folder(tmp_path / "back")
    assert back.keys() == tensors.keys() and all(np.array_equal(back[name], tensors[name]) for name in tensors)
    assert model_spec_from_hf(back_words) == model_spec_from_hf(words)
    with pytest.raises(UserError, match="its heads are experts already"):
        heads_made(tmp_path / "attn", tmp_path / "no", chosen=1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"chosen": None}, "--top_k_attn is missing"),
        ({"chosen": 5}, "--top_k_attn 5 of 4 experts: choose 1 to 4"),
        ({"chosen": 1, "experts": 6}, "--attn_experts 6: give 4, or a multiple of it that divides 8"),
        ({"chosen": 1, "scale": 0.0}, "--scale_factor_attn 0.0"),
        ({"chosen": 1, "ends": 2}, "no layer would be MoE"),
    ],
)
def test_heads_that_cannot_be_experts(dense: Path, tmp_path: Path, words: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        heads_made(dense, tmp_path / "moe", **words)
    assert not list(tmp_path.iterdir())
