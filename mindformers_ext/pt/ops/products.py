# SPDX-License-Identifier: Apache-2.0
"""x W^T in inference on a CPU: by the library that reads the weights fastest, and weights prepacked for it.

One row is what numpy's BLAS does best: OpenBLAS reads float32 weights (192 to 49152 rows, 192 to 14336 columns,
AVX-512) 1.0 to 1.9 times as fast as the better one of oneDNN and MKL, at 13 to 39 GB/s on two threads where a sum reads
20 to 44. It reads column-major ones faster, unless they have few rows and more columns, or many columns. Several rows
go to oneDNN, beside MKL, which torch takes by itself: 512 rows 1.05 to 1.2 times as fast, and of weights in oneDNN's
own order 8 rows 1.6 to 3 times, 64 rows 1.3 to 1.9, 512 rows 1.1 to 1.2. A wide weight as it lies it reads faster as
the left factor: 16 to 64 rows 1.05 to 1.4 times, 1.05 to 1.7 times as fast as a column-major one. Training keeps to
torch's choice.

numpy's threads and torch's wait for work in a loop, and take the processors from each other (2 to 6 times as slow):
numpy is asked where torch has one thread, as ``one_thread`` leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**20  # weights converted at once
MANY = 1024  # rows from which a weight becomes column-major for one row, though it has more columns
WIDE = 2048  # columns from which it stays as it is: two threads read it as fast (0.9 to 1.1), and it need not be moved
TURNED = range(16, 65)  # rows of x that are multiplied by a wide weight from the right: (W x^T)^T


def product(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T (+ b) of x (T, in) and a weight (out, in), plain, or ``prepacked`` in the type of x: (T, out) in that type.

    In inference on a CPU a weight of another type is converted a block at a time, which stays in the cache.
    """
    if weight.dtype == torch.float32 and is_for_numpy(x_TD) and not weight.is_mkldnn:
        return _of_row(x_TD, weight, bias)
    if not weight.is_mkldnn and not uses_onednn(x_TD):
        return F.linear(x_TD, weight.to(x_TD.dtype), None if bias is None else bias.to(x_TD.dtype))
    if weight.dtype == x_TD.dtype:
        return _by_onednn(x_TD, weight, bias)
    blocks = weight.split(max(1, BLOCK // weight.shape[1]))
    parts = [product(x_TD, w.to(x_TD.dtype)) for w in blocks]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return y if bias is None else y + bias.to(y.dtype)


def _by_onednn(x_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``product`` in one type."""
    if weight.is_mkldnn or weight.shape[1] < WIDE or len(x_TD) not in TURNED:
        return torch.ops.mkldnn._linear_pointwise(x_TD, weight, bias, "none", [], "")
    y_TF = torch.ops.mkldnn._linear_pointwise(weight, x_TD, None, "none", [], "").T.contiguous()
    return y_TF if bias is None else y_TF.add_(bias)


def _of_row(x_1D: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``product`` of one float32 row by numpy, (1, out)."""
    y_1F = torch.from_numpy(np.dot(weight.numpy(), x_1D[0].numpy()))[None]
    return y_1F if bias is None else y_1F.add_(bias)


def is_for_numpy(x_TD: Tensor) -> bool:
    """Whether x is one row that numpy computes with, in inference on a CPU."""
    return (
        x_TD.shape[0] == 1
        and x_TD.dtype == torch.float32
        and x_TD.device.type == "cpu"
        and torch.is_inference_mode_enabled()
        and torch.get_num_threads() == 1
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Leave torch one thread: all that computes one row belongs to numpy's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def uses_onednn(x: Tensor) -> bool:
    """Whether ``product`` asks oneDNN for x: in inference mode, on a CPU that computes in its type."""
    return torch.is_inference_mode_enabled() and has_onednn(x.device, x.dtype)


def has_onednn(device: torch.device, kind: torch.dtype) -> bool:
    """Whether oneDNN multiplies there in this type, and weights of it may be ``prepacked``."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return kind == torch.float32 or (kind == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepacked(weight: Tensor, rows: int) -> Tensor:
    """A weight (..., out, in) in the order that products with so many rows read fastest.

    For one row it is the same tensor to every operator; for more, which takes (out, in), ``product`` alone reads it.
    """
    weight = weight.detach()
    if weight.is_mkldnn:
        return weight
    if rows > 1:
        return torch.ops.mkldnn._reorder_linear_weight(weight)
    height, width = weight.shape[-2:]
    if weight.dtype != torch.float32 or height < min(MANY, width) or width >= WIDE:
        return weight
    return weight.transpose(-1, -2).contiguous().transpose(-1, -2)
