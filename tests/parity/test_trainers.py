# SPDX-License-Identifier: Apache-2.0
"""Both engines' trainers from one seed: the same figures step by step, and the same state behind them."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
import torch

from mindformers_ext.core.config.schedule import Schedule
from mindformers_ext.core.config.train import LossScale, OptimizerSpec, ParameterGroup, TrainSpec
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.jobs.train.train import hooks_of
from mindformers_ext.ms.trainer import DataParallel, MindSporeTrainer
from mindformers_ext.pt.trainer import TorchTrainer

MOE = MoESpec(num_local_experts=4, num_experts_per_tok=2, balance_via_topk_bias=True, aux_losses=(("expert", 0.05),))
SPEC = NetworkSpec(
    model=ModelSpec(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=-1,
        initializer_range=0.1,
        moe=MOE,
    ),
    seq_length=8,
    batch_size=4,
)
COSINE = Schedule(
    kind="CosineWithWarmUpLR", learning_rate=1e-2, lr_end=1e-3, warmup_steps=2, total_steps=6, decay_steps=6
)
TRAIN = TrainSpec(optimizer=OptimizerSpec(weight_decay=0.1), schedule=COSINE, steps=6, max_grad_norm=1.0, seed=3)
GROUPS = (
    ParameterGroup(pattern=r".*\.wq\.weight", trained=False),
    ParameterGroup(pattern="lm_head.*", lr_factor=2.0, decay=False),
    ParameterGroup(pattern=r".*ffn\.w[13]\.weight", sign=-1),
)
CASES = {
    "fused": TRAIN,
    "composite, groups, dynamic scale, micro batches": replace(
        TRAIN, groups=GROUPS, loss_scale=LossScale(value=2.0**65, window=2), micro_batches=2, bias_rate=0.01, steps=9
    ),
    "no bias correction, linear": replace(
        TRAIN,
        optimizer=OptimizerSpec(bias_correction=False, weight_decay=0.1, eps=1e-6),
        schedule=replace(COSINE, kind="LinearWithWarmUpLR"),
    ),
}


@pytest.mark.slow
@pytest.mark.turn("trainers")
@pytest.mark.parametrize("case", CASES)
def test_both_trainers_do_the_same_steps(case: str) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    train = CASES[case]
    trainers = (
        MindSporeTrainer(SPEC, train, DataParallel(), fused="composite" not in case),
        TorchTrainer(SPEC, train, torch.device("cpu")),
    )
    hooks = []
    for trainer in trainers:
        trainer.open()
        hooks.append(hooks_of(train, trainer))
    for step in range(1, train.steps + 1):
        ids = np.random.default_rng(step).integers(0, 50, (4, 9)).astype(np.int32)
        ours, theirs = (trainer.step((ids,)) for trainer in trainers)
        assert ours.overflow == theirs.overflow and ours.loss_scale == theirs.loss_scale, step
        for name in ("loss", "lm_loss", "aux_loss", "learning_rate", "global_norm"):
            if not (ours.overflow and name == "global_norm"):
                assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=2e-4), (step, name)
        np.testing.assert_array_equal(ours.expert_load, theirs.expert_load)
        for trainer, own in zip(trainers, hooks, strict=True):
            for hook in own:
                hook.after_step(step, ours)
                trainer.set_values(hook.inputs(step + 1))
    first, second = (dict(trainer.state(adapters=False)) for trainer in trainers)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_allclose(array, second[name], atol=2e-4, err_msg=name)
    assert trainers[1].updates > 3  # the others overflowed
    assert train.bias_rate == 0 or any(array.any() for name, array in first.items() if name.endswith("topk_bias"))


@pytest.mark.slow
def test_a_mindspore_trainer_goes_on_where_it_stopped() -> None:
    """From what it has written down, the other trainer's next step is the same to the last bit."""
    ms.set_context(mode=ms.GRAPH_MODE)
    train = replace(TRAIN, loss_scale=LossScale(value=8.0, window=2))
    batches = [(np.random.default_rng(step).integers(0, 50, (4, 9)).astype(np.int32),) for step in range(4)]
    one = MindSporeTrainer(SPEC, train, DataParallel())
    one.open()
    for batch in batches[:3]:
        one.step(batch)
    state = {name: array.copy() for name, array in one.state(adapters=False)}
    two = MindSporeTrainer(SPEC, replace(train, seed=99), DataParallel())
    two.fill((name, array) for name, array in state.items() if name.startswith(("model.", "lm_head.")))
    two.open()
    two.restore(state)
    assert one.step(batches[3])[:7] == two.step(batches[3])[:7]
    again = dict(two.state(adapters=False))
    assert all(np.array_equal(array, again[name]) for name, array in one.state(adapters=False))
