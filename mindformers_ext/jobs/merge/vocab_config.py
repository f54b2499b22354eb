# SPDX-License-Identifier: Apache-2.0
"""What a merge's YAML says about the tokenizer: ``tokenizer_source``, or ``tokenizer`` with rows of single tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mindformers_ext.core.errors import Problems

UNION, BASE = "union", "base"
KEYS = ("source", "tokens", "pad_to_multiple_of", "trim_vocab")
KINDS = ("model_token", "zero")


@dataclass(frozen=True)
class TokenSource:
    """Where a token's row comes from: ``token`` (text or id; None: the same one) of ``model``; no model: zeros.

    ``forced``: also for models that have the token.
    """

    model: str | None = None
    token: str | int | None = None
    forced: bool = False


@dataclass(frozen=True)
class VocabularyWish:
    """The tokenizer that a merge shall have: ``source`` is union, base, or a model.

    The number of rows becomes a multiple of ``multiple``; ``trim`` drops rows that have no token.
    """

    source: str
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    multiple: int = 1
    trim: bool = False

    def models(self) -> list[str]:
        """Every model that is named."""
        named = [self.source] if self.source not in (UNION, BASE) else []
        return [*named, *(source.model for source in self.tokens.values() if source.model)]


def parse_vocabulary(raw: Mapping[str, Any], problems: Problems) -> VocabularyWish | None:
    """The wish in the top level of a configuration, None where it has none; faults go to ``problems``."""
    source, table = raw.get("tokenizer_source"), raw.get("tokenizer")
    if source is not None and table is not None:
        problems.add("both tokenizer_source and tokenizer are given", "keep one of them")
    if table is None:
        return None if source is None else VocabularyWish(_source(source, problems))
    if not isinstance(table, Mapping):
        problems.add(f"tokenizer is {table!r}", "write a mapping with source, or use tokenizer_source")
        return None
    problems.unknown_keys("tokenizer", map(str, table), KEYS)
    multiple, trim = table.get("pad_to_multiple_of"), table.get("trim_vocab", False)
    if multiple is not None:
        problems.positive("tokenizer.pad_to_multiple_of", multiple)
    if not isinstance(trim, bool):
        problems.add(f"tokenizer.trim_vocab is {trim!r}", "write true or false")
    tokens = table.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        problems.add(f"tokenizer.tokens is {tokens!r}", "write a mapping of tokens to {source, force}")
        tokens = {}
    return VocabularyWish(
        _source(table.get("source", UNION), problems),
        {str(token): _token(item, f"tokenizer.tokens.{token}", problems) for token, item in tokens.items()},
        multiple if isinstance(multiple, int) and multiple > 0 else 1,
        bool(trim),
    )


def _source(raw: Any, problems: Problems) -> str:
    if not isinstance(raw, str):
        problems.add(f"the tokenizer's source is {raw!r}", "write base, union, or one of the models")
        return BASE
    return raw


def _token(raw: Any, where: str, problems: Problems) -> TokenSource:
    if raw is not None and not isinstance(raw, Mapping):
        problems.add(f"{where} is {raw!r}", "write a mapping with source and force")
    item: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
    problems.unknown_keys(where, map(str, item), ("source", "force"))
    source, forced = item.get("source"), item.get("force", False)
    if not isinstance(forced, bool):
        problems.add(f"{where}.force is {forced!r}", "write true or false")
    if isinstance(source, str):
        return TokenSource(source, None, bool(forced))
    if not isinstance(source, Mapping):
        problems.add(
            f"{where}.source is {source!r}",
            "write one of the models, {kind: zero}, or {kind: model_token, model: ..., token: ...}",
        )
        return TokenSource()
    problems.unknown_keys(f"{where}.source", map(str, source), ("kind", "model", "token", "token_id"))
    problems.one_of(f"{where}.source.kind", source.get("kind"), KINDS)
    if source.get("kind") == "zero":
        return TokenSource(None, None, bool(forced))
    given = [source[key] for key in ("token", "token_id") if source.get(key) is not None]
    good = len(given) == 1 and isinstance(given[0], str if "token" in source else int) and type(given[0]) is not bool
    if not isinstance(source.get("model"), str) or not good:
        problems.add(f"{where}.source is {dict(source)!r}", "name the model, and a token or a token_id of it")
        return TokenSource()
    return TokenSource(source["model"], given[0], bool(forced))
