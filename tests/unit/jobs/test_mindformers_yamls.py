# SPDX-License-Identifier: Apache-2.0
"""Every public YAML of MindFormers that describes a LLaMA or a Mixtral is accepted, or refused for a reason that is named.

The table of their keys is made by tests/helpers/mindformers_yamls.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from mindformers_ext.core.config.run import run_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.run.checks import check_words
from tests.helpers.mindformers_yamls import TABLE, configurations

FILES = list(configurations())
LLAMA = ("configs/llama", "configs/codellama", "research/llama3")


def judged(row: dict[str, Any], config: dict[str, Any]) -> str:
    """``ours`` or ``theirs`` where the file is accepted, else the first broken rule."""
    if config.get("run_mode") == "predict" and config.get("use_parallel"):
        config = {**config, "load_checkpoint": "given"}  # a path in every file, which the table leaves out
    try:
        run = run_spec_from_yaml(config)
        check_words(config, run, row["devices"], row["name"])
    except UserError as error:
        return str(error)
    return "theirs" if run.family is None else "ours"


def label(row: dict[str, Any]) -> str:
    return f"{row['name']} of {', '.join(row['releases'])} ({row['sha256'][:8]})"


def test_the_table_is_small_and_holds_every_release() -> None:
    assert TABLE.stat().st_size < 300_000
    assert {release for row, _ in FILES for release in row["releases"]} >= {"1.1", "1.2", "1.3", "1.4", "1.5", "1.6", "1.7"}


def test_every_mixtral_file_is_accepted() -> None:
    found = {label(row): judged(row, config) for row, config in FILES if row["name"].startswith("research/mixtral/")}
    assert len(found) >= 26
    assert {name: verdict for name, verdict in found.items() if verdict != "ours"} == {}


def test_every_dense_file_has_its_verdict() -> None:
    wrong = {}
    for row, config in FILES:
        found = judged(row, config)
        if row["verdict"] in ("ours", "theirs") and found != row["verdict"]:
            wrong[label(row)] = found
        if row["verdict"] == "quantised" and "asks for a quantised network" not in found:
            wrong[label(row)] = found
    assert wrong == {}
