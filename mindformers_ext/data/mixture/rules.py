# SPDX-License-Identifier: Apache-2.0
"""How the proportions of domains start and move: one table of rules, computed in float64.

The moving rules are exponentiated gradient on the excess of a domain's loss over its target: DoReMi (Xie et al. 2023,
arXiv:2305.10429) as Sheared-LLaMA (Xia et al. 2023, arXiv:2310.06694) uses it, and LLaMA-MoE's variants of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mindformers_ext.data.mixture.bounds import Bounds

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """One way to set proportions.

    moves: whether losses change them. ``clips``: a domain below its target counts as at it. ``smoothing``: the weight
    of 1/n in an update, where the user names none. ``given``: whether the user says the proportions at the start; if
    not, they are 1/n, or follow from the domains' sizes (``by_rows``).
    """

    moves: bool = False
    clips: bool = False
    smoothing: float = 0.0
    given: bool = True
    by_rows: bool = False


RULES: dict[str, Rule] = {
    "constant": Rule(),
    "stratified": Rule(given=False),
    "temperature": Rule(given=False, by_rows=True),
    "doremi": Rule(moves=True, smoothing=1e-4),
    "doremi_clipped": Rule(moves=True, clips=True, smoothing=1e-4),
    "sheared_paper": Rule(moves=True, clips=True),
}
# Other names of the same rules: Sheared-LLaMA's code and paper, and LLaMA-MoE's.
ALIASES: dict[str, str] = {
    "sheared": "doremi",
    "sheared_llama": "doremi",
    "sheared_llama_paper": "sheared_paper",
    "uniform": "stratified",
}


@dataclass(frozen=True)
class Settings:
    """A rule and its numbers. ``smoothing`` None is the rule's own."""

    rule: str = "constant"
    eta: float = 1.0
    smoothing: float | None = None
    temperature: float = 1.0
    bounds: Bounds = field(default_factory=Bounds)

    @property
    def moves(self) -> bool:
        """Whether losses change the proportions."""
        return RULES[self.rule].moves


def start(settings: Settings, rows: Floats, given: Floats | None) -> Floats:
    """Proportions (n) of the first window.

    Args:
        settings: the rule; its bounds hold from the start.
        rows: of each domain (n).
        given: the user's proportions (n), which ``constant`` and the moving rules start from; None is 1/n.
    """
    rule, count = RULES[settings.rule], len(rows)
    if rule.by_rows:  # p ~ rows^(1/T): Arivazhagan et al. 2019 (arXiv:1907.05019), section 3
        logs = np.log(np.asarray(rows, np.float64)) / settings.temperature
        found = normalised(np.exp(logs - logs.max()))
    elif given is None or not rule.given:
        found = np.full(count, 1.0 / count)
    else:
        found = normalised(np.asarray(given, np.float64))
    return settings.bounds.nearest(found)


def updated(settings: Settings, proportions: Floats, losses: Floats, targets: Floats) -> Floats:
    """Proportions (n) after an evaluation.

    alpha = softmax(ln p + eta delta), delta = loss - target, where the rule clips max(0, delta); then
    p' = (1 - c) alpha + c/n, c the smoothing; then the nearest within the bounds. A loss that is no number has delta 0.

    Args:
        settings: the rule; one that does not move returns ``proportions``.
        proportions: of the window that ends (n).
        losses: mean loss per token of each domain (n).
        targets: what each is compared with (n).
    """
    rule = RULES[settings.rule]
    if not rule.moves:
        return proportions
    delta = np.where(np.isfinite(losses), np.asarray(losses, np.float64) - targets, 0.0)
    if rule.clips:
        delta = np.maximum(delta, 0.0)
    with np.errstate(divide="ignore"):  # a proportion of 0 stays 0
        logs = np.log(proportions) + settings.eta * delta
    alpha = normalised(np.exp(logs - logs.max()))
    share = rule.smoothing if settings.smoothing is None else settings.smoothing
    mixed = (1.0 - share) * alpha + share / len(alpha)
    return settings.bounds.nearest(normalised(mixed))


def normalised(weights: Floats) -> Floats:
    """``weights`` divided by their sum."""
    return np.asarray(weights / weights.sum())
