# SPDX-License-Identifier: Apache-2.0
"""What the splits of a corpus get, over parts of made-up documents: all of them, none twice, no copy in two splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.data.domains.manifest import SPLITS
from mindformers_ext.data.domains.splits import Amount
from mindformers_ext.formats.frames import FrameWriter
from mindformers_ext.jobs.preprocess.domains.survey import Survey, share_out

LENGTH = 16


def write_parts(folder: Path, rng: np.random.Generator, sizes: list[int]) -> dict[str, list[Path]]:
    """Domains of two parts each; a third of their documents have copies in all of them. Every document's ids are its
    number, which is its place among the hashes."""
    hashes = rng.integers(0, 2**64, 200, np.uint64)
    lengths = rng.integers(1, 60, 200)
    parts: dict[str, list[Path]] = {}
    for domain, size in enumerate(sizes):
        own = np.concatenate([np.arange(60), rng.integers(60 + 40 * domain, 100 + 40 * domain, size)])
        rng.shuffle(own)
        paths = [folder / f"{domain}-{number}.part" for number in range(2)]
        for path, some in zip(paths, np.array_split(own, 2), strict=True):
            with FrameWriter(path) as writer:
                for frame in np.array_split(some, 3):
                    ids = np.repeat(frame, lengths[frame]).astype(np.uint16)
                    writer.add({}, {"hash": hashes[frame], "tokens": lengths[frame].astype(np.uint32), "ids": ids})
                writer.ending.update(documents=len(some), filtered={"ads": 1})
        parts[str(domain)] = paths
    return parts


@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.integers(0, 9),
    st.one_of(st.integers(0, 20), st.floats(0, 0.6)),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_document_is_in_one_split_or_a_copy_of_it_is(
    tmp_path_factory: pytest.TempPathFactory, seed: int, sizes: list[int], eval_rows: int, prune: float, rest: bool
) -> None:
    parts = write_parts(tmp_path_factory.mktemp("parts"), np.random.default_rng(seed), sizes)
    survey = Survey(parts, None, lambda count: None)
    amounts = {
        "eval": Amount(rows=dict.fromkeys(parts, eval_rows)),
        "for_prune": Amount(rows=dict.fromkeys(parts, prune)) if isinstance(prune, int) else Amount(share=prune),
        "for_ft": Amount(rest=True) if rest else Amount(share=0.2),
    }
    shares = share_out(survey, amounts, LENGTH)
    where: dict[int, str] = {}
    for split in SPLITS:
        found = set()
        for name, share in shares[split].items():
            table = list(survey.rows(name, share, LENGTH))
            rows = np.concatenate(table) if table else np.empty((0, LENGTH), np.int32)
            assert share.tokens // LENGTH == len(rows) >= share.rows and rows.shape[1:] == (LENGTH,)
            assert share.rows == len(rows) if share.range.rows is None else share.rows == share.range.rows
            found |= set(rows.reshape(-1).tolist())
        assert not found & set(where), "a document in two splits"
        where |= dict.fromkeys(found, split)
    for name in parts:
        assert survey.read[name] == 60 + sizes[int(name)] and survey.filtered[name] == {"ads": 2}
        used = sum(shares[split][name].documents for split in SPLITS)
        assert used <= survey.read[name] and (not rest or len(sizes) > 1 or used == survey.read[name])
