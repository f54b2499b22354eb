# SPDX-License-Identifier: Apache-2.0
"""``--out-shard-size`` as mergekit's users write it: 5B is 5e9 bytes there, and 5GB is what they mean."""

from __future__ import annotations

import re

from mindformers_ext.core.byte_sizes import read_size
from mindformers_ext.core.errors import UserError

SHORT = {"": "", "K": "KB", "M": "MB", "B": "GB"}


def shard_bytes(text: str) -> int:
    """Bytes of ``text``: a number, or one with k, m, b (thousand, million, milliard) or KB, MB, GB, MiB, GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMbB]?)\s*", text)
    try:
        return read_size(match[1] + SHORT[match[2].upper()] if match else text, "size", bare=True)
    except UserError as error:
        raise UserError(
            f"--out-shard-size '{text}' is not understood: write for example 1B, 5GB, 500M or 2GiB"
        ) from error
