# SPDX-License-Identifier: Apache-2.0
"""One of several processes in ``test_sharded``: trains networks a few steps each and writes what it saw.

ranks_worker.py STEPS EP ROUTING OUTPUT [EP ROUTING OUTPUT ...] [RESUME]
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mindformers_ext.core.config.schedule import Schedule
from mindformers_ext.core.config.train import OptimizerSpec, TrainSpec
from mindformers_ext.core.layers import MoESpec, SharedExpertSpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec, ParallelSpec
from mindformers_ext.pt.sharded import open_ranks
from mindformers_ext.pt.trainer import TorchTrainer

LOSSES = (("expert", 0.05), ("comm", 0.02))
MOE = MoESpec(num_local_experts=4, num_experts_per_tok=2, capacity_factor=1.0, enable_sdrop=True, aux_losses=LOSSES)
MODEL = ModelSpec(
    vocab_size=51,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    pad_token_id=3,
    initializer_range=0.2,
    moe=MOE,
)
QWEN = replace(
    MODEL,
    num_hidden_layers=3,
    qkv_bias=True,
    dense_layers=(1,),
    moe=replace(MOE, intermediate_size=12, shared_expert=SharedExpertSpec(intermediate_size=20, gated=True)),
    family="qwen2_moe",
)
NOISY = replace(
    MODEL,
    moe=replace(MOE, aux_losses=(), gate="mlp_noisy", norm_topk_prob=False, gate_balance_loss_weight=0.1),
    family="llama_moe",
)
MODELS = {"qwen": QWEN, "noisy": NOISY}
TRAIN = TrainSpec(
    optimizer=OptimizerSpec(weight_decay=0.1),
    steps=9,
    max_grad_norm=0.5,
    seed=3,
    schedule=Schedule(kind="ConstantWarmUpLR", learning_rate=5e-3),
)
ROWS = 4
FIXED = ("one", "empty")  # routings by a bias, dropless


def spec_of(size: int, ep: int, routing: str, alone: bool) -> NetworkSpec:
    """The network; ``alone`` computes the routing groups of all ranks in one process."""
    model = MODELS.get(routing, MODEL)
    model = replace(model, moe=replace(model.routing, capacity_factor=0.0 if routing in FIXED else 1.0))
    parallel = ParallelSpec(
        data_parallel=size,
        expert_parallel=ep,
        device_num=size,
        parallel_mode="stand_alone" if alone else "semi_auto_parallel",
    )
    return NetworkSpec(model=model, seq_length=8, batch_size=2, parallel=parallel)


def rows(step: int) -> np.ndarray:
    found = np.random.default_rng(step).integers(0, 51, (ROWS, 9)).astype(np.int32)
    found[0, 3:6] = 3  # padding: the ranks count different numbers of tokens
    return found


def trainer_of(size: int, ep: int, routing: str, alone: bool) -> TorchTrainer:
    torch.set_num_threads(1)
    spec = spec_of(size, ep, routing, alone)
    trainer = TorchTrainer(spec, TRAIN, torch.device("cpu"), open_ranks(spec.parallel, "CPU"))
    if routing in FIXED:  # all tokens to one expert of the first rank, or none to those of the first
        with torch.no_grad():
            for layer in trainer.network.model.layers:
                layer.ffn_norm.weight.fill_(1.0)
                gate = layer.feed_forward.router.dense.weight
                gate.mul_(1e-3)
                layer.feed_forward.router.router.moe = replace(spec.model.routing, balance_via_topk_bias=True)
                bias = torch.tensor([5.0, 4.0, 0.0, 0.0] if routing == "one" else [-5.0, -5.0, 0.0, 0.0])
                layer.feed_forward.router.router.register_buffer("topk_bias", bias)
    return trainer


def main() -> None:
    steps, *words = sys.argv[1:]
    resume = words.pop() if len(words) % 3 else ""
    port = int(os.environ["MASTER_PORT"])
    for number, (ep, routing, output) in enumerate(zip(words[0::3], words[1::3], words[2::3], strict=True)):
        os.environ["MASTER_PORT"] = str(port + number)  # a process must not meet the group that another one closes
        train(int(ep), routing, Path(output), int(steps), resume)


def train(ep: int, routing: str, output: Path, steps: int, resume: str) -> None:
    trainer = trainer_of(int(os.environ["WORLD_SIZE"]), ep, routing, alone=False)
    first = 0
    if resume:
        held = dict(np.load(resume))
        trainer.fill((n, a) for n, a in held.items() if n.startswith(("model.", "lm_head.")))
        first = int(held["global_step"][0])
    trainer.open()
    if first:
        trainer.restore(held)
    part = trainer.ranks.share(ROWS)
    seen = []
    for step in range(first, steps):
        figures = trainer.step((rows(step)[part],))
        seen.append([figures.loss, figures.lm_loss, figures.aux_loss, figures.global_norm])
        load = figures.expert_load.tolist()
    state = dict(trainer.state(adapters=False))
    if trainer.ranks.rank == 0:
        np.savez(output, **state)
        output.with_suffix(".json").write_text(json.dumps({"figures": seen, "load": load}), encoding="utf-8")
    trainer.ranks.close()


if __name__ == "__main__":
    main()
