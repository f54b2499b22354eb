# SPDX-License-Identifier: Apache-2.0
"""What a merge method is: its parameters, its inputs, and the function that merges one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # a stack of layers is copied without torch: only methods that compute load it
    import torch

    from mindformers_ext.surgery.merge.stream import Stream

    Run = Callable[[Stream, "Settings"], Iterator[torch.Tensor]]

Number = float | bool


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method. ``per_input``: each model has its own. ``default`` None: it must be given.

    ``low`` and ``high`` bound numbers, both included; ``whole`` numbers have no fraction.
    """

    name: str
    default: Number | None = None
    per_input: bool = False
    low: float | None = None
    high: float | None = None
    whole: bool = False

    @property
    def is_bool(self) -> bool:
        """Whether the value is true or false."""
        return isinstance(self.default, bool)


@dataclass(frozen=True)
class Settings:
    """The parameters of one tensor, all filled in. ``inputs`` has one mapping per input (the base is none)."""

    shared: Mapping[str, Number] = field(default_factory=dict)
    inputs: tuple[Mapping[str, Number], ...] = ()
    seed: int = 0
    rescale_mode: Literal["l1", "density"] = "l1"

    def number(self, name: str) -> float:
        """A shared number."""
        return float(self.shared[name])

    def on(self, name: str) -> bool:
        """A shared switch."""
        return bool(self.shared[name])

    def each(self, name: str) -> list[float]:
        """A number of every input."""
        return [float(values[name]) for values in self.inputs]


@dataclass(frozen=True)
class Method:
    """A merge method.

    ``base`` says whether one model is the base ("slerp": the base is also one of the two inputs). ``most`` None is any
    number. ``lone`` says what happens to an optional tensor that only some models have: "copy" the only one, or
    "error". ``random``: the seed matters.
    """

    name: str
    run: Run
    parameters: tuple[Parameter, ...]
    base: Literal["required", "optional", "never"] = "required"
    fewest: int = 1
    most: int | None = None
    lone: Literal["copy", "error"] = "error"
    random: bool = False
