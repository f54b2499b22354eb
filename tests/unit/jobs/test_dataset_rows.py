# SPDX-License-Identifier: Apache-2.0
"""Rows that cannot be trained on: found before the run, or named with their row when they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindformers_ext.core.config.run import DataSpec, RunSpec
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import DeviceSpec, ModelSpec, NetworkSpec
from mindformers_ext.jobs.run import dataset
from mindformers_ext.jobs.run.dataset import check_dataset

SPEC = NetworkSpec(
    model=ModelSpec(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2,
        max_position_embeddings=8,
        pad_token_id=0,
    ),
    seq_length=8,
)


class Store:
    """Rows in memory instead of a file."""

    def __init__(self, **columns: np.ndarray) -> None:
        self.columns = columns

    def read(self, path: Path, names: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
        for row in range(len(self.columns["input_ids"])):
            yield {name: self.columns[name][row] for name in names}


def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **columns: np.ndarray) -> None:
    monkeypatch.setattr(dataset, "open_records", lambda plain: Store(**columns))
    monkeypatch.setattr(dataset, "row_count", lambda path: len(columns["input_ids"]))
    for name in ("a.mindrecord", "a.mindrecord.db"):
        (tmp_path / name).touch()
    data = DataSpec(section="train_dataset", named=(tmp_path / "a.mindrecord",), columns=tuple(columns))
    check_dataset(RunSpec(mode="train", engine="pt", device=DeviceSpec("CPU"), data=data), SPEC)


IDS = np.tile(np.arange(1, 10, dtype=np.int32), (3000, 1))


def test_an_id_without_an_embedding_is_named_with_its_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check(monkeypatch, tmp_path, input_ids=IDS)
    for row, wrong in ((2500, 20), (0, -1), (2999, 2**30)):
        ids = IDS.copy()
        ids[row, 4] = wrong
        with pytest.raises(UserError, match=f"row {row} holds the id {wrong} .*0 to 19"):
            check(monkeypatch, tmp_path, input_ids=ids)


def test_data_without_any_loss_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    masked = np.full_like(IDS, -100)
    for columns in ({"input_ids": IDS, "labels": masked}, {"input_ids": np.zeros_like(IDS)}):
        with pytest.raises(UserError, match="no position of 3000 rows bears loss"):
            check(monkeypatch, tmp_path, **columns)
    masked[17, 3] = 5
    check(monkeypatch, tmp_path, input_ids=IDS, labels=masked)
    masked[17, 3] = -5
    with pytest.raises(UserError, match="row 17 holds the label -5"):
        check(monkeypatch, tmp_path, input_ids=IDS, labels=masked)


def test_rows_of_other_lengths_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rows of 8 tokens, model_config.seq_length=8 needs 9"):
        check(monkeypatch, tmp_path, input_ids=IDS[:, :8])
