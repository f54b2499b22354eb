# SPDX-License-Identifier: Apache-2.0
"""The names of the merge methods, known without torch: a name that is none of them is refused at once."""

from __future__ import annotations

from mindformers_ext.core.errors import nearest

# with the parameters and formulas of mergekit 0.1.5; ``registry`` has the methods themselves
NAMES = (
    "linear",
    "slerp",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "passthrough",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
    "model_stock",
    "nuslerp",
    "sce",
    "karcher",
    "multislerp",
    "nearswap",
    "arcee_fusion",
    "ram",
    "ramplus_tl",
)


def name_fault(name: object) -> tuple[str, str] | None:
    """What is wrong with ``merge_method: name`` and what to do; None where it is a method."""
    if name in NAMES:
        return None
    choices = f"choose one of {', '.join(NAMES)}"
    if not isinstance(name, str):
        return f"merge_method is {name!r}", choices
    return f"merge_method '{name}' is unknown", f"{nearest(name, sorted(NAMES))} {choices}"
