# SPDX-License-Identifier: Apache-2.0
"""Which back end multiplies the experts' rows: a table of measurements, asked once per layer shape and logged.

A row holds for the first match. ``MFEXT_MOE_BACKEND`` names another one by force, for measuring.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.log import get_logger
from mindformers_ext.pt.ops.grouped import BACKENDS, Backend, fits_gmm

FORCE = "MFEXT_MOE_BACKEND"


@dataclass(frozen=True)
class Row:
    """One measured or reasoned choice; ``narrow``: rows of at most this ffn width, None for any."""

    device: str
    dtype: torch.dtype | None
    narrow: int | None
    backend: str
    why: str


TABLE = (
    Row("cpu", None, None, "gmm", "measured: not slower than the loop (tools/bench/moe_layer.py)"),
    Row("cuda", torch.bfloat16, None, "gmm", "not measured here: grouped_mm has its fast kernel for bfloat16 alone"),
    Row("cuda", None, None, "loop", "grouped_mm has no fast kernel for this type"),
)  # fmt: skip
_told: set[tuple[object, ...]] = set()


def select_backend(device: torch.device, dtype: torch.dtype, hidden: int, ffn: int) -> Backend:
    """The back end for experts (hidden, ffn) of this type on this device; the first choice of a kind is logged."""
    name, why = _choice(device.type, dtype, hidden, ffn)
    asked = (device.type, dtype, hidden, ffn)
    if asked not in _told:
        _told.add(asked)
        get_logger(__name__).info("experts %d x %d, %s on %s: back end %s (%s)", hidden, ffn, dtype, device.type, name,
                                  why)  # fmt: skip
    return BACKENDS[name]


def _choice(device: str, dtype: torch.dtype, hidden: int, ffn: int) -> tuple[str, str]:
    forced = os.environ.get(FORCE)
    if forced and forced not in BACKENDS:
        raise UserError(f"{FORCE}={forced} is unknown: choose one of {', '.join(BACKENDS)}")
    if forced:
        return forced, f"{FORCE} says so"
    for row in TABLE:
        if row.device == device and row.dtype in (None, dtype) and (row.narrow is None or ffn <= row.narrow):
            if row.backend == "gmm" and not fits_gmm(dtype, hidden, 2 * ffn, ffn):
                return "loop", "grouped_mm wants widths of whole 16 bytes"
            return row.backend, row.why
    return "loop", f"nothing is known of {device}"
