# SPDX-License-Identifier: Apache-2.0
"""A step's outputs by name: our own nine, MindFormers' five, and a loss alone."""

from __future__ import annotations

import math

import numpy as np

from mindformers_ext.core.figures import StepFigures, figures_of


class Device:
    """A tensor as an engine has it: its values come when they are asked for."""

    def __init__(self, values: object) -> None:
        self.values = np.array(values, np.float32)

    def asnumpy(self) -> np.ndarray:
        return self.values


OURS = (1.5, False, 2.0, [0.1], 0.5, 1.25, 0.25, [[3.0, 1.0]], [0.5])


def test_our_step_tells_all() -> None:
    found = figures_of(tuple(map(Device, OURS)))
    assert (found.loss, found.overflow, found.loss_scale, found.global_norm) == (1.5, False, 2.0, 0.5)
    assert found.learning_rate == np.float32(0.1) and (found.lm_loss, found.aux_loss) == (1.25, 0.25)
    assert found.expert_load.tolist() == [[3.0, 1.0]] and found.dropped.tolist() == [0.5] and found.has_load


def test_the_first_five_stand_where_mindformers_callbacks_read_them() -> None:
    assert StepFigures._fields[:5] == ("loss", "overflow", "loss_scale", "learning_rate", "global_norm")


def test_what_a_step_does_not_tell() -> None:
    five = figures_of(tuple(map(Device, OURS[:5])))
    assert (five.lm_loss, five.aux_loss) == (1.5, 0.0) and not five.has_load and five.dropped.tolist() == [0.0]
    alone = figures_of(Device([1.0, 2.0]))  # a loss per row
    assert alone.loss == 1.5 and not alone.overflow and alone.loss_scale == 1.0
    assert math.isnan(alone.learning_rate) and math.isnan(alone.global_norm)
    without_norm = figures_of((Device(1.0), Device(True), Device(8.0), Device(0.1), None))
    assert without_norm.overflow and math.isnan(without_norm.global_norm)
