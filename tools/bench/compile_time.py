# SPDX-License-Identifier: Apache-2.0
"""Seconds to the end of the first training step (graph compilation included) against the number of layers.

    python tools/bench/compile_time.py [--layers 2 8 32]

Hidden 32, ffn 64, 4 experts top-2, sequences of 16: the graph is what costs. Each depth runs in its own process. On a
CPU MindSpore compiles every layer anew (``lazy_inline`` is refused there), so linear growth is the limit: 4.0 for
four times the layers.
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse
import json
import subprocess
import sys
import time

import numpy as np


def first_step(layers: int) -> None:
    """Build, compile and run one step; print its seconds and the process's CPU seconds."""
    import mindspore as ms

    from mindformers_ext.core.layers import MoESpec
    from mindformers_ext.core.spec import ModelSpec, NetworkSpec
    from mindformers_ext.ms.causal_lm import build_causal_lm
    from mindformers_ext.ms.optim import FusedAdamW
    from mindformers_ext.ms.step import LossNetwork, TrainStepCell

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_recursion_limit(10000)
    ms.set_device("CPU")
    moe = MoESpec(num_local_experts=4, num_experts_per_tok=2, aux_losses=(("expert", 0.05),))
    model = ModelSpec(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        moe=moe,
    )
    net = build_causal_lm(NetworkSpec(model=model, seq_length=16))
    cell = TrainStepCell(LossNetwork(net), FusedAdamW(net.trainable_params()))
    cell.set_train()
    ids = ms.Tensor(np.ones((1, 17), np.int32))
    wall, cpu = time.perf_counter(), time.process_time()
    cell(ids)[0].asnumpy()
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}))


def main() -> None:
    """Parent: every depth in its own process; child (--worker): one depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32], help="depths to compile")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        first_step(options.layers[0])
        return
    seconds = {}
    for layers in options.layers:
        command = [sys.executable, __file__, "--worker", "--layers", str(layers)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds[layers] = json.loads(output.strip().splitlines()[-1])
        print(f"{layers:3d} layers: first step {seconds[layers]['wall']:.1f} s, CPU {seconds[layers]['cpu']:.1f} s")
    for fewer, more in zip(options.layers, options.layers[1:], strict=False):
        ratio = seconds[more]["wall"] / seconds[fewer]["wall"]
        print(f"t({more}) / t({fewer}) = {ratio:.2f} for {more / fewer:.1f} times the layers")


if __name__ == "__main__":
    main()
