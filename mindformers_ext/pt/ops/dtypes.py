# SPDX-License-Identifier: Apache-2.0
"""Types by the names that specs use."""

from __future__ import annotations

import torch


def torch_dtype(name: str) -> torch.dtype:
    """``torch.float32`` for "float32" and so on; the names are ``core.spec.DTYPE_NAMES``."""
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
