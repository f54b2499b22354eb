# SPDX-License-Identifier: Apache-2.0
"""The generation loop: prompts of any lengths in batches of one shape, one token per row and step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mindformers_ext.core.capacity import round_up
from mindformers_ext.core.config.sampling import SamplingSpec
from mindformers_ext.jobs.engine.protocols import Network, Session
from mindformers_ext.jobs.predict.sampling import choose, generator_of
from mindformers_ext.jobs.run.display import current

OnToken = Callable[[int, int], None]  # prompt, token


@dataclass(frozen=True)
class Answer:
    """The new tokens of one prompt; ``finish`` is "eos" (whose token is the last one) or "length"."""

    prompt: int
    tokens: tuple[int, ...]
    finish: str


@dataclass
class Timing:
    """Seconds, and what was done in them. Compilation is counted apart; the first token comes after the prompts."""

    compile: float = 0.0
    prompts: float = 0.0
    decode: float = 0.0
    first_token: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows, prompts' time included."""
        return self.new_tokens / max(self.prompts + self.decode, 1e-9)


@dataclass(frozen=True)
class Shape:
    """One shape for all batches of a run, so that the graphs compile once: rows, prompt tokens, cache positions."""

    rows: int
    length: int
    positions: int


@dataclass
class _Row:
    """One prompt on its way. ``limit``: tokens of prompt and answer at most."""

    prompt: int
    tokens: list[int]
    length: int
    limit: int
    generator: np.random.Generator
    finish: str | None = None


@dataclass
class Generation:
    """A network that answers prompts.

    Args:
        network: weights included.
        sampling: how tokens are chosen.
        seq_length: tokens of prompt and answer at most, whatever ``sampling`` says.
        batch_size: prompts computed together.
        use_cache: False computes the whole text anew for every token; the same answers, slowly.
        announce: what making a session is called on the display; '' where it takes no time.
    """

    network: Network
    sampling: SamplingSpec
    seq_length: int
    batch_size: int
    use_cache: bool = True
    announce: str = ""
    timing: Timing = field(default_factory=Timing)
    _session: Session | None = None
    _shape: Shape | None = None

    def answers(
        self, prompts: Sequence[Sequence[int]], on_token: OnToken | None = None, room: int = 0
    ) -> Iterator[Answer]:
        """Answers in the order of ``prompts``, a batch at a time; ``on_token`` sees each new token at once.

        ``room``: new tokens to make the cache for at least, so that a later run with longer answers compiles nothing.
        """
        shape = self._shape_for(prompts, room)
        session = self._open(shape)
        for start in range(0, len(prompts), shape.rows):
            batch = enumerate(prompts[start : start + shape.rows], start)
            rows = [self._row(prompt, tokens) for prompt, tokens in batch]
            self.timing.prompt_tokens += sum(row.length for row in rows)
            self._fill(session, shape, rows, on_token)
            yield from (Answer(row.prompt, tuple(row.tokens[row.length :]), str(row.finish)) for row in rows)

    def _row(self, prompt: int, tokens: Sequence[int]) -> _Row:
        limit = min(self.seq_length, self.sampling.longest(len(tokens)))
        return _Row(prompt, list(tokens), len(tokens), limit, generator_of(self.sampling, prompt))

    def _shape_for(self, prompts: Sequence[Sequence[int]], room: int) -> Shape:
        longest = max(len(tokens) for tokens in prompts)
        total = max(self._row(0, tokens).limit for tokens in prompts)
        positions = bucket(max(total, longest + max(room, 1)))
        length = min(bucket(longest), positions) if self.use_cache else positions
        return Shape(min(self.batch_size, len(prompts)), length, positions)

    def _open(self, shape: Shape) -> Session:
        """The session of the run before where the shape is the same."""
        if self._session is None or self._shape != shape:
            self._session = None  # lets go of the old cache first
            if self.announce:
                current().begin(self.announce)
            started = time.perf_counter()
            self._session = self.network.session(shape.rows, shape.length, shape.positions, self.use_cache)
            self._shape = shape
            self.timing.compile += time.perf_counter() - started
            current().done()
        return self._session

    def _fill(self, session: Session, shape: Shape, rows: list[_Row], on_token: OnToken | None) -> None:
        """Lets every row of a batch grow to its end."""
        started = time.perf_counter()
        logits = session.prompt(*padded([row.tokens for row in rows], shape))
        self._take(rows, logits, on_token)
        prompted = time.perf_counter()
        self.timing.prompts += prompted - started
        self.timing.first_token = self.timing.first_token or prompted - started
        while any(row.finish is None for row in rows):
            if self.use_cache:
                logits = session.token(*_last(rows, shape.rows))
            else:
                logits = session.prompt(*padded([row.tokens for row in rows], shape))
            self._take(rows, logits, on_token)
        self.timing.decode += time.perf_counter() - prompted

    def _take(self, rows: list[_Row], logits: np.ndarray, on_token: OnToken | None) -> None:
        for row, scores in zip(rows, logits, strict=False):  # rows behind the last prompt are fillers
            if row.finish is not None:
                continue
            token = choose(scores, row.tokens, row.length, self.sampling, row.generator)
            row.tokens.append(token)
            self.timing.new_tokens += 1
            if token in self.sampling.eos_token_ids:
                row.finish = "eos"
            elif len(row.tokens) >= row.limit:
                row.finish = "length"
            if on_token:
                on_token(row.prompt, token)


def bucket(length: int) -> int:
    """``length`` rounded up by at most a quarter, so that few shapes are ever compiled: 16, 20, ... 32, 40, ... 64."""
    return round_up(length, max(4, (1 << max(length - 1, 1).bit_length()) // 8))


def padded(texts: Sequence[Sequence[int]], shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """ids (B, S) padded on the right and lengths (B); fillers have one token."""
    ids, lengths = np.zeros((shape.rows, shape.length), np.int32), np.ones(shape.rows, np.int32)
    for place, tokens in enumerate(texts):
        ids[place, : len(tokens)] = tokens
        lengths[place] = len(tokens)
    return ids, lengths


def _last(rows: list[_Row], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The newest token of every row and its position; a row that has ended repeats itself."""
    tokens, positions = np.zeros(count, np.int32), np.zeros(count, np.int32)
    for place, row in enumerate(rows):
        tokens[place], positions[place] = row.tokens[-1], len(row.tokens) - 1
    return tokens, positions
