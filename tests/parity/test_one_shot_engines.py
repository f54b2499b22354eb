# SPDX-License-Identifier: Apache-2.0
"""What is measured of every unit is the same on both engines, and so is what a cut fitted by least squares becomes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tests.helpers.parity  # noqa: F401 MindSpore before transformers
from mindformers_ext.jobs.experts.texts import Texts
from mindformers_ext.jobs.prune.one_shot.cuts import chosen_by, open_workbench
from mindformers_ext.jobs.prune.one_shot.importance import measured
from mindformers_ext.jobs.prune.one_shot.targets import target_of
from tests.helpers.one_shot import BLOCK, JUDGED, TOKENS, make_model, write_text

pytestmark = pytest.mark.slow  # MindSpore is imported and compiles


def test_both_engines_measure_fit_and_judge_alike(tmp_path: Path) -> None:
    make_model(tmp_path / "model", num_hidden_layers=2, tie_word_embeddings=True)
    text, found, losses = write_text(tmp_path / "text.txt"), {}, {}
    for engine in ("pt", "ms"):
        texts = Texts(
            calibration=(text,), tokens=TOKENS, held_out_tokens=JUDGED, block_size=BLOCK, engine=engine, quiet=True
        )
        with open_workbench(tmp_path / "model", texts, tmp_path / engine) as bench:
            path = tmp_path / f"{engine}.npz"
            found[engine] = measured(bench.start, path, ("forward", "taylor"), False, lambda line: None)
            target = target_of({"intermediate_size": 24, "num_attention_heads": 2}, bench.shape)
            values = chosen_by(bench, "minitron", found["pt"], target, 0)
            losses[engine] = [bench.loss(None), bench.loss(bench.cut(values, "least_squares"))]
    for name, value in found["pt"].statistics.items():
        least = 1e-5 * np.abs(value).max()
        np.testing.assert_allclose(found["ms"].statistics[name], value, rtol=1e-3, atol=least, err_msg=name)
    np.testing.assert_allclose(losses["ms"], losses["pt"], atol=1e-4)
    assert losses["pt"][0] != pytest.approx(losses["pt"][1], abs=1e-3)
