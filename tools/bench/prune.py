# SPDX-License-Identifier: Apache-2.0
"""Cut of two real-width LLaMA layers with their embeddings (4096/11008 to 2560/6912) by soft masks, against ``cp``.

Random weights and masks are made in a temporary folder, which is deleted at the end. Each cut is a fresh process; its
peak memory is the kernel's own figure (VmHWM), its time from start to the folder under its final name on the disk. The
peer is ``cp`` of the same source bytes followed by ``sync`` of the copy, run directly before, on the same disk. The
ratio is source bytes per second of ours over those of the peer.

    python tools/bench/prune.py [--folder DIR] [--rounds 3] [--width 4096] [--dtype bfloat16]
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import convert as bench  # the same folder's
import numpy as np

from mindformers_ext.core.config.hf import hf_config_from_spec
from mindformers_ext.core.pruning import ModelShape, shape_of_model
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.dtypes import float_dtype
from mindformers_ext.formats.safetensors_dir import SafetensorsDirWriter
from mindformers_ext.formats.tensors import TensorInfo
from mindformers_ext.jobs.prune.masks_file import SavedMasks, write_masks
from mindformers_ext.weights.convert import rule_set

CHILD = bench.CHILD.replace("mindformers_ext.cli.convert", "mindformers_ext.cli.prune")


def make_model(folder: Path, width: int, dtype: str) -> ModelShape:
    """Two layers with random weights."""
    spec = ModelSpec(
        vocab_size=32000 * width // 4096,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=width // 32,
    )
    kind = float_dtype(dtype)
    targets = [TensorInfo(name, shape, kind) for item in rule_set(spec).bindings for name, shape in item.hf.items()]
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(2**22, dtype=np.float32) * 0.02).astype(kind)
    folder.mkdir()
    with SafetensorsDirWriter(folder, targets, 10**9) as writer:
        for info in targets:
            writer.add_parts(info, bench.parts(rng, pool, int(np.prod(info.shape))))
    (folder / "config.json").write_text(json.dumps(hf_config_from_spec(spec) | {"torch_dtype": dtype}))
    return shape_of_model(spec)


def make_masks(path: Path, shape: ModelShape) -> None:
    """Soft masks of five eighths of everything but the layers."""
    eighths = {"hidden_size": 5, "num_attention_heads": 5, "num_key_value_heads": 5}
    target = replace(shape, **{name: getattr(shape, name) * part // 8 for name, part in eighths.items()})
    target = replace(target, intermediate_size=shape.intermediate_size * 27 // 43)
    rng, values = np.random.default_rng(1), {}
    for name in ("hidden", "head", "intermediate"):
        mask = rng.uniform(0.5, 1.0, shape.mask_shape(name)).astype(np.float32)
        for row in np.atleast_2d(mask):
            row[rng.permutation(len(row))[target.units(name) :]] = 0.0
        values[name] = mask
    write_masks(path, SavedMasks(values, shape, target))


def main() -> None:
    """Print one line: medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=words.folder) as name:
        place = Path(name)
        shape = make_model(place / "dense", words.width, words.dtype)
        make_masks(place / "masks.npz", shape)
        size = sum(file.stat().st_size for file in (place / "dense").iterdir())
        bench.read_all(place / "dense")
        taken = []
        for _ in range(words.rounds):
            os.sync()
            theirs = bench.copied(place / "dense", place / "copy", sync=True)
            command = ["cut", str(place / "dense"), "--masks", str(place / "masks.npz"), "--output"]
            command += [str(place / "cut"), "--quiet", "--overwrite"]
            done = subprocess.run(
                [sys.executable, "-c", CHILD, "sync", *command], capture_output=True, text=True, check=False
            )
            if done.returncode or not done.stdout.strip().endswith("}"):
                raise SystemExit(done.stderr)
            taken.append((theirs, json.loads(done.stdout.splitlines()[-1])))
        wall = statistics.median(theirs["wall"] / ours["wall"] for theirs, ours in taken)
        cpu = statistics.median(theirs["cpu"] / ours["cpu"] for theirs, ours in taken)
        ours = statistics.median(ours["wall"] for _, ours in taken)
        peak = max(ours["peak"] for _, ours in taken)
        print(
            f"cut {size / 1e9:.2f} GB of {words.dtype}: {ours:.2f} s, {wall:.2f} of cp by wall clock, {cpu:.2f} by "
            f"processor time, peak {peak / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    main()
