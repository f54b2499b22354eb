# SPDX-License-Identifier: Apache-2.0
"""PyTorch as jobs see it (``jobs.engine.protocols``): specs and numpy arrays in, numpy arrays out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import DeviceSpec, NetworkSpec
from mindformers_ext.pt import names
from mindformers_ext.pt.causal_lm import CausalLM, build_causal_lm
from mindformers_ext.pt.generate import PyTorchSession
from mindformers_ext.pt.init import build_empty
from mindformers_ext.pt.linear import Linear
from mindformers_ext.pt.lora import LoraLinear
from mindformers_ext.pt.moe.experts import Experts
from mindformers_ext.pt.ops.memory import give_back_freed_memory, keep_freed_memory
from mindformers_ext.pt.ops.products import has_onednn, prepacked


class PyTorchNetwork:
    """A causal language model on PyTorch."""

    def __init__(self, module: CausalLM, device: torch.device) -> None:
        self.module = module.eval()
        self.rank = 0
        self.device = device

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Fill the parameters from ``weights`` (MindFormers' names); see ``pt.names.load``."""
        names.load(self.module, weights)

    def fill(self, weights: Iterable[tuple[str, np.ndarray]]) -> None:
        """As ``load``, one tensor at a time; see ``pt.names.fill``."""
        names.fill(self.module, weights)
        give_back_freed_memory()

    def agree(self, digest: bytes) -> bool:
        """True: one process holds the network."""
        return True

    def session(self, rows: int, length: int, positions: int, use_cache: bool = True) -> PyTorchSession:
        """Generation for ``rows`` prompts of up to ``length`` tokens, up to ``positions`` with their answers."""
        if has_onednn(self.device, self.module.model.compute_dtype):
            prepack_weights(self.module, rows)
        session = PyTorchSession(self.module, rows, length, positions, self.device)
        session.compile(use_cache)
        return session

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 logits of shape (B, S, V) for token ids of shape (B, S)."""
        with torch.inference_mode():
            found = self.module(torch.from_numpy(ids.astype(np.int64)).to(self.device))
        return found.cpu().numpy()


def prepack_weights(module: CausalLM, rows: int) -> None:
    """Lay the weights for products of so many rows, one layer's after the other (``ops.products``).

    They are constants then, and stay as they are where the network computes in another type than they have; so does the
    embedding that is the head, too, for more than one row.
    """
    kind, embedding = module.model.compute_dtype, module.model.tok_embeddings
    for block in (*module.model.layers, module):  # what a layer leaves behind goes back before the next one's turn
        for part in block.modules():
            if type(part) is Linear and part.weight.dtype == kind:
                part.prepack(rows)
            elif isinstance(part, Experts) and part.down[0].dtype == kind:
                part.prepack(rows)
        give_back_freed_memory()
    if module.tied and rows == 1 and embedding.embedding_weight.dtype == kind:
        embedding.embedding_weight = nn.Parameter(prepacked(embedding.embedding_weight, 1), requires_grad=False)
    plain = all(weight.dtype == torch.float32 and not weight.is_mkldnn for weight in module.parameters())
    module.by_numpy = (
        plain and kind == torch.float32 and not any(isinstance(part, LoraLinear) for part in module.modules())
    )


class PyTorchEngine:
    """Builds networks that run on a GPU or on the CPU."""

    name = "pt"

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def use(self, device: DeviceSpec) -> None:
        """Run on this device from now on; PyTorch computes operator by operator anyway.

        Raises:
            UserError: torch sees no such device, or several processes should hold a network ``together``.
        """
        if device.together:
            raise UserError("the PyTorch engine has no networks that several processes hold together: start one")
        if device.target == "CPU":
            keep_freed_memory()
            self.device = torch.device("cpu")
            return
        if device.target != "GPU":
            raise UserError(f"device_target {device.target} is MindSpore's: the PyTorch engine runs on GPU and CPU")
        if not torch.cuda.is_available():
            raise UserError(
                f"device_target is GPU, but torch {torch.__version__} sees no CUDA device: run with "
                "--device_target CPU, or install a CUDA build of torch"
            )
        if device.number >= torch.cuda.device_count():
            raise UserError(f"device_id {device.number}: this machine has {torch.cuda.device_count()} GPUs, from 0")
        self.device = torch.device("cuda", device.number)
        torch.cuda.set_device(self.device)

    def build(self, spec: NetworkSpec, empty: bool = False) -> PyTorchNetwork:
        """A network with fresh random weights, or with none until they are filled in (``empty``)."""
        if empty:
            return PyTorchNetwork(build_empty(spec, self.device), self.device)
        with self.device:
            return PyTorchNetwork(build_causal_lm(spec), self.device)
