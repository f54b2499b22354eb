# SPDX-License-Identifier: Apache-2.0
"""Training steps: identities between ways to the same update, overflow, adapters, restored state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mindformers_ext.core.config.lora import LoraSpec
from mindformers_ext.core.config.schedule import Schedule
from mindformers_ext.core.config.train import LossScale, OptimizerSpec, ParameterGroup, TrainSpec
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec, NumericsSpec
from mindformers_ext.jobs.train.train import hooks_of
from mindformers_ext.pt.trainer import TorchTrainer

MOE = MoESpec(num_local_experts=4, num_experts_per_tok=2, capacity_factor=0.0, aux_losses=(("expert", 0.05),))
MODEL = ModelSpec(
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
)
SPEC = NetworkSpec(model=MODEL, seq_length=8, batch_size=4)
TRAIN = TrainSpec(
    optimizer=OptimizerSpec(weight_decay=0.1),
    steps=9,
    max_grad_norm=1.0,
    seed=3,
    schedule=Schedule(kind="ConstantWarmUpLR", learning_rate=1e-2),
)
CPU = torch.device("cpu")
W13 = ("w1", "w3")


def rows(step: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(step).integers(0, 50, (count, 9)).astype(np.int32)


def trained(spec: NetworkSpec = SPEC, train: TrainSpec = TRAIN, steps: int = 4) -> tuple[TorchTrainer, list]:
    trainer = TorchTrainer(spec, train, CPU)
    trainer.open()
    return trainer, [trainer.step((rows(step),)) for step in range(steps)]


def weights(trainer: TorchTrainer) -> dict[str, np.ndarray]:
    return dict(trainer.state(adapters=False))


def assert_equal(a: TorchTrainer, b: TorchTrainer, limit: float = 0.0) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_allclose(array, second[name], rtol=0, atol=limit, err_msg=name)


def test_a_run_learns_and_repeats_itself() -> None:
    one, figures = trained()
    two, again = trained()
    assert_equal(one, two)
    assert [f.loss for f in figures] == [f.loss for f in again]
    trainer = TorchTrainer(SPEC, TRAIN, CPU)
    trainer.open()
    losses = [trainer.step((rows(0),)).loss for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_torchs_adamw_makes_the_same_step() -> None:
    trainer = TorchTrainer(SPEC, replace(TRAIN, max_grad_norm=None), CPU)
    trainer.open()
    twin = TorchTrainer(SPEC, TRAIN, CPU)
    groups = [
        {
            "params": [p for p in twin.network.parameters() if (p.dim() > 1) == decays],
            "weight_decay": 0.1 if decays else 0.0,
        }
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(3):
        trainer.step((rows(step),))
        optimizer.zero_grad()
        twin.network(torch.from_numpy(rows(step)).long(), losses=True).loss.backward()
        optimizer.step()
    for (name, ours), theirs in zip(trainer.network.named_parameters(), twin.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_recomputing_changes_nothing() -> None:
    assert_equal(trained()[0], trained(train=replace(TRAIN, recompute=True))[0])


def test_the_loss_scale_cancels_out() -> None:
    one = weights(trained()[0])
    two = weights(trained(train=replace(TRAIN, loss_scale=LossScale(value=1024.0)))[0])
    assert (one.pop("scale_sense"), two.pop("scale_sense")) == (1.0, 1024.0)
    for name, array in one.items():
        np.testing.assert_allclose(array, two[name], atol=2e-6, err_msg=name)


def test_micro_batches_add_up() -> None:
    """Without capacity and auxiliary loss a step is a mean over rows, however they are cut."""
    spec = replace(SPEC, model=replace(MODEL, moe=replace(MOE, aux_losses=())))
    assert_equal(trained(spec)[0], trained(spec, replace(TRAIN, micro_batches=2))[0], 2e-5)


def test_an_overflow_changes_nothing_but_the_scale() -> None:
    scale = LossScale(value=1e38, factor=4.0, window=2)
    trainer = TorchTrainer(SPEC, replace(TRAIN, loss_scale=scale), CPU)
    trainer.open()
    before = weights(trainer)
    figures = trainer.step((rows(0),))
    assert figures.overflow and figures.loss_scale == pytest.approx(2.5e37) and trainer.updates == 0
    after = weights(trainer)
    assert all(
        np.array_equal(before[name], after[name])
        for name in before
        if name not in ("scale_sense", "current_iterator_step", "last_overflow_iterator_step")
    )
    while trainer.step((rows(1),)).overflow:
        pass
    assert trainer.updates == 1


def test_adapters_alone_learn() -> None:
    lora = LoraSpec(rank=2, alpha=4, dropout=0.1, targets=r".*wq|.*wo|lm_head")
    trainer, figures = trained(train=replace(TRAIN, lora=lora), steps=6)
    plain, _ = trained(steps=0)
    state = dict(trainer.state(adapters=True))
    assert all("mindpet_delta_lora" in name for name in state if name.startswith(("model.", "lm_head.")))
    whole, start = weights(trainer), weights(plain)
    assert all(np.array_equal(whole[name], start[name]) for name in start if name.startswith(("model.", "lm_head.")))
    assert np.abs(state["lm_head.mindpet_delta_lora_b"]).max() > 0 and len(figures) == 6
    with pytest.raises(UserError, match="matches model.layers.0.feed_forward.ffn.*: only linear layers are adapted"):
        TorchTrainer(SPEC, replace(TRAIN, lora=replace(lora, targets=r".*ffn$")), CPU)
    with pytest.raises(UserError, match="matches no layer: the linear layers are lm_head, model.layers"):
        TorchTrainer(SPEC, replace(TRAIN, lora=replace(lora, targets="nothing")), CPU)


@pytest.mark.parametrize("corrected", [True, False])
def test_restored_state_goes_on_exactly(corrected: bool) -> None:
    train = replace(
        TRAIN,
        optimizer=OptimizerSpec(bias_correction=corrected, weight_decay=0.1),
        loss_scale=LossScale(value=8.0, window=2),
    )
    one, _ = trained(train=train)
    state = weights(one)
    two = TorchTrainer(SPEC, replace(train, seed=3), CPU)
    two.fill((name, array) for name, array in state.items() if name.startswith(("model.", "lm_head.")))
    two.open()
    two.restore(state)
    assert_equal(one, two)
    for step in range(3):
        assert one.step((rows(step),))[:6] == two.step((rows(step),))[:6]
    assert_equal(one, two)


def test_half_precision_weights_have_float32_moments() -> None:
    numerics = NumericsSpec(compute_dtype="bfloat16", param_dtype="bfloat16")
    trainer, figures = trained(replace(SPEC, numerics=numerics))
    assert all(m.dtype == torch.float32 for m in trainer.optimizer.means) and np.isfinite(figures[-1].loss)
    assert weights(trainer)["lm_head.weight"].dtype == np.uint16


def test_biases_follow_the_load() -> None:
    moe, train = replace(MOE, balance_via_topk_bias=True), replace(TRAIN, bias_rate=0.01)
    trainer = TorchTrainer(replace(SPEC, model=replace(MODEL, moe=moe)), train, CPU)
    trainer.open()
    (hook,) = hooks_of(train, trainer)
    figures = trainer.step((rows(0),))
    hook.after_step(1, figures)
    trainer.set_values(hook.inputs(2))
    load, biases = figures.expert_load, weights(trainer)
    for layer in range(2):
        found = biases[f"model.layers.{layer}.feed_forward.router.router.topk_bias"]
        share = load[layer] / load[layer].sum()
        np.testing.assert_allclose(found, 0.01 * np.sign(0.25 - share), atol=1e-7)


def test_groups_of_parameters_go_their_own_way() -> None:
    """One is frozen, one learns twice as fast, one climbs; the others do what they did without groups."""
    groups = (
        ParameterGroup(pattern=r".*\.wq\.weight", trained=False),
        ParameterGroup(pattern="lm_head.*", lr_factor=2.0, decay=False),
        ParameterGroup(pattern=r".*ffn\.w[13]\.weight", sign=-1, decay=False),
    )
    plain = replace(TRAIN, optimizer=OptimizerSpec(), max_grad_norm=None)
    start, alike = (weights(trained(train=plain, steps=steps)[0]) for steps in (0, 1))
    trainer, _ = trained(train=replace(plain, groups=groups), steps=1)
    own = weights(trainer)
    for name, before in start.items():
        if not name.startswith(("model.", "lm_head.")):
            continue
        factor = 0.0 if ".wq." in name else 2.0 if name == "lm_head.weight" else -1.0 if name[-9:-7] in W13 else 1.0
        np.testing.assert_allclose(own[name] - before, factor * (alike[name] - before), atol=1e-7, err_msg=name)
    assert "adam_m.model.layers.0.attention.wq.weight" not in own and "adam_m.lm_head.weight" in own
    with pytest.raises(UserError, match="w1.weight and .*w3.weight are one parameter"):
        TorchTrainer(SPEC, replace(TRAIN, groups=(ParameterGroup(pattern=".*w1.weight", sign=-1),)), CPU)
