# SPDX-License-Identifier: Apache-2.0
"""Losses measured between two training steps: equal in both engines, without noise, and the steps do not see it."""

import numpy as np
import pytest

from mindformers_ext.core.spec import DeviceSpec
from mindformers_ext.jobs.engine.door import open_trainer
from tests.pt.ranks_worker import TRAIN, rows, spec_of

pytestmark = pytest.mark.slow


def test_a_measurement_is_the_same_in_both_engines_and_changes_no_step() -> None:
    found = {}
    ignored = np.full_like(rows(0), -100)
    for engine, measures in (("ms", True), ("pt", True), ("pt", False)):
        trainer = open_trainer(engine, spec_of(1, 1, "noisy", alone=True), TRAIN, DeviceSpec("CPU"))
        trainer.open()
        losses, steps = [], []
        for step in range(2):
            if measures:
                losses += [trainer.evaluate((rows(7), rows(7))) for _ in range(2)]
            steps.append(trainer.step((rows(step),)).loss)
        if measures:
            assert losses[0] == losses[1] and losses[2] == losses[3] < losses[0]  # no noise is drawn
            assert trainer.evaluate((rows(7), ignored)) == 0.0
        values = np.array([[1e9 + 1 / 3, 2.0]])
        assert np.array_equal(trainer.ranks.sum(values), values)
        found[engine, measures] = losses, steps
    assert found["pt", True][1] == found["pt", False][1]
    for part in (0, 1):
        np.testing.assert_allclose(found["ms", True][part], found["pt", True][part], rtol=1e-5)
