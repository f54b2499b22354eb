# SPDX-License-Identifier: Apache-2.0
"""MDS folders as mosaicml-streaming 0.7.6 writes them (format 2), byte by byte; never imports what it judges."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HEADER = json.dumps(
    {
        "column_encodings": ["str", "bytes"],
        "column_names": ["set", "tokens"],
        "column_sizes": [None, None],
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": 1 << 26,
    },
    sort_keys=True,
).encode()


def write_mds(folder: Path, rows: Sequence[np.ndarray], domain: str, per_shard: int = 3) -> None:
    """``rows`` of token ids below 65536, and the domain of all of them."""
    folder.mkdir(parents=True)
    shards = []
    for number, start in enumerate(range(0, len(rows), per_shard)):
        samples = []
        for row in rows[start : start + per_shard]:
            word, ids = domain.encode(), row.astype("<u2").tobytes()
            samples.append(struct.pack("<II", len(word), len(ids)) + word + ids)
        at = 4 + 4 * (len(samples) + 1) + len(HEADER)
        offsets = np.cumsum([at, *map(len, samples)])
        data = struct.pack("<I", len(samples)) + offsets.astype("<u4").tobytes() + HEADER + b"".join(samples)
        name = f"shard.{number:05}.mds"
        (folder / name).write_bytes(data)
        shards.append(
            {
                **json.loads(HEADER),
                "samples": len(samples),
                "raw_data": {"basename": name, "bytes": len(data), "hashes": {}},
                "zip_data": None,
            }
        )
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}, sort_keys=True))
