# SPDX-License-Identifier: Apache-2.0
"""Packed rows in both engines: a document computes what it computes alone, and a step learns what it learns padded."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindformers_ext.core.config.schedule import Schedule
from mindformers_ext.core.config.train import FREEZE_GATE, GATE_SWITCHES, OptimizerSpec, TrainSpec
from mindformers_ext.core.figures import StepFigures
from mindformers_ext.ms.causal_lm import build_causal_lm
from mindformers_ext.ms.trainer import DataParallel, MindSporeTrainer
from mindformers_ext.pt.trainer import TorchTrainer
from tests.helpers.packed import NETWORKS, SEQ, SIZES, columns, documents

TRAIN = TrainSpec(
    optimizer=OptimizerSpec(),
    schedule=Schedule(kind="ConstantWarmUpLR", learning_rate=1e-2, lr_end=1e-2, warmup_steps=0, total_steps=6),
    steps=6,
    seed=3,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the tensors are tiny


def torch_trainer(name: str, train: TrainSpec = TRAIN) -> TorchTrainer:
    trainer = TorchTrainer(NETWORKS[name](), train, torch.device("cpu"))
    trainer.open()
    return trainer


@pytest.mark.parametrize("name", NETWORKS)
def test_a_packed_document_has_the_logits_it_has_alone_on_pytorch(name: str) -> None:
    network, packed = torch_trainer(name).network.eval(), columns("pack")
    with torch.no_grad():
        found = network(torch.from_numpy(packed.ids).long(), documents=torch.from_numpy(packed.documents).long())
        place = 0
        for document in documents(SIZES[:3]):
            alone = network(torch.from_numpy(document.ids)[None].long())[0]
            assert torch.allclose(found[0, place : place + len(document.ids)], alone, atol=1e-5)
            place += len(document.ids)


def test_a_packed_document_has_the_logits_it_has_alone_on_mindspore() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    theirs, packed = torch_trainer("mixtral"), columns("pack")
    spec = replace(NETWORKS["mixtral"](), seq_length=SEQ + 1)
    ours = build_causal_lm(spec)
    for parameter in ours.get_parameters():
        parameter.set_data(Tensor(dict(theirs.state(False))[parameter.name]))
    ours.set_train(False)
    found = ours(Tensor(packed.ids), Tensor(packed.documents)).asnumpy()
    with torch.no_grad():
        place = 0
        for document in documents(SIZES[:3]):
            alone = theirs.network.eval()(torch.from_numpy(document.ids)[None].long())[0].numpy()
            np.testing.assert_allclose(found[0, place : place + len(document.ids)], alone, atol=1e-5)
            place += len(document.ids)


def test_rows_sorted_by_expert_are_cut_where_padding_is_too_on_mindspore() -> None:
    """``use_gmm``: padding counts in no balance, but its rows are there."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    theirs, padded, found = torch_trainer("mixtral"), columns("pad"), []
    for sorted_rows in (False, True):
        spec = NETWORKS["mixtral"]()
        moe = replace(spec.model.routing, use_gmm=sorted_rows)
        ours = build_causal_lm(replace(spec, model=replace(spec.model, moe=moe)))
        for parameter in ours.get_parameters():
            parameter.set_data(Tensor(dict(theirs.state(False))[parameter.name]))
        terms = ours.losses(Tensor(padded.ids), Tensor(padded.labels), None, Tensor(padded.documents))
        found.append([term.asnumpy() for term in terms])
    for slots, rows in zip(*found, strict=True):
        np.testing.assert_allclose(rows, slots, rtol=1e-5)
    assert found[0][3].sum() < 2 * 2 * padded.ids[:, :-1].size  # some tokens are padding


def same(one: StepFigures, other: StepFigures) -> None:
    for name in ("loss", "lm_loss", "aux_loss", "global_norm"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-5, rel=1e-5), name
    np.testing.assert_array_equal(one.expert_load, other.expert_load)


@pytest.mark.parametrize("name", NETWORKS)
def test_packed_and_padded_rows_have_one_loss_per_token_and_one_step_on_pytorch(name: str) -> None:
    packed, padded = (torch_trainer(name) for _ in range(2))
    assert packed.evaluate(columns("pack")) == pytest.approx(padded.evaluate(columns("pad")), abs=1e-5)
    for _ in range(3):
        same(packed.step(columns("pack")), padded.step(columns("pad")))


@pytest.mark.slow
@pytest.mark.turn("packed rows")
@pytest.mark.parametrize("name", NETWORKS)
def test_packed_rows_on_mindspore_take_pytorchs_steps_and_those_of_padded_rows(name: str) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    theirs, found = torch_trainer(name), []
    for strategy in ("pack", "pad"):
        ours = MindSporeTrainer(NETWORKS[name](), TRAIN, DataParallel())
        ours.open()
        for parameter in ours.cell.network.get_parameters():
            parameter.set_data(Tensor(dict(torch_trainer(name).state(False))[parameter.name]))
        found.append([ours.step(columns(strategy)) for _ in range(2)])
    for packed, padded in zip(*found, strict=True):
        same(packed, padded)
        step = theirs.step(columns("pack"))
        assert packed.loss == pytest.approx(step.loss, rel=1e-4)
        assert packed.global_norm == pytest.approx(step.global_norm, rel=2e-4)


@pytest.mark.parametrize("switch", GATE_SWITCHES)
@pytest.mark.parametrize("name", ["mixtral", "llama_moe"])
def test_gates_stay_to_the_bit_and_everything_else_learns_or_the_other_way_round(name: str, switch: str) -> None:
    trainer = torch_trainer(name, replace(TRAIN, groups=GATE_SWITCHES[switch]))
    before = {key: value.copy() for key, value in trainer.state(False) if key.startswith(("model.", "lm_head."))}
    for _ in range(3):
        trainer.step(columns("pack"))
    after = dict(trainer.state(False))
    same_ones = {key for key, value in before.items() if np.array_equal(value, after[key])}
    gates = {key for key in before if ".router." in key}
    stay = gates if switch == FREEZE_GATE else before.keys() - gates
    no_gradient = {key for key in gates if ".noise." in key}  # these steps draw none
    assert gates and same_ones == stay | no_gradient
    assert not any(f"adam_m.{key}" in after for key in stay)


@pytest.mark.slow
@pytest.mark.turn("packed rows")
@pytest.mark.parametrize("switch", GATE_SWITCHES)
def test_gates_stay_or_learn_alone_on_mindspore_too(switch: str) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    trainer = MindSporeTrainer(NETWORKS["mixtral"](), replace(TRAIN, groups=GATE_SWITCHES[switch]), DataParallel())
    trainer.open()
    names = [name for name, _ in trainer.state(False) if name.startswith(("model.", "lm_head."))]
    before = {name: value.copy() for name, value in trainer.state(False) if name in names}
    trainer.step(columns("pack"))
    after = dict(trainer.state(False))
    same_ones = {name for name in names if np.array_equal(before[name], after[name])}
    assert same_ones == {name for name in names if (".router." in name) == (switch == FREEZE_GATE)}
