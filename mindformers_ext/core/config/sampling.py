# SPDX-License-Identifier: Apache-2.0
"""The words of a YAML's generation keys; what they do is in ``jobs.predict.sampling``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mindformers_ext.core.errors import Problems

# Keys that would change the answer and are not built, with the values that mean nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {"num_beams": (1, None), "encoder_repetition_penalty": (1, 1.0, None)}


@dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """How an answer is chosen and when it ends.

    ``max_length`` counts the prompt, ``max_new_tokens`` does not and goes first; so with the two minimums. ``top_k``
    0 and ``top_p`` 1.0 are off. ``seed`` belongs to ``do_sample``: prompt i of a run draws from (seed, i), whoever
    stands beside it in a batch.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 5
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_length: int = 1024
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    seed: int = 0

    def ended_by(self, *token_ids: int) -> SamplingSpec:
        """The same with the tokens that end an answer; negative ids mean none."""
        return replace(self, eos_token_ids=tuple(token for token in token_ids if token >= 0))

    def collect(self, problems: Problems) -> None:
        """Add every value out of range to ``problems``."""
        if not self.temperature > 0:
            problems.add(
                f"temperature={self.temperature}", "give a number above 0, or do_sample False for the best token"
            )
        if self.top_k < 0:
            problems.add(f"top_k={self.top_k}", "give 1 or more, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            problems.add(f"top_p={self.top_p}", "give a number above 0, at most 1.0 (off)")
        if not self.repetition_penalty > 0:
            problems.add(f"repetition_penalty={self.repetition_penalty}", "give a number above 0; 1.0 is off")
        problems.positive("max_length (max_decode_length)", self.max_length)
        if self.max_new_tokens is not None:
            problems.positive("max_new_tokens", self.max_new_tokens)
        if self.min_length < 0 or (self.min_new_tokens or 0) < 0:
            problems.add(f"min_length={self.min_length}, min_new_tokens={self.min_new_tokens}", "give 0 or more")

    def longest(self, prompt: int) -> int:
        """Tokens of prompt and answer together at most."""
        return prompt + self.max_new_tokens if self.max_new_tokens is not None else self.max_length

    def shortest(self, prompt: int) -> int:
        """Tokens of prompt and answer together at least."""
        return max(self.min_length, prompt + (self.min_new_tokens or 0))


def sampling_from_yaml(words: Mapping[str, Any], eos_token_ids: Sequence[int], seed: int) -> SamplingSpec:
    """The generation keys of ``model.model_config``, with MindFormers' defaults for a LLaMA.

    Raises:
        UserError: lists what is of the wrong kind, out of range, or not built.
    """
    problems = Problems("model.model_config (generation)")
    for name, neutral in NEUTRAL.items():
        if words.get(name, neutral[0]) not in neutral:
            problems.add(f"{name}={words[name]!r} is not built", f"leave it out, or set {neutral[0]}")
    given: dict[str, Any] = {"eos_token_ids": tuple(token for token in eos_token_ids if token >= 0), "seed": seed}
    length = words.get("max_length")
    merged = {**words, "max_length": words.get("max_decode_length") if length is None else length}
    for name, kind in SamplingSpec.__annotations__.items():
        value = merged.get(name)
        if name not in given and value is not None:
            given[name] = _read(name, value, kind, problems)
    problems.raise_if_any()
    spec = SamplingSpec(**given)
    spec.collect(problems)
    problems.raise_if_any()
    return spec


def _read(name: str, value: Any, kind: str, problems: Problems) -> Any:
    if kind == "bool":
        right = isinstance(value, bool)
    elif kind == "float":
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        right = isinstance(value, int) and not isinstance(value, bool)
    if not right:
        problems.add(f"{name}={value!r} is no {kind.partition(' ')[0]}", "correct it or leave the key out")
    return float(value) if right and kind == "float" else value
