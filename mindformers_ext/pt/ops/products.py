# SPDX-License-Identifier: Apache-2.0
"""x W^T in inference on a CPU: by oneDNN, which reads the weights of few rows faster than torch's own choice, MKL.

Measured on one core with AVX-512 (float32, weights 512 to 14336 wide): 1 row 1.1 to 1.4 times as fast, 512 rows 1.05 to
1.2; of weights in oneDNN's own order (``ordered``) 8 rows 1.6 to 3 times, 64 rows 1.3 to 1.9, 512 rows 1.1 to 1.2, but
one row of wide weights .8. Training keeps to MKL: what is ordered has no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = (torch.float32, torch.bfloat16)
BLOCK = 2**20  # weights turned at once


def product(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T (+ b) of x (T, in) and a weight (out, in), plain, or ``ordered`` in the type of x: (T, out) in that type.

    In inference on a CPU a weight of another type is turned into it a block at a time, which stays in the cache.
    """
    if not weight.is_mkldnn and not by_onednn(x_TD):
        return F.linear(x_TD, weight.to(x_TD.dtype), None if bias is None else bias.to(x_TD.dtype))
    if weight.dtype == x_TD.dtype:
        return torch.ops.mkldnn._linear_pointwise(x_TD, weight, bias, "none", [], "")
    blocks = weight.split(max(1, BLOCK // weight.shape[1]))
    parts = [torch.ops.mkldnn._linear_pointwise(x_TD, w.to(x_TD.dtype), None, "none", [], "") for w in blocks]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return y if bias is None else y + bias.to(y.dtype)


def by_onednn(x: Tensor) -> bool:
    """Whether ``product`` asks oneDNN for x: in inference mode, on a CPU, in a type for which every CPU has code."""
    return torch.is_inference_mode_enabled() and x.dtype in KINDS and has_onednn(x.device)


def has_onednn(device: torch.device) -> bool:
    """Whether weights on this device may be ``ordered``."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available()


def ordered(weight: Tensor) -> Tensor:
    """A weight (out, in) in the order in which oneDNN reads it for many rows: for ``product`` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())
