# SPDX-License-Identifier: Apache-2.0
"""MindRecord files read by MindSpore's own data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np


def rows_of(path: Path, *fields: str) -> Iterator[dict[str, np.ndarray]]:
    """The rows of a data set in file order; for several shards, ``path`` is the first of them."""
    import mindspore.dataset as ds

    rows = ds.MindDataset(str(path), columns_list=list(fields), shuffle=False)
    yield from rows.create_dict_iterator(num_epochs=1, output_numpy=True)
