# SPDX-License-Identifier: Apache-2.0
"""The states that enter each layer of a Hugging Face model, with one layer's weights in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

# See hf_reference.py: transformers loads protobuf, and MindSpore must find its Python implementation.
os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")

Read = Callable[[str], np.ndarray]


class HiddenStates:
    """Runs a model layer by layer in bfloat16. ``read`` gives a tensor by its name as the bits of bfloat16 (uint16)."""

    def __init__(self, folder: Path, read: Read) -> None:
        """Build the model of ``folder``'s config.json without weights; nothing is downloaded, no code of it is run."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval().model
        self._model.rotary_emb = type(self._model.rotary_emb)(config=config)
        self._read = read
        self._seen: list[torch.Tensor] = []
        for number, layer in enumerate(self._model.layers):
            layer.register_forward_pre_hook(self._loader(f"model.layers.{number}."), with_kwargs=True)
            layer.register_forward_hook(lambda module, given, result: module.to("meta") and None)

    def states(self, embeddings: np.ndarray, mask: np.ndarray) -> list[torch.Tensor]:
        """Per layer the states (B, S, D) that enter it, from the embeddings' bits (B, S, D) and a 0/1 mask (B, S)."""
        self._seen = []
        self._model.norm.load_state_dict({"weight": _tensor(self._read("model.norm.weight"))}, assign=True)
        with torch.no_grad():
            self._model(inputs_embeds=_tensor(embeddings), attention_mask=torch.from_numpy(mask), use_cache=False)
        return self._seen

    def _loader(self, prefix: str) -> Callable[..., None]:
        def load(module: Any, given: tuple, named: dict) -> None:
            self._seen.append((given[0] if given else named["hidden_states"]).clone())
            names = module.state_dict()
            module.load_state_dict({name: _tensor(self._read(prefix + name)) for name in names}, assign=True)

        return load


def _tensor(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)
