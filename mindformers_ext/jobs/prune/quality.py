# SPDX-License-Identifier: Apache-2.0
"""What a cut costs: the loss on held-out text of the model, of the cut, and of cuts of equal size that cost nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mindformers_ext.jobs.experts.dense_model import StreamedModel
from mindformers_ext.jobs.experts.probe import Course, Nothing, check_needs, forward, mean_losses, needs
from mindformers_ext.jobs.experts.states import States

ORIGINAL, RANDOM = "original", "random"


@dataclass(frozen=True)
class Judgement:
    """Mean loss per predicted token of every way, the text's predicted tokens, and the seed of what was drawn."""

    losses: Mapping[str, float]
    tokens: int
    measured_tokens: int
    seed: int

    def lines(self) -> list[str]:
        """One line a way, the best first."""
        width, base = max(map(len, self.losses)), self.losses[ORIGINAL]
        rows = sorted(self.losses.items(), key=lambda item: item[1])
        found = [f"held-out loss on {self.tokens} tokens, measured on {self.measured_tokens} tokens, seed {self.seed}"]
        return found + [
            f"{name:{width}}  {loss:.4f}" + ("" if name == ORIGINAL else f"  ({loss - base:+.4f})")
            for name, loss in rows
        ]

    def json(self) -> dict[str, Any]:
        """The same for a file."""
        return asdict(self)


def loss_of(course: Course, model: StreamedModel, folder: Path) -> float:
    """Mean loss of ``model`` on the course's rows. ``folder``: made for what enters the layers, and removed."""
    course = replace(course, model=model)
    spec, nothing = model.spec, Nothing()
    check_needs(needs(course, nothing, spec.num_hidden_layers, backward=False, loss=True), folder)
    states = States(folder, course.length, spec.hidden_size, "loss", keep=False, anew=True)
    try:
        forward(course, states, nothing, (spec.num_hidden_layers - 1,), keep_last=True)
        (loss,) = mean_losses(course, course.open(), (states,), spec.num_hidden_layers)
        return loss
    finally:
        states.remove()
