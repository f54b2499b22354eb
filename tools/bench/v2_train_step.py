# SPDX-License-Identifier: Apache-2.0
"""Training steps of a residual LLaMA-MoE v2: our trainer against transformers with the code saved with the model.

    python tools/bench/v2_train_step.py [--engine pt] [--rounds 9] [--hidden 256] [--length 512]

Six layers, dense ones at both ends, seven experts of which a token passes one, each as wide as the residual part;
vocabulary 1000, batch 4, float32, the loss of balance on. Both do forward, backward, the clipping of the gradient norm
and AdamW with decay, on the same weights and rows; the losses of the first step have to agree.
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from peers import THREADS, compare, machine, report, serve

BATCH, VOCABULARY, RATE, DECAY = 4, 1000, 1e-4, 0.01
NAMES = ("step",)


def words_of(hidden: int) -> dict[str, Any]:
    """config.json of the model."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": hidden // 2,
        "intermediate_size_residual": hidden // 2,
        "intermediate_size_dense": 4 * hidden,
        "num_hidden_layers": 6,
        "num_moe_contract_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 7,
        "num_experts_per_tok": 1,
        "scale_factor": 1.0,
        "router_aux_loss_coef": 0.01,
        "sliding_window": None,
        "pad_token_id": None,
        "rms_norm_eps": 1e-5,
    }


def token_ids(length: int) -> np.ndarray:
    """(B, S + 1) random tokens, the same for both."""
    return np.random.default_rng(0).integers(1, VOCABULARY, (BATCH, length + 1)).astype(np.int32)


def serve_transformers(folder: Path, length: int) -> None:
    """The folder's own code, sdpa attention, torch AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    net = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
    ids = torch.tensor(token_ids(length)).long()

    def step() -> float:
        loss = net(ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    serve({"loss": step()}, {"step": step})


def serve_ours(folder: Path, length: int, engine: str) -> None:
    """The trainer that runs use."""
    from mindformers_ext.core.config.hf import model_spec_from_hf
    from mindformers_ext.core.config.schedule import Schedule
    from mindformers_ext.core.config.train import OptimizerSpec, TrainSpec
    from mindformers_ext.core.spec import NetworkSpec
    from mindformers_ext.jobs.checkpoint.source import open_hf, read_config
    from mindformers_ext.weights.convert import iter_to_mindspore

    schedule = Schedule(kind="ConstantWarmUpLR", learning_rate=RATE, lr_end=RATE, warmup_steps=0, total_steps=10**6)
    train = TrainSpec(optimizer=OptimizerSpec(weight_decay=DECAY), schedule=schedule, steps=10**6, max_grad_norm=1.0)
    spec = NetworkSpec(model=model_spec_from_hf(read_config(folder)), seq_length=length, batch_size=BATCH)
    trainer: Any
    if engine == "pt":
        import torch

        from mindformers_ext.pt.trainer import TorchTrainer

        torch.set_num_threads(THREADS)
        trainer = TorchTrainer(spec, train, torch.device("cpu"))
    else:
        import mindspore as ms

        from mindformers_ext.ms.trainer import DataParallel, MindSporeTrainer

        ms.set_context(mode=ms.GRAPH_MODE)
        ms.set_device("CPU")
        trainer = MindSporeTrainer(spec, train, DataParallel())
    trainer.fill(iter_to_mindspore(open_hf(folder), spec.model))
    trainer.open()
    columns = (token_ids(length),)
    serve({"loss": float(trainer.step(columns).loss)}, {"step": lambda: trainer.step(columns)})


def main() -> None:
    """Parent: make the model and compare both; child (--worker): be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("pt", "ms"), default="pt", help="of ours; default %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps each; default %(default)s")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model; default %(default)s")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row; default %(default)s")
    parser.add_argument("--worker", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "transformers":
        serve_transformers(options.folder, options.length)
    elif options.worker:
        serve_ours(options.folder, options.length, options.engine)
    else:
        _parent(options)


def _parent(options: argparse.Namespace) -> None:
    from mindformers_ext.core.config.hf import model_spec_from_hf
    from mindformers_ext.jobs.checkpoint.tiny_model import TinyModelRequest, make_tiny_model

    print(machine())
    with TemporaryDirectory() as place:
        folder = Path(place) / "model"
        made = make_tiny_model(TinyModelRequest(output_dir=folder, spec=model_spec_from_hf(words_of(options.hidden))))
        same = ["--folder", str(folder), "--length", str(options.length), "--engine", options.engine]
        workers = {key: [__file__, "--worker", key, *same] for key in ("ours", "transformers")}
        result = compare(workers, NAMES, options.rounds)
    report(f"residual v2, {options.engine}", result, NAMES, "ours", "transformers")
    losses = {key: facts["loss"] for key, facts in result["facts"].items()}
    apart = abs(losses["ours"] - losses["transformers"])
    cpu = ", ".join(f"{key} {result['step'][key]['cpu']:.3f} s" for key in workers)
    print(f"  {made.parameters:,} parameters; CPU of a step: {cpu}; loss {losses['ours']:.4f}, {apart:.1e} apart")
    if apart > 1e-4:
        raise SystemExit("both have to compute the same loss")


if __name__ == "__main__":
    main()
