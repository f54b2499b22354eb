# SPDX-License-Identifier: Apache-2.0
"""Merging and cutting of a checkpoint of real width: time and peak memory, against cp in the same run.

    python tools/bench/reshard.py [--gigabytes 3] [--folder DIR] [--output_format ckpt]

One layer of Mixtral-8x7B repeated to the size asked for, cut for dp 2 x mp 4 x ep 2 with optimizer sharding (8 ranks),
bfloat16 random bits. The set is made, measured and deleted; the disk needs three times its size.
"""

import set_up  # noqa: F401 (first)

# isort: split
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mindformers_ext.formats.ms_ckpt import CkptWriter  # noqa: E402
from mindformers_ext.formats.strategy import read_strategy  # noqa: E402
from mindformers_ext.formats.tensors import TensorInfo  # noqa: E402
from tests.helpers.sliced import write_strategy  # noqa: E402

# name, whole shape, tensor map over the device matrix [2, 4], whether optimizer sharding goes over the two replicas
LAYER = (
    ("attention.wq.weight", (4096, 4096), [0, -1], True),
    ("attention.wk.weight", (1024, 4096), [0, -1], True),
    ("attention.wv.weight", (1024, 4096), [0, -1], True),
    ("attention.wo.weight", (4096, 4096), [-1, 0], True),
    ("attention_norm.weight", (4096,), [-1], False),
    ("ffn_norm.weight", (4096,), [-1], False),
    ("feed_forward.router.dense.weight", (8, 4096), [-1, -1], False),
    ("feed_forward.ffn.w1.weight", (8, 14336, 4096), [1, 0, -1], False),
    ("feed_forward.ffn.w2.weight", (8, 4096, 14336), [1, -1, 0], False),
    ("feed_forward.ffn.w3.weight", (8, 14336, 4096), [1, 0, -1], False),
)


def make(folder, gigabytes, width):
    """The strategy and eight ranks of random bits; returns the bytes of the whole model."""
    rows, shapes = {}, {}
    layer_bytes = 2 * sum(int(np.prod(scaled(shape, width))) for _, shape, _, _ in LAYER)
    for layer in range(max(1, round(gigabytes * 1e9 / layer_bytes))):
        for name, shape, tensor_map, sharded in LAYER:
            full = f"model.layers.{layer}.{name}"
            rows[full] = dict(matrix=[2, 4], tensor_map=tensor_map, step=4 * sharded, size=-1 if sharded else 0)
            shapes[full] = scaled(shape, width)
    strategy = read_strategy(write_strategy(folder / "strategy" / "s.ckpt", rows))
    block = np.random.default_rng(0).integers(0, 2**16, 2**23, np.uint16).view(ml_dtypes.bfloat16)
    for rank in range(8):
        path = folder / "ranks" / f"rank_{rank}" / "x.ckpt"
        path.parent.mkdir(parents=True)
        with CkptWriter(path) as writer:
            for name, layout in strategy.stages[0].items():
                shape = tuple(item.stop - item.start for item in layout.box(shapes[name], rank))
                numbers = blocks(block, int(np.prod(shape)), sum(layout.place(rank)))
                writer.add_parts(TensorInfo(name, shape, block.dtype), numbers)
    return 2 * sum(int(np.prod(shape)) for shape in shapes.values())


def scaled(shape, width):
    """``shape`` for a hidden size of ``width``; the axis of the 8 experts stays."""
    return tuple(size if size == 8 else size * width // 4096 for size in shape)


def blocks(block, count, start):
    """``count`` numbers out of ``block``, piece by piece, from place ``start`` on; equal for ranks with equal parts."""
    piece = np.roll(block[: 2**20], start)
    while count > 0:
        yield piece[:count]
        count -= len(piece)


COMMAND = (
    "import resource, sys; from mindformers_ext.cli.transform_ckpt import main; code = main(sys.argv[1:]); "
    "use = resource.getrusage(resource.RUSAGE_SELF); "
    "peak = next(line for line in open('/proc/self/status') if 'VmHWM' in line).split()[1]; "
    "print(int(peak) / 1024, use.ru_utime + use.ru_stime); sys.exit(code)"
)


def measured(command):
    """Seconds of a command, and the last two numbers it prints (peak resident MB and CPU seconds), if any."""
    started = time.monotonic()
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return seconds, *(float(word) for word in done.stdout.split()[-2:])


def main():
    """Print one line for each direction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--width", type=int, default=4096, help="hidden size, a multiple of 256")
    parser.add_argument("--folder", type=Path, help="where to make the set (default: the system's temporary folder)")
    parser.add_argument("--output_format", choices=("ckpt", "safetensors"), default="ckpt")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.folder, prefix="reshard_"))
    tool = [sys.executable, "-c", COMMAND, "--output_format", options.output_format]
    try:
        size = make(work, options.gigabytes, options.width)
        print(f"{size / 1e9:.2f} GB in 8 ranks (dp 2 x mp 4 x ep 2, optimizer sharding), {os.cpu_count()} cores")
        held = sum(path.stat().st_size for path in work.rglob("x.ckpt"))
        copy, *_ = measured(["cp", "-r", work / "ranks", work / "copy"])
        copy /= held / size  # replicas make the ranks larger than the model
        shutil.rmtree(work / "copy")
        print(f"cp     {size / 1e6 / copy:6.0f} MB/s")
        merge = ["--src_ckpt_dir", work / "ranks", "--src_ckpt_strategy", work / "strategy"]
        cut = ["--src_ckpt_dir", work / "whole", "--dst_ckpt_strategy", work / "strategy"]
        for label, words, out in (("merge", merge, "whole"), ("cut", cut, "again")):
            seconds, peak, cpu = measured([*tool, *words, "--dst_ckpt_dir", work / out])
            written = sum(path.stat().st_size for path in (work / out).rglob("*.*"))
            ratio = written / seconds / (size / copy)
            print(
                f"{label:6} {written / 1e6 / seconds:6.0f} MB/s, {ratio:.2f} of cp, peak {peak:.0f} MB, "
                f"CPU {cpu:.1f} s for {written / 1e9:.2f} GB"
            )
        if options.output_format == "ckpt":
            for rank in range(8):
                first, again = work / "ranks" / f"rank_{rank}" / "x.ckpt", work / "again" / f"rank_{rank}"
                subprocess.run(["cmp", first, again / f"checkpoint_{rank}.ckpt"], check=True)
            print("the ranks cut from the merged file equal the first ones, byte by byte")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
