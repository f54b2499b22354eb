# SPDX-License-Identifier: Apache-2.0
"""The first masks of a run that prunes, from what ``prune.py shape`` has measured (``l0_module.importance``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import Problems
from mindformers_ext.core.pruning import MASKS, Z_LOGA, PruningSpec
from mindformers_ext.jobs.prune.masks_file import differences
from mindformers_ext.jobs.prune.one_shot.importance_file import read_importance_file
from mindformers_ext.surgery.prune.importance import Scores, minitron
from mindformers_ext.surgery.prune.warm_start import ordered_loga


def first_masks(spec: PruningSpec) -> dict[str, np.ndarray]:
    """Parameters of all masks by name, float32; empty where no file is named.

    Raises:
        UserError: no such file, or one of a model of other sizes.
    """
    if spec.importance is None:
        return {}
    found = read_importance_file(Path(spec.importance))
    problems = Problems(f"l0_module.importance '{spec.importance}' is of another model")
    for name, ours, theirs in differences(spec.source, found.source):
        problems.add(f"its {name} is {theirs}, this model's {ours}", "measure this one with 'prune.py shape'")
    problems.raise_if_any()
    scores = _by_module(minitron(found.statistics, found.source), spec)
    return {
        f"{MASKS}{name}.{Z_LOGA}": ordered_loga(scores[name], spec.start_sparsity).astype(np.float32)
        for name in spec.modules
    }


def _by_module(scores: Scores, spec: PruningSpec) -> dict[str, np.ndarray]:
    """Scores by the names of ``core.pruning.MODULES``."""
    source = spec.source
    grouped = scores.heads.reshape(-1, source.num_key_value_heads, source.heads_per_group)
    hidden = {} if scores.hidden is None else {"hidden": scores.hidden}
    return hidden | {
        "head": scores.heads,
        "kv_head": scores.groups,
        "q_in_group": grouped.sum(1),
        "intermediate": scores.neurons,
        **dict.fromkeys(("layer", "head_layer", "mlp"), scores.layers),
    }
