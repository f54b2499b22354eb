# SPDX-License-Identifier: Apache-2.0
"""The network of a run, read from its YAML and judged as far as it is ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindformers_ext.core.cluster.build import BuildSpec, build_spec
from mindformers_ext.core.cluster.cluster_rules import check_cluster, check_network, effective_spec, uncut_slots
from mindformers_ext.core.config.foreign import foreign_lora, foreign_spec
from mindformers_ext.core.config.run import MINDSPORE, TRAINING, RunSpec
from mindformers_ext.core.config.view import network_spec_from_yaml, yaml_notes
from mindformers_ext.core.documents import DOCUMENT_IDS
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.spec import NetworkSpec


def read_network(config: Mapping[str, Any], run: RunSpec, device_num: int) -> tuple[NetworkSpec, list[str]]:
    """The network that ``run``, read from ``config``, is about: sizes as written, and notes.

    Of a network of MindFormers' own (``run.family`` is None) the sizes alone are read.

    Raises:
        UserError: lists every key and value that cannot be.
    """
    if run.family is None:
        if run.data is not None and DOCUMENT_IDS in run.data.columns:
            raise UserError(
                f"input_columns: {DOCUMENT_IDS}: rows packed of documents are for networks of ours, this one is "
                "MindFormers' own: name one of ours in model.arch.type, or give its padded rows"
            )
        return foreign_spec(config, device_num)
    spec = network_spec_from_yaml(config, device_num)
    return spec, yaml_notes(config, spec.model.moe)


def judge_network(spec: NetworkSpec, run: RunSpec, mode: str) -> list[str]:
    """Check ``spec`` as ``read_network`` gives it for ``mode`` (of ``cluster_rules.JUDGED_MODES``); returns warnings.

    Raises:
        UserError: lists every broken rule.
    """
    hindrance = uncut_slots(spec) if run.engine == MINDSPORE and mode in TRAINING else None
    if hindrance:
        problems = Problems("these settings do not fit together")
        problems.add(*hindrance)
        problems.raise_if_any()
    stages = effective_spec(spec)[0].parallel.pipeline_stage if spec.packed else 1
    if stages > 1:
        problems = Problems("packed rows")
        problems.add(
            f"parallel_config.pipeline_stage={stages}: {DOCUMENT_IDS} are not sent between pipeline stages",
            "set it to 1 and use data_parallel, model_parallel and expert_parallel, or train on padded rows",
        )
        problems.raise_if_any()
    return check_cluster(spec) if run.family is None else check_network(spec, mode)


def build_network(spec: NetworkSpec, config: Mapping[str, Any], run: RunSpec, recompute: bool = True) -> BuildSpec:
    """What is built of ``spec``; of a network of MindFormers' own its sizes, and adapters that can be merged later.

    Raises:
        UserError: ``pet_config`` or ``recompute_config`` does not fit it.
    """
    if run.family is None:
        return BuildSpec(network=effective_spec(spec)[0], lora=foreign_lora(config))
    return build_spec(spec, config, recompute)
