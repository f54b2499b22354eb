# SPDX-License-Identifier: Apache-2.0
"""numpy arrays of files to torch tensors and back, without a copy where the type allows. bfloat16 travels as bits."""

from __future__ import annotations

import numpy as np
import torch

TYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def tensor_of(array: np.ndarray, kind: str, target: str, device: str = "cpu") -> torch.Tensor:
    """``array``, whose elements are of type ``kind`` ("bfloat16", ...), as a tensor of type ``target``."""
    bits = array.view(np.uint16) if kind == "bfloat16" else array
    tensor = torch.from_numpy(bits)
    if kind == "bfloat16":
        tensor = tensor.view(torch.bfloat16)
    return tensor.to(device=device, dtype=TYPES[target])


def array_of(tensor: torch.Tensor, target: str) -> np.ndarray:
    """``tensor`` in the type ``target``, contiguous; bfloat16 as its bits (uint16)."""
    here = tensor.detach().to(dtype=TYPES[target]).cpu().contiguous()
    array: np.ndarray = (here.view(torch.uint16) if target == "bfloat16" else here).numpy()
    return array


def device_fault(device: str) -> str | None:
    """Why ``device`` cannot be used here, or None."""
    kind = device.split(":")[0]
    if kind == "cpu":
        return None
    if kind == "cuda":
        return None if torch.cuda.is_available() else "torch sees no CUDA device here"
    return "merging runs on cpu or cuda"


def one_thread_each() -> None:
    """An operation of torch stays in the thread that asks for it: whole tensors are shared out, not operations."""
    torch.set_num_threads(1)
