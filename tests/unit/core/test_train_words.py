# SPDX-License-Identifier: Apache-2.0
"""What the PyTorch engine reads for itself: schedules, initial weights, the order of rows, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from mindformers_ext.core.config.schedule import Schedule, schedule_from_yaml
from mindformers_ext.core.config.train import ParameterGroup, TrainSpec, group_of, train_spec_from_yaml
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.philox import CHUNK, normal, seeds
from mindformers_ext.core.spec import ParallelSpec
from mindformers_ext.data.row_order import RowOrder
from tests.helpers.pretrain import changed
from tests.helpers.specs import PRETRAIN_YAML


def test_initial_weights_are_mindspores() -> None:
    """Noted from MindSpore 2.9's initializer; the seeds are numpy's."""
    noted = [1.1987393, -1.5148976, -0.56773245, 0.14529076, 1.9129629, -0.6005816, -0.49828988, -0.7491615]
    np.testing.assert_allclose(normal(5, 7, 1.0), noted[:7], rtol=1e-6)
    own = seeds(7)
    assert [next(own) for _ in range(2)] == np.random.RandomState(7).randint(1, 1 << 63, 2, dtype=np.int64).tolist()
    long = normal(11, CHUNK + 5, 0.02)
    np.testing.assert_array_equal(long[:9], normal(11, 9, 0.02))
    assert abs(float(long.std()) - 0.02) < 1e-4 and abs(float(long.mean())) < 1e-4


def test_the_order_of_rows_is_mindspores() -> None:
    """Noted from MindSpore 2.9's MindDataset with seed 7 (seed 8 is its second epoch in training)."""
    assert RowOrder(8, True, 7).epoch(0).tolist() == [4, 5, 1, 2, 6, 7, 3, 0]
    assert RowOrder(9, True, 7).epoch(0).tolist() == [5, 6, 1, 8, 0, 7, 4, 3, 2]
    assert RowOrder(40, True, 1).epoch(0)[:11].tolist() == [34, 30, 21, 29, 10, 38, 16, 5, 39, 11, 33]
    assert RowOrder(8, True, 6).epoch(1).tolist() == RowOrder(8, True, 7).epoch(0).tolist()
    assert RowOrder(5, False).epoch(3).tolist() == [0, 1, 2, 3, 4]
    many = RowOrder(60_000, True, 0).epoch(0)  # too many for two places in one number
    assert sorted(many.tolist()) == list(range(60_000)) and many[:3].tolist() != [0, 1, 2]


@pytest.mark.parametrize(
    ("words", "steps", "rates"),
    [
        (
            {"type": "CosineWithWarmUpLR", "learning_rate": 1.0, "lr_end": 0.1, "warmup_ratio": 0.1, "total_steps": -1},
            (0, 1, 2, 11, 20),
            (0.0, 0.5, 1.0, 0.55, 0.1),
        ),
        (
            {"type": "LinearWithWarmUpLR", "learning_rate": 1.0, "warmup_steps": 4, "total_steps": 20},
            (0, 2, 4, 12, 30),
            (0.0, 0.5, 1.0, 0.5, 0.0),
        ),
        (
            {"type": "ConstantWarmUpLR", "learning_rate": 1.0, "warmup_steps": 4, "warmup_lr_init": 0.2},
            (0, 2, 4, 30),
            (0.2, 0.6, 1.0, 1.0),
        ),
    ],
)
def test_schedules(words: dict, steps: tuple, rates: tuple) -> None:
    problems = Problems("test")
    schedule = schedule_from_yaml({"lr_schedule": words}, 20, 10, problems)
    problems.raise_if_any()
    assert [schedule.rate(step) for step in steps] == pytest.approx(rates)


def test_a_constant_rate_without_a_schedule() -> None:
    problems = Problems("test")
    assert schedule_from_yaml({"optimizer": {"learning_rate": 0.5}}, 9, 9, problems).rate(7) == 0.5
    schedule_from_yaml({"optimizer": {}}, 9, 9, problems)
    schedule_from_yaml({"lr_schedule": {"type": "Fancy", "learning_rate": "high", "warmup_ratio": 3}}, 9, 9, problems)
    with pytest.raises(UserError, match=r"give one of them\n.*Fancy.*\n.*learning_rate='high'.*\n.*warmup_ratio=3"):
        problems.raise_if_any()


def spec_of(**changes: object) -> tuple[TrainSpec, list[str]]:
    """The long YAML of the older files, with keys set by dotted path."""
    config = changed({path.replace("__", "."): value for path, value in changes.items()})
    return train_spec_from_yaml(config, ParallelSpec(), 100, 0.0)


def test_an_older_yaml() -> None:
    spec, notes = spec_of()
    assert spec.schedule == Schedule(
        kind="CosineWithWarmUpLR", learning_rate=1e-5, lr_end=1e-6, warmup_steps=30, total_steps=1000, decay_steps=1000
    )
    assert spec.optimizer.betas == (0.9, 0.95) and spec.optimizer.bias_correction and spec.optimizer.weight_decay == 0
    assert (spec.loss_scale.value, spec.loss_scale.window) == (65535, 1000)
    assert spec.max_grad_norm == 1.0 and spec.recompute and spec.steps == 1000
    assert spec.checkpoint is not None and spec.checkpoint.prefix == "mixtral-8x7b" and spec.checkpoint.keep == 5
    assert len(notes) == 1 and "writes no TensorBoard events" in notes[0]
    assert spec_of(callbacks=[{"type": "MFLossMonitor", "tensorboard": False}])[1] == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("runner_wrapper__local_norm", True, "runner_wrapper.local_norm=True: the PyTorch engine does not build this"),
        ("do_eval", True, "do_eval=True: .*evaluate after training"),
        ("optimizer__type", "Muon", "optimizer.type='Muon' is unknown: choose one of AdamW"),
        ("callbacks", [{"type": "ProfileMonitor"}], "callback ProfileMonitor belongs to MindFormers' trainer"),
        ("callbacks", [{"type": "CheckpointMonitor", "save_checkpoint_seconds": 9}], "use save_checkpoint_steps"),
        ("profile", True, "profile=True"),
        ("optimizer__eps", 0.0, "eps=0.0 is out of range"),
    ],
)
def test_what_is_not_built_is_named(path: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec_of(**{path: value})


def test_gates_alone_beside_adapters_are_refused() -> None:
    adapters = {"pet_type": "lora", "target_modules": ".*wq"}
    with pytest.raises(UserError, match="train_gate_only: True trains no adapters"):
        spec_of(runner_config__train_gate_only=True, model__model_config__pet_config=adapters)


@pytest.mark.parametrize("name", ["pipeline_stage", "model_parallel", "context_parallel"])
def test_sizes_that_are_not_built_are_named(name: str) -> None:
    config = yaml.safe_load(PRETRAIN_YAML)
    with pytest.raises(UserError, match=f"parallel_config.{name}=2: the PyTorch engine does not build this"):
        train_spec_from_yaml(config, ParallelSpec(**{name: 2}), 100, 0.0)


@pytest.mark.parametrize(
    ("words", "is_on", "noted"),
    [
        ({"recompute": True}, True, []),
        ({"recompute": [10, 8], "select_recompute": True}, True, ["select_recompute: ", "recompute=[10, 8]: "]),
        ({"recompute": [0, 0], "select_recompute": [0, 0]}, False, []),
        ({"select_recompute": {"attention": [0, 3], "feed_forward": False}}, True, ["select_recompute: "]),
        ({"select_recompute": {"attention": False}}, False, []),
    ],
)
def test_recompute_is_of_whole_layers(words: dict, is_on: bool, noted: list[str]) -> None:
    spec, notes = spec_of(recompute_config=words, callbacks=[])
    assert spec.recompute is is_on
    assert [note.split("the PyTorch")[0] for note in notes] == [f"recompute_config.{text}" for text in noted]


@pytest.mark.parametrize("words", [{"select_recompute": ["attn"]}, {"recompute": "False"}])
def test_recompute_words_are_checked(words: dict) -> None:
    with pytest.raises(UserError, match="is no part of a layer here|is not understood"):
        spec_of(recompute_config=words)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            ParallelSpec(parallel_mode="semi_auto_parallel", device_num=2),
            "parallel_mode=semi_auto_parallel: .*set it to 0",
        ),
        (ParallelSpec(parallel_mode="data_parallel", device_num=2, expert_parallel=2), "keeps all experts on every"),
        (
            ParallelSpec(model_parallel=2),
            "model_parallel=2: --trainer own does not build this: .*--trainer mindformers",
        ),
        (
            ParallelSpec(pipeline_stage=2),
            "pipeline_stage=2: --trainer own does not build this: .*--trainer mindformers",
        ),
    ],
)
def test_what_our_loop_leaves_to_mindformers_is_named(parallel: ParallelSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_spec_from_yaml(yaml.safe_load(PRETRAIN_YAML), parallel, 100, 0.0, "ms")


def test_the_first_group_that_matches_the_whole_name_decides() -> None:
    groups = (ParameterGroup(pattern=r"lm_head\..*", decay=False), ParameterGroup(pattern=r".*weight", lr_factor=0.5))
    assert group_of("lm_head.weight", groups) is groups[0] and group_of("model.norm.weight", groups) is groups[1]
    default = group_of("model.norm.bias", groups)
    assert default.trained and (default.lr_factor, default.sign) == (1.0, 1)
    assert default.decays(2) and not default.decays(1) and not groups[0].decays(2)
    with pytest.raises(UserError, match="sign=0 must be 1 or -1"):
        ParameterGroup(sign=0)
