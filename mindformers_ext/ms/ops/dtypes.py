# SPDX-License-Identifier: Apache-2.0
"""Type names of the specs as MindSpore types."""

from __future__ import annotations

import mindspore as ms

_BY_NAME = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}


def mindspore_dtype(name: str) -> ms.Type:
    """The MindSpore type called ``name`` in a spec; ``KeyError`` for a name that no spec allows."""
    return _BY_NAME[name]
