# SPDX-License-Identifier: Apache-2.0
"""Sliced checkpoints that several files of tests read."""

import shutil

import numpy as np
import pytest

from mindformers_ext.formats.strategy import read_strategy
from tests.helpers.sliced import (
    PP2,
    cut,
    golden_arrays,
    write_ranks,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's output: 16 ranks with counters, and what they hold whole."""
    folder = tmp_path_factory.mktemp("run")
    strategy = read_strategy(PP2)
    arrays = golden_arrays(strategy.names())
    extras = {"global_step": np.int32([7])}
    write_ranks(folder / "checkpoint", cut(strategy, arrays, extras))
    shutil.copytree(PP2, folder / "strategy")
    return folder, arrays | extras
