# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization in both engines: TRL's formula on the same numbers, and pairs that are learnt."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindformers_ext.core.config.train import OptimizerSpec
from mindformers_ext.ms.trainer import DataParallel, MindSporeTrainer
from mindformers_ext.pt.loss import preference_loss
from mindformers_ext.pt.trainer import TorchTrainer
from tests.helpers.packed import NETWORKS
from tests.helpers.preference import dpo_loss, pairs, row_logps
from tests.parity.test_packed_rows import TRAIN

DPO = replace(TRAIN, dpo_beta=0.1, optimizer=OptimizerSpec(), steps=60)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the tensors are tiny


def torch_trainer(name: str, micro_batches: int = 1) -> TorchTrainer:
    train = replace(DPO, micro_batches=micro_batches)
    trainer = TorchTrainer(replace(NETWORKS[name](), packed=False), train, torch.device("cpu"))
    trainer.open()
    return trainer


def reference_of(trainer: TorchTrainer | MindSporeTrainer, columns: tuple[np.ndarray, ...]) -> np.ndarray:
    chosen, rejected = (trainer.row_log_probabilities(*columns[side : side + 2]) for side in (0, 2))
    return np.stack((chosen, rejected), 1).astype(np.float32)


def test_the_loss_is_trls_on_the_same_numbers() -> None:
    draw = np.random.default_rng(1)
    policy, reference = draw.normal(-20, 5, (2, 8)), draw.normal(-20, 5, (8, 2))
    for beta in (0.1, 0.5):
        wanted = dpo_loss(policy[0], policy[1], reference[:, 0], reference[:, 1], beta)
        loss, measured = preference_loss(torch.from_numpy(policy.reshape(-1)), torch.from_numpy(reference), beta)
        assert (float(loss), *measured.tolist()) == pytest.approx(wanted, rel=1e-6)


def test_log_probabilities_of_rows_are_those_of_the_logits_of_labelled_tokens() -> None:
    trainer, columns = torch_trainer("mixtral"), pairs(4)
    with torch.no_grad():
        logits = trainer.network.eval()(torch.from_numpy(columns[0][:, :-1]).long()).double().numpy()
    found = trainer.row_log_probabilities(columns[0], columns[1])
    np.testing.assert_allclose(found, row_logps(logits, columns[1][:, 1:]), rtol=1e-5)


@pytest.mark.parametrize("name", ["dense", "mixtral"])
def test_pairs_are_learnt_and_the_first_loss_is_that_of_no_preference(name: str) -> None:
    trainer, columns = torch_trainer(name, micro_batches=2), pairs()
    reference = reference_of(trainer, columns)
    steps = [trainer.step((*columns, reference)) for _ in range(20)]
    assert steps[0].lm_loss == pytest.approx(np.log(2), abs=1e-6)
    assert steps[-1].extra["accuracy"] == 1.0 and steps[-1].extra["margin"] > 1.0
    assert steps[-1].lm_loss < 0.5 * steps[0].lm_loss
    assert len(steps[-1].dropped) == len(steps[-1].expert_load)
    held_out = pairs(16, seed=9)
    now, before = reference_of(trainer, held_out), reference_of(torch_trainer(name), held_out)
    _, accuracy, _ = dpo_loss(now[:, 0], now[:, 1], before[:, 0], before[:, 1], 0.1)
    assert accuracy > 0.7


@pytest.mark.slow
def test_both_engines_take_the_same_steps_over_pairs() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    theirs, columns = torch_trainer("mixtral", micro_batches=2), pairs(4)
    spec = replace(NETWORKS["mixtral"](), packed=False)
    ours = MindSporeTrainer(spec, replace(DPO, micro_batches=2), DataParallel())
    ours.open()
    for parameter in ours.cell.network.get_parameters():
        parameter.set_data(Tensor(dict(theirs.state(False))[parameter.name]))
    reference = reference_of(theirs, columns)
    np.testing.assert_allclose(reference_of(ours, columns), reference, rtol=1e-5)
    for step in range(3):
        one, other = ours.step((*columns, reference)), theirs.step((*columns, reference))
        for name in ("loss", "lm_loss", "aux_loss", "global_norm"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=2e-4, abs=1e-6), name
        if step:  # before, margins are rounding
            assert one.extra == pytest.approx(other.extra, rel=2e-3, abs=1e-5)
        np.testing.assert_allclose(one.dropped, other.dropped)
