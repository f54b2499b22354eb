# SPDX-License-Identifier: Apache-2.0
"""Compiles MindSpore's layer probe for Ascend: run in the environment of ``jobs.dryrun.stubs``."""

from __future__ import annotations

import sys

from mindformers_ext.core.spec import DeviceSpec, KernelSpec, ModelSpec, NetworkSpec, NumericsSpec
from mindformers_ext.ms.engine import MindSporeEngine
from mindformers_ext.ms.probe import MindSporeLayerProbe


def main(dtype: str) -> None:
    """The parts that were compiled are printed."""
    MindSporeEngine().use(DeviceSpec("Ascend"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = ModelSpec(vocab_size=512, num_hidden_layers=2, head_dim=16, **sizes)
    kernels = KernelSpec(flash_attention=True, rope=True, swiglu=True)
    numerics = NumericsSpec(compute_dtype=dtype, param_dtype=dtype)
    MindSporeLayerProbe(NetworkSpec(model=model, seq_length=64, kernels=kernels, numerics=numerics)).compile(2)
    print("compiled for Ascend")


if __name__ == "__main__":
    main(*sys.argv[1:])
