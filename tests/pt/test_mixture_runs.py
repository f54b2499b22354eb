# SPDX-License-Identifier: Apache-2.0
"""Runs of our loop over a data mixture on PyTorch: what is drawn, how proportions move, and what stops a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mindformers_ext.cli.run_mindformer import main
from mindformers_ext.core.config.file import dump_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.data.mixture.state import LARGEST
from mindformers_ext.formats import mindrecord_file
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.jobs.predict.evaluate import open_evaluation
from mindformers_ext.jobs.run.checks import check_run
from mindformers_ext.jobs.run.mixture_checks import held_state
from mindformers_ext.jobs.train.token_data import RecordRows
from mindformers_ext.jobs.train.train import open_rows, train
from tests.helpers.mixtures import (
    INTERVAL,
    NAMES,
    PROPORTIONS,
    ROWS,
    TARGETS,
    domain_rows,
    mixture_job,
    prepared_folder,
)
from tests.helpers.tiny_run import BATCH, config_of, rows_of, write_rows

TIMES = ("seconds", "tokens_per_second")
STEPS = 10
WORDS = ("engine=pt", "callbacks.1.save_checkpoint_steps=1")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A YAML of ten steps; one thread, so that equal steps are equal to the last bit."""
    threads = torch.get_num_threads()
    path = mixture_job(tmp_path_factory.mktemp("mixture"))
    torch.set_num_threads(1)
    yield path
    torch.set_num_threads(threads)


def config(job: Path, output: str = "out", *options: str, **loader: Any) -> dict[str, Any]:
    found = config_of(job, *WORDS, f"output_dir={job.parent / output}", *options)
    words = found["train_dataset"]["data_loader"] | loader
    found["train_dataset"]["data_loader"] = {name: value for name, value in words.items() if value is not None}
    return found


def run(job: Path, output: str, *options: str, **loader: Any) -> list[dict]:
    """Metrics of a run, without times."""
    checked = check_run(config(job, output, *options, **loader), "test")
    train(checked.run, checked.config, checked.build.network, checked.notes)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(job.parent / output)]


@pytest.fixture(scope="module")
def whole(job: Path) -> list[dict]:
    return run(job, "whole")


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


def test_a_domain_s_loss_is_that_of_an_evaluation_on_its_rows(job: Path) -> None:
    """Beside our evaluation, another network and another sum; with slots enough nothing is dropped in either."""
    rows = run(job, "roomy", "moe_config.capacity_factor=4.0", update_type="constant", target_loss=None)
    load = job.parent / "roomy" / "checkpoint" / "rank_0" / "tiny_rank_0-1_9.ckpt"
    for name in NAMES:
        options = ("run_mode=eval", f"load_checkpoint={load}", "moe_config.capacity_factor=4.0")
        asked = config(job, "judged", *options)
        asked["eval_dataset"]["data_loader"]["dataset_dir"] = str(job.parent / f"{name}_eval.mindrecord")
        checked = check_run(asked, "test")
        judged = open_evaluation(checked.run, checked.build.network).run()
        assert rows[8][f"domain_loss.{name}"] == pytest.approx(judged.loss, rel=1e-6)


def test_the_rows_are_those_of_the_domains_and_ranks_take_slices(job: Path) -> None:
    checked = check_run(config(job), "test")
    data, halves = (open_rows(checked.run, checked.config, checked.build.network) for _ in range(2))
    held = [domain_rows(name)[:ROWS] for name in NAMES]
    for step in range(30):
        (ids,) = data.batch(step, slice(None))
        domains, rows = halves.schedule.draw()  # type: ignore[attr-defined]
        assert np.array_equal(ids, np.stack([held[d][n] for d, n in zip(domains, rows, strict=True)]))
        if step == 20:
            halves.restore(data.state(), "test")
    with pytest.raises(ValueError, match="step 5 of a mixture that stands before step 30"):
        data.batch(5, slice(None))


@pytest.mark.parametrize("step", [2, 3, 4, 6])  # before and behind a change of the proportions
def test_a_resumed_run_is_as_if_it_had_not_stopped(job: Path, whole: list[dict], step: int) -> None:
    folder = job.parent / f"again{step}"
    shutil.copytree(job.parent / "whole", folder)
    for later in range(step + 1, STEPS + 1):
        (folder / "checkpoint" / "rank_0" / f"tiny_rank_0-1_{later}.ckpt").unlink()
    assert run(job, folder.name, "resume_training=True") == whole
    last = "checkpoint/rank_0/tiny_rank_0-1_10.ckpt"
    assert (folder / last).read_bytes() == (job.parent / "whole" / last).read_bytes()


def test_the_state_is_small_and_tells_what_happened(job: Path, whole: list[dict]) -> None:
    held = held_state(job.parent / "whole" / "checkpoint" / "rank_0" / "tiny_rank_0-1_10.ckpt")
    text = held["mixture"].astype(np.uint8).tobytes()
    found = json.loads(text)
    assert len(text) < LARGEST and found["global_step"] == STEPS and found["domains"] == list(NAMES)
    assert [window for window, _ in found["history"]] == [0, 1, 2, 3]
    assert found["proportions"] == [whole[-1][f"proportion.{name}"] for name in NAMES]


def test_a_prepared_folder_gives_the_same_run(job: Path, whole: list[dict], tmp_path: Path) -> None:
    folder = prepared_folder(tmp_path / "domains")
    words = {"dataset_dir": str(folder), "split": "for_prune", "domains": None, "eval_domains": None}
    assert run(job, "prepared", **words) == whole


def test_the_names_of_sheared_llama_are_understood(job: Path, whole: list[dict]) -> None:
    found = config(job, "sheared", proportion=None, update_type=None, target_loss=None, eval_interval=None)
    words = {"dynamic": True, "set_names": list(NAMES), "proportion": PROPORTIONS, "target_loss": TARGETS}
    found["callbacks"] = {**{item.pop("type"): item for item in found["callbacks"]}, "data_loading": words}
    found["eval_interval"] = f"{INTERVAL}ba"
    checked = check_run(found, "test")
    train(checked.run, checked.config, checked.build.network, checked.notes)
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(job.parent / "sheared")]
    assert rows == whole


def test_targets_are_measured_on_a_model_and_kept(job: Path, whole: list[dict]) -> None:
    """The model is the run's own at step 9: its losses are those measured there, but for tokens that found no slot."""
    load = job.parent / "whole" / "checkpoint" / "rank_0" / "tiny_rank_0-1_9.ckpt"
    rows = run(job, "measured", target_loss=None, target_loss_from=str(job.parent / "whole"))
    kept = json.loads((job.parent / "measured" / "target_loss.json").read_text())
    assert load.is_file() and list(kept["target_loss"]) == list(NAMES)
    np.testing.assert_allclose(list(kept["target_loss"].values()), column([whole[8]], "domain_loss")[0], rtol=0.02)
    again = run(job, "from_file", target_loss=str(job.parent / "measured" / "target_loss.json"))
    assert again == rows


def test_orders_of_large_files_are_looked_up_row_by_row(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [job.parent / f"books-{number}.mindrecord" for number in range(2)]
    monkeypatch.setattr(mindrecord_file, "HELD_ROWS", 4)
    rows = RecordRows(paths, ("input_ids",))
    assert len(rows) == ROWS and np.array_equal([rows.row(n)[0] for n in range(ROWS)], domain_rows("books")[:ROWS])
    with pytest.raises(UserError, match=r"row 99 of .* is not in its index"):
        rows.files[0].read(99, ("input_ids",))
    rows.close()


def refused(job: Path, message: str, *options: str, **loader: Any) -> None:
    """The command ends with 2 and this message, and writes nothing."""
    path = job.parent / "refused.yaml"
    found = config(job, "refused", *options, **loader)
    path.write_text(dump_yaml(found), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        check_run(found, "test")
    assert main(["--config", str(path)]) == 2
    assert not (job.parent / "refused").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"proportion": [0.5, 0.3, 0.3]}, "proportion sums to 1.1: give numbers whose sum is 1"),
        ({"proportion": [0.8, 0.3, -0.1]}, "negative number -0.1"),
        ({"proportion": [0.5, float("nan"), 0.2]}, "proportion=.* is not a list of finite numbers"),
        ({"proportion": [0.5, "x", 0.2]}, "proportion=.* is not a list of finite numbers"),
        ({"proportion": [0.5, 0.5]}, r"proportion has 2 numbers for 3 domains \(books, code, web\)"),
        ({"proportion": {"books": 0.5, "code": 0.5}}, "1 domains have no proportion: web"),
        ({"proportion": None}, "no proportion: give one per domain, a preset"),
        ({"target_loss": [1, 2]}, "target_loss has 2 numbers for 3 domains"),
        ({"target_loss": [1, 2, float("inf")]}, "target_loss=.* is not a list of numbers"),
        ({"target_loss": None}, "update_type doremi without target_loss"),
        ({"target_loss": "no.json"}, r"no.json"),
        ({"eval_interval": None}, "update_type doremi without eval_interval"),
        ({"eval_interval": "3ep"}, "eval_interval='3ep' is not a number of steps above 0"),
        ({"eval_domains": None}, "3 domains have no row to measure losses on: books, code, web"),
        ({"set_names": ["books", "code", "news"]}, "of set_names are not in the data: news"),
        ({"set_names": ["books", "code", "code"]}, "1 domains are named twice: code"),
        ({"update_type": "doremy"}, r"update_type='doremy' is unknown: did you mean 'doremi'\?"),
        ({"preset": "sheared_1.4b"}, "preset='sheared_1.4b' is unknown: choose one of sheared_370m"),
        ({"preset": "sheared_1.3b"}, "domains of the preset sheared_1.3b are not in the data: cc, github"),
        ({"on_exhausted": "stop"}, "on_exhausted='stop' is unknown: choose one of repeat, renormalise, error"),
        ({"on_exhausted": "renormalise", "num_samples": 91}, None),
        ({"on_exhausted": "renormalise", "num_samples": 92}, "the run takes 92 rows, its domains have 90"),
        ({"on_exhausted": "error", "update_type": "constant", "num_samples": 80}, "takes about books 40 of 30 rows"),
        ({"min_weight": 0.4}, "min_weight=0.4, max_weight=1, min_entropy=0: no proportions of 3 domains fit"),
        ({"max_weight": 0.3}, "max_weight of at least 0.333333"),
        ({"min_entropy": 1.2}, "min_entropy of at most 1.09861"),
        ({"smoothing": 1.5}, "smoothing=1.5 is not a number from 0 to 1"),
        ({"num_samples": 3}, "an epoch of the data mixture has 3 rows, one step takes 4"),
        ({"proportions": [1]}, "unknown key 'proportions' .*: did you mean 'proportion'"),
        ({"dataset_dir": "x"}, r"one of dataset_dir \(a prepared folder\) and domains is needed"),
        ({"domains": {"books": "gone.mindrecord"}}, r"gone.mindrecord \(.*domains.books\) does not exist"),
        ({"domains": None, "eval_domains": None, "dataset_dir": "x"}, "dataset_dir without split"),
        ({"domains": None, "eval_domains": None, "dataset_dir": "x", "split": "for_ft"}, "'x' is not a folder"),
        ({"target_loss_from": "x"}, "target_loss and target_loss_from are both given"),
    ],
)
def test_what_is_no_mixture_is_refused(job: Path, words: dict, message: str | None) -> None:
    if message is None:
        check_run(config(job, "refused", **words), "test")
    else:
        refused(job, message, **words)


def test_an_empty_domain_and_rows_that_do_not_fit_are_refused(job: Path, tmp_path: Path) -> None:
    loader = config(job)["train_dataset"]["data_loader"]
    short = str(write_rows(tmp_path / "short.mindrecord", domain_rows("books")[:, :20]))
    padding = str(write_rows(tmp_path / "padding.mindrecord", np.full((5, 33), 3, np.int32)))
    for word, name, path, message in (
        ("domains", "code", short, "rows of 20 tokens"),
        ("eval_domains", "web", short, "rows of 20 tokens"),
        ("eval_domains", "web", padding, "eval rows of web: no position of 5 rows bears loss"),
    ):
        refused(job, message, **{word: loader[word] | {name: path}})
    folder = prepared_folder(tmp_path / "domains")
    manifest = json.loads((folder / "manifest.json").read_text())
    count = manifest["splits"]["for_prune"]["web"].pop("rows")
    manifest["splits"]["for_prune"]["web"] = {"rows": 0, "files": []}
    manifest["counts"]["web"]["tokens"] -= count * manifest["seq_length"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    words = {"dataset_dir": str(folder), "split": "for_prune", "domains": None, "eval_domains": None}
    refused(job, "1 domains have no row to train on: web", **words)


@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        (("seed=8",), {}, "its seed was 7, now it is 8"),
        (("runner_config.batch_size=2",), {}, "a step took 4 rows, now it takes 2"),
        ((), {"eval_interval": 4}, "eval_interval was 3, now it is 4"),
        ((), {"set_names": ["code", "books", "web"]}, "the order of its domains was books, code, web"),
        (
            (),
            {"set_names": ["books", "web"], "proportion": [0.5, 0.5], "target_loss": [1, 1]},
            "now it is without code",
        ),
        ((), {"update_type": "constant", "target_loss": None}, "which update_type constant keeps"),
    ],
)
def test_another_mixture_is_not_resumed(
    job: Path, whole: list[dict], options: tuple, words: dict, message: str
) -> None:
    load = job.parent / "whole" / "checkpoint" / "rank_0" / "tiny_rank_0-1_6.ckpt"
    refused(job, message, f"load_checkpoint={load}", "resume_training=True", *options, **words)


def test_other_files_are_not_resumed_and_a_plain_run_neither(job: Path, whole: list[dict], tmp_path: Path) -> None:
    saved = job.parent / "whole" / "checkpoint" / "rank_0" / "tiny_rank_0-1_6.ckpt"
    resumed = (f"load_checkpoint={saved}", "resume_training=True")
    loader = config(job)["train_dataset"]["data_loader"]
    rows = domain_rows("code")[:ROWS]
    other = [
        str(write_rows(tmp_path / Path(path).name, part))
        for path, part in zip(loader["domains"]["code"], (rows[10:20], rows[10:]), strict=True)
    ]
    refused(job, r"domain code had 30 rows \(fingerprint", *resumed, domains=loader["domains"] | {"code": other})
    file = CkptFile(saved)
    held = {name: file.read(name) for name in file.infos if not name.startswith("data.")}
    file.close()
    from tests.helpers.sliced import write_file

    write_file(tmp_path / "plain.ckpt", held)
    refused(job, "it holds no data mixture", f"load_checkpoint={tmp_path / 'plain.ckpt'}", "resume_training=True")


def test_mindformers_loop_moves_no_proportions(job: Path) -> None:
    refused(job, "give --trainer own", "engine=ms")
    found = config(job, "refused", "run_mode=eval")
    found["eval_dataset"] = found["train_dataset"]
    with pytest.raises(UserError, match="run_mode eval: it is for training"):
        check_run(found, "test")
