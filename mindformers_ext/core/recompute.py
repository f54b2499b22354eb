# SPDX-License-Identifier: Apache-2.0
"""``recompute_config``: which layers forget their activations after the forward pass and compute them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindformers_ext.core.cluster import layer_stage
from mindformers_ext.core.errors import Problems
from mindformers_ext.core.yaml_values import read_value

WHERE = "recompute_config"


@dataclass(frozen=True)
class RecomputeSpec:
    """``layers``: indices of the layers that are computed again.

    ``exchanges``: also repeat what they exchange with other devices (``mp_comm_recompute``); otherwise those results
    are kept. ``cut_inputs``: keep each layer's input cut over model_parallel (``recompute_slice_activation``).
    """

    layers: frozenset[int] = frozenset()
    exchanges: bool = True
    cut_inputs: bool = False


def recompute_from_yaml(config: Mapping[str, Any], layers: int, stages: int, parts: int = 1) -> RecomputeSpec:
    """Read ``recompute_config``; without it nothing is computed again.

    ``recompute`` is True, False, or a list with one entry per pipeline stage: so many of its layers from its first,
    or True or False. Stages behind the list's end compute nothing again.

    Args:
        config: the YAML's content.
        layers: layers of the network.
        stages: pipeline stages.
        parts: of every stage (``pp_interleave_num``).

    Raises:
        UserError: a value of the wrong kind, or a list longer than the pipeline.
    """
    words = config.get(WHERE) or {}
    problems = Problems(WHERE)
    if not isinstance(words, Mapping):
        problems.add(f"{WHERE}={words!r} is no section", "write keys below it, such as recompute: True")
        problems.raise_if_any()
    exchanges = read_value(f"{WHERE}.mp_comm_recompute", words.get("mp_comm_recompute", True), "bool", True, problems)
    cut = read_value(f"{WHERE}.recompute_slice_activation", words.get("recompute_slice_activation", False), "bool",
                     False, problems)  # fmt: skip
    counts = _counts(words.get("recompute", False), layers, stages, problems)
    problems.raise_if_any()
    chosen, seen = set(), [0] * stages
    for layer in range(layers):
        stage = layer_stage(layer, layers, stages, parts)
        if seen[stage] < counts[stage]:
            chosen.add(layer)
        seen[stage] += 1
    return RecomputeSpec(frozenset(chosen), bool(exchanges), bool(cut))


def _counts(value: object, layers: int, stages: int, problems: Problems) -> list[int]:
    """Layers to compute again per stage."""
    advice = "write True, False, or one number of layers per pipeline stage, for example [3, 2]"
    if value is None or isinstance(value, bool):
        return [layers if value else 0] * stages
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, int) and item >= 0 for item in value):
        problems.add(f"{WHERE}.recompute={value!r} is not understood", advice)
        return [0] * stages
    if len(value) > stages:
        problems.add(f"{WHERE}.recompute={list(value)} has {len(value)} entries, pipeline_stage={stages}", advice)
        return [0] * stages
    counts = [layers if item is True else int(item) for item in value]
    return counts + [0] * (stages - len(counts))
