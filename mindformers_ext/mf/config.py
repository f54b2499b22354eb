# SPDX-License-Identifier: Apache-2.0
"""Configuration classes that MindFormers builds from ``model.model_config`` and that know their ``NetworkSpec``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from mindformers.models.llama.llama_config import LlamaConfig

from mindformers_ext.core.cluster.build import BuildSpec, build_spec_from_yaml
from mindformers_ext.core.config.lora import LoraSpec
from mindformers_ext.core.config.recompute import RecomputeSpec
from mindformers_ext.core.config.train import ParameterGroup
from mindformers_ext.core.families import implied_family
from mindformers_ext.core.pruning import PruningSpec
from mindformers_ext.core.spec import NetworkSpec

# The key of model_config under which ``mf.adapt`` keeps the network's YAML sections as the user wrote them.
WRITTEN = "network_yaml"
# What this process has made of such sections. MindFormers carries words only, through files, copies and JSON: the same
# words lead back here, and others (a file changed by hand) do not.
_MADE: dict[str, BuildSpec] = {}


def remember(sections: Mapping[str, Any], build: BuildSpec) -> None:
    """Networks that MindFormers builds from ``sections`` are ``build``, which the checks of the run have made."""
    _MADE[_digest(sections)] = build


class PortableLlamaConfig(LlamaConfig):
    """MindFormers' ``LlamaConfig`` plus our own keys (see ``core.config.view``), for a family of ``core.families``.

    Args:
        network_yaml: the YAML sections that describe the network, as written; None to read them back from the
            objects MindFormers has made of them. (The objects forget two things: ``aux_loss_types: []`` looks like
            null, and ``aux_loss_factor: 0`` is refused.)
        given: ``model.model_config`` and what MindFormers adds (``moe_config``, ``parallel_config``, ...).
    """

    family = implied_family(has_experts=False)

    def __init__(self, network_yaml: Mapping[str, Any] | None = None, **given: Any) -> None:
        super().__init__(**given)
        self.network_yaml = network_yaml
        self.given = {key: value for key, value in given.items() if key not in ("moe_config", "parallel_config")}

    def network_spec(self, device_num: int = 1) -> NetworkSpec:
        """The network this configuration describes, with MindFormers' final parallel sizes and batch size.

        Raises:
            UserError: lists every key or value the network cannot be built from.
        """
        return self._build(device_num).network

    def lora(self) -> LoraSpec | None:
        """The adapters that ``pet_config`` asks for."""
        return self._build().lora

    def pruning(self) -> PruningSpec | None:
        """The masks that ``l0_module`` asks for."""
        return self._build().pruning

    def groups(self) -> tuple[ParameterGroup, ...]:
        """Parameters that are trained in another way than the rest."""
        return self._build().groups

    def recompute_spec(self) -> RecomputeSpec:
        """The layers that ``recompute_config`` computes again."""
        return self._build().recompute

    def _build(self, device_num: int | None = None) -> BuildSpec:
        """What the checks have made of the sections; made here, once, where a job has passed none (a plain MindFormers
        run) or where its devices are others than expected."""
        sections = self._sections() if self.network_yaml is None else self.network_yaml
        digest = _digest(sections)
        made = _MADE.get(digest)
        if made is None or device_num not in (None, made.network.parallel.device_num):
            made = _MADE[digest] = build_spec_from_yaml(sections, device_num or 1)
        return made

    def _sections(self) -> dict[str, Any]:
        words = {key: value for key, value in self.given.items() if key != "pet_config"}  # MindFormers' own adapters
        parallel = {
            key: value for key, value in self.parallel_config.to_dict().items() if key not in ("recompute", "swap")
        }
        moe = self.moe_config.to_dict()
        if not moe.get("aux_loss_types"):
            moe.pop("aux_loss_types", None), moe.pop("aux_loss_factors", None)
        if moe.get("router_dense_type") is None:  # MindFormers' own default, before its template is applied
            moe.pop("router_dense_type", None)
        kind, architecture = self.family.yaml_names[0]
        model = {"model_config": {**words, "type": kind}, "arch": {"type": architecture}}
        return {"model": model, "moe_config": moe, "parallel_config": parallel}


def _digest(sections: Mapping[str, Any]) -> str:
    """Equal for equal words, whatever the order of keys and whoever's mappings hold them."""
    return hashlib.sha256(repr(_plain(sections)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sorted((str(key), _plain(item)) for key, item in value.items())
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)
