# SPDX-License-Identifier: Apache-2.0
"""For tools that measure quality: the project's own commands, and what they have made already."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(*words: object) -> None:
    """One of the project's commands, quiet unless it fails."""
    told = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    if told.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{told.stdout[-3000:]}{told.stderr[-3000:]}")


def once(path: Path, make: Callable[[], None]) -> Path:
    """``path``, made if it is not there."""
    if not path.exists():
        print(f"  {path}", flush=True)
        make()
    return path


def with_sizes(config: str, sizes: Mapping[str, int]) -> str:
    """The text of the project's YAML ``config`` with other sizes of its model."""
    text = (ROOT / config).read_text(encoding="utf-8")
    for name, value in sizes.items():
        text = re.sub(rf"^( +{name}: )\d+", rf"\g<1>{value}", text, count=1, flags=re.M)
    return text
