# SPDX-License-Identifier: Apache-2.0
"""Conversion of one real-width layer of Mixtral-8x7B with its embeddings (3.4 GB in bfloat16), against ``cp``.

Random weights are made in a temporary folder, which is deleted at the end. Each conversion is a fresh process; its peak
memory is the kernel's own figure (VmHWM), its time from start to the file under its final name on the disk. The peer is
``cp`` of the same source bytes followed by ``sync`` of the copy, run directly before, on the same disk. Ratios are
source bytes per second of ours over those of the peer: by wall clock, by processor time (user and system), and by
wall clock without waiting for the disk (neither side syncs).

    python tools/bench/convert.py [--folder DIR] [--rounds 3] [--experts 8] [--only GMM]
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

import ml_dtypes
import numpy as np

from mindformers_ext.core.config.hf import hf_config_from_spec
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.safetensors_dir import SafetensorsDirWriter
from mindformers_ext.formats.tensors import TensorInfo
from mindformers_ext.weights.convert import rule_set

# A child that converts and prints its own figures; syncing can be turned off to see the processor's part alone.
CHILD = """
import json, os, re, sys, time
sync, start = sys.argv[1] == "sync", time.perf_counter()
if not sync:
    os.fsync = lambda descriptor: None
from mindformers_ext.cli.convert import main
code = main(sys.argv[2:])
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
times = os.times()
print(json.dumps(dict(code=code, wall=time.perf_counter() - start, cpu=times.user + times.system, peak=peak)))
"""
BF16 = np.dtype(ml_dtypes.bfloat16)


def make_model(folder: Path, experts: int, width: int) -> int:
    """Write the layer with random weights of a real model's spread; returns its bytes."""
    spec = ModelSpec(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=width // 32,
        moe=MoESpec(num_local_experts=experts, num_experts_per_tok=2),
    )
    targets = [
        TensorInfo(name, shape, BF16) for binding in rule_set(spec).bindings for name, shape in binding.hf.items()
    ]
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(2**22, dtype=np.float32) * 0.02).astype(BF16)
    folder.mkdir()
    with SafetensorsDirWriter(folder, targets, 10**9) as writer:
        for info in targets:
            writer.add_parts(info, parts(rng, pool, int(np.prod(info.shape))))
    (folder / "config.json").write_text(json.dumps(hf_config_from_spec(spec) | {"torch_dtype": "bfloat16"}))
    os.sync()
    return sum(info.nbytes for info in targets)


def parts(rng: np.random.Generator, pool: np.ndarray, size: int):
    """``size`` random numbers, turned out of the pool at random places."""
    while size:
        part = np.roll(pool, int(rng.integers(len(pool))))[: min(size, len(pool))]
        yield part
        size -= len(part)


def copied(source: Path, target: Path, sync: bool) -> dict:
    """``cp -r``, and the copies flushed; wall and processor seconds."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    if sync:
        files = [target] if target.is_file() else list(target.iterdir())
        subprocess.run(["sync", *map(str, files)], check=True)
    after, wall = os.times(), time.perf_counter() - start
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    remove(target)
    return {"wall": wall, "cpu": cpu}


def converted(words: list[str], sync: bool) -> dict:
    """One conversion in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "sync" if sync else "", *words], capture_output=True, text=True, check=False
    )
    if done.returncode or not done.stdout.strip().endswith("}"):
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def remove(path: Path) -> None:
    """Delete a file with its description, or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.with_name(path.name + ".json").unlink(missing_ok=True)


def read_all(path: Path) -> None:
    """Bring the source into the page cache, so that both sides start alike."""
    for file in [path] if path.is_file() else path.iterdir():
        with open(file, "rb", buffering=0) as stream:
            while stream.read(2**24):
                pass


def measure(name: str, source: Path, words: list[str], target: Path, rounds: int, keep: bool = False) -> None:
    """One line: medians over the rounds, cp directly before each conversion."""
    size = sum(file.stat().st_size for file in ([source] if source.is_file() else source.iterdir()))
    rows: dict[str, list[tuple[dict, dict]]] = {"sync": [], "": []}
    read_all(source)
    for _ in range(rounds):
        for sync, taken in rows.items():
            theirs = copied(source, target.with_name("copy"), bool(sync))
            remove(target)
            os.sync()
            taken.append((theirs, converted([*words, "--overwrite"], bool(sync))))
            assert taken[-1][1]["code"] == 0
            os.sync()
    ratio = {
        (sync, kind): statistics.median(theirs[kind] / ours[kind] for theirs, ours in taken)
        for sync, taken in rows.items()
        for kind in ("wall", "cpu")
    }
    peak = max(ours["peak"] for taken in rows.values() for _, ours in taken)
    ours, theirs = (statistics.median(pair[place]["wall"] for pair in rows["sync"]) for place in (1, 0))
    print(
        f"{name:<34} peak RSS {peak / 1e6:4.0f} MB   {size / ours / 1e6:5.0f} MB/s (cp {size / theirs / 1e6:5.0f})   "
        f"ratio to cp: to disk {ratio['sync', 'wall']:.2f}, without sync {ratio['', 'wall']:.2f}, "
        f"processor {ratio['', 'cpu']:.2f}",
        flush=True,
    )
    if not keep:
        remove(target)


def main() -> None:
    """Make the model, measure every conversion, delete everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--experts", type=int, default=8, help="fewer for a quick look")
    parser.add_argument("--width", type=int, default=4096, help="hidden size, a multiple of 64; the others follow")
    parser.add_argument("--only", default="", help="the lines whose name holds this")
    given = parser.parse_args()
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    kind = cpu[1] if cpu else "unknown processor"
    print(f"machine: {kind}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="bench_convert_") as place:
        hf, ckpt, gmm, back = (Path(place) / name for name in ("hf", "m.ckpt", "gmm.ckpt", "back"))
        print(f"model: one layer, {make_model(hf, given.experts, given.width) / 1e9:.2f} GB bfloat16")
        forward = ["--input_path", str(hf), "--output_path"]
        reverse = ["--reversed", "--input_path", str(ckpt), "--output_path", str(back)]
        table = (
            ("HF -> .ckpt, fp16", hf, [*forward, str(gmm), "--dtype", "fp16"], gmm),
            ("HF -> .ckpt GMM, fp16", hf, [*forward, str(gmm), "--use_gmm", "--dtype", "fp16"], gmm),
            ("HF -> .ckpt GMM, unchanged", hf, [*forward, str(gmm), "--use_gmm"], gmm),
            ("HF -> .ckpt qkv_concat, unchanged", hf, [*forward, str(gmm), "--qkv_concat"], gmm),
            ("HF -> .ckpt, unchanged", hf, [*forward, str(ckpt)], ckpt),
            (".ckpt -> HF, unchanged", ckpt, reverse, back),
            (".ckpt -> HF, fp16", ckpt, [*reverse, "--dtype", "fp16"], back),
            (
                ".ckpt -> .ckpt GMM, unchanged",
                ckpt,
                ["--pre_ckpt_path", str(ckpt), "--output_path", str(gmm), "--use_gmm"],
                gmm,
            ),
        )
        needs_ckpt = any(source == ckpt and given.only in name for name, source, *_ in table)
        for name, source, words, target in table:
            if given.only in name:
                measure(name, source, words, target, given.rounds, keep=target == ckpt)
            elif target == ckpt and needs_ckpt:
                converted(words, sync=False)


if __name__ == "__main__":
    main()
