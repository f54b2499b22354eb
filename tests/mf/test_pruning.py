# SPDX-License-Identifier: Apache-2.0
"""Masks trained in MindFormers' loop: our loop's run to the last bit, also behind a resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import numpy as np
import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.run.checks import check_run
from mindformers_ext.jobs.train.train import train
from tests.helpers.tiny_run import config_of, rows_of

STEPS, KEPT = 10, "checkpoint/rank_0/tiny_rank_0-1_{}.ckpt"
NOT_EQUAL = ("seconds", "tokens_per_second", "learning_rate")  # the rate is kept in float32 by MindFormers' steps
L0 = {
    "pruning_modules": ["head", "intermediate", "layer", "hidden"],
    "lagrangian_warmup_steps": "4ba",
    "target_model": {"d_model": 16, "n_heads": 2, "n_layers": 1, "intermediate_size": 24},
}


def config(job: SimpleNamespace, output: Path, *options: str, **l0: Any) -> dict[str, Any]:
    words = ("runner_config.epochs=1", "callbacks.1.save_checkpoint_steps=1", "callbacks.1.keep_checkpoint_max=99")
    found = config_of(job.yaml, *words, f"output_dir={output}", *options)
    del found["moe_config"]
    found["model"]["model_config"]["l0_module"] = L0 | l0
    return found


def mindformers(given: dict[str, Any]) -> None:
    from mindformers_ext.mf.run import run

    checked = check_run(given, "test")
    run(checked.config, checked)


def figures(output: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in NOT_EQUAL} for row in rows_of(output)]


def same_files(one: Path, other: Path) -> None:
    first, second = (ms.load_checkpoint(str(path)) for path in (one, other))
    assert {name for name in first if name.startswith("model.l0_module.masks.hidden")} == {
        f"model.l0_module.masks.hidden.{end}" for end in ("z_loga", "noise", "values")
    }
    assert first.keys() == second.keys()
    for name, held in first.items():
        np.testing.assert_array_equal(held.asnumpy(), second[name].asnumpy(), err_msg=name)


@pytest.mark.slow
@pytest.mark.turn("same figures")
def test_the_same_run_as_in_our_loop_and_after_a_resume(job: SimpleNamespace, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    mindformers(config(job, theirs))
    checked = check_run(config(job, ours, "loop=own"), "test")
    train(checked.run, checked.config, checked.build.network, checked.notes)
    whole = figures(theirs)
    assert whole == figures(ours) and len(whole) == STEPS
    assert whole[-1]["lagrangian_loss"] > whole[2]["lagrangian_loss"] > 0  # multipliers climb
    same_files(theirs / KEPT.format(STEPS), ours / KEPT.format(STEPS))
    again = tmp_path / "again"
    shutil.copytree(theirs, again)
    for step in range(6, STEPS + 1):
        (again / KEPT.format(step)).unlink()
    mindformers(config(job, again, "resume_training=True"))
    assert figures(again) == whole
    (last,) = (again / "checkpoint" / "rank_0").glob(f"*-1_{STEPS}.ckpt")  # MindFormers names a resumed run's anew
    same_files(last, theirs / KEPT.format(STEPS))


def test_what_cannot_be_is_refused(job: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of a run of 10 steps: the target would not be reached"):
        mindformers(config(job, tmp_path / "late", lagrangian_warmup_steps=11))
    with pytest.raises(UserError, match="cut the model first"):
        check_run(config(job, tmp_path / "predict", "run_mode=predict"), "test")
