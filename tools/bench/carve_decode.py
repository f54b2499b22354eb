# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of a dense LLaMA and of the same carved into experts, one row on PyTorch on a CPU, and the limit.

    python tools/bench/carve_decode.py [--hidden 576 --width 1536 --layers 30 --heads 9 --keys 3 --vocabulary 49152]

Random float32 weights: what a token reads is what counts. The limit is the ratio of the weights that a token reads:
attention and the head are read whole by both. Both networks are measured in turn, in CPU time of one thread.
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's, which computes a row: before it is loaded

# isort: split
import argparse
import statistics
import time

import numpy as np
import torch

from mindformers_ext.core.layers import MoESpec, SharedExpertSpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.pt.causal_lm import CausalLM
from mindformers_ext.pt.engine import PyTorchNetwork
from mindformers_ext.pt.generate import PyTorchSession

PROMPT = 8


def options() -> argparse.ArgumentParser:
    """The bench's options; SmolLM2-135M's sizes unless told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 576, "width": 1536, "layers": 30, "heads": 9, "keys": 3, "vocabulary": 49152}
    for name, value in (sizes | {"experts": 8, "shared": 2, "active": 2, "rounds": 100}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser


def spec_of(words: argparse.Namespace, carved: bool) -> NetworkSpec:
    """Dense, or the stock form of a carved model."""
    size = words.width // words.experts
    shared = SharedExpertSpec(intermediate_size=words.shared * size, gated=True)
    moe = MoESpec(
        num_local_experts=words.experts - words.shared,
        num_experts_per_tok=words.active,
        intermediate_size=size,
        capacity_factor=0.0,
        shared_expert=shared,
    )
    model = ModelSpec(
        vocab_size=words.vocabulary,
        hidden_size=words.hidden,
        intermediate_size=words.width,
        num_hidden_layers=words.layers,
        num_attention_heads=words.heads,
        num_key_value_heads=words.keys,
        head_dim=words.hidden // words.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        moe=moe if carved else None,
    )
    return NetworkSpec(model=model, seq_length=PROMPT + words.rounds)


def session_of(words: argparse.Namespace, carved: bool) -> tuple[PyTorchSession, int]:
    """A session behind its prompt, and how many weights there are."""
    spec = spec_of(words, carved)
    network = CausalLM(spec).requires_grad_(False)
    session = PyTorchNetwork(network, torch.device("cpu")).session(1, PROMPT, spec.seq_length)
    session.prompt(np.ones((1, PROMPT), np.int64), np.array([PROMPT]))
    return session, sum(weight.numel() for weight in network.parameters())


def main() -> None:
    """Print both rates, their ratio and its limit."""
    words = options().parse_args()
    torch.set_num_threads(1)
    dense, whole = session_of(words, carved=False)
    carved, more = session_of(words, carved=True)
    taken: dict[PyTorchSession, list[float]] = {dense: [], carved: []}
    for number in range(words.rounds):
        for session, seconds in taken.items():
            started = time.thread_time()
            session.token(np.array([5]), np.array([PROMPT + number]))
            seconds.append(time.thread_time() - started)
    parts = 3 * words.layers * words.hidden * words.width
    idle = parts * (words.experts - words.shared - words.active) // words.experts
    times = [statistics.median(seconds) for seconds in taken.values()]
    print(f"dense  {1 / times[0]:.1f} tokens/s, {whole / 1e6:.1f} M weights, {parts / whole:.0%} in feed-forward parts")
    print(f"carved {1 / times[1]:.1f} tokens/s, {(more - idle) / 1e6:.1f} M of {more / 1e6:.1f} M weights read")
    print(f"ratio {times[0] / times[1]:.2f}, limit by what is read {whole / (more - idle):.2f}; CPU time of one thread")


if __name__ == "__main__":
    main()
