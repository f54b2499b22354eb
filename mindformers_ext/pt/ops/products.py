# SPDX-License-Identifier: Apache-2.0
"""x W^T in inference on a CPU: by oneDNN or MKL, whichever reads the weights faster, and weights prepacked for it.

Measured on one core with AVX-512 (float32, weights 512 to 14336 wide). oneDNN beside MKL, which torch takes by itself:
1 row 1.1 to 1.4 times as fast, 512 rows 1.05 to 1.2; of weights in oneDNN's own order 8 rows 1.6 to 3 times, 64 rows
1.3 to 1.9, 512 rows 1.1 to 1.2, but one row of wide weights .8. For one row MKL is 1.3 to 1.9 times as fast as the
better one where the weight is column-major, has more rows than columns, and few columns (nothing is left of it at
4096): its sums are short otherwise. Training keeps to torch's choice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**20  # weights converted at once
SHORT = 2048  # columns up to which a weight becomes column-major for one row


def product(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T (+ b) of x (T, in) and a weight (out, in), plain, or ``prepacked`` in the type of x: (T, out) in that type.

    In inference on a CPU a weight of another type is converted a block at a time, which stays in the cache.
    """
    if not weight.is_mkldnn and not uses_onednn(x_TD):
        return F.linear(x_TD, weight.to(x_TD.dtype), None if bias is None else bias.to(x_TD.dtype))
    if weight.dtype == x_TD.dtype:
        if x_TD.shape[0] == 1 and is_column_major(weight):
            return F.linear(x_TD, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x_TD, weight, bias, "none", [], "")
    blocks = weight.split(max(1, BLOCK // weight.shape[1]))
    parts = [torch.ops.mkldnn._linear_pointwise(x_TD, w.to(x_TD.dtype), None, "none", [], "") for w in blocks]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return y if bias is None else y + bias.to(y.dtype)


def uses_onednn(x: Tensor) -> bool:
    """Whether ``product`` asks oneDNN for x: in inference mode, on a CPU that computes in its type."""
    return torch.is_inference_mode_enabled() and has_onednn(x.device, x.dtype)


def has_onednn(device: torch.device, kind: torch.dtype) -> bool:
    """Whether oneDNN multiplies there in this type, and weights of it may be ``prepacked``."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return kind == torch.float32 or (kind == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_column_major(weight: Tensor) -> bool:
    """Whether a weight lies column by column."""
    return not weight.is_mkldnn and weight.stride(-2) == 1 and weight.shape[-1] > 1


def prepacked(weight: Tensor, rows: int) -> Tensor:
    """A weight (..., out, in) in the order that products with so many rows read fastest.

    For one row it is the same tensor to every operator; for more, which takes (out, in), ``product`` alone reads it.
    """
    weight = weight.detach()
    if weight.is_mkldnn:
        return weight
    if rows > 1:
        return torch.ops.mkldnn._reorder_linear_weight(weight)
    if weight.dtype != torch.float32 or weight.shape[-1] > SHORT or weight.shape[-2] <= weight.shape[-1]:
        return weight
    return weight.transpose(-1, -2).contiguous().transpose(-1, -2)
