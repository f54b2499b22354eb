# SPDX-License-Identifier: Apache-2.0
"""What is asked of an upcycling, and the arithmetic of what it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mindformers_ext.jobs.merge.moe_outputs import DOWN, GATE, OUTPUTS, UP
from mindformers_ext.jobs.merge.output import MergeReport, OutputRequest

COPY, GRANULAR, DROP, EXPERT = "copy", "granular", "drop", "expert"
METHODS = (COPY, GRANULAR, DROP, EXPERT)
EXACT, MEGATRON = "exact", "megatron"
SCALES = (EXACT, MEGATRON)
GROUPS, NORMAL, KMEANS, ZEROS = "groups", "normal", "kmeans", "zeros"
ROUTERS = (GROUPS, NORMAL, KMEANS, ZEROS)
MINDSPORE = "mindspore"
FORMATS = (*(row.kind for row in OUTPUTS), MINDSPORE)
STD = 0.02  # of a router's rows
MOST_SPREAD = 1e6  # of drawn rows and of noise: draws stay far inside float32
NO_STATES = "optimizer states are not carried over: training begins with new ones"


@dataclass(frozen=True, kw_only=True)
class UpcycleRequest:
    """An upcycling of the Hugging Face folder ``model``.

    ``experts``: routed experts of a layer that is written, all segments counted; ``top_k`` None: two whole copies, of
    ``expert`` as many times the old number as there are copies. ``form`` None: the mixture that the model fits.
    ``normalised``: the weights of the chosen experts sum to 1. ``gates``: what ``router`` kmeans reads.
    ``moe_layer_freq``: see ``moe_layers``. ``router_noise``: by which copied rows of a mixture's router differ.
    """

    model: Path
    output: OutputRequest
    method: str
    experts: int
    top_k: int | None = None
    granularity: int = 1
    drop_ratio: float = 0.5
    same_neurons: bool = False
    scale: str = EXACT
    router: str = GROUPS
    router_std: float = STD
    gates: Path | None = None
    moe_layer_freq: str | None = None
    normalised: bool = True
    router_noise: float = 0.0
    form: str | None = None
    dtype: str | None = None
    seed: int = 0

    @property
    def chosen(self) -> int:
        """Experts that a token passes, of a dense model's mixture."""
        return min(2 * self.granularity, self.experts) if self.top_k is None else self.top_k


@dataclass(frozen=True)
class Upcycled:
    """What was written, or would be; ``facts`` about it, a line each."""

    report: MergeReport
    facts: tuple[str, ...]


def whole_factor(experts: int, chosen: int, granularity: int, normalised: bool) -> float:
    """By which the sum of equally weighed experts becomes the dense output.

    Of E copies in G segments each, T are chosen, T / G of every segment: with weights of 1 / T the sum is dense / G,
    with those of a softmax over all E G it is dense T / (E G^2) (Megatron-LM, moe/upcycling_utils.py).
    """
    return float(granularity) if normalised else experts * granularity / chosen


def matrix_factors(factor: float, scale: str) -> Mapping[str, float]:
    """The factors of an expert's matrices. Down alone is exact; Megatron's cube root on all three is not, as SwiGLU's
    gate is not linear: silu(s a) is not s silu(a)."""
    if scale == EXACT:
        return {DOWN: factor}
    return dict.fromkeys((GATE, UP, DOWN), factor ** (1 / 3))
