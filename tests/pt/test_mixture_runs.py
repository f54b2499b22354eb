# SPDX-License-Identifier: Apache-2.0
"""Runs of our loop over a data mixture on PyTorch: what is drawn, how proportions move, and what stops a run."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.figures import figures_of
from mindformers_ext.data.mixture.state import LARGEST
from mindformers_ext.formats import mindrecord_file
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.jobs.predict.evaluate import open_evaluation
from mindformers_ext.jobs.run.checks import check_run
from mindformers_ext.jobs.run.mixture_checks import held_state
from mindformers_ext.jobs.train.domain_losses import DomainLosses
from mindformers_ext.jobs.train.mixture_data import MixtureData
from mindformers_ext.jobs.train.token_data import RecordRows
from mindformers_ext.jobs.train.train import open_rows
from mindformers_ext.pt.ranks import Ranks
from tests.helpers.mixtures import (
    INTERVAL,
    NAMES,
    PROPORTIONS,
    ROWS,
    TARGETS,
    domain_rows,
    prepared_folder,
    train_checked,
)
from tests.helpers.mixtures import mixture_config as config
from tests.helpers.tiny_run import BATCH, ROOT, config_of, write_rows

STEPS = 10


def run(job: Path, output: str, *options: str, **loader: Any) -> list[dict]:
    """Metrics of a run, without times."""
    return train_checked(config(job, output, *options, **loader))


def column(rows: list[dict], word: str) -> np.ndarray:
    return np.array([[row[f"{word}.{name}"] for name in NAMES] for row in rows])


def test_proportions_move_with_the_losses_at_the_end_of_every_window(whole: list[dict]) -> None:
    shares = column(whole, "proportion")
    expected = np.array(PROPORTIONS)
    for step, row in enumerate(whole, 1):
        assert np.abs(shares[step - 1] - expected).max() < 1e-15, step
        measured = [f"domain_loss.{name}" in row for name in NAMES]
        assert measured == [step % INTERVAL == 0] * 3
        if step % INTERVAL == 0:
            alpha = expected * np.exp(column([row], "domain_loss")[0] - TARGETS)
            expected = (1 - 1e-4) * alpha / alpha.sum() + 1e-4 / 3
    assert not np.array_equal(shares[0], shares[-1])
    used = column(whole, "rows")
    assert (used.sum(1) == BATCH * np.arange(1, STEPS + 1)).all() and (np.diff(used, axis=0) >= 0).all()


def test_a_domain_s_loss_is_that_of_an_evaluation_on_its_rows(mixed_job: Path) -> None:
    """Beside our evaluation, another network and another sum; with slots enough nothing is dropped in either."""
    rows = run(mixed_job, "roomy", "moe_config.capacity_factor=4.0", update_type="constant", target_loss=None)
    load = mixed_job.parent / "roomy" / "checkpoint" / "rank_0" / "tiny_rank_0-1_9.ckpt"
    for name in NAMES:
        options = ("run_mode=eval", f"load_checkpoint={load}", "moe_config.capacity_factor=4.0")
        asked = config(mixed_job, "judged", *options)
        asked["eval_dataset"]["data_loader"]["dataset_dir"] = str(mixed_job.parent / f"{name}_eval.mindrecord")
        checked = check_run(asked, "test")
        judged = open_evaluation(checked.run, checked.build.network).run()
        assert rows[8][f"domain_loss.{name}"] == pytest.approx(judged.loss, rel=1e-6)


def test_the_rows_are_those_of_the_domains_and_ranks_take_slices(mixed_job: Path) -> None:
    checked = check_run(config(mixed_job), "test")
    data, halves = (open_rows(checked.run, checked.config, checked.build.network) for _ in range(2))
    held = [domain_rows(name)[:ROWS] for name in NAMES]
    for step in range(30):
        (ids,) = data.batch(step, slice(None))
        domains, rows = halves.schedule.draw()  # type: ignore[attr-defined]
        assert np.array_equal(ids, np.stack([held[d][n] for d, n in zip(domains, rows, strict=True)]))
        if step == 20:
            halves.restore(data.state(), 21, "test")
    with pytest.raises(UserError, match="a.ckpt: it is of step 29, its data mixture of step 30"):
        halves.restore(data.state(), 29, "a.ckpt")
    with pytest.raises(ValueError, match="step 5 of a mixture that stands before step 30"):
        data.batch(5, slice(None))


@pytest.mark.parametrize("step", [2, 3, 4, 6])  # before and behind a change of the proportions
def test_a_resumed_run_is_as_if_it_had_not_stopped(mixed_job: Path, whole: list[dict], step: int) -> None:
    folder = mixed_job.parent / f"again{step}"
    shutil.copytree(mixed_job.parent / "whole", folder)
    for later in range(step + 1, STEPS + 1):
        (folder / "checkpoint" / "rank_0" / f"tiny_rank_0-1_{later}.ckpt").unlink()
    assert run(mixed_job, folder.name, "resume_training=True") == whole
    last = "checkpoint/rank_0/tiny_rank_0-1_10.ckpt"
    assert (folder / last).read_bytes() == (mixed_job.parent / "whole" / last).read_bytes()


def test_workers_and_prefetching_change_nothing(mixed_job: Path, whole: list[dict]) -> None:
    assert run(mixed_job, "workers", "train_dataset.num_parallel_workers=3", "train_dataset.prefetch_size=16") == whole


def test_a_safetensors_file_holds_the_state_too(mixed_job: Path, whole: list[dict]) -> None:
    for options in ((), ("resume_training=True",)):
        found = config(mixed_job, "safe", "load_ckpt_format=safetensors", *options)
        found["callbacks"][1] |= {"checkpoint_format": "safetensors", "save_checkpoint_steps": 7}
        assert train_checked(found) == whole
        (mixed_job.parent / "safe" / "checkpoint" / "rank_0" / "tiny_rank_0-1_10.safetensors").unlink()


def test_the_state_is_small_and_tells_what_happened(mixed_job: Path, whole: list[dict]) -> None:
    with closing(CkptFile(mixed_job.parent / "whole" / "checkpoint" / "rank_0" / "tiny_rank_0-1_10.ckpt")) as file:
        held = held_state(file)
    text = held["mixture"].astype(np.uint8).tobytes()
    found = json.loads(text)
    assert len(text) < LARGEST and found["global_step"] == STEPS and found["domains"] == list(NAMES)
    assert [window for window, _ in found["history"]] == [0, 1, 2, 3]
    assert found["proportions"] == [whole[-1][f"proportion.{name}"] for name in NAMES]


def test_a_prepared_folder_gives_the_same_run(mixed_job: Path, whole: list[dict], tmp_path: Path) -> None:
    folder = prepared_folder(tmp_path / "domains")
    words = {"dataset_dir": str(folder), "split": "for_prune", "domains": None, "eval_domains": None}
    assert run(mixed_job, "prepared", **words) == whole


def test_the_names_of_sheared_llama_are_understood(mixed_job: Path, whole: list[dict]) -> None:
    found = config(mixed_job, "sheared", proportion=None, update_type=None, target_loss=None, eval_interval=None)
    words = {"dynamic": True, "set_names": list(NAMES), "proportion": PROPORTIONS, "target_loss": TARGETS}
    found["callbacks"] = {**{item.pop("type"): item for item in found["callbacks"]}, "data_loading": words}
    found["eval_interval"] = f"{INTERVAL}ba"
    assert train_checked(found) == whole


def test_targets_are_measured_on_a_model_and_kept(mixed_job: Path, whole: list[dict]) -> None:
    """The model is the run's own at step 9: its losses are those measured there, but for tokens that found no slot."""
    load = mixed_job.parent / "whole" / "checkpoint" / "rank_0" / "tiny_rank_0-1_9.ckpt"
    rows = run(mixed_job, "measured", target_loss=None, target_loss_from=str(mixed_job.parent / "whole"))
    kept = json.loads((mixed_job.parent / "measured" / "target_loss.json").read_text())
    assert load.is_file() and list(kept["target_loss"]) == list(NAMES)
    np.testing.assert_allclose(list(kept["target_loss"].values()), column([whole[8]], "domain_loss")[0], rtol=0.02)
    (mixed_job.parent / "measured" / "checkpoint" / "rank_0" / "tiny_rank_0-1_10.ckpt").unlink()
    words = {"target_loss": None, "target_loss_from": str(mixed_job.parent / "whole")}
    shutil.move(mixed_job.parent / "whole" / "checkpoint", mixed_job.parent / "gone")
    assert run(mixed_job, "measured", "resume_training=True", **words) == rows
    shutil.move(mixed_job.parent / "gone", mixed_job.parent / "whole" / "checkpoint")
    again = run(mixed_job, "from_file", target_loss=str(mixed_job.parent / "measured" / "target_loss.json"))
    assert again == rows


def test_the_example_trains_within_its_caps(tmp_path: Path) -> None:
    """configs/tiny/mixture_pretrain.yaml, with a smaller network, fewer steps and shorter windows."""
    folder = prepared_folder(tmp_path / "domains", ("code", "docs"), 129)
    words = ("hidden_size=32", "intermediate_size=64", "num_layers=1", "num_heads=2", "n_kv_heads=2")
    loader = ("num_samples=96", "eval_interval=2", "eta=20.0", "max_weight=0.6", f"dataset_dir={folder}")
    found = config_of(
        ROOT / "configs" / "tiny" / "mixture_pretrain.yaml",
        "engine=pt",
        f"output_dir={tmp_path / 'out'}",
        *(f"model.model_config.{word}" for word in words),
        *(f"train_dataset.data_loader.{word}" for word in loader),
    )
    shares = np.array([[row["proportion.docs"], row["proportion.code"]] for row in train_checked(found)])
    assert len(shares) == 6 and (shares >= 0.4 - 1e-12).all() and (shares <= 0.6).all() and shares.max() == 0.6


def test_orders_of_large_files_are_looked_up_row_by_row(mixed_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [mixed_job.parent / f"books-{number}.mindrecord" for number in range(2)]
    monkeypatch.setattr(mindrecord_file, "HELD_ROWS", 4)
    rows = RecordRows(paths, ("input_ids",))
    assert len(rows) == ROWS and np.array_equal([rows.row(n)[0] for n in range(ROWS)], domain_rows("books")[:ROWS])
    with pytest.raises(UserError, match=r"row 99 of .* is not in its index"):
        rows.files[0].read(99, ("input_ids",))
    rows.close()


class OneAbove:
    """A trainer without a network: every token costs 0.5 more than its domain's target."""

    ranks = Ranks()

    def evaluate(self, columns: tuple[np.ndarray, ...]) -> float:
        held = [name for name in NAMES if (domain_rows(name)[ROWS] == columns[0][0]).all()]
        return TARGETS[NAMES.index(held[0])] + 0.5 if held else 99.0


def test_a_domain_of_which_no_token_counts_stands_on_its_target(mixed_job: Path, tmp_path: Path) -> None:
    checked = check_run(config(mixed_job), "test")
    data = open_rows(checked.run, checked.config, checked.build.network)
    assert isinstance(data, MixtureData)
    hook = DomainLosses(data, OneAbove(), checked.build.network.model, 5, np.array(TARGETS))  # type: ignore[arg-type]
    hook.files[2] = RecordRows(
        [write_rows(tmp_path / "padding.mindrecord", np.full((5, 33), 3, np.int32))], ("input_ids",)
    )
    figures = figures_of((1.0, False))
    assert hook.measured(2, figures) == {
        **{f"proportion.{name}": share for name, share in zip(NAMES, PROPORTIONS, strict=True)},
        **{f"rows.{name}": 0.0 for name in NAMES},
    }
    found = hook.measured(3, figures)
    assert found["domain_loss.books"] == pytest.approx(TARGETS[0] + 0.5) and np.isnan(found["domain_loss.web"])
    alpha = np.array(PROPORTIONS) * np.exp([0.5, 0.5, 0.0])
    expected = (1 - 1e-4) * alpha / alpha.sum() + 1e-4 / 3
    np.testing.assert_allclose(data.schedule.state.proportions, expected, rtol=1e-12)
    before = data.schedule.state
    hook.measured(6, figures._replace(loss=float("nan")))  # the watch will stop the run
    assert data.schedule.state == before
