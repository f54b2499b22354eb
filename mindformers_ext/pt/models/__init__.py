# SPDX-License-Identifier: Apache-2.0
"""Networks by model type."""

from __future__ import annotations

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.causal_lm import CausalLM
from mindformers_ext.pt.models.llama import build_llama
from mindformers_ext.pt.models.mixtral import build_mixtral

_BUILDERS = {"llama": build_llama, "mixtral": build_mixtral}


def build_causal_lm(spec: NetworkSpec) -> CausalLM:
    """The network of ``spec.model.model_type`` with fresh random weights."""
    return _BUILDERS[spec.model.model_type](spec)
