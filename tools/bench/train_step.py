# SPDX-License-Identifier: Apache-2.0
"""A whole training step of a 4-layer Mixtral: ours in MindSpore (GRAPH, CPU) against transformers with torch AdamW.

    python tools/bench/train_step.py [--capacity_factor 1.1] [--rounds 9]

Hidden 256, ffn 512, 8 heads over 2, 8 experts top-2, vocabulary 1000, sequences of 512, batch 4, float32. Both do
forward, backward, the clipping of the gradient norm and AdamW with decay; transformers attends with sdpa.
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse

import numpy as np
from peers import THREADS, compare, machine, report, serve

VOCABULARY, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, EXPERTS, CHOSEN = 1000, 256, 512, 4, 8, 2, 8, 2
SEQUENCE, BATCH, RATE, DECAY = 512, 4, 1e-4, 0.01
NAMES = ("step",)


def token_ids() -> np.ndarray:
    """(B, S + 1) random tokens, the same for both engines."""
    return np.random.default_rng(0).integers(1, VOCABULARY, (BATCH, SEQUENCE + 1)).astype(np.int32)


def serve_transformers(factor: float) -> None:
    """transformers' Mixtral, sdpa attention, torch AdamW."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        attn_implementation="sdpa",
    )
    net = MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
    ids = torch.tensor(token_ids()).long()

    def step() -> None:
        logits = net(ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    serve({}, {"step": step})


def serve_mindspore(factor: float) -> None:
    """Our network, train step and optimizer."""
    import mindspore as ms

    from mindformers_ext.core.layers import MoESpec
    from mindformers_ext.core.spec import ModelSpec, NetworkSpec
    from mindformers_ext.ms.causal_lm import build_causal_lm
    from mindformers_ext.ms.optim import FusedAdamW
    from mindformers_ext.ms.step import LossNetwork, TrainStepCell

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    moe = MoESpec(
        num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN, capacity_factor=factor, aux_losses=(("expert", 0.01),)
    )
    model = ModelSpec(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HIDDEN // HEADS,
        moe=moe,
    )
    net = build_causal_lm(NetworkSpec(model=model, seq_length=SEQUENCE))
    cell = TrainStepCell(LossNetwork(net), FusedAdamW(net.trainable_params(), RATE, weight_decay=DECAY))
    cell.set_train()
    ids = ms.Tensor(token_ids())
    dropped = float(cell(ids)[-1].asnumpy().mean())
    serve({"dropped": dropped}, {"step": lambda: cell(ids)[0].asnumpy()})


WORKERS = {"mindspore": serve_mindspore, "transformers": serve_transformers}


def main() -> None:
    """Parent: compare both; child (--worker): be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity_factor", type=float, default=1.1, help="slots; <= 0 is dropless")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps per engine")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        WORKERS[options.worker](options.capacity_factor)
        return
    print(machine())
    commands = {key: [__file__, "--worker", key, "--capacity_factor", str(options.capacity_factor)] for key in WORKERS}
    result = compare(commands, NAMES, options.rounds)
    report("train step", result, NAMES, "mindspore", "transformers")
    print(f"  dropped {result['facts']['mindspore']['dropped']:.2%} of assignments in the first step")


if __name__ == "__main__":
    main()
