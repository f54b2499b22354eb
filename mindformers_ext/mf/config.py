# SPDX-License-Identifier: Apache-2.0
"""Configuration classes that MindFormers builds from ``model.model_config`` and that know their ``NetworkSpec``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindformers.models.llama.llama_config import LlamaConfig

from mindformers_ext.core.cluster.cluster_rules import settled
from mindformers_ext.core.config.lora import LoraSpec, lora_from_yaml
from mindformers_ext.core.config.recompute import RecomputeSpec, recompute_from_yaml
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.spec import NetworkSpec

# The key of model_config under which ``mf.adapt`` keeps the network's YAML sections as the user wrote them.
WRITTEN = "network_yaml"


class PortableLlamaConfig(LlamaConfig):
    """MindFormers' ``LlamaConfig`` plus our own keys (``head_dim``, ``return_extra_loss``, ``aux_loss_reduce``).

    Args:
        network_yaml: the YAML sections that describe the network, as written; None to read them back from the
            objects MindFormers has made of them. (The objects forget two things: ``aux_loss_types: []`` looks like
            null, and ``aux_loss_factor: 0`` is refused.)
        given: ``model.model_config`` and what MindFormers adds (``moe_config``, ``parallel_config``, ...).
    """

    def __init__(self, network_yaml: Mapping[str, Any] | None = None, **given: Any) -> None:
        super().__init__(**given)
        self.network_yaml = network_yaml
        self.given = {key: value for key, value in given.items() if key not in ("moe_config", "parallel_config")}

    def network_spec(self, device_num: int = 1) -> NetworkSpec:
        """The network this configuration describes, with MindFormers' final parallel sizes and batch size.

        Raises:
            UserError: lists every key or value the network cannot be built from.
        """
        words = self._sections() if self.network_yaml is None else self.network_yaml
        return settled(network_spec_from_yaml(words, device_num))[0]

    def lora(self) -> LoraSpec | None:
        """The adapters that ``pet_config`` asks for."""
        return lora_from_yaml(self.network_yaml or {})

    def recompute_spec(self) -> RecomputeSpec:
        """The layers that ``recompute_config`` computes again."""
        return recompute_from_yaml(self.network_yaml or {}, self.network_spec())

    def _sections(self) -> dict[str, Any]:
        parallel = {
            key: value for key, value in self.parallel_config.to_dict().items() if key not in ("recompute", "swap")
        }
        moe = self.moe_config.to_dict()
        if not moe.get("aux_loss_types"):
            moe.pop("aux_loss_types", None), moe.pop("aux_loss_factors", None)
        if moe.get("router_dense_type") is None:  # MindFormers' own default, before its template is applied
            moe.pop("router_dense_type", None)
        return {"model": {"model_config": self.given}, "moe_config": moe, "parallel_config": parallel}


class MixtralConfig(PortableLlamaConfig):
    """Configuration of ``MixtralForCausalLM``: a LLaMA whose feed-forward layers are routed experts."""
