# SPDX-License-Identifier: Apache-2.0
"""The PyTorch engine needs no MindSpore: training, evaluation and prediction where it cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny_run import ROOT, environment, make_job, rows_of

PROGRAM = """
import sys
for name in ("mindspore", "mindformers", "torch._dynamo"):  # the last takes a second, and nothing is compiled
    sys.modules[name] = None  # importing it fails
from mindformers_ext.cli.run_mindformer import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_train_eval_predict(tmp_path: Path) -> None:
    job = make_job(tmp_path)

    def run(*words: object) -> str:
        command = [sys.executable, "-c", PROGRAM, "--config", job, "--engine", "pt", "--output_dir", "out", *words]
        found = subprocess.run(
            list(map(str, command)),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=250,
            env=environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert found.returncode == 0, found.stderr[-3000:]
        return found.stdout

    run()
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 20 and rows[-1]["loss"] < rows[0]["loss"]
    weights = "out/checkpoint"
    run("--run_mode", "eval", "--eval_data", "train.mindrecord", "--load_checkpoint", weights)
    measured = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    assert abs(measured["loss"] - rows[-1]["lm_loss"]) < 0.5 and measured["tokens"] == 40 * 32
    text = run("--run_mode", "predict", "--predict_data", "def load", "--load_checkpoint", weights)
    assert text.startswith("def load") and len(text) > 12
