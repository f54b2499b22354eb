# SPDX-License-Identifier: Apache-2.0
"""Whether a Composer checkpoint holds the weights of a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.checkpoint.composer import as_hugging_face, open_raw
from mindformers_ext.jobs.checkpoint.source import open_hf, read_config

SIZE_KEYS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")


@dataclass(frozen=True)
class ComposerParity:
    """``only``: names of one side; ``largest``: difference of an element, after both are float32."""

    tensors: int
    only: tuple[str, ...]
    largest: float

    @property
    def is_equal(self) -> bool:
        """Whether both are the same model."""
        return not self.only and self.largest == 0.0

    def __str__(self) -> str:
        """A line for people."""
        if self.only:
            return f"not equal: {len(self.only)} tensors are on one side alone, first {self.only[0]}"
        word = "equal" if self.is_equal else "not equal"
        return f"{word}: {self.tensors} tensors, largest difference {self.largest:.2e}"


def compare(folder: Path, file: Path, sizes: tuple[int, int, int, int] | None = None) -> ComposerParity:
    """Compare both; ``sizes``: those that the folder's config.json must have, in the order of ``SIZE_KEYS``."""
    config = read_config(folder)
    for name, size in zip(SIZE_KEYS, sizes or (), strict=bool(sizes)):
        if config.get(name) != size:
            raise UserError(f"'{folder}' has {name} {config.get(name)}, MODEL_SIZE says {size}: correct one of them")
    largest = 0.0
    with closing(open_hf(folder)) as theirs, closing(open_raw(file)) as raw:
        ours = as_hugging_face(raw, file)
        names = {name for name in theirs.infos if "rotary" not in name}
        only = sorted(names ^ set(ours.infos))
        for name in [] if only else sorted(names):
            if theirs.infos[name].shape != ours.infos[name].shape:
                only.append(name)
                continue
            a, b = (np.asarray(reader.read(name), np.float32) for reader in (theirs, ours))
            largest = max(largest, float(np.abs(a - b).max()))
    return ComposerParity(len(names), tuple(only), largest)
