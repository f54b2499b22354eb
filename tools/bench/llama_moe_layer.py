# SPDX-License-Identifier: Apache-2.0
"""Workers of ``moe_layer.py --model llama_moe``: a LLaMA's feed-forward, and the same neurons as experts.

Hidden 1024, ffn 2816 (``--widths``), cut into 8 experts, 2 chosen by the noisy gate of two layers. "dense" is
transformers' ``LlamaMLP``, "saved" the code that is saved with a model, "pytorch" our engine's layer; "mindspore" our
layer beside our dense one ("dense_ms"), both in GRAPH mode. A forward is one of evaluation; forward+backward is one of
training, with noise and the loss of balance. One thread each. A quarter of the neurons is computed, so the ratio is 4
or so at most; where few tokens touch all experts, all weights are read, and the memory's speed is the limit.
"""

from __future__ import annotations

import numpy as np
from peers import compare, machine, report, serve

HIDDEN, FFN, EXPERTS, CHOSEN, THREADS = 1024, 2816, 8, 2, 1
NAMES = ("forward", "forward+backward")
TOKENS = (1, 64, 512, 2048)


def widths(hidden: int, ffn: int) -> None:
    """Measure a layer of other widths; before anything else."""
    global HIDDEN, FFN
    HIDDEN, FFN = hidden, ffn


def arrays(tokens: int) -> dict[str, np.ndarray]:
    """The same weights and tokens for all; gate, up (I, H), down (H, I) of the dense layer, experts are slices."""
    rng = np.random.default_rng(0)
    shapes = {
        "x": (tokens, HIDDEN),
        "dout": (tokens, HIDDEN),
        "noise": (tokens, EXPERTS),
        "first": (EXPERTS, HIDDEN),
        "second": (EXPERTS, EXPERTS),
        "gate": (FFN, HIDDEN),
        "up": (FFN, HIDDEN),
        "down": (HIDDEN, FFN),
    }
    scale = {"x": 1.0, "dout": 1.0, "noise": 1.0, "second": 1.0}
    return {k: rng.standard_normal(s, dtype=np.float32) * np.float32(scale.get(k, 0.02)) for k, s in shapes.items()}


def cut(weight: np.ndarray, axis: int) -> list[np.ndarray]:
    """A dense weight as those of its experts."""
    return np.split(weight, EXPERTS, axis)


def serve_torch(layer, a: dict, evaluate, train) -> None:
    """Answer for a torch layer: ``evaluate`` gives the output, ``train`` what is differentiated with its gradients."""
    import torch

    def forward() -> None:
        layer.eval()
        with torch.no_grad():
            evaluate(a["x"])

    x = a["x"].clone().requires_grad_()

    def both() -> None:
        layer.train().zero_grad(set_to_none=True)
        x.grad = None
        torch.autograd.backward(*train(x))

    layer.eval()
    with torch.no_grad():
        sums = evaluate(a["x"]).sum(-1).reshape(-1).tolist()
    serve({"sums": sums}, dict(zip(NAMES, (forward, both), strict=True)))


def torch_arrays(tokens: int) -> dict:
    """The same as torch has them."""
    import torch

    torch.set_num_threads(THREADS)
    return {name: torch.tensor(value) for name, value in arrays(tokens).items()}


def serve_dense(tokens: int, factor: float) -> None:
    """transformers' LlamaMLP."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    a = torch_arrays(tokens)
    layer = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=FFN))
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            getattr(layer, f"{name}_proj").weight.copy_(a[name])
    serve_torch(layer, a, layer, lambda x: ([layer(x)], [a["dout"]]))


def serve_saved(tokens: int, factor: float) -> None:
    """The feed-forward of the code that is saved with a model."""
    import torch

    from mindformers_ext.jobs.checkpoint.model_code.configuration_llama_moe import LlamaMoEConfig
    from mindformers_ext.jobs.checkpoint.model_code.mixture_llama_moe import LlamaMoEMixture

    a = torch_arrays(tokens)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 1, "num_attention_heads": 8}
    layer = LlamaMoEMixture(LlamaMoEConfig(num_experts=EXPERTS, num_selects=CHOSEN, **sizes), 0)
    with torch.no_grad():
        layer.gate.gate_network[0].weight.copy_(a["first"])
        layer.gate.gate_network[2].weight.copy_(a["second"])
        torch.nn.init.zeros_(layer.gate.weight_noise.weight)
        for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
            for weight, part in zip(
                getattr(layer.calculator.experts, f"weight_{name}"), a[name].chunk(EXPERTS, axis), strict=True
            ):
                weight.copy_(part)
    layer.gate.draw = lambda logits: a["noise"]

    def train(x) -> tuple:
        out, told = layer(x[None])
        return [out, told.balance_loss], [a["dout"][None], None]

    serve_torch(layer, a, lambda x: layer(x[None], counted=False)[0], train)


def mixture_spec(tokens: int, factor: float):
    """Our description of the layer."""
    from mindformers_ext.core.layers import MoESpec
    from mindformers_ext.core.spec import ModelSpec, NetworkSpec

    moe = MoESpec(
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        intermediate_size=FFN // EXPERTS,
        capacity_factor=factor,
        norm_topk_prob=False,
        gate="mlp_noisy",
    )
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": HIDDEN // 8}
    model = ModelSpec(vocab_size=32, hidden_size=HIDDEN, intermediate_size=FFN, moe=moe, **sizes)
    return NetworkSpec(model=model, seq_length=tokens), moe


def serve_pytorch(tokens: int, factor: float) -> None:
    """Our engine's layer in PyTorch."""
    import torch

    from mindformers_ext.pt.layer import build_feed_forward
    from mindformers_ext.pt.ops.memory import keep_freed_memory

    keep_freed_memory()  # as the engine does
    a = torch_arrays(tokens)
    spec, _ = mixture_spec(tokens, factor)
    layer = build_feed_forward(spec, spec.model.layer(0))
    with torch.no_grad():
        layer.router.dense.weight.copy_(a["first"])
        layer.router.out.weight.copy_(a["second"])
        both = [torch.cat(parts) for parts in zip(a["gate"].chunk(EXPERTS), a["up"].chunk(EXPERTS), strict=True)]
        layer.ffn.gate_up.copy_(torch.stack(both))
        layer.ffn.down.copy_(torch.stack(a["down"].chunk(EXPERTS, 1)))

    def train(x) -> tuple:
        out, loss, _ = layer(x, a["noise"])
        return [out, loss.sum()], [a["dout"], None]

    serve_torch(layer, a, layer.dropless, train)


def serve_mindspore(tokens: int, factor: float, dense: bool = False) -> None:
    """Our engine's layer in MindSpore, a mixture or dense."""
    import mindspore as ms
    from bench_cells import ForwardBackward, WithNoise

    from mindformers_ext.ms.feed_forward import SwiGlu
    from mindformers_ext.ms.layer import build_feed_forward
    from mindformers_ext.ms.ops.select import select_operators

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    a, (spec, _) = arrays(tokens), mixture_spec(tokens, factor)
    x, dout, noise = (ms.Tensor(a[name]) for name in ("x", "dout", "noise"))
    if dense:
        layer = SwiGlu(spec, FFN, select_operators())
        for name, part in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            getattr(layer, name).weight.set_data(ms.Tensor(a[part]))
        trained, facts = layer, {"dropped": 0.0}
    else:
        layer = build_feed_forward(spec, spec.model.layer(0), select_operators())
        layer.router.dense.weight.set_data(ms.Tensor(a["first"]))
        layer.router.out.weight.set_data(ms.Tensor(a["second"]))
        for name, part, axis in (("w1", "gate", 0), ("w3", "up", 0), ("w2", "down", 1)):
            getattr(layer.ffn, name).weight.set_data(ms.Tensor(np.stack(cut(a[part], axis))))
        layer.set_train(False)
        facts = {"dropped": float(layer(x)[2].asnumpy()[:, -1].mean())}
        trained = WithNoise(layer, noise)
    facts["sums"] = layer(x)[0].asnumpy().sum(1).tolist()
    both = ForwardBackward(trained).set_train()

    def forward() -> None:
        layer.set_train(False)
        layer(x)[0].asnumpy()

    def backward() -> None:
        both.set_train()
        both(x, dout)[0][0].asnumpy()

    serve(facts, dict(zip(NAMES, (forward, backward), strict=True)))


WORKERS = {
    "dense": serve_dense,
    "saved": serve_saved,
    "pytorch": serve_pytorch,
    "mindspore": serve_mindspore,
    "dense_ms": lambda tokens, factor: serve_mindspore(tokens, factor, dense=True),
}
ENGINES = {"ms": ("mindspore", "dense_ms"), "pt": ("pytorch", "saved", "dense")}  # the last is the peer of the others


def measure(script: str, engine: str, tokens: list[int] | None, factor: float, rounds: int) -> None:
    """Compare, for each number of tokens."""
    keys = ENGINES[engine]
    print(machine(THREADS))
    for count in tokens or TOKENS:
        words = ["--model", "llama_moe", "--tokens", str(count), "--capacity_factor", str(factor)]
        words += ["--widths", str(HIDDEN), str(FFN)]
        result = compare({key: [script, "--worker", key, *words] for key in keys}, NAMES, rounds, THREADS)
        for key in keys[:-1]:
            report(f"2 of 8, {HIDDEN}, T={count}", result, NAMES, key, keys[-1])
        sums = [np.array(result["facts"][key]["sums"]) for key in keys[:-1]]
        if len(sums) == 2:
            apart = np.abs(sums[0] - sums[1]).max()
            print(f"  checked: largest difference of {keys[0]}'s and {keys[1]}'s row sums {apart:.1e}")
        if "dropped" in result["facts"][keys[0]]:
            print(f"  dropped {result['facts'][keys[0]]['dropped']:.2%} of assignments in the measured forward")
