# SPDX-License-Identifier: Apache-2.0
"""The words of ``moe_config`` that fill several fields, or fields together with others.

``aux_loss_types`` with ``aux_loss_factors`` where given (``[]`` means none); where absent or null, ``aux_loss_factor``
> 0 means ``expert`` with that factor. MindFormers reads that factor and drops the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindformers_ext.core.config.values import read_value
from mindformers_ext.core.errors import Problems
from mindformers_ext.core.families import UNBALANCED_GATES
from mindformers_ext.core.layers import LAYERWISE, MoESpec, SharedExpertSpec

ROUTING_POLICY = "TopkRouterV2"
AUX_FACTOR = 0.05  # MindFormers' default
NO_GRADIENT = (
    "moe_gate 'threshold': no gradient reaches the gate, weight decay alone moves it; runner_config.freeze_gate: True "
    "leaves it as it is"
)


def read_routing(words: Mapping[str, Any], moe: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """The MoE fields that several keys fill together.

    Args:
        words: the section ``moe_config``.
        moe: what single keys have filled, the gate among them.
        problems: what is wrong.
    """
    policy = words.get("routing_policy", "TopkRouterV1")
    if policy != ROUTING_POLICY and words.get("expert_num", 1) not in (1, None):
        problems.add(
            f"moe_config.routing_policy={policy!r}" + ("" if "routing_policy" in words else " (the default)"),
            f"LLaMA's experts are routed by {ROUTING_POLICY}: set routing_policy: {ROUTING_POLICY}",
        )
    overlapped = read_value(
        "moe_config.comp_comm_parallel", words.get("comp_comm_parallel", False), "bool", False, problems
    )
    degree = read_value(
        "moe_config.comp_comm_parallel_degree", words.get("comp_comm_parallel_degree", 2), "int", 2, problems
    )
    name = "router_dense_type"
    dtype = read_value(f"moe_config.{name}", words.get(name, "float32"), "dtype", "float32", problems)
    return {
        "aux_losses": _aux_losses(words, moe["gate"] in UNBALANCED_GATES, problems),
        "comp_comm_parallel_degree": degree if overlapped else 1,
        "router_dtype": "float32" if dtype == "float16" else dtype,  # MindFormers' dtype_map
    }


def _aux_losses(words: Mapping[str, Any], unbalanced: bool, problems: Problems) -> tuple[tuple[str, float], ...]:
    """``unbalanced``: these do not weigh on the gate; MindFormers' template writes its default factor there too."""
    kinds, factors = words.get("aux_loss_types"), words.get("aux_loss_factors")
    if kinds is None:
        if factors:
            problems.add(f"moe_config.aux_loss_factors={factors} without aux_loss_types", "name their kinds")
        name = "moe_config.aux_loss_factor"
        factor = read_value(name, words.get("aux_loss_factor", AUX_FACTOR), "float", AUX_FACTOR, problems)
        if unbalanced and factor == AUX_FACTOR:
            return ()
        if factor is not None and not 0 <= factor < 1:
            problems.add(f"{name}={factor} is out of range", "use 0 (off) up to below 1")
        return (("expert", float(factor)),) if factor and words.get("expert_num", 1) != 1 else ()
    factors = [] if factors is None else factors
    if not isinstance(kinds, (list, tuple)) or not isinstance(factors, (list, tuple)):
        problems.add(f"moe_config.aux_loss_types={kinds!r}, aux_loss_factors={factors!r}", "both must be lists")
        return ()
    if len(kinds) != len(factors):
        problems.add(
            f"moe_config.aux_loss_types has {len(kinds)} entries, aux_loss_factors {len(factors)}",
            "give one factor per kind",
        )
    read = [read_value("moe_config.aux_loss_factors", factor, "float", 0.0, problems) for factor in factors]
    return tuple((str(kind), factor) for kind, factor in zip(kinds, read, strict=False))


def routing_notes(words: Mapping[str, Any], moe: MoESpec | None, trains: bool) -> list[str]:
    """What ``aux_loss_factor`` and ``aux_loss_type`` do that their reader might not expect. ``words``: as for
    ``read_routing``; ``moe``: what was read; ``trains``: whether the run has a loss to add anything to."""
    name, factor = "moe_config.aux_loss_factor", words.get("aux_loss_factor")
    if moe is None and words.get("aux_loss_type") not in (None, LAYERWISE):
        return ["moe_config.aux_loss_type has no effect: a dense model has no experts to balance"]
    if moe is None or words.get("aux_loss_types") is not None:
        return []
    if moe.is_noisy and factor:
        return [
            f"{name}={factor} has no effect: this gate has a loss of its own, gate_balance_loss_weight; set it to 0"
        ]
    if moe.by_threshold:
        return [f"{name}={factor} has no effect: a gate by threshold has no loss; set it to 0"] if factor else []
    if trains and factor is None and moe.aux_losses:
        return [
            f"{name} is not set: the loss that balances experts weighs {AUX_FACTOR} (MindFormers drops it), 0 is none"
        ]
    return []


def written_routing(moe: MoESpec) -> dict[str, Any]:
    """The keys of ``moe_config`` that say several fields together; ``read_routing`` reads them back."""
    degree = moe.comp_comm_parallel_degree
    overlap = {"comp_comm_parallel": True, "comp_comm_parallel_degree": degree} if degree > 1 else {}
    return {
        "routing_policy": ROUTING_POLICY,
        "aux_loss_types": [kind for kind, _ in moe.aux_losses],
        "aux_loss_factors": [factor for _, factor in moe.aux_losses],
        **overlap,
        **_written_shared(moe.shared_expert),
    }


def _written_shared(shared: SharedExpertSpec | None) -> dict[str, Any]:
    if shared is None:
        return {}
    return {"shared_expert_num": shared.num_experts, "use_shared_expert_gating": shared.gated}
