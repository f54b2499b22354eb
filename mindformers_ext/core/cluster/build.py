# SPDX-License-Identifier: Apache-2.0
"""All that a network is built from, made once: by the checks of a run, or where MindFormers builds without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindformers_ext.core.cluster.cluster_rules import effective_spec
from mindformers_ext.core.config.lora import LoraSpec, lora_from_yaml
from mindformers_ext.core.config.pruning import WHERE, pruning_from_yaml
from mindformers_ext.core.config.recompute import RecomputeSpec, recompute_from_yaml
from mindformers_ext.core.config.train import (
    GATE_SWITCHES,
    GATES_ALONE,
    TRAIN_GATE_ONLY,
    ParameterGroup,
    trained_groups,
)
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.pruning import PruningSpec
from mindformers_ext.core.spec import NetworkSpec


@dataclass(frozen=True, kw_only=True)
class BuildSpec:
    """``network``: with the sizes that are really built (``effective_spec``); ``lora``: adapters beside its layers;
    ``pruning``: masks in them; ``recompute``: layers whose activations are computed again, none where nothing is
    learnt; ``groups``: parameters that are trained in another way than the rest."""

    network: NetworkSpec
    lora: LoraSpec | None = None
    pruning: PruningSpec | None = None
    recompute: RecomputeSpec = RecomputeSpec()
    groups: tuple[ParameterGroup, ...] = ()


def build_spec(read: NetworkSpec, config: Mapping[str, Any], recompute: bool = True) -> BuildSpec:
    """What is built of the network ``read`` from ``config``; ``recompute``: by an engine that recomputes parts.

    Raises:
        UserError: ``pet_config``, ``l0_module`` or ``recompute_config`` does not fit it, or gates are named that it
            lacks.
    """
    network = effective_spec(read)[0]
    groups = trained_groups(config)
    if groups and network.model.moe is None:
        raise UserError(f"{' and '.join(GATE_SWITCHES)}: a dense model has no gates: leave them out")
    if groups == GATES_ALONE and network.model.moe and network.model.moe.by_threshold:
        raise UserError(
            f"{TRAIN_GATE_ONLY}: no gradient reaches a gate by threshold: nothing would learn, leave it out"
        )
    wanted = recompute and config.get("run_mode") != "predict"
    return BuildSpec(
        network=network,
        lora=lora_from_yaml(config),
        pruning=built_pruning(config, network),
        recompute=recompute_from_yaml(config, network) if wanted else RecomputeSpec(),
        groups=groups,
    )


def built_pruning(config: Mapping[str, Any], network: NetworkSpec) -> PruningSpec | None:
    """The masks that ``config`` asks for in ``network``, as ``effective_spec`` leaves it.

    Raises:
        UserError: what ``pruning_from_yaml`` refuses, or a pipeline.
    """
    pruning, stages = pruning_from_yaml(config, network.model), network.parallel.pipeline_stage
    if pruning and stages > 1:
        raise UserError(
            f"{WHERE} with parallel_config.pipeline_stage={stages}: masks of the whole network are not sent between "
            "pipeline stages; set it to 1, and cut by data_parallel and model_parallel, with "
            "parallel.enable_parallel_optimizer: True where memory is short"
        )
    return pruning


def build_spec_from_yaml(config: Mapping[str, Any], device_num: int = 1) -> BuildSpec:
    """The same from ``config`` alone, by a job of ``device_num`` devices.

    Raises:
        UserError: lists every key or value the network cannot be built from.
    """
    return build_spec(network_spec_from_yaml(config, device_num), config)
