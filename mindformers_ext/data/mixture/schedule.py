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
LAST = 400  # windows of the history that may fit into a state
CHUNK = 4096  # rows of one domain held
ORDERS = 1 << 63  # keys of orders have this bit; those of draws, a step's number, do not
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class _Draws:
    """The doubles in [0, 1) by which samples draw their domains: ``Generator(Philox(key=[seed, step])).random``.

    One generator is set to each step's key, which takes a third of the time of a new one.
    """

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._philox)
        self._begin = self._philox.state

    def of(self, seed: int, step: int, count: int) -> Floats:
        self._begin["state"]["key"][:] = seed, step
        self._philox.state = self._begin
        return self._generator.random(count)


def uniforms(seed: int, step: int, count: int) -> Floats:
    """The doubles of one step (count)."""
    return _Draws().of(seed, step, count)


def edges(proportions: Floats) -> Floats:
    """cumsum(p), in which the last domain with a proportion above 0 has all that rounding leaves below 1 (n)."""
    sums = np.cumsum(proportions)
    sums[int(np.flatnonzero(proportions > 0)[-1]) :] = np.inf
    return sums


def domains_of(draws: Floats, proportions: Floats) -> Ints:
    """The domain of each draw; one of proportion 0 gets none."""
    return edges(proportions).searchsorted(draws, side="right")


class DomainSchedule:
    """Draws a run's samples step by step.

    Args:
        state: where it stands; ``step``, here too, is the one drawn next.
        on_exhausted: what happens where a domain has no unused row: its rows come again in another order (``repeat``),
            the rest of the samples is drawn from the other domains (``renormalise``, by the same numbers), or the run
            ends (``error``).
    """

    def __init__(self, state: MixtureState, on_exhausted: str = REPEAT) -> None:
        self.on_exhausted, self._draws = on_exhausted, _Draws()
        self._orders = [_Order(domain.rows, state.seed, place) for place, domain in enumerate(state.domains)]
        self.state = state

    @property
    def state(self) -> MixtureState:
        """Where it stands."""
        return replace(self._state, step=self.step, used=tuple(self._used))

    @state.setter
    def state(self, state: MixtureState) -> None:
        self._state, self.step, self._used = state, state.step, list(state.used)
        self._shares = np.array(state.proportions, np.float64)
        self._edges = edges(self._shares)

    def draw(self, part: slice = slice(None)) -> tuple[list[int], list[int]]:
        """Domain and row of the samples ``part`` of the next step; the schedule then stands behind that step.

        Raises:
            UserError: a domain is exhausted and may not be, or all are.
        """
        domains = self._domains().tolist()
        first, end, _ = part.indices(len(domains))
        used, rows = self._used, list[int]()
        for place, domain in enumerate(domains):
            number = used[domain]
            used[domain] = number + 1
            if first <= place < end:
                rows.append(self._orders[domain].row(number))
        self.step += 1
        return domains[first:end], rows

    def pass_over(self, step: int) -> None:
        """Stand before ``step``, with the present proportions, without computing the rows on the way."""
        while self.step < step:
            for domain, count in enumerate(np.bincount(self._domains()).tolist()):
                self._used[domain] += count
            self.step += 1

    def move(self, proportions: Floats) -> None:
        """The window that begins with the next step has these proportions."""
        state, window = self.state, self.step // max(self._state.interval, 1)
        shares = tuple(proportions.tolist())
        self.state = replace(state, proportions=shares, history=(*state.history[-LAST:], (window, shares)))

    def _domains(self) -> Ints:
        """The domain of every sample of the next step."""
        batch = self._state.batch
        draws = self._draws.of(self._state.seed, self.step, batch)
        if self.on_exhausted == REPEAT:
            return self._edges.searchsorted(draws, side="right")
        left = np.array([domain.rows for domain in self._state.domains], np.int64) - np.array(self._used, np.int64)
        found, done = np.empty(batch, np.int64), 0
        while True:
            found[done:] = domains_of(draws[done:], self._open_shares(left))
            over = _first_over(found[done:], left)
            if over is None:
                return found
            if self.on_exhausted == ERROR:
                name = self._state.domains[int(found[done + over])].name
                raise UserError(
                    f"step {self.step + 1}: the domain {name} is exhausted, and on_exhausted is error: give it more "
                    "rows or a smaller proportion, train fewer steps, or set on_exhausted to repeat or renormalise"
                )
            left -= np.bincount(found[done : done + over], minlength=len(left))
            done += over

    def _open_shares(self, left: Ints) -> Floats:
        """The proportions, without domains that have no row left where these are passed over."""
        if self.on_exhausted == ERROR:
            return self._shares
        shares = np.where(left > 0, self._shares, 0.0)
        if not shares.sum() > 0:
            raise UserError(
                f"step {self.step + 1}: every domain with a proportion above 0 is exhausted: train fewer steps "
                "(runner_config.epochs, data_loader.num_samples), or set on_exhausted to repeat"
            )
        return np.asarray(shares / shares.sum())


def _first_over(domains: Ints, left: Ints) -> int | None:
    """The first place whose domain has no row left for it."""
    places = [np.flatnonzero(domains == domain) for domain in range(len(left))]
    over = [int(where[max(n, 0)]) for where, n in zip(places, left.tolist(), strict=True) if len(where) > n]
    return min(over, default=None)


class _Order:
    """The rows of one domain in the order in which they are drawn, through all passes; some next to each other are
    held."""

    def __init__(self, size: int, seed: int, domain: int) -> None:
        self.size, self.seed, self.domain = size, seed, domain
        self._number, self._pass = -1, Permutation(size, (seed, ORDERS | domain << 48))
        self._first, self._rows = 0, list[int]()

    def row(self, number: int) -> int:
        """The row drawn as number ``number`` (from 0)."""
        if not 0 <= number - self._first < len(self._rows):
            passes, place = divmod(number, self.size)
            if passes != self._number:
                self._number, self._pass = (
                    passes,
                    Permutation(self.size, (self.seed, ORDERS | self.domain << 48 | passes)),
                )
            begin = place // CHUNK * CHUNK
            self._first = number - place + begin
            self._rows = self._pass.at(np.arange(begin, min(begin + CHUNK, self.size))).tolist()
        return self._rows[number - self._first]
