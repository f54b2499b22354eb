# SPDX-License-Identifier: Apache-2.0
"""Hooks between training steps, as both loops call them."""

from __future__ import annotations

import numpy as np
import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.figures import StepFigures
from mindformers_ext.jobs.train.hooks import (
    AdapterDropout,
    BiasBalance,
    LoadLog,
    QuietHook,
    hook_state,
    load_lines,
    moved,
    restore_hooks,
)

NAMES = ("model.layers.0.feed_forward.router.router.topk_bias", "model.layers.1.feed_forward.router.router.topk_bias")
LOAD = np.array([[10.0, 2.0, 4.0, 0.0], [4.0, 4.0, 4.0, 4.0]])


def figures(load: np.ndarray = LOAD, overflow: bool = False) -> StepFigures:
    return StepFigures(1.0, overflow, 1.0, 0.1, 0.5, 1.0, 0.0, load, np.zeros(len(load)))


def test_the_bias_goes_against_the_load() -> None:
    bias = moved(np.zeros(4, np.float32), np.array([10.0, 2.0, 4.0, 0.0]), 0.01)
    np.testing.assert_allclose(bias, [-0.01, 0.01, 0.0, 0.01])
    np.testing.assert_array_equal(moved(bias, np.zeros(4), 0.01), bias)


def test_biases_move_once_a_step_and_not_in_a_skipped_one() -> None:
    hook = BiasBalance(0.01, {name: np.zeros(4, np.float32) for name in NAMES})
    assert hook.inputs(1) == {}
    hook.after_step(1, figures(overflow=True))
    assert hook.inputs(2) == {}
    hook.after_step(2, figures())
    given = hook.inputs(3)
    np.testing.assert_allclose(given[NAMES[0]], [-0.01, 0.01, 0.0, 0.01])
    assert not given[NAMES[1]].any() and given[NAMES[0]].dtype == np.float32
    assert hook.inputs(3) == {}  # told once
    with pytest.raises(UserError, match="needs the load of every step: set runner_wrapper.type"):
        hook.after_step(3, figures(np.zeros((1, 1))))


def test_the_load_of_experts_is_shown_per_layer() -> None:
    lines = load_lines(np.array([[6.0, 2.0, 0.0, 8.0], [4.0, 4.0, 4.0, 4.0]]), np.array([0.25, 0.0]))
    assert lines == [
        "layer: 0, drop_rate: 0.25000, fullest expert: 3 (2.00 of an even load), emptiest: 2 (0.00)",
        "layer: 1, drop_rate: 0.00000, fullest expert: 0 (1.00 of an even load), emptiest: 0 (1.00)",
    ]
    (line,) = load_lines(np.array([[1.0, 1.0]]), np.array([0.0]), layers=(2,))  # two dense ones before it
    assert line.startswith("layer: 2, ")


def test_the_load_is_logged_every_n_steps_and_its_absence_once() -> None:
    lines, warnings = list[str](), list[str]()
    hook = LoadLog(lambda text, *values: lines.append(text % values), warnings.append, every=2)
    for step in range(5, 9):
        hook.after_step(step, figures())
    assert len(lines) == 2 * len(LOAD) and not warnings  # steps 5 and 7
    for step in range(9, 13):
        hook.after_step(step, figures(np.zeros((1, 1))))
    assert len(warnings) == 1 and len(lines) == 4


class Counter(QuietHook):
    """A hook with a state of its own."""

    def __init__(self) -> None:
        self.steps = 0

    def after_step(self, step: int, figures: StepFigures) -> None:
        self.steps += 1

    def state(self) -> dict[str, np.ndarray]:
        return {"steps": np.array(self.steps)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        self.steps = int(state["steps"])


def test_each_hook_gets_its_own_state_back() -> None:
    hooks = [Counter(), QuietHook(), Counter()]
    hooks[0].after_step(1, figures())
    state = hook_state(hooks)
    assert sorted(state) == ["hook.0.steps", "hook.2.steps"]
    again = [Counter(), QuietHook(), Counter()]
    again[2].steps = 5
    restore_hooks(again, state | {"model.norm_out.weight": np.ones(2)})
    assert (again[0].steps, again[2].steps) == (1, 0)
    later = Counter()
    restore_hooks([later], {"hook.3.steps": np.array(7)}, first=3)
    assert later.steps == 7


def test_dropout_has_seeds_of_its_own_in_every_step_on_every_rank() -> None:
    held = {"model.adapter_dropout_seed": np.zeros(3, np.int32)}
    seeds = [AdapterDropout(7, rank, held).inputs(step) for step in (1, 2) for rank in (0, 1)]
    found = np.concatenate([item["model.adapter_dropout_seed"] for item in seeds])
    assert found.dtype == np.int32 and len(set(found.tolist())) == 12
    again = AdapterDropout(7, 1, held).inputs(2)
    np.testing.assert_array_equal(again["model.adapter_dropout_seed"], found[-3:])
