# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864): how fast each pair of a head's numbers turns.

Both engines take their tables of cosines and sines from here, in the layout of Hugging Face's LLaMA (pair i is the
numbers i and i + P/2 of a head of width P). Arithmetic is transformers': frequencies in float32, so that a long text is
turned by the same angles. The ways to reach beyond the trained positions, by ``rope_type``:

- linear: all frequencies divided by a factor (Chen et al. 2023, arXiv:2306.15595).
- dynamic: the base grows with the text's length ("NTK-aware"; Peng et al. 2023, appendix B.1, on bloc97 and emozilla).
- llama3: only slow frequencies are divided, those in between partly (Grattafiori et al. 2024, arXiv:2407.21783).
- yarn: a ramp over the pairs between both, and a temperature (Peng et al. 2023, arXiv:2309.00071, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from mindformers_ext.core.errors import Problems

if TYPE_CHECKING:  # functions import it: whoever shows a help reads specs, and computes nothing
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How positions beyond the trained ones are turned. Field names are those of Hugging Face's ``rope_scaling``.

    ``original_max_position_embeddings``: positions that the model was trained on, None for its own
    ``max_position_embeddings``. ``attention_factor``: what yarn multiplies cosines and sines by, None where it follows
    from factor and the mscales.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def collect(self, problems: Problems) -> None:
        """Add every broken rule to ``problems``."""
        problems.one_of("rope_type", self.rope_type, tuple(ROPE_TYPES))
        if not self.factor >= 1.0:
            problems.add(f"rope_scaling's factor={self.factor}", "positions are stretched: use 1 or more")
        original = self.original_max_position_embeddings
        if original is not None and original < 1:
            problems.add(f"rope_scaling's original_max_position_embeddings={original}", "use 1 or more")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            problems.add(
                f"low_freq_factor={self.low_freq_factor}, high_freq_factor={self.high_freq_factor}",
                "both must be positive, the second the larger",
            )
        if not 0 < self.beta_slow < self.beta_fast:
            problems.add(
                f"beta_slow={self.beta_slow}, beta_fast={self.beta_fast}",
                "both must be positive, the second the larger",
            )
        if self.attention_factor is not None and not self.attention_factor > 0:
            problems.add(f"rope_scaling's attention_factor={self.attention_factor}", "it must be positive")

    def said(self) -> dict[str, Any]:
        """The fields that the method reads and that differ from their defaults, with those that have none."""
        return {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name in ("rope_type", "factor", *NEEDED.get(self.rope_type, ()))
            or (item.name in READ.get(self.rope_type, ()) and getattr(self, item.name) != item.default)
        }


# Beside ``factor``: what a method reads, and what of it a file has to say.
READ: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
NEEDED: dict[str, tuple[str, ...]] = {"llama3": READ["llama3"]}


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a model: width P of a head, base theta, scaling, and its positions."""

    head_dim: int
    theta: float
    max_position_embeddings: int
    scaling: RopeScaling | None = None

    @property
    def follows_length(self) -> bool:
        """Whether a token is turned otherwise in a longer text."""
        return self.scaling is not None and self.scaling.rope_type == "dynamic"

    def frequencies(self, length: int) -> tuple[Array, float]:
        """float32 (P/2) radians per position in a text of ``length`` tokens, and what multiplies cosines and sines."""
        if self.scaling is None:
            return _plain(self.head_dim, self.theta), 1.0
        return ROPE_TYPES[self.scaling.rope_type](self, self.scaling, length)

    def tables(self, positions: int) -> tuple[Array, Array]:
        """float32 cosines and sines (positions, P), both halves equal, for one text of so many tokens."""
        return self.tables_in(positions, positions)

    def tables_in(self, positions: int, length: int) -> tuple[Array, Array]:
        """The same of the first ``positions`` in a text of ``length`` tokens."""
        import numpy as np

        return _turned(np.arange(positions), *self.frequencies(length))

    def growing_tables(self, positions: int) -> tuple[Array, Array]:
        """The same where position p is the last of a text: what a token is turned by that continues one."""
        import numpy as np

        if not self.follows_length or positions <= self.max_position_embeddings:
            return self.tables(positions)
        trained = self.max_position_embeddings
        parts = [_turned(np.arange(trained), *self.frequencies(trained))]
        parts += [_turned(np.array([place]), *self.frequencies(place + 1)) for place in range(trained, positions)]
        cos, sin = (np.concatenate(part) for part in zip(*parts, strict=True))
        return cos, sin


def _turned(places: Array, frequencies: Array, scale: float) -> tuple[Array, Array]:
    import numpy as np

    angles = places.astype(np.float32)[:, None] * frequencies[None]
    angles = np.concatenate([angles, angles], -1)
    return np.cos(angles) * np.float32(scale), np.sin(angles) * np.float32(scale)


def _plain(head_dim: int, theta: float) -> Array:
    import numpy as np

    return (1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)).astype(np.float32)


def _linear(rope: Rope, scaling: RopeScaling, length: int) -> tuple[Array, float]:
    import numpy as np

    return (_plain(rope.head_dim, rope.theta) / scaling.factor).astype(np.float32), 1.0


def _dynamic(rope: Rope, scaling: RopeScaling, length: int) -> tuple[Array, float]:
    trained, width = rope.max_position_embeddings, rope.head_dim
    stretch = scaling.factor * max(length, trained) / trained - (scaling.factor - 1)
    exponent = width / (width - 2) if width > 2 else 1.0
    return _plain(width, rope.theta * stretch**exponent), 1.0


def _llama3(rope: Rope, scaling: RopeScaling, length: int) -> tuple[Array, float]:
    import numpy as np

    plain = _plain(rope.head_dim, rope.theta)
    trained = scaling.original_max_position_embeddings or rope.max_position_embeddings
    turns = trained * plain / (2 * math.pi)  # over all trained positions
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = (turns - low) / (high - low)  # 0: divided by the factor, 1: left alone
    between = (1 - share) * plain / scaling.factor + share * plain
    found = np.where(turns < low, plain / scaling.factor, np.where(turns > high, plain, between))
    return found.astype(np.float32), 1.0


def _yarn(rope: Rope, scaling: RopeScaling, length: int) -> tuple[Array, float]:
    import numpy as np

    width, pairs = rope.head_dim, rope.head_dim // 2
    trained = scaling.original_max_position_embeddings or rope.max_position_embeddings

    def pair_of(turns: float) -> float:
        """The pair that turns so often over all trained positions."""
        return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = (np.arange(pairs, dtype=np.float32) - first) / (last - first or 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    plain = _plain(width, rope.theta)
    found = (plain / scaling.factor) * (1 - kept) + plain * kept
    return found.astype(np.float32), _temperature(scaling)


def grown(weight: float, factor: float) -> float:
    """yarn's temperature (Peng et al. 2023, equation 22), its logarithm times ``weight``."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _temperature(scaling: RopeScaling) -> float:
    """With both mscales DeepSeek-V2's ratio of two (arXiv:2405.04434)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return grown(scaling.mscale, scaling.factor) / grown(scaling.mscale_all_dim, scaling.factor)
    return grown(1.0, scaling.factor)


ROPE_TYPES: dict[str, Callable[[Rope, RopeScaling, int], tuple[Array, float]]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
