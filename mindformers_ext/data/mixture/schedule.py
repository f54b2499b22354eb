# SPDX-License-Identifier: Apache-2.0
"""Which row of which domain every sample of a run is: all of a window is known when its proportions are.

Sample j of step k (both from 0) is of the domain searchsorted(cumsum(p), u_j, side="right") with u the doubles that
numpy's Philox(key=[seed, k]) gives; its row is the next one in the domain's order, in the order of steps and samples.
So the global batches are the same for any number of processes, which take slices of them, and whoever reads the rows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.mixture.permutation import Permutation
from mindformers_ext.data.mixture.state import MixtureState

REPEAT, RENORMALISE, ERROR = ON_EXHAUSTED = ("repeat", "renormalise", "error")
ORDERS = 1 << 63  # keys of orders have this bit; those of draws, a step's number, do not
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def uniforms(seed: int, step: int, count: int) -> Floats:
    """The doubles in [0, 1) that a step's samples draw their domains by (count)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64))).random(count)


def domains_of(draws: Floats, proportions: Floats) -> Ints:
    """The domain of each draw; one of proportion 0 gets none, also where rounding leaves the sum below 1."""
    last = int(np.flatnonzero(proportions > 0)[-1])
    return np.minimum(np.searchsorted(np.cumsum(proportions), draws, side="right"), last).astype(np.int64)


class DomainSchedule:
    """Draws a run's samples step by step.

    Args:
        state: where it stands; ``step`` is the one drawn next.
        on_exhausted: what happens where a domain has no unused row: its rows come again in another order (``repeat``),
            the rest of the samples is drawn from the other domains (``renormalise``, by the same numbers), or the run
            ends (``error``).
    """

    def __init__(self, state: MixtureState, on_exhausted: str = REPEAT) -> None:
        self.state, self.on_exhausted = state, on_exhausted
        self._rows = np.array([domain.rows for domain in state.domains], np.int64)
        self._orders: dict[int, tuple[int, Permutation]] = {}

    def draw(self, part: slice = slice(None)) -> tuple[Ints, Ints]:
        """Domain and row of the samples ``part`` of the next step; the schedule then stands behind that step.

        Raises:
            UserError: a domain is exhausted and may not be, or all are.
        """
        state = self.state
        domains = self._domains()
        used = np.array(state.used, np.int64)
        mine = np.arange(len(domains))[part]
        rows = np.empty(len(mine), np.int64)
        for domain in np.unique(domains):
            where = np.flatnonzero(domains == domain)
            low, high = np.searchsorted(where, (mine[0], mine[-1] + 1)) if len(mine) else (0, 0)
            first = int(used[domain])
            if high > low:
                rows[where[low:high] - mine[0]] = self._order(int(domain), first + int(low), first + int(high))
            used[domain] += len(where)
        self.state = replace(state, step=state.step + 1, used=tuple(used.tolist()))
        return domains[part], rows

    def pass_over(self, step: int) -> None:
        """Stand before ``step``, with the present proportions, without computing the rows on the way."""
        used = np.array(self.state.used, np.int64)
        while self.state.step < step:
            used = used + np.bincount(self._domains(), minlength=len(used))
            self.state = replace(self.state, step=self.state.step + 1, used=tuple(used.tolist()))

    def move(self, proportions: Floats) -> None:
        """The window that begins with the next step has these proportions."""
        state, window = self.state, self.state.step // max(self.state.interval, 1)
        shares = tuple(proportions.tolist())
        self.state = replace(state, proportions=shares, history=(*state.history[-LAST:], (window, shares)))

    def _domains(self) -> Ints:
        """The domain of every sample of the next step."""
        state = self.state
        proportions, left = np.array(state.proportions), self._rows - np.array(state.used, np.int64)
        draws = uniforms(state.seed, state.step, state.batch)
        if self.on_exhausted == REPEAT:
            return domains_of(draws, proportions)
        found, done = np.empty(state.batch, np.int64), 0
        while True:
            open_ = np.where(left > 0, proportions, 0.0)
            if self.on_exhausted == RENORMALISE and open_.sum() <= 0:
                raise UserError(
                    f"step {state.step + 1}: every domain with a proportion above 0 is exhausted: train fewer steps "
                    "(runner_config.epochs, data_loader.num_samples), or set on_exhausted to repeat"
                )
            shares = open_ / open_.sum() if self.on_exhausted == RENORMALISE else proportions
            found[done:] = domains_of(draws[done:], shares)
            over = self._first_over(found[done:], left)
            if over is None:
                return found
            if self.on_exhausted == ERROR:
                name = state.domains[int(found[done + over])].name
                raise UserError(
                    f"step {state.step + 1}: the domain {name} is exhausted, and on_exhausted is error: give it more "
                    "rows or a smaller proportion, train fewer steps, or set on_exhausted to repeat or renormalise"
                )
            left -= np.bincount(found[done : done + over], minlength=len(left))
            done += over

    @staticmethod
    def _first_over(domains: Ints, left: Ints) -> int | None:
        """The first place whose domain has no row left for it."""
        places = [np.flatnonzero(domains == domain) for domain in range(len(left))]
        over = [int(where[max(n, 0)]) for where, n in zip(places, left.tolist(), strict=True) if len(where) > n]
        return min(over, default=None)

    def _order(self, domain: int, first: int, end: int) -> Ints:
        """The rows number ``first`` to ``end`` that are drawn of a domain, counted through all its passes."""
        size, parts = int(self._rows[domain]), []
        while first < end:
            number, place = divmod(first, size)
            held = self._orders.get(domain)
            if held is None or held[0] != number:
                key = (self.state.seed, ORDERS | domain << 48 | number)
                held = self._orders[domain] = number, Permutation(size, key)
            stop = min(place + end - first, size)
            parts.append(held[1].between(place, stop))
            first += stop - place
        return np.concatenate(parts)


LAST = 400  # windows of the history that may fit into a state
