# SPDX-License-Identifier: Apache-2.0
"""A data mixture with fixed proportions in MindFormers' loop: our loop's rows, also behind a resume in an epoch."""

import pytest

from mindformers_ext.core.config.mixture_words import with_mixture_words
from mindformers_ext.jobs.run.checks import check_run
from mindformers_ext.jobs.train.train import train
from tests.helpers.mixtures import NAMES, mixture_job, prepared_folder
from tests.helpers.tiny_run import config_of, rows_of

pytestmark = pytest.mark.slow
WORDS = ("runner_config.epochs=2", "callbacks.1.save_checkpoint_steps=3", "train_dataset.data_loader.num_samples=20")
FIXED = {"update_type": "constant", "target_loss": None, "eval_interval": None, "eval_domains": None}


@pytest.mark.turn("same figures")
def test_the_same_rows_as_in_our_loop_and_after_a_resume(job, tmp_path):
    from mindformers_ext.mf.run import run

    path = mixture_job(tmp_path, **FIXED)
    checked = check_run(config_of(path, *WORDS, "engine=pt", f"output_dir={tmp_path / 'ours'}"), "test")
    train(checked.run, checked.config, checked.build.network, checked.notes)
    theirs, folder = tmp_path / "theirs", prepared_folder(tmp_path / "domains")
    path = mixture_job(tmp_path, **FIXED, domains=None, dataset_dir=str(folder), split="for_ft")
    checked = check_run(config_of(path, *WORDS, f"output_dir={theirs}"), "test")
    run(checked.config, checked)
    rows = rows_of(theirs)
    assert len(rows) == 10
    for mine, row in zip(rows_of(tmp_path / "ours"), rows, strict=True):
        assert row["loss"] == pytest.approx(mine["loss"], rel=1e-5)
        assert [row[f"rows.{name}"] for name in NAMES] == [mine[f"rows.{name}"] for name in NAMES]
    (theirs / "checkpoint" / "rank_0" / "tiny_rank_0-2_4.ckpt").unlink()
    (theirs / "checkpoint" / "rank_0" / "tiny_rank_0-2_5.ckpt").unlink()
    checked = check_run(config_of(path, *WORDS, f"output_dir={theirs}", "resume_training=True"), "test")
    assert any("tiny_rank_0-2_1.ckpt" in note for note in checked.notes)
    run(checked.config, checked)
    again = rows_of(theirs)
    kept = ("step", "loss", *(f"rows.{name}" for name in NAMES))
    assert [[row[name] for name in kept] for row in again] == [[row[name] for name in kept] for row in rows]


def test_adapt_gives_the_loader_its_seed():
    from mindformers_ext.mf.adapt import adapt

    words = {"type": "MixtureDataset", "domains": {"a": "a.mindrecord"}, "proportion": [1.0]}
    config = {"seed": 3, "run_mode": "train", "train_dataset": {"data_loader": words}}
    assert adapt(config, "CPU")[0]["train_dataset"]["data_loader"] == {**words, "seed": 3}
    assert with_mixture_words(config) is config
