# SPDX-License-Identifier: Apache-2.0
"""Whether the Triton kernels run: on a GPU where triton is installed, unless ``MFEXT_TRITON`` is 0; logged once."""

from __future__ import annotations

import functools
import importlib.util
import os

from torch import Tensor

from mindformers_ext.core.log import get_logger

SWITCH = "MFEXT_TRITON"


def fused(tensor: Tensor) -> bool:
    """Whether the Triton kernels take this tensor."""
    return tensor.is_cuda and kernels_wanted()


@functools.cache
def kernels_wanted() -> bool:
    """Whether they may run on this machine's GPU."""
    if os.environ.get(SWITCH, "1") == "0":
        why, wanted = f"{SWITCH} is 0", False
    elif importlib.util.find_spec("triton") is None:
        why, wanted = "triton is not installed", False
    else:
        why, wanted = "swiglu and combine in one pass each", True
    get_logger(__name__).info("Triton kernels: %s (%s)", "on" if wanted else "off", why)
    return wanted
