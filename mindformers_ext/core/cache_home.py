# SPDX-License-Identifier: Apache-2.0
"""Where what can be made again is kept between processes."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The project's folder ``name`` below XDG_CACHE_HOME, by default ~/.cache; not made here."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mindformers_ext" / name
