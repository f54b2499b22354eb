# SPDX-License-Identifier: Apache-2.0
"""How a merge's YAML names a model: a folder, a name on the hub (``OWNER/NAME@REVISION``), or MODEL+ADAPTER."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import Problems, UserError

PLUS = "+"


def parse_reference(raw: Any, where: str, problems: Problems) -> str:
    """The name that ``raw`` at ``where`` means, in mergekit's short form; "" and a problem where it means none."""
    if isinstance(raw, Mapping):  # mergekit's long form
        problems.unknown_keys(where, map(str, raw), ("model", "lora"))
        parts = [_path(raw.get("model")), *([_path(raw["lora"])] if raw.get("lora") is not None else [])]
        raw = PLUS.join(parts) if all(parts) else raw
    if not isinstance(raw, str) or not raw.strip():
        problems.add(f"{where} is {raw!r}", "write the folder of a model, or its name on the hub")
        return ""
    return raw


def _path(raw: Any) -> str:
    if isinstance(raw, Mapping):
        path, revision = raw.get("path"), raw.get("revision")
        raw = f"{path}@{revision}" if isinstance(path, str) and isinstance(revision, str) else path
    return raw if isinstance(raw, str) else ""


def split_reference(name: str) -> tuple[str, str | None]:
    """Model and adapter of ``name``; no adapter where the whole is a path that exists.

    Raises:
        UserError: more than one adapter.
    """
    if PLUS not in name or _exists(name):
        return name, None
    places = [place for place, letter in enumerate(name) if letter == PLUS]
    pairs = [(name[:place], name[place + 1 :]) for place in places]
    found = [pair for pair in pairs if all(map(_exists, pair))]
    if len(places) > 1 and not found:
        raise UserError(f"model '{name}' has {len(places)} '+': write MODEL+ADAPTER with one adapter")
    model, adapter = found[0] if found else pairs[0]
    if not model or not adapter:
        raise UserError(f"model '{name}' is not MODEL+ADAPTER: write a model before the '+' and an adapter behind it")
    return model, adapter


def _exists(path: str) -> bool:
    return bool(path) and Path(path).expanduser().exists()
