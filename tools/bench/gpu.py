# SPDX-License-Identifier: Apache-2.0
"""The PyTorch engine's MoE layers on a GPU: one command, one table.

    python tools/bench/gpu.py                        # both layer shapes, T = 1 ... 32768, bfloat16, on the GPU
    python tools/bench/gpu.py --shapes toy --tokens 1 16 --reps 3   # on a CPU: shows that the script runs

Roofs are measured in the same run: dense products of the layer's own shape and of a large square, reading and copying
memory. "roof" is the share of the slower of the two limits: 6 k H I floating point operations per token (three times
that with the backward pass) at the dense product's speed, and the weights of the experts touched (three times) at the
reading speed. Peers run in turn in one process with the same weights and the same chosen experts. "error" is the
relative norm of the difference from float32. Decoding runs in a CUDA graph over four layers, so that weights come from
memory and not from the cache. A peer that is not installed is named.
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse
import statistics
import time
from collections.abc import Callable

import torch
from gpu_peers import Layer, missing, peers
from torch import Tensor

from mindformers_ext.pt.ops.memory import keep_freed_memory

SHAPES = {"mixtral": (4096, 14336, 8, 2), "llama-moe": (4096, 688, 16, 4), "toy": (64, 96, 8, 2)}  # H, I, E, k
TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768)
ROUTINGS = ("uniform", "zipf", "one")
LAYERS = 4  # of a decoding step: more weights than any cache holds
WARM_UP = 20


class Clock:
    """Times calls: CUDA events on a GPU, the wall clock elsewhere."""

    def __init__(self, device: torch.device, reps: int) -> None:
        self.cuda, self.reps = device.type == "cuda", reps

    def once(self, run: Callable[[], object]) -> float:
        """Seconds of one call."""
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def in_turn(self, runs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Sorted seconds of ``reps`` calls of each, one after the other."""
        for run in runs.values():
            for _ in range(WARM_UP if self.cuda else 1):
                run()
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.reps):
            for name, run in runs.items():
                taken[name].append(self.once(run))
        return {name: sorted(values) for name, values in taken.items()}

    def median(self, run: Callable[[], object]) -> float:
        return statistics.median(self.in_turn({"": run})[""])


def memory_roof(clock: Clock, device: torch.device) -> tuple[float, float]:
    """(read, copy) bytes per second over 4 GiB (64 MiB on a CPU)."""
    block = torch.ones((4 << 30 if clock.cuda else 64 << 20) // 4, device=device)
    other = torch.empty_like(block)
    read = block.nbytes / clock.median(lambda: torch.sum(block))
    return read, 2 * block.nbytes / clock.median(lambda: other.copy_(block))


def dense_roof(clock: Clock, rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations per second of one product."""
    a, b = torch.randn(rows, inner, device=device, dtype=dtype), torch.randn(inner, columns, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    return 2.0 * rows * inner * columns / clock.median(lambda: torch.mm(a, b, out=out))


def routing(kind: str, tokens: int, experts: int, chosen: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Different experts (T, K) per token and weights that sum to 1."""
    generator = torch.Generator().manual_seed(1)
    if kind == "one":
        index = torch.arange(chosen).repeat(tokens, 1)
    else:
        odds = torch.ones(experts) if kind == "uniform" else 1.0 / torch.arange(1, experts + 1)
        index = torch.multinomial(odds.expand(tokens, experts), chosen, generator=generator)
    weight = torch.rand(tokens, chosen, generator=generator) + 0.1
    return index.to(device), (weight / weight.sum(-1, keepdim=True)).to(device)


class Case:
    """One shape, number of tokens and routing; ``limit`` gives the shortest possible time."""

    def __init__(self, shape: str, tokens: int, kind: str, options: argparse.Namespace) -> None:
        self.title = f"{shape} T={tokens} {kind}"
        self.hidden, self.ffn, self.experts, self.chosen = SHAPES[shape]
        self.device, self.dtype, self.tokens = options.device, options.dtype, tokens
        self.index, self.weight = routing(kind, tokens, self.experts, self.chosen, self.device)
        generator = torch.Generator(self.device).manual_seed(2)
        self.x = torch.randn(tokens, self.hidden, device=self.device, generator=generator).to(self.dtype)
        self.dout = torch.randn(tokens, self.hidden, device=self.device, generator=generator).to(self.dtype)
        touched = int(self.index.unique().numel())
        self.flops = 6.0 * self.chosen * self.hidden * self.ffn * tokens
        self.bytes = 3.0 * touched * self.hidden * self.ffn * self.x.itemsize + 2 * self.x.nbytes

    def layers(self, count: int) -> list[Layer]:
        return [Layer(self.hidden, self.ffn, self.experts, self.dtype, self.device, seed) for seed in range(count)]

    def limit(self, dense: float, read: float, passes: int) -> float:
        return passes * max(self.flops / dense, self.bytes / read)

    def reference(self, layer: Layer) -> Tensor:
        """The layer in float32, by a loop over experts."""
        out = torch.zeros(self.tokens, self.hidden, device=self.device)
        for e in range(self.experts):
            token, choice = torch.where(self.index == e)
            if token.numel():
                gate, up = (self.x[token].float() @ layer.gate_up[e].float().T).chunk(2, -1)
                found = (torch.nn.functional.silu(gate) * up) @ layer.down[e].float().T
                out.index_add_(0, token, found * self.weight[token, choice, None])
        return out


def show(
    case: Case,
    what: str,
    taken: dict[str, list[float]],
    limit: float,
    flops: float,
    errors: dict[str, float],
    peak: dict[str, float],
) -> None:
    """One line per implementation."""
    for name, values in taken.items():
        middle = statistics.median(values)
        low, high = values[len(values) // 10], values[-1 - len(values) // 10]
        spread = f"(p10 {low * 1e6:.1f}, p90 {high * 1e6:.1f})"
        error = f"{errors[name]:.1e}" if name in errors else "not taken"
        most = f"{peak[name]:.2f} GB" if name in peak else "not taken"
        print(
            f"{case.title:<26} {what:<9} {name:<18} {middle * 1e6:10.1f} us {spread:<28} "
            f"{flops / middle / 1e12:8.2f} TFLOP/s {case.bytes / middle / 1e9:8.1f} GB/s  roof {limit / middle:6.1%} "
            f"error {error}  peak {most}",
            flush=True,
        )


def forward_and_backward(case: Case, clock: Clock, dense: float, read: float) -> None:
    """Both passes of one layer."""
    layer = case.layers(1)[0]
    with torch.no_grad():
        expected = case.reference(layer)
    runs, trains, errors, peak = {}, {}, {}, {}
    for name, (run, _) in peers(layer, case.chosen, case.tokens, training=False).items():

        def forward(run=run) -> Tensor:  # noqa: ANN001
            with torch.no_grad():
                return run(case.x, case.index, case.weight)

        errors[name] = float((forward().float() - expected).norm() / expected.norm())
        runs[name] = forward
    for name, (run, _) in peers(layer, case.chosen, case.tokens, training=True).items():
        x, weight = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()

        def both(run=run, x=x, weight=weight) -> None:  # noqa: ANN001
            for tensor in (x, weight, *layer.parameters):
                tensor.grad = None
            run(x, case.index, weight).backward(case.dout)

        trains[name] = both
        if clock.cuda:
            torch.cuda.reset_peak_memory_stats()
            both()
            peak[name] = torch.cuda.max_memory_allocated() / 1e9
    show(case, "forward", clock.in_turn(runs), case.limit(dense, read, 1), case.flops, errors, {})
    show(case, "fwd+bwd", clock.in_turn(trains), case.limit(dense, read, 3), 3 * case.flops, errors, peak)


def decoding(case: Case, clock: Clock, dense: float, read: float) -> None:
    """Several layers one after the other, as one CUDA graph where that is possible; times are of one layer."""
    layers = case.layers(LAYERS)
    built = [peers(layer, case.chosen, case.tokens, training=False) for layer in layers]
    runs: dict[str, Callable[[], object]] = {}
    for name, (_, capturable) in built[0].items():

        def step(name=name) -> Tensor:  # noqa: ANN001
            with torch.no_grad():
                x = case.x
                for layer in built:
                    x = layer[name][0](x, case.index, case.weight)
                return x

        if not clock.cuda:
            runs[name] = step
        elif capturable:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            runs[name] = graph.replay
    taken = {name: [value / LAYERS for value in values] for name, values in clock.in_turn(runs).items()}
    show(case, "decode", taken, case.limit(dense, read, 1), case.flops, {}, {})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["mixtral", "llama-moe"])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=["uniform"])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--reps", type=int, default=50, help="calls that are timed")
    options = parser.parse_args()
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = getattr(torch, options.dtype)
    clock = Clock(options.device, options.reps)
    keep_freed_memory()
    name = torch.cuda.get_device_name() if clock.cuda else f"CPU, {torch.get_num_threads()} threads: no GPU here"
    print(f"machine: {name}; torch {torch.__version__}; {missing()}")
    read, copy = memory_roof(clock, options.device)
    side = 8192 if clock.cuda else 512
    square = dense_roof(clock, side, side, side, options.dtype, options.device)
    print(
        f"roofs: read {read / 1e9:.0f} GB/s, copy {copy / 1e9:.0f} GB/s, product of {side}^3 {square / 1e12:.2f} "
        "TFLOP/s"
    )
    for shape in options.shapes:
        hidden, ffn, _, chosen = SHAPES[shape]
        for tokens in options.tokens:
            own = dense_roof(clock, max(tokens * chosen, 1), hidden, 3 * ffn, options.dtype, options.device)
            dense = max(own, square)
            for kind in options.routings:
                case = Case(shape, tokens, kind, options)
                forward_and_backward(case, clock, dense, read)
                if tokens <= 32:
                    decoding(case, clock, dense, read)


if __name__ == "__main__":
    main()
