# SPDX-License-Identifier: Apache-2.0
"""What people see of a dry run while it compiles: where each rank is, and how long it will take."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from mindformers_ext.jobs.dryrun.facts import RankFacts
from mindformers_ext.jobs.dryrun.plan import DryRunPlan
from mindformers_ext.jobs.run.display import Sink

# Seconds on a quiet core, from full-width runs (research/mixtral/NOTES.md): 16 layers of 16 micro batches took 75.
IMPORTS, RANK, LAYER = 20.0, 5.0, 0.28
OVERDUE = 0.1  # of what a rank has taken, when it takes longer than was expected
TICK = 1.0  # seconds between two pictures of the live line
IMPORTING = "importing MindFormers"


def expected_rank_seconds(plan: DryRunPlan, rank: int) -> float:
    """What building and compiling ``rank`` takes, about: every layer is compiled once per micro batch of a pipeline,
    or once per graph of a prediction."""
    spec, stage = plan.spec, plan.stage(rank)
    layers = sum(spec.layer_stage(layer) == stage for layer in range(spec.model.num_hidden_layers))
    if plan.shape is not None:
        return RANK + LAYER * 2 * layers
    pipelined = spec.parallel.micro_batch_num if spec.parallel.pipeline_stage > 1 else 1
    return RANK + LAYER * layers * pipelined * spec.parallel.micro_batch_interleave_num


class DryRunProgress:
    """Hears of phases and ends of ranks and shows them.

    Args:
        plan: what is compiled.
        at_once: ranks compiled at a time.
        sink: where it is shown.
        what: whose network, for the first line.
        clock: seconds.
    """

    def __init__(
        self, plan: DryRunPlan, at_once: int, sink: Sink, what: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.plan, self.at_once, self.sink, self.clock = plan, at_once, sink, clock
        self.began = clock()
        self.phases: dict[int, tuple[str, float]] = {}  # of the ranks under way: the phase, and since when
        self.took: dict[int, float] = {}
        self.since: dict[int, float] = {}
        ranks = ", ".join(map(str, plan.ranks[:8])) + (" ..." if len(plan.ranks) > 8 else "")
        sink.line(
            f"compiling {what}: {len(plan.ranks)} of {plan.world} ranks ({ranks}), {at_once} at a time; "
            f"about {_duration(self.left())} on quiet cores ({IMPORTING} first)"
        )

    def left(self) -> float:
        """Seconds that remain, about: from the ranks that have ended, until then from the number of layers."""
        now = self.clock()
        by_layers = {rank: expected_rank_seconds(self.plan, rank) for rank in self.plan.ranks}
        measured = sum(self.took.values()) / sum(by_layers[rank] for rank in self.took) if self.took else 1.0
        spent = {rank: now - self.since.get(rank, now) for rank in self.plan.ranks if rank not in self.took}
        waiting = [max(measured * by_layers[rank] - done, done * OVERDUE) for rank, done in spent.items()]
        imports = 0.0 if self.since or self.took else max(IMPORTS - (now - self.began), 0.0)
        return imports + max(sum(waiting) / self.at_once, *waiting, 0.0)

    def reached(self, rank: int, phase: str) -> None:
        """``rank`` has begun ``phase``."""
        now = self.clock()
        if not self.since and not self.sink.lives:
            self.sink.line(f"{IMPORTING}: done in {now - self.began:.0f} s")
        self.since.setdefault(rank, now)
        self.phases[rank] = phase, now
        if not self.sink.lives:
            self.sink.line(f"rank {rank}: {phase} ...")

    def ended(self, facts: RankFacts) -> None:
        """A rank is done."""
        now = self.clock()
        self.phases.pop(facts.rank, None)
        self.took[facts.rank] = now - self.since.get(facts.rank, self.began)
        seconds = facts.start_seconds + facts.build_seconds + facts.compile_seconds
        left = f", about {_duration(self.left())} left" if len(self.took) < len(self.plan.ranks) else ""
        self.sink.line(
            f"rank {facts.rank}: {'compiles' if facts.compiles else 'FAILS'} ({seconds:.0f} s), "
            f"{len(self.took)} of {len(self.plan.ranks)} done{left}"
        )

    def picture(self) -> str:
        """The live line."""
        now = self.clock()
        under_way = [f"rank {rank} {phase} {now - since:.0f} s" for rank, (phase, since) in sorted(self.phases.items())]
        return "  ".join(
            [
                f"{len(self.took)}/{len(self.plan.ranks)} done",
                f"about {_duration(self.left())} left",
                *(under_way or [f"{IMPORTING} {now - self.began:.0f} s"]),
            ]
        )

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Inside, a terminal's live line is kept up to date."""
        over = threading.Event()

        def tick() -> None:
            while not over.wait(TICK):
                self.sink.live(self.picture())

        thread = threading.Thread(target=tick, daemon=True)
        if self.sink.lives:
            thread.start()
        try:
            yield
        finally:
            over.set()
            if self.sink.lives:
                thread.join()
                self.sink.live("")


def _duration(seconds: float) -> str:
    """``45 s`` or minutes and seconds, not finer than it is known."""
    if seconds < 60:
        return f"{5 * math.ceil(seconds / 5)} s"
    if seconds < 3590:
        return str(timedelta(seconds=10 * math.ceil(seconds / 10)))[2:] + " min"
    return f"{seconds / 3600:.1f} h"
