# SPDX-License-Identifier: Apache-2.0
"""Which back end computes the experts: a table of measurements; each choice for a layer shape is logged once.

The first row that matches holds. ``MFEXT_MOE_BACKEND`` names another one by force, for measuring.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.log import get_logger
from mindformers_ext.pt.ops.fused import SWITCH, kernels_wanted
from mindformers_ext.pt.ops.grouped import BACKENDS, Backend, fits_gmm

FORCE = "MFEXT_MOE_BACKEND"


@dataclass(frozen=True)
class BackendRow:
    """One measured or reasoned choice; ``narrow``: for at most this ffn width, ``tokens``: for at most so many, None
    for any."""

    device: str
    dtype: torch.dtype | None
    narrow: int | None
    tokens: int | None
    backend: str
    why: str


TABLE = (
    BackendRow("cpu", None, None, 1, "loop", "measured: grouped_mm visits every expert for one token's few"),
    BackendRow("cpu", None, None, None, "gmm", "measured: not slower than the loop (tools/bench/moe_layer.py)"),
    BackendRow("cuda", None, None, 32, "triton", "not measured here: reads weights once and nothing on the host"),
    BackendRow("cuda", torch.bfloat16, None, None, "gmm", "not measured here: grouped_mm is fast for bfloat16 alone"),
    BackendRow("cuda", None, None, None, "loop", "not measured here: grouped_mm has no fast kernel for this type"),
)
_told: set[tuple[object, ...]] = set()


def select_backend(
    device: torch.device, dtype: torch.dtype, hidden: int, ffn: int, tokens: int | None = None
) -> Backend:
    """The back end for experts (hidden, ffn) of this type on this device; the first choice of a kind is logged.

    ``tokens`` of one call, all of them here with their experts; None for rows that came sorted from other ranks, which
    ``triton`` does not take.

    Raises:
        UserError: ``MFEXT_MOE_BACKEND`` names one that is unknown or cannot run here.
    """
    name, why = _choice(device.type, dtype, hidden, ffn, tokens)
    asked = (device.type, dtype, hidden, ffn, name)
    if asked not in _told:
        _told.add(asked)
        get_logger(__name__).info(
            "experts %d x %d, %s on %s: back end %s (%s)", hidden, ffn, dtype, device.type, name, why
        )
    return BACKENDS[name]


def _choice(device: str, dtype: torch.dtype, hidden: int, ffn: int, tokens: int | None) -> tuple[str, str]:
    forced = os.environ.get(FORCE)
    if forced and forced not in BACKENDS:
        raise UserError(f"{FORCE}={forced} is unknown: choose one of {', '.join(BACKENDS)}")
    if forced == "triton" and not _has_kernels(device):
        raise UserError(
            f"{FORCE}=triton runs on a GPU with triton installed and {SWITCH} not 0, here is {device}: "
            f"choose loop or gmm"
        )
    if forced and (forced != "triton" or tokens is not None):
        return forced, f"{FORCE} says so"
    for row in TABLE:
        if row.device == device and row.dtype in (None, dtype) and (row.narrow is None or ffn <= row.narrow):
            if row.tokens is not None and (tokens is None or tokens > row.tokens):
                continue
            if row.backend == "triton" and not _has_kernels(device):
                continue
            if row.backend == "gmm" and not fits_gmm(dtype, hidden, 2 * ffn, ffn):
                return "loop", "grouped_mm wants widths of whole 16 bytes"
            return row.backend, row.why
    return "loop", f"nothing is known of {device}"


def _has_kernels(device: str) -> bool:
    return device == "cuda" and kernels_wanted()
