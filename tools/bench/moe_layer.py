# SPDX-License-Identifier: Apache-2.0
"""MoE layer: ours against transformers' block (the default of the installed version), same weights and tokens, on CPU.

    python tools/bench/moe_layer.py [--tokens 64 1024] [--capacity_factor 1.1] [--rounds 15]
    python tools/bench/moe_layer.py --engine pt [--dtype bfloat16] [--tokens 64 1024] [--rounds 15]
    python tools/bench/moe_layer.py --model llama_moe [--engine pt] [--tokens 1 64 512 2048] [--rounds 15]

Ours in MindSpore (GRAPH) or, with ``--engine pt``, in PyTorch; that is dropless unless told otherwise, as transformers
is. Hidden 512, ffn 1792, 8 experts, top-2. "checked" is the largest difference of the outputs over the tokens that lost
nothing to capacity. The limit for all is 6 N k D F multiply-adds at the machine's matrix speed; with ``--engine pt`` it
is measured too: the experts' matrix products alone, outputs preallocated ("gemms").

With ``--model llama_moe`` a LLaMA's feed-forward beside the same neurons as experts: see llama_moe_layer.py.
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse

import llama_moe_layer
import numpy as np
from peers import THREADS, compare, machine, report, serve

HIDDEN, FFN, EXPERTS, CHOSEN = 512, 1792, 8, 2
NAMES = ("forward", "forward+backward")


def arrays(tokens: int) -> dict[str, np.ndarray]:
    """The same weights and tokens for both engines."""
    rng = np.random.default_rng(0)
    shapes = {
        "x": (tokens, HIDDEN),
        "dout": (tokens, HIDDEN),
        "gate": (EXPERTS, HIDDEN),
        "w1": (EXPERTS, FFN, HIDDEN),
        "w2": (EXPERTS, HIDDEN, FFN),
        "w3": (EXPERTS, FFN, HIDDEN),
    }
    scale = {"x": 1.0, "dout": 1.0}
    return {k: rng.standard_normal(s).astype(np.float32) * np.float32(scale.get(k, 0.02)) for k, s in shapes.items()}


def serve_transformers(tokens: int, factor: float, dtype: str) -> None:
    """transformers' MixtralSparseMoeBlock."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.set_num_threads(THREADS)
    a = {k: torch.tensor(v).to(getattr(torch, dtype)) for k, v in arrays(tokens).items()}
    block = MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN)
    ).to(a["x"].dtype)
    with torch.no_grad():
        block.gate.weight.copy_(a["gate"])
        for e, expert in enumerate(block.experts):
            for name in ("w1", "w2", "w3"):
                getattr(expert, name).weight.copy_(a[name][e])
    x = a["x"][None].requires_grad_()

    def forward() -> None:
        with torch.inference_mode():
            block(x)

    def both() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        block(x)[0].backward(a["dout"][None])

    with torch.no_grad():
        sums = block(x)[0][0].float().sum(1).tolist()
    serve({"sums": sums}, dict(zip(NAMES, (forward, both), strict=True)))


def serve_mindspore(tokens: int, factor: float, dtype: str) -> None:
    """Our MoE layer."""
    import mindspore as ms
    from bench_cells import ForwardBackward

    from mindformers_ext.core.layers import MoESpec
    from mindformers_ext.core.spec import ModelSpec, NetworkSpec
    from mindformers_ext.ms.layer import build_feed_forward
    from mindformers_ext.ms.ops.select import select_operators

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    moe = MoESpec(num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN, capacity_factor=factor)
    model = ModelSpec(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        moe=moe,
    )
    spec = NetworkSpec(model=model, seq_length=tokens)
    layer = build_feed_forward(spec, model.layer(0), select_operators())
    a = {k: ms.Tensor(v) for k, v in arrays(tokens).items()}
    layer.router.dense.weight.set_data(a["gate"])
    for name in ("w1", "w2", "w3"):
        getattr(layer.ffn, name).weight.set_data(a[name])
    both = ForwardBackward(layer)
    out, _, report_GE = layer(a["x"])
    facts = {"sums": out.asnumpy().sum(1).tolist(), "dropped": float(report_GE.asnumpy()[:, -1].mean())}
    runs = (lambda: layer(a["x"])[0].asnumpy(), lambda: both(a["x"], a["dout"])[0][0].asnumpy())
    serve(facts, dict(zip(NAMES, runs, strict=True)))


def serve_pytorch(tokens: int, factor: float, dtype: str) -> None:
    """Our MoE layer in PyTorch."""
    import torch

    from mindformers_ext.core.layers import MoESpec
    from mindformers_ext.core.spec import ModelSpec, NetworkSpec
    from mindformers_ext.pt.moe.layer import MoE
    from mindformers_ext.pt.ops.memory import keep_freed_memory

    torch.set_num_threads(THREADS)
    keep_freed_memory()  # as the engine does
    kind = getattr(torch, dtype)
    moe = MoESpec(num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN, capacity_factor=factor)
    model = ModelSpec(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        moe=moe,
    )
    layer = MoE(NetworkSpec(model=model, seq_length=tokens), moe)
    a = {k: torch.tensor(v) for k, v in arrays(tokens).items()}
    with torch.no_grad():
        layer.router.dense.weight.copy_(a["gate"].to(kind).float())
        layer.ffn.gate_up.copy_(torch.cat((a["w1"], a["w3"]), 1))
        layer.ffn.down.copy_(a["w2"])
    layer.ffn.to(kind)
    x, dout = a["x"].to(kind).requires_grad_(), a["dout"].to(kind)

    def forward() -> None:
        with torch.inference_mode():
            layer(x)

    def both() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x)[0].backward(dout)

    with torch.no_grad():
        out, _, report = layer(x)
    facts = {"sums": out.float().sum(1).tolist(), "dropped": float(report[:, -1].mean())}
    serve(facts, dict(zip(NAMES, (forward, both), strict=True)))


def serve_gemms(tokens: int, factor: float, dtype: str) -> None:
    """The experts' matrix products alone, for the same counts of tokens."""
    import torch

    torch.set_num_threads(THREADS)
    kind = getattr(torch, dtype)
    a = {k: torch.tensor(v) for k, v in arrays(tokens).items()}
    chosen = (a["x"].to(kind).float() @ a["gate"].to(kind).float().T).topk(CHOSEN).indices.reshape(-1)
    counts = torch.bincount(chosen, minlength=EXPERTS).tolist()
    up, down = torch.cat((a["w1"], a["w3"]), 1).to(kind), a["w2"].to(kind)
    rows = [torch.randn(n, HIDDEN).to(kind) for n in counts]
    wide = [torch.randn(n, 2 * FFN).to(kind) for n in counts]
    middle = [torch.randn(n, FFN).to(kind) for n in counts]
    out = [torch.empty_like(r) for r in rows]
    d_up, d_down = torch.empty_like(up), torch.empty_like(down)

    def forward() -> None:
        for e in range(EXPERTS):
            if counts[e]:
                torch.mm(rows[e], up[e].T, out=wide[e])
                torch.mm(middle[e], down[e].T, out=out[e])

    def both() -> None:
        forward()
        for e in range(EXPERTS):
            if counts[e]:
                torch.mm(out[e], down[e], out=middle[e])
                torch.mm(out[e].T, middle[e], out=d_down[e])
                torch.mm(wide[e], up[e], out=out[e])
                torch.mm(wide[e].T, rows[e], out=d_up[e])

    serve({}, dict(zip(NAMES, (forward, both), strict=True)))


WORKERS = {
    "mindspore": serve_mindspore,
    "transformers": serve_transformers,
    "pytorch": serve_pytorch,
    "gemms": serve_gemms,
}
ENGINES = {"ms": ("mindspore", "transformers"), "pt": ("pytorch", "transformers", "gemms")}


def main() -> None:
    """Parent: compare both; child (--worker): be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mixtral", "llama_moe"), default="mixtral", help="whose layer is measured")
    parser.add_argument("--widths", type=int, nargs=2, help="hidden and ffn of --model llama_moe")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens per call")
    parser.add_argument("--engine", choices=ENGINES, default="ms", help="whose layer: MindSpore's or PyTorch's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="with --engine pt")
    parser.add_argument("--capacity_factor", type=float, help="slots, by default 1.1 (ms) or dropless (pt, -1)")
    parser.add_argument("--rounds", type=int, default=15, help="measured calls per engine")
    parser.add_argument("--worker", choices=WORKERS | llama_moe_layer.WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    factor = options.capacity_factor if options.capacity_factor is not None else {"ms": 1.1, "pt": -1.0}[options.engine]
    if options.model == "llama_moe":
        llama_moe_layer.widths(*options.widths or (llama_moe_layer.HIDDEN, llama_moe_layer.FFN))
        if options.worker:
            llama_moe_layer.WORKERS[options.worker](options.tokens[0], factor)
        else:
            llama_moe_layer.measure(__file__, options.engine, options.tokens, factor, options.rounds)
        return
    if options.worker:
        WORKERS[options.worker](options.tokens[0], factor, options.dtype)
        return
    keys = ENGINES[options.engine]
    print(machine())
    for tokens in options.tokens or (64, 1024):
        shared = ["--tokens", str(tokens), "--capacity_factor", str(factor), "--dtype", options.dtype]
        result = compare({key: [__file__, "--worker", key, *shared] for key in keys}, NAMES, options.rounds)
        title = f"MoE layer T={tokens}"
        report(title, result, NAMES, keys[0], "transformers")
        if "gemms" in keys:
            report(title, result, NAMES, keys[0], "gemms")
        ours, theirs = (np.array(result["facts"][key]["sums"]) for key in keys[:2])
        same = np.abs(ours - theirs) < (1e-2 if options.dtype == "float32" else 1e-1)
        dropped = result["facts"][keys[0]]["dropped"]
        print(
            f"  dropped {dropped:.2%} of assignments; checked {same.sum()} of {len(same)} tokens equal, largest "
            f"difference of their row sums {np.abs(ours - theirs)[same].max():.1e}"
        )


if __name__ == "__main__":
    main()
