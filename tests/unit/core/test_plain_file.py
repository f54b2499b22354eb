# SPDX-License-Identifier: Apache-2.0
"""What is written in place, under a name that can be foreseen, goes through no link and waits for no pipe."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.log import set_up_logging
from mindformers_ext.core.plain_file import AFRESH, open_plain
from mindformers_ext.formats.blocks import open_new
from mindformers_ext.jobs.preprocess.tiny_corpus import CorpusRequest, make_corpus
from mindformers_ext.jobs.run.lock import training_lock
from mindformers_ext.jobs.run.metrics_file import MetricsFile
from mindformers_ext.jobs.run.quiet import output_to

WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "appended": ("log", lambda folder: os.close(open_plain(folder / "log"))),
    "afresh": ("log", lambda folder: os.close(open_plain(folder / "log", AFRESH))),
    "info.log": ("info.log", lambda folder: set_up_logging(file=folder / "info.log")),
    "output.log": ("output.log", lambda folder: output_to(folder / "output.log").__enter__()),
    "lock": (".training.lock", lambda folder: training_lock(folder).__enter__()),
    "metrics": ("metrics/rank_0.jsonl", lambda folder: MetricsFile(str(folder), 0, 0)),
    "resumed metrics": ("metrics/rank_0.jsonl", lambda folder: MetricsFile(str(folder), 0, 3)),
    "weights": ("m.ckpt", lambda folder: open_new(folder / "m.ckpt")),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe"])
def test_a_link_or_a_pipe_is_refused_and_what_it_names_stays(name: str, kind: str, tmp_path: Path) -> None:
    place, write = WRITERS[name]
    path, other = tmp_path / "run" / place, tmp_path / "other.txt"
    path.parent.mkdir(parents=True)
    if kind == "link":
        other.write_text("mine")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(other)
    with pytest.raises(UserError, match="remove it, or choose another folder") as caught:
        write(tmp_path / "run")
    assert str(path) in str(caught.value)
    assert other.exists() == (kind == "link") and (kind != "link" or other.read_text() == "mine")


def test_a_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with os.fdopen(open_plain(tmp_path / "run" / "log"), "a") as file:
        file.write("a line")
    assert (tmp_path / "disk" / "log").read_text() == "a line"


def test_the_summary_of_a_corpus_takes_the_place_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").symlink_to(tmp_path / "other.txt")
    (tmp_path / "other.txt").write_text("mine")
    make_corpus(CorpusRequest(output_dir=tmp_path, max_bytes=200_000, vocab_size=600))
    assert (tmp_path / "other.txt").read_text() == "mine" and not (tmp_path / "corpus.json").is_symlink()
    assert json.loads((tmp_path / "corpus.json").read_text())["vocab_size"] == 600
