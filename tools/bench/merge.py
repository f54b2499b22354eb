# SPDX-License-Identifier: Apache-2.0
"""Merging three LLaMA checkpoints (0.43 B parameters, 0.85 GB bfloat16 each), against mergekit 0.1.5 and ``cp``.

The checkpoints are made in a temporary folder, deleted at the end: 20 layers of width 1280, a base and two models that
are the base plus noise. Every merge is a fresh process with two threads, ours and mergekit's in turn on the same
files; processor seconds (user and system) and peak memory are the kernel's own figures for that process. ``cp`` copies
the bytes of our output. mergekit lives in an environment of its own (see tests/cli/merge/test_merge_peer.py):

    MERGEKIT_PYTHON=peer/bin/python python tools/bench/merge.py [--folder DIR] [--rounds 1] [--only ties slerp]
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
THREADS = "2"
NEEDED = ("ties", "dare_ties", "linear", "slerp", "passthrough", "moe_random", "moe_cheap_embed", "moe_hidden")


def make_models(folder: Path, width: int) -> None:
    """Base, ft1 and ft2, three shards each. Runs in a process of its own: its memory would count for its children."""
    import ml_dtypes
    import numpy as np

    from mindformers_ext.core.config.hf import hf_config_from_spec
    from mindformers_ext.core.spec import ModelSpec
    from mindformers_ext.formats.safetensors_dir import SafetensorsDirWriter
    from mindformers_ext.formats.tensors import TensorInfo
    from mindformers_ext.weights.convert import rule_set

    bf16 = np.dtype(ml_dtypes.bfloat16)
    spec = ModelSpec(
        vocab_size=width * 25,
        hidden_size=width,
        intermediate_size=width * 27 // 10,
        num_hidden_layers=20,
        num_attention_heads=20,
        num_key_value_heads=4,
        head_dim=width // 20,
    )
    infos = [TensorInfo(name, shape, bf16) for rule in rule_set(spec).bindings for name, shape in rule.hf.items()]
    size = sum(info.nbytes for info in infos)
    pools = [np.random.default_rng(n).standard_normal(2**22, dtype=np.float32) for n in range(3)]
    for number, name in enumerate(("base", "ft1", "ft2")):
        (folder / name).mkdir()
        with SafetensorsDirWriter(folder / name, infos, size // 3 + 1) as writer:
            for place, info in enumerate(infos):
                writer.add(info.name, _values(pools, number, place, info.shape).astype(bf16))
        config = hf_config_from_spec(spec) | {"torch_dtype": "bfloat16"}
        (folder / name / "config.json").write_text(json.dumps(config))
        words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, 100)}
        model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
        table = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
        (folder / name / "tokenizer.json").write_text(json.dumps(table))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))
    print(f"models: {size / 1e9:.2f} GB bfloat16 each, {len(infos)} tensors")


def _values(pools, number, place, shape):
    """0.02 times normal numbers, the same in every model, plus 0.006 times the model's own."""
    import numpy as np

    count = int(np.prod(shape))
    start = place * 9973 % 1000
    base = np.resize(pools[0][start:], count) * 0.02
    own = np.resize(pools[number][start + 7 :], count) * 0.006 if number else 0
    return (base + own + (len(shape) == 1)).reshape(shape)


def configs() -> dict[str, str]:
    """The YAML of each measurement, in the tutorial's shapes."""
    t = "[{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}, {value: 0.5}]"

    def tuned(method: str, dtype: str, density: float, shared: str) -> str:
        own = f"parameters: {{density: {density}, weight: 0.4}}"
        return (
            f"models: [{{model: base}}, {{model: ft1, {own}}}, {{model: ft2, {own}}}]\nmerge_method: {method}\n"
            f"base_model: base\nparameters: {shared}\ndtype: {dtype}\n"
        )

    def moe(mode: str) -> str:
        experts = "\n".join(
            f"- source_model: {name}\n  positive_prompts: [w{9 * n + 3} w{9 * n + 4}, w{9 * n + 8}]"
            for n, name in enumerate(("base", "ft1", "ft2", "ft1"))
        )
        return f"base_model: base\ngate_mode: {mode}\ndtype: bfloat16\nexperts:\n{experts}\n"

    return {
        "linear": "models: [{model: ft1, parameters: {weight: 0.5}}, {model: ft2, parameters: {weight: 0.3}}]\n"
        "merge_method: linear\ndtype: bfloat16\n",
        "slerp": "slices: [{sources: [{model: base, layer_range: [0, 20]}, {model: ft1, layer_range: [0, 20]}]}]\n"
        f"merge_method: slerp\nbase_model: base\nparameters: {{t: {t}}}\ndtype: bfloat16\n",
        "passthrough": "slices: [{sources: [{model: ft1, layer_range: [0, 20]}]}, {sources: [{model: ft2, layer_range: "
        "[15, 20]}]}]\nmerge_method: passthrough\ndtype: bfloat16\n",
        "ties": tuned("ties", "float16", 0.5, "{normalize: true}"),
        "dare_ties": tuned("dare_ties", "bfloat16", 0.53, "{int8_mask: true}"),
        **{f"moe_{mode}": moe(mode) for mode in ("random", "cheap_embed", "hidden")},
    }


def measure(command: list[str], folder: Path) -> dict:
    """Wall and processor seconds and peak megabytes of one process."""
    environment = dict(os.environ, OMP_NUM_THREADS=THREADS, MKL_NUM_THREADS=THREADS, PYTHONPATH=str(ROOT))
    start = time.perf_counter()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(folder / 'log').read_text()[-3000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall": time.perf_counter() - start, "cpu": cpu, "peak": usage.ru_maxrss / 1024}


def compare(name: str, folder: Path, peer: str | None, rounds: int) -> None:
    """One line: medians of ours, of mergekit's and of cp, and the ratios of processor seconds."""
    kind = "moe" if name.startswith("moe") else "yaml"
    flags = [f"{name}.yml", "OUT", "--random-seed", "1", "--quiet", "--allow-crimes", "--copy-tokenizer"]
    flags += ["--no-write-model-card"] if kind == "yaml" else []  # mergekit asks the hub for it; its moe writes none
    commands = {"ours": [sys.executable, str(ROOT / "tools/merge.py"), kind, *flags]}
    if peer:
        commands["mergekit"] = [str(Path(peer).parent.resolve() / f"mergekit-{kind}"), *flags]
    taken: dict[str, list[dict]] = {key: [] for key in [*commands, "cp"]}
    for _ in range(rounds):
        for key, command in commands.items():
            shutil.rmtree(folder / key, ignore_errors=True)
            os.sync()
            taken[key].append(measure([key if word == "OUT" else word for word in command], folder))
        os.sync()
        taken["cp"].append(measure(["cp", "-r", "ours", "copy"], folder))
        size = sum(path.stat().st_size for path in (folder / "copy").iterdir())
        for key in taken:
            shutil.rmtree(folder / ("copy" if key == "cp" else key))
    median = {
        key: {kind: statistics.median(run[kind] for run in runs) for kind in ("wall", "cpu", "peak")}
        for key, runs in taken.items()
    }
    line = f"{name:<16} {size / 1e9:5.2f} GB"
    for key, values in median.items():
        line += f" | {key} wall {values['wall']:6.1f} s CPU {values['cpu']:6.1f} s peak {values['peak']:5.0f} MB"
    for key in [key for key in median if key != "ours"]:
        line += f" | CPU ours/{key} {median['ours']['cpu'] / max(median[key]['cpu'], 1e-3):.2f}"
    print(line, flush=True)


def main() -> None:
    """Make the models, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the models (needs 8 GB)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--width", type=int, default=1280, help="hidden size, a multiple of 40; the others follow")
    parser.add_argument("--only", nargs="+", choices=NEEDED, default=NEEDED)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        return make_models(given.make, given.width)
    peer = os.environ.get("MERGEKIT_PYTHON")
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    kind = cpu[1] if cpu else "unknown processor"
    print(f"machine: {kind}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, {THREADS} threads")
    if not peer:
        print("mergekit is not measured: MERGEKIT_PYTHON does not name a Python that has it")
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="bench_merge_") as place:
        command = [sys.executable, __file__, "--make", place, "--width", str(given.width)]
        subprocess.run(command, check=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
        for name, text in configs().items():
            if name in given.only:
                (Path(place) / f"{name}.yml").write_text(text)
                compare(name, Path(place), peer, given.rounds)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
