# SPDX-License-Identifier: Apache-2.0
"""Pruning by both engines: the same figures step by step, MindSpore's resume to the last bit, and its convergence."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
import torch

from mindformers_ext.core.pruning import PruningSpec
from mindformers_ext.ms.trainer import DataParallel, MindSporeTrainer
from mindformers_ext.pt.trainer import TorchTrainer
from tests.helpers.prune_training import SOURCE, TARGET, network, pruning, reached, train, training

SMALL = pruning(replace(SOURCE, num_hidden_layers=2), replace(TARGET, num_hidden_layers=1), warmup_steps=4)


def opened(spec: PruningSpec, steps: int) -> MindSporeTrainer:
    ms.set_context(mode=ms.GRAPH_MODE)
    trainer = MindSporeTrainer(network(spec.source), training(spec, steps), DataParallel())
    trainer.open()
    return trainer


@pytest.mark.slow
@pytest.mark.turn("pruning trainers")
def test_both_engines_do_the_same_steps() -> None:
    spec = SMALL
    ours = train(opened(spec, 6), spec, range(1, 6))
    torchs = TorchTrainer(network(spec.source), training(spec, 6), torch.device("cpu"))
    torchs.open()
    for mine, theirs in zip(ours, train(torchs, spec, range(1, 6)), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert value == pytest.approx(theirs[name], abs=2e-5), name


@pytest.mark.slow
@pytest.mark.turn("pruning trainers")
def test_a_resumed_run_on_mindspore_is_the_same_to_the_last_bit() -> None:
    spec = SMALL
    whole = opened(spec, 6)
    figures = train(whole, spec, range(1, 4))
    state = {name: array.copy() for name, array in whole.state(adapters=False)}
    figures += train(whole, spec, range(4, 7))
    again = MindSporeTrainer(network(spec.source), training(spec, 6), DataParallel())
    again.fill((name, array) for name, array in state.items() if name.startswith(("model.", "lm_head.")))
    again.open()
    again.restore(state)
    assert train(again, spec, range(4, 7)) == figures[3:]
    for (name, mine), (other, theirs) in zip(again.state(False), whole.state(False), strict=True):
        assert name == other
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


@pytest.mark.long("tests/pt/test_prune_training.py reaches it on PyTorch")
def test_the_targets_shape_is_reached_on_mindspore() -> None:
    """The same with less: tests/pt/test_prune_training.py, and equal steps above."""
    spec = pruning()
    trainer = opened(spec, 400)
    train(trainer, spec, range(1, 401))
    masks = reached(trainer, spec)
    assert max(masks.gaps().values()) <= 0.02
    for name in spec.modules:
        assert (np.count_nonzero(np.atleast_2d(masks.values[name]), 1) == spec.target.units(name)).all(), name
