# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint's weights are those that a network wants, by name and shape; both engines ask here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy.typing as npt

from mindformers_ext.core.errors import Problems, UserError, listed

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
STATE = ("topk_bias", "expert_load")  # router state with sensible start values; a weight file need not hold it
OTHER_MODEL = "the checkpoint was made for another model or other sizes"


def _is_state(name: str) -> bool:
    """Whether the tensor ``name`` may be missing in a checkpoint."""
    return name.split(".")[-1] in STATE


def check_weights(wanted: Mapping[str, Shape], weights: Mapping[str, Array]) -> None:
    """All ``weights`` at once against the shapes ``wanted`` by name.

    Raises:
        UserError: lists what is missing, what nothing wants, and what has another shape.
    """
    problems = Problems("weights for the network")
    missing = [f"'{name}'" for name in wanted if name not in weights and not _is_state(name)]
    unwanted = [f"'{name}'" for name in weights if name not in wanted]
    wrong = [
        f"'{name}' {weights[name].shape} instead of {shape}"
        for name, shape in wanted.items()
        if name in weights and weights[name].shape != shape
    ]
    for what, names in (("missing", missing), ("unwanted", unwanted), ("misshaped", wrong)):
        problems.add_names("tensors", f"are {what}", names, OTHER_MODEL)
    problems.raise_if_any()


def fitting(
    wanted: Mapping[str, Shape], weights: Iterable[tuple[str, Array]], optional: Collection[str] = ()
) -> Iterator[tuple[str, Array]]:
    """The ``weights`` one at a time, each checked as it comes; names in ``optional`` and router state need not come.

    Raises:
        UserError: a tensor that nothing wants, or of another shape, where it comes; what is missing, at the end.
    """
    missing = {name for name in wanted if not _is_state(name) and name not in optional}
    for name, weight in weights:
        if wanted.get(name) != weight.shape:
            raise UserError(f"weight '{name}' {weight.shape} has no place in the network: {OTHER_MODEL}")
        yield name, weight
        missing.discard(name)
        del weight  # or it lives on while the next one is read
    if missing:
        raise UserError(f"the checkpoint lacks {listed(sorted(missing))}: give the whole model")
