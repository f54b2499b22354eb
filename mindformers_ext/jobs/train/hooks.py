# SPDX-License-Identifier: Apache-2.0
"""What happens between training steps besides the update, written once for both loops: ours and MindFormers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.figures import StepFigures

Arrays = Mapping[str, np.ndarray]
BIAS = ".router.router.topk_bias"
PREFIX = "hook."  # of hooks' own state in a checkpoint: hook.<place>.<name>


class TrainHook(Protocol):
    """A part of a training run that sees its steps. Steps count from 1, in the whole run."""

    def inputs(self, step: int) -> Arrays:
        """New values of network parameters, by MindFormers' names, for ``step`` and those after it; others stay."""
        ...

    def measured(self, step: int, figures: StepFigures) -> Mapping[str, float]:
        """Further figures for the record of ``step``, which is done; the network may be computed with."""
        ...

    def after_step(self, step: int, figures: StepFigures) -> None:
        """``step`` is done, and its record written."""
        ...

    def state(self) -> Arrays:
        """What a checkpoint must hold of the hook besides the network's parameters."""
        ...

    def restore(self, state: Arrays) -> None:
        """Continue from such a state."""
        ...


class QuietHook:
    """A hook that does nothing: what real ones need not write again."""

    def inputs(self, step: int) -> Arrays:
        """No new values."""
        return {}

    def measured(self, step: int, figures: StepFigures) -> Mapping[str, float]:
        """No further figures."""
        return {}

    def after_step(self, step: int, figures: StepFigures) -> None:
        """Nothing."""

    def state(self) -> Arrays:
        """Nothing."""
        return {}

    def restore(self, state: Arrays) -> None:
        """Nothing."""


class BiasBalance(QuietHook):
    """Balances experts by a bias instead of a loss (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3 section 2.1.2).

    After every step: bias += rate * sign(mean load - load), per layer, the load as a share of its sum. A skipped step
    moves nothing: its load may be of broken activations.

    Args:
        rate: how far a bias moves in a step.
        biases: the present biases (E) by name, in the order of the layers that have a load.
    """

    def __init__(self, rate: float, biases: Arrays) -> None:
        self.rate, self.biases = rate, dict(biases)
        self.has_moved = False

    def inputs(self, step: int) -> Arrays:
        """The biases, where they have moved."""
        moved, self.has_moved = self.has_moved, False
        return self.biases if moved else {}

    def after_step(self, step: int, figures: StepFigures) -> None:
        """Move the biases.

        Raises:
            UserError: the step does not tell its load.
        """
        if not self.biases or not self.rate:
            return
        if not figures.has_load:
            raise UserError(
                "TopkBiasBalanceCallback needs the load of every step: set runner_wrapper.type to "
                "PortableTrainOneStepCell"
            )
        if figures.overflow:
            return
        for (name, bias), load in zip(self.biases.items(), figures.expert_load, strict=True):
            self.biases[name] = moved(bias, load, self.rate)
        self.has_moved = True


def moved(bias: np.ndarray, load: np.ndarray, rate: float) -> np.ndarray:
    """The bias (E) after one step of load (E): experts above the mean load go down by ``rate``, those below go up."""
    total = float(load.sum())
    if total <= 0:
        return bias
    share = load / total
    return (bias + rate * np.sign(1.0 / len(share) - share)).astype(bias.dtype)


class AdapterDropout(QuietHook):
    """Gives every step's dropout of adapters seeds of its own, that follow from the run's seed and the step's number.

    Args:
        seed: the run's.
        rank: of this process, which has other rows than others.
        held: the network's parameter of seeds, one per adapted layer, by its name.
    """

    def __init__(self, seed: int, rank: int, held: Arrays) -> None:
        self.seed, self.rank, self.held = seed, rank, dict(held)

    def inputs(self, step: int) -> Arrays:
        """The seeds of ``step``: 32 bits each (numpy's SeedSequence, the same in all its releases)."""
        words = np.random.SeedSequence((abs(self.seed), step, self.rank))
        return {name: words.generate_state(len(old)).view(np.int32) for name, old in self.held.items()}


class LoadLog(QuietHook):
    """One log line per mixture: the share dropped, and the fullest and emptiest expert beside an even load.

    Args:
        log: takes a format and its values.
        warn: the same for what is missing.
        every: steps between lines.
        layers: numbers of the layers that are mixtures, where some are dense.
    """

    def __init__(
        self, log: Callable[..., None], warn: Callable[..., None], every: int = 1, layers: Sequence[int] = ()
    ) -> None:
        self.log, self.warn, self.every, self.layers = log, warn, max(1, every), layers
        self.first: int | None = None
        self.is_told = False

    def after_step(self, step: int, figures: StepFigures) -> None:
        """Show the step just done."""
        self.first = step if self.first is None else self.first
        if (step - self.first) % self.every:
            return
        if figures.has_load:
            for line in load_lines(figures.expert_load, figures.dropped, self.layers):
                self.log("%s", line)
        elif not self.is_told:
            self.is_told = True
            self.warn(
                "The expert load is not shown: it needs experts, and our network with our train step "
                "(PortableTrainOneStepCell) or in a pipeline."
            )


def load_lines(load: np.ndarray, dropped: np.ndarray, layers: Sequence[int] = ()) -> list[str]:
    """One line per mixture. ``load`` (L, E): assignments per expert before dropping; ``dropped`` (L): their share;
    ``layers``: the mixtures' numbers, by default 0 to L - 1."""
    lines = []
    for layer, counts, share in zip(layers or range(len(load)), load, dropped.reshape(-1), strict=True):
        even = max(float(counts.mean()), 1e-9)
        high, low = int(counts.argmax()), int(counts.argmin())
        lines.append(
            f"layer: {layer}, drop_rate: {float(share):.5f}, fullest expert: {high} "
            f"({counts[high] / even:.2f} of an even load), emptiest: {low} ({counts[low] / even:.2f})"
        )
    return lines


def hook_state(hooks: Sequence[TrainHook]) -> dict[str, np.ndarray]:
    """The hooks' own state under a checkpoint's names."""
    return {
        f"{PREFIX}{place}.{name}": array for place, hook in enumerate(hooks) for name, array in hook.state().items()
    }


def restore_hooks(hooks: Sequence[TrainHook], state: Arrays, first: int = 0) -> None:
    """Give each hook its part of ``state``, a checkpoint's tensors by name; ``first``: the place of the first one."""
    for place, hook in enumerate(hooks, first):
        start = f"{PREFIX}{place}."
        held = {name.removeprefix(start): array for name, array in state.items() if name.startswith(start)}
        if held:
            hook.restore(held)
