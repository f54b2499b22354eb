# SPDX-License-Identifier: Apache-2.0
"""What is no data mixture, or not the one that a run has drawn, is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindformers_ext.cli.run_mindformer import main
from mindformers_ext.core.config.file import dump_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.jobs.run.checks import check_run
from tests.helpers.mixtures import ROWS, domain_rows, prepared_folder
from tests.helpers.mixtures import mixture_config as config
from tests.helpers.sliced import write_file
from tests.helpers.tiny_run import write_rows


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
        ({"target_loss": [1, 2, -3]}, "target_loss has the negative number -3"),
        ({"target_loss": {"books": 1, "code": 1, "web": 1, "news": 1}}, "1 names of target_loss are no domains: news"),
        ({"proportion": {"books": 0.5, "code": 0.3, "web": 0.2, "x": 0}}, "1 names of proportion are no domains: x"),
        ({"eta": 1e300}, "eta=1e.300 is not a number from 0 to 1e.06"),
        ({"temperature": 0}, "temperature=0 is not a number from 0.001"),
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
def test_what_is_no_mixture_is_refused(mixed_job: Path, words: dict, message: str | None) -> None:
    if message is None:
        check_run(config(mixed_job, "refused", **words), "test")
    else:
        refused(mixed_job, message, **words)


def test_an_empty_domain_and_rows_that_do_not_fit_are_refused(mixed_job: Path, tmp_path: Path) -> None:
    loader = config(mixed_job)["train_dataset"]["data_loader"]
    short = str(write_rows(tmp_path / "short.mindrecord", domain_rows("books")[:, :20]))
    padding = str(write_rows(tmp_path / "padding.mindrecord", np.full((5, 33), 3, np.int32)))
    shared = loader["domains"]["books"]
    for word, name, path, message in (
        ("domains", "code", shared, "books-0.mindrecord is given for books and for code"),
        ("domains", "code", short, "rows of 20 tokens"),
        ("eval_domains", "web", short, "rows of 20 tokens"),
        ("eval_domains", "web", padding, "eval rows of web: no position of 5 rows bears loss"),
    ):
        refused(mixed_job, message, **{word: loader[word] | {name: path}})
    folder = prepared_folder(tmp_path / "domains")
    manifest = json.loads((folder / "manifest.json").read_text())
    count = manifest["splits"]["for_prune"]["web"].pop("rows")
    manifest["splits"]["for_prune"]["web"] = {"rows": 0, "files": []}
    manifest["counts"]["web"]["tokens"] -= count * manifest["seq_length"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    words = {"dataset_dir": str(folder), "split": "for_prune", "domains": None, "eval_domains": None}
    refused(mixed_job, "1 domains have no row to train on: web", **words)


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
    mixed_job: Path, whole: list[dict], options: tuple, words: dict, message: str
) -> None:
    load = mixed_job.parent / "whole" / "checkpoint" / "rank_0" / "tiny_rank_0-1_6.ckpt"
    refused(mixed_job, message, f"load_checkpoint={load}", "resume_training=True", *options, **words)


def test_other_files_and_a_plain_run_are_not_resumed(mixed_job: Path, whole: list[dict], tmp_path: Path) -> None:
    saved = mixed_job.parent / "whole" / "checkpoint" / "rank_0" / "tiny_rank_0-1_6.ckpt"
    resumed = (f"load_checkpoint={saved}", "resume_training=True")
    loader = config(mixed_job)["train_dataset"]["data_loader"]
    rows = domain_rows("code")[:ROWS]
    other = [
        str(write_rows(tmp_path / Path(path).name, part))
        for path, part in zip(loader["domains"]["code"], (rows[10:20], rows[10:]), strict=True)
    ]
    refused(mixed_job, r"domain code had 30 rows \(fingerprint", *resumed, domains=loader["domains"] | {"code": other})
    file = CkptFile(saved)
    held = {name: file.read(name) for name in file.infos if not name.startswith("data.")}
    file.close()
    write_file(tmp_path / "plain.ckpt", held)
    refused(mixed_job, "it holds no data mixture", f"load_checkpoint={tmp_path / 'plain.ckpt'}", "resume_training=True")
    found = config(mixed_job, "refused", *resumed)
    found["train_dataset"]["data_loader"] = {"type": "MindDataset", "dataset_dir": loader["domains"]["books"]}
    with pytest.raises(UserError, match=r"its run drew a data mixture, .*type is not MixtureDataset"):
        check_run(found, "test")


def test_what_may_be_meant_is_a_note(mixed_job: Path, tmp_path: Path) -> None:
    (tmp_path / "targets.json").write_text(json.dumps({"target_loss": {"books": 5, "code": 5, "web": 5, "news": 5}}))
    loader = config(mixed_job)["train_dataset"]["data_loader"]
    for words, note in (
        ({"eval_interval": 10}, "the proportions will not move: the run has 10 steps, a window 10"),
        ({"eval_domains": loader["domains"]}, "losses are measured on rows that are trained on: "),
        ({"target_loss": str(tmp_path / "targets.json")}, "targets.json also has news, which are not drawn"),
        ({"max_weight": 0.45}, "at the start become books 0.4500, code 0.3300, web 0.2200: the nearest within the"),
        ({"num_samples": 120}, "takes books 60 of 30 rows (2.0 passes), code 36 of 30 rows (1.2 passes): rows come"),
        ({"set_names": ["web"], "proportion": [1], "target_loss": [5]}, "domains books, code are not used: set_names"),
        ({"update_type": "temperature"}, "proportion has no effect with update_type temperature"),
    ):
        assert any(note in found for found in check_run(config(mixed_job, **words), "test").notes), note


def test_mindformers_loop_moves_no_proportions(mixed_job: Path) -> None:
    refused(mixed_job, "give --trainer own", "engine=ms")
    found = config(mixed_job, "refused", "run_mode=eval")
    found["eval_dataset"] = found["train_dataset"]
    with pytest.raises(UserError, match="run_mode eval: it is for training"):
        check_run(found, "test")
