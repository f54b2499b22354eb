# SPDX-License-Identifier: Apache-2.0
"""Training with masks on PyTorch: the target's shape is reached, and a resumed run is the same to the last bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mindformers_ext.core.config.lora import BESIDE_BASE
from mindformers_ext.core.pruning import PruningSpec
from mindformers_ext.jobs.prune.report import NotReachedError, check_reached
from mindformers_ext.pt.trainer import TorchTrainer
from tests.helpers.prune_training import SOURCE, TARGET, network, pruning, reached, train, training

CPU = torch.device("cpu")
GROUPS = {"source": replace(SOURCE, num_key_value_heads=4), "target": replace(TARGET, num_key_value_heads=4)}
FEWER = {"source": replace(SOURCE, num_key_value_heads=4), "target": replace(TARGET, num_attention_heads=2,
                                                                             num_key_value_heads=2)}  # fmt: skip


def opened(spec: PruningSpec, steps: int = 400) -> TorchTrainer:
    trainer = TorchTrainer(network(spec.source), training(spec, steps), CPU)
    trainer.open()
    return trainer


@pytest.mark.slow
@pytest.mark.turn("shapes")
@pytest.mark.parametrize("shapes", [{}, GROUPS, FEWER], ids=["heads", "groups stay", "fewer groups"])
def test_the_targets_shape_is_reached(shapes: dict) -> None:
    spec = pruning(**shapes)
    trainer = opened(spec)
    train(trainer, spec, range(1, 401))
    masks = reached(trainer, spec)
    assert max(masks.gaps().values()) <= 0.02
    for name in spec.modules:
        kept = np.count_nonzero(np.atleast_2d(masks.values[name]), 1)
        assert (kept == spec.target.units(name)).all(), name
    assert not check_reached(masks, force=False)


def test_masks_that_learn_too_slowly_are_refused_by_the_cut() -> None:
    spec = pruning(lag_lr=0.01, warmup_steps=5)
    trainer = opened(spec, 30)
    train(trainer, spec, range(1, 31))
    masks = reached(trainer, spec)
    assert masks.gaps()["hidden"] > 0.05
    with pytest.raises(NotReachedError, match="hidden by 0."):
        check_reached(masks, force=False)


def test_a_mask_whose_target_is_the_source_is_frozen() -> None:
    spec = pruning(target=replace(TARGET, num_hidden_layers=4), warmup_steps=4)
    assert spec.whole == ("layer",) and "layer" not in spec.modules
    trainer = opened(spec, 10)
    assert not [name for name in trainer.values("") if "layer" in name and "l0_module" in name]
    figures = train(trainer, spec, range(1, 4))
    assert {"expected_hidden_sparsity", "target_hidden_sparsity", "expected_sparsity", "lagrangian_loss"} <= {
        *figures[-1]
    }
    assert figures[-1]["loss"] == pytest.approx(figures[-1]["lm_loss"] + figures[-1]["lagrangian_loss"], abs=1e-6)


def test_multipliers_climb_and_masks_keep_their_limits() -> None:
    spec = pruning(warmup_steps=0)
    trainer = opened(spec, 10)
    train(trainer, spec, range(1, 8))
    lambdas = {name: float(value[0]) for name, value in trainer.values("").items() if ".lambdas." in name}
    assert len(lambdas) == 2 * len(spec.modules)
    assert all(value > 0 for name, value in lambdas.items() if "lambda_2" in name)  # its gradient is a square
    assert all(value < 0 for name, value in lambdas.items() if "lambda_1" in name)  # fewer units go than are to
    for loga in trainer.values(".z_loga").values():
        assert loga.max() <= np.float32(4.605171) and loga.min() >= np.float32(-4.605171)


def test_a_resumed_run_is_the_same_to_the_last_bit() -> None:
    spec = pruning(warmup_steps=4)
    whole = opened(spec, 6)
    figures = train(whole, spec, range(1, 7))
    first = opened(spec, 6)
    assert train(first, spec, range(1, 4)) == figures[:3]
    state = dict(first.state(adapters=False))
    again = TorchTrainer(network(), training(spec, 6), CPU)
    again.fill((name, array) for name, array in state.items() if name.startswith(("model.", "lm_head.")))
    again.open()
    again.restore(state)
    assert train(again, spec, range(4, 7)) == figures[3:]
    for (name, mine), (other, theirs) in zip(again.state(False), whole.state(False), strict=True):
        assert name == other
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


def test_base_weights_need_no_masks() -> None:
    wanted = training(pruning(warmup_steps=4), 6)
    plain = TorchTrainer(network(), replace(wanted, pruning=None, groups=()), CPU)
    trainer = TorchTrainer(network(), wanted, CPU)
    trainer.fill(plain.values("").items())
    assert not any(name.endswith(BESIDE_BASE) for name in plain.values(""))
