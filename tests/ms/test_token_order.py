# SPDX-License-Identifier: Apache-2.0
"""The rows of our own loop are those that MindDataset gives each process, as MindFormers asks for them."""

from __future__ import annotations

from pathlib import Path

import mindspore.dataset as ds
import numpy as np
import pytest

from mindformers_ext.jobs.train.token_data import TokenData
from tests.helpers.tiny_run import write_rows

ROWS, BATCH, EPOCHS = 41, 3, 3


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that are their own numbers."""
    rows = np.tile(np.arange(ROWS, dtype=np.int32)[:, None], (1, 3))
    return write_rows(tmp_path_factory.mktemp("rows") / "train.mindrecord", rows)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("limit", [None, 30])
@pytest.mark.parametrize("processes", [1, 2])
def test_each_process_reads_the_rows_of_minddataset(
    file: Path, processes: int, limit: int | None, shuffle: bool
) -> None:
    loader = {"type": "MindDataset", "dataset_dir": str(file), "shuffle": shuffle}
    config = {"seed": 5, "train_dataset": {"data_loader": loader | ({"num_samples": limit} if limit else {})}}
    ours = TokenData(config, "train_dataset", BATCH * processes, processes)
    before = ds.config.get_seed()
    for rank in range(processes):
        ds.config.set_seed(5)
        cut = {"num_samples": limit // processes} if limit else {}
        data = ds.MindDataset([str(file)], ["input_ids"], shuffle=shuffle, num_shards=processes, shard_id=rank, **cut)
        data = data.batch(BATCH, drop_remainder=True)
        assert ours.per_epoch == data.get_dataset_size()
        rows = data.create_tuple_iterator(num_epochs=EPOCHS, output_numpy=True)
        theirs = [batch[:, 0].tolist() for _ in range(EPOCHS) for (batch,) in rows]
        mine = slice(rank * BATCH, (rank + 1) * BATCH)
        assert [ours.batch(step, mine)[0][:, 0].tolist() for step in range(EPOCHS * ours.per_epoch)] == theirs
    ds.config.set_seed(before)
    ours.close()
