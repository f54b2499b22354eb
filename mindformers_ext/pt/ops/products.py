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


def product(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T (+ b) of x (T, in) and a weight (out, in) of its type, plain or ``ordered``: (T, out)."""
    if weight.is_mkldnn or by_onednn(x_TD.device):
        return torch.ops.mkldnn._linear_pointwise(x_TD, weight, bias, "none", [], "")
    return F.linear(x_TD, weight, bias)


def by_onednn(device: torch.device) -> bool:
    """Whether ``product`` asks oneDNN: in inference mode, on a CPU."""
    return torch.is_inference_mode_enabled() and has_onednn(device)


def has_onednn(device: torch.device) -> bool:
    """Whether weights on this device may be ``ordered``."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available()


def ordered(weight: Tensor) -> Tensor:
    """A weight (out, in) in the order in which oneDNN reads it for many rows: for ``product`` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())
