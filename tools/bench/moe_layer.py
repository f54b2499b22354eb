# SPDX-License-Identifier: Apache-2.0
"""MoE layer: ours in MindSpore (GRAPH, CPU) against transformers' eager block, same weights and tokens.

    python tools/bench/moe_layer.py [--tokens 64 1024] [--capacity_factor 1.1] [--rounds 15]

Hidden 512, ffn 1792, 8 experts, top-2, float32. "checked" is the largest difference of the outputs over the tokens
that lost nothing to capacity. The limit for both is 6 N k D F multiply-adds at the machine's matrix speed.
"""

from __future__ import annotations

import argparse

import numpy as np
from peers import THREADS, compare, machine, report, serve

HIDDEN, FFN, EXPERTS, CHOSEN = 512, 1792, 8, 2
NAMES = ("forward", "forward+backward")


def arrays(tokens: int) -> dict[str, np.ndarray]:
    """The same weights and tokens for both engines."""
    rng = np.random.default_rng(0)
    shapes = {"x": (tokens, HIDDEN), "dout": (tokens, HIDDEN), "gate": (EXPERTS, HIDDEN), "w1": (EXPERTS, FFN, HIDDEN),
              "w2": (EXPERTS, HIDDEN, FFN), "w3": (EXPERTS, FFN, HIDDEN)}  # fmt: skip
    scale = {"x": 1.0, "dout": 1.0}
    return {k: rng.standard_normal(s).astype(np.float32) * np.float32(scale.get(k, 0.02)) for k, s in shapes.items()}


def serve_transformers(tokens: int, factor: float) -> None:
    """transformers' MixtralSparseMoeBlock."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.set_num_threads(THREADS)
    a = {k: torch.tensor(v) for k, v in arrays(tokens).items()}
    block = MixtralSparseMoeBlock(MixtralConfig(hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=EXPERTS,
                                                num_experts_per_tok=CHOSEN))  # fmt: skip
    with torch.no_grad():
        block.gate.weight.copy_(a["gate"])
        for e, expert in enumerate(block.experts):
            for name in ("w1", "w2", "w3"):
                getattr(expert, name).weight.copy_(a[name][e])
    x = a["x"][None].requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            block(x)

    def both() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        block(x)[0].backward(a["dout"][None])

    with torch.no_grad():
        sums = block(x)[0][0].sum(1).tolist()
    serve({"sums": sums}, dict(zip(NAMES, (forward, both), strict=True)))


def serve_mindspore(tokens: int, factor: float) -> None:
    """Our MoE layer."""
    import mindspore as ms
    from bench_cells import ForwardBackward

    from mindformers_ext.core.spec import ModelSpec, MoESpec, NetworkSpec
    from mindformers_ext.ms.moe import MoE
    from mindformers_ext.ms.ops.select import select_operators

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    moe = MoESpec(num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN, capacity_factor=factor)
    model = ModelSpec(vocab_size=32, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=1,
                      num_attention_heads=8, num_key_value_heads=8, head_dim=64, moe=moe)  # fmt: skip
    layer = MoE(NetworkSpec(model=model, seq_length=tokens), select_operators())
    a = {k: ms.Tensor(v) for k, v in arrays(tokens).items()}
    layer.router.dense.weight.set_data(a["gate"])
    for name in ("w1", "w2", "w3"):
        getattr(layer.ffn, name).weight.set_data(a[name])
    both = ForwardBackward(layer)
    out, _, report_GE = layer(a["x"])
    facts = {"sums": out.asnumpy().sum(1).tolist(), "dropped": float(report_GE.asnumpy()[:, -1].mean())}
    runs = (lambda: layer(a["x"])[0].asnumpy(), lambda: both(a["x"], a["dout"])[0][0].asnumpy())
    serve(facts, dict(zip(NAMES, runs, strict=True)))


WORKERS = {"mindspore": serve_mindspore, "transformers": serve_transformers}


def main() -> None:
    """Parent: compare both; child (--worker): be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 1024], help="tokens per call")
    parser.add_argument("--capacity_factor", type=float, default=1.1, help="slots; <= 0 is dropless")
    parser.add_argument("--rounds", type=int, default=15, help="measured calls per engine")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        WORKERS[options.worker](options.tokens[0], options.capacity_factor)
        return
    print(machine())
    for tokens in options.tokens:
        shared = ["--tokens", str(tokens), "--capacity_factor", str(options.capacity_factor)]
        result = compare({key: [__file__, "--worker", key, *shared] for key in WORKERS}, NAMES, options.rounds)
        report(f"MoE layer T={tokens}", result, NAMES, "mindspore", "transformers")
        ours, theirs = (np.array(result["facts"][key]["sums"]) for key in WORKERS)
        same = np.abs(ours - theirs) < 1e-2
        dropped = result["facts"]["mindspore"]["dropped"]
        print(f"  dropped {dropped:.2%} of assignments; checked {same.sum()} of {len(same)} tokens equal, largest "
              f"difference of their row sums {np.abs(ours - theirs)[same].max():.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
