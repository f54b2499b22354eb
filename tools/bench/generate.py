# SPDX-License-Identifier: Apache-2.0
"""Generation with a Mixtral of 97 million parameters: both our engines on a CPU against transformers' generate, in one
run, and beside what the machine allows.

    python tools/bench/generate.py [--prompt 512] [--new 128] [--batches 1 8] [--rounds 3]
    python tools/bench/generate.py --hidden 2048 --ffn 5632 --layers 4 --prompt 128 --new 16 --batches 1

Hidden 512, expert width 1024, 7 layers, 8 heads over 2, 8 experts top-2, float32, the same random weights from one
Hugging Face folder, greedy; the second command has real widths (4.7 GB, held three times). Prefill is generate with one
new token; decode is what the other new tokens take besides. All tokens are compared. Memory: the peak of the whole
process, that of the framework alone taken off.

Limits: a prompt takes at least its matrix products, timed alone in the faster of torch's two libraries, MKL and oneDNN
(each token its two experts; attention's own products are left out); a token at least the reading of its weights, at the
speed at which this machine sums a large array (a batch of B tokens reads each expert that any of them takes).
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse
import functools
import importlib
import json
import os
import resource
import tempfile
import time
import timeit
from pathlib import Path

import numpy as np
from peers import THREADS, Worker, compare, machine, serve

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import DeviceSpec, ModelSpec, NetworkSpec

VOCABULARY, FULL = 4000, dict(hidden=512, ffn=1024, layers=7)


def model_spec(hidden: int, ffn: int, layers: int) -> ModelSpec:
    """The model at these sizes."""
    moe = MoESpec(num_local_experts=8, num_experts_per_tok=2, capacity_factor=0.0)
    return ModelSpec(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=hidden // 8,
        initializer_range=0.05,
        max_position_embeddings=4096,
        eos_token_id=-1,
        pad_token_id=-1,
        moe=moe,
    )


def prompts(batch: int, length: int) -> np.ndarray:
    """(B, S) random tokens, the same for both engines."""
    return np.random.default_rng(batch).integers(5, VOCABULARY, (batch, length))


def peak_memory() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve_transformers(options: argparse.Namespace) -> None:
    """transformers' Mixtral, sdpa attention, its own cache."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    before = peak_memory()
    net = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32, attn_implementation="sdpa").eval()

    def generate(batch: int, new: int) -> list[list[int]]:
        ids = torch.from_numpy(prompts(batch, options.prompt))
        with torch.no_grad():
            out = net.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        return out[:, options.prompt :].tolist()

    serve_both(options, generate, before, {})


def serve_ours(options: argparse.Namespace, engine: str) -> None:
    """Our network and generation loop."""
    from mindformers_ext.core.config.sampling import SamplingSpec
    from mindformers_ext.jobs.predict.generate import Generation
    from mindformers_ext.jobs.predict.network import open_network, open_weights

    model = model_spec(options.hidden, options.ffn, options.layers)
    spec = NetworkSpec(model=model, seq_length=4096)
    importlib.import_module({"ms": "mindspore", "pt": "torch"}[engine])  # so that its own memory is known
    before, started = peak_memory(), time.perf_counter()
    network = open_network(engine, DeviceSpec("CPU"), spec, open_weights(Path(options.folder), model))
    facts = {"load": time.perf_counter() - started, "loaded": peak_memory() - before}
    greedy = {new: SamplingSpec(do_sample=False, max_new_tokens=new) for new in (1, options.new)}
    jobs = {batch: Generation(network, greedy[1], 4096, batch) for batch in options.batches}

    def generate(batch: int, new: int) -> list[list[int]]:
        jobs[batch].sampling = greedy[new]
        found = jobs[batch].answers(prompts(batch, options.prompt).tolist(), room=options.new)
        return [list(answer.tokens) for answer in found]

    compiled = lambda: {str(batch): job.timing.compile for batch, job in jobs.items()}  # noqa: E731
    serve_both(options, generate, before, facts, compiled)


def serve_both(options: argparse.Namespace, generate, before: int, facts: dict, compiled=dict) -> None:
    """Answer once (the tokens are facts), then be measured."""
    first = {}
    tokens = {}
    for batch in options.batches:
        started = time.perf_counter()
        generate(batch, 1)
        first[str(batch)] = time.perf_counter() - started
        tokens[str(batch)] = generate(batch, options.new)
    facts = {**facts, "tokens": tokens, "first": first, "compile": compiled(), "memory": peak_memory() - before}
    calls = [(kind, batch, new) for batch in options.batches for kind, new in (("prefill", 1), ("all", options.new))]
    serve(facts, {f"{kind} {batch}": functools.partial(generate, batch, new) for kind, batch, new in calls}, warm=1)


def report(options: argparse.Namespace, result: dict) -> None:
    """Tokens per second of both, and ratios (above 1: ours is faster)."""
    for batch in options.batches:
        prefill, everything = result[f"prefill {batch}"], result[f"all {batch}"]
        for name, tokens, times in (
            ("prefill", batch * options.prompt, prefill),
            (
                "decode",
                batch * (options.new - 1),
                {
                    key: {kind: everything[key][kind] - prefill[key][kind] for kind in ("wall", "cpu")}
                    for key in prefill
                },
            ),
        ):
            theirs, limit = times["transformers"], limits(options, batch)[name]
            print(f"batch {batch} {name:<8} transformers {tokens / theirs['wall']:9.1f} tokens/s, at most {limit:9.1f}")
            for engine in OURS:
                mine = times[engine]
                speed = tokens / mine["wall"]
                print(
                    f"    {engine:<12} {speed:9.1f} tokens/s   ratio wall {theirs['wall'] / mine['wall']:.2f}  CPU "
                    f"{theirs['cpu'] / mine['cpu']:.2f}   of the limit {speed / limit:.2f}"
                )
    theirs = result["facts"]["transformers"]
    for engine in OURS:
        report_start(options, engine, result["facts"][engine], theirs)


def report_start(options: argparse.Namespace, engine: str, ours: dict, theirs: dict) -> None:
    """How an engine begins, whether it answers alike, and its memory."""
    for batch in map(str, options.batches):
        same = sum(a == b for a, b in zip(ours["tokens"][batch], theirs["tokens"][batch], strict=True))
        print(
            f"{engine}, batch {batch}: first token of a fresh process after {ours['first'][batch]:.1f} s, of it "
            f"{ours['compile'][batch]:.1f} s compilation (transformers {theirs['first'][batch]:.1f} s); equal "
            f"answers {same} of {batch}"
        )
    model = model_spec(options.hidden, options.ffn, options.layers)
    weights = sum(file.stat().st_size for file in Path(options.folder).glob("*.safetensors"))
    rows, positions = max(options.batches), options.prompt + options.new
    cache = 2 * rows * positions * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * 4
    print(
        f"weights {weights / 1e6:.0f} MB + cache {cache / 1e6:.0f} MB; peak besides the framework: {engine} "
        f"{ours['memory'] / 1e6:.0f} MB ({ours['memory'] / (weights + cache):.2f}x), transformers "
        f"{theirs['memory'] / 1e6:.0f} MB"
    )
    print(
        f"weights in after {ours['load']:.1f} s and {ours['loaded'] / 1e6:.0f} MB; the rest are the cache, "
        "compiled graphs and the tensors of one pass"
    )


@functools.cache
def stream_speed() -> float:
    """Bytes a second at which an array that no cache holds is summed, all threads together."""
    import torch

    torch.set_num_threads(THREADS)
    array = torch.ones(2**27)
    return array.nbytes / min(timeit.repeat(array.sum, number=1, repeat=5))


@functools.cache
def product_time(rows: int, inner: int, columns: int) -> float:
    """Seconds of one product of (rows, inner) by a weight (columns, inner)."""
    import torch

    from mindformers_ext.pt.ops.products import prepacked, product

    torch.set_num_threads(THREADS)
    a, weight = torch.ones(rows, inner), torch.ones(columns, inner)
    with torch.inference_mode():
        ways = (lambda: torch.nn.functional.linear(a, weight), functools.partial(product, a, prepacked(weight, rows)))
        return min(time for way in ways for time in timeit.repeat(way, number=1, repeat=5))


def limits(options: argparse.Namespace, batch: int) -> dict[str, float]:
    """Tokens per second that the machine allows at most, by phase; see the module's text."""
    model = model_spec(options.hidden, options.ffn, options.layers)
    moe, hidden, width = model.moe, model.hidden_size, model.intermediate_size
    assert moe is not None
    keys = model.num_key_value_heads * model.head_dim
    attention = [(hidden, 2), (keys, 2)]  # columns, how many such matrices
    rows = batch * options.prompt
    share = rows * moe.num_experts_per_tok // moe.num_local_experts  # tokens of each expert, were all equal
    layer = sum(count * product_time(rows, hidden, columns) for columns, count in attention)
    layer += moe.num_local_experts * (2 * product_time(share, hidden, width) + product_time(share, width, hidden))
    prompt = model.num_hidden_layers * layer + product_time(batch, hidden, model.vocab_size)
    taken = moe.num_local_experts * (1 - (1 - moe.num_experts_per_tok / moe.num_local_experts) ** batch)
    weights = model.num_hidden_layers * (hidden * 2 * (hidden + keys) + taken * 3 * hidden * width)
    read = 4 * (weights + hidden * model.vocab_size)
    return {"prefill": rows / prompt, "decode": batch * stream_speed() / read}


OURS = {"mindspore": "ms", "pytorch": "pt"}  # engines
WORKERS = {name: functools.partial(serve_ours, engine=engine) for name, engine in OURS.items()}
WORKERS["transformers"] = serve_transformers


def main() -> None:
    """Parent: compare both; child (--worker): be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of every prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts computed together")
    parser.add_argument("--rounds", type=int, default=3, help="measured runs per engine")
    for name, value in FULL.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of the model, by default {value}")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        WORKERS[options.worker](options)
        return
    from mindformers_ext.jobs.checkpoint.tiny_model import TinyModelRequest, make_tiny_model

    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = str(Path(folder) / "model")
        model = model_spec(options.hidden, options.ffn, options.layers)
        made = make_tiny_model(TinyModelRequest(output_dir=Path(options.folder), spec=model))
        print(f"{json.dumps({'parameters': made.parameters})}, prompts of {options.prompt}, {options.new} new tokens")
        words = [
            word
            for name in ("prompt", "new", "hidden", "ffn", "layers", "folder")
            for word in (f"--{name}", str(getattr(options, name)))
        ]
        words += ["--batches", *map(str, options.batches)]
        commands = {key: [__file__, "--worker", key, *words] for key in WORKERS}
        names = [f"{kind} {batch}" for batch in options.batches for kind in ("prefill", "all")]
        os.environ["XDG_CACHE_HOME"] = folder  # no graph of another run
        report(options, compare(commands, names, options.rounds))
        again = Worker(commands["mindspore"])  # which finds the graphs of the first one
        again.close()
        first = ", ".join(f"{seconds:.1f} s (batch {batch})" for batch, seconds in again.facts["first"].items())
        print(f"mindspore, second start: first token {first} behind loading; peak {again.facts['memory'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
