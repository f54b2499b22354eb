# SPDX-License-Identifier: Apache-2.0
"""Strategy files and rank folders for tests, written independently of the package's reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mindformers_ext.formats.ms_ckpt import CkptWriter
from mindformers_ext.formats.safetensors_file import SafetensorsFileWriter
from mindformers_ext.formats.tensors import MappingReader
from mindformers_ext.formats.wire import bytes_field, varint_field

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "strategies"
PP2, PP4 = GOLDEN / "dp2_mp4_pp2_ep2_opt", GOLDEN / "dp2_mp2_pp4_ep2_opt"
DP4, DP8, JSON = GOLDEN / "dp4_mp2_ep2_opt", GOLDEN / "dp8_mp2_ep2_opt2", GOLDEN / "dp2_mp2_ep2_json"
# The golden model: hidden 32, ffn 64, 4 experts, 8 heads, 4 key-value heads, vocabulary 96.
SHAPES = (
    ("embedding_weight", (96, 32)),
    ("lm_head.weight", (96, 32)),
    ("router.dense.weight", (4, 32)),
    ("ffn.w1.weight", (4, 64, 32)),
    ("ffn.w2.weight", (4, 32, 64)),
    ("ffn.w3.weight", (4, 64, 32)),
    ("wk.weight", (16, 32)),
    ("wv.weight", (16, 32)),
    ("wq.weight", (32, 32)),
    ("wo.weight", (32, 32)),
    ("norm.weight", (32,)),
    ("norm_out.weight", (32,)),
)


def shape_of(name):
    """The whole shape of a parameter of the golden model, or of its optimizer state."""
    return next(shape for ending, shape in SHAPES if name.endswith(ending))


def golden_arrays(names, dtype=np.float32, seed=0):
    """Random whole tensors for ``names``; gradients' accumulators are not saved, so there are none."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape_of(name)).astype(dtype) for name in sorted(names) if "accu_grads" not in name}


def cut(strategy, arrays, extras=None):
    """By rank, what its file holds."""
    ranks = []
    for rank in range(strategy.world):
        stage, local = divmod(rank, strategy.devices)
        held = {
            name: np.ascontiguousarray(arrays[name][layout.box(arrays[name].shape, local)])
            for name, layout in strategy.stages[stage].items()
            if name in arrays
        }
        ranks.append(held | (extras or {}))
    return ranks


def write_file(path, arrays):
    """One checkpoint file in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".ckpt":
        writer = CkptWriter(path)
    else:
        writer = SafetensorsFileWriter(path, list(MappingReader(arrays).infos.values()), {"format": "ms"})
    with writer:
        for name, array in arrays.items():
            writer.add(name, array)


def write_ranks(folder, ranks, suffix=".ckpt", name="mixtral_rank_{}-3_2"):
    """``folder/rank_N/NAME`` for each."""
    for rank, arrays in enumerate(ranks):
        write_file(folder / f"rank_{rank}" / (name.format(rank) + suffix), arrays)


def same(left, right):
    """Bit-equal, type and shape included."""
    return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())


def assert_holds(reader, arrays):
    """The reader holds exactly ``arrays``."""
    assert set(reader.infos) == set(arrays)
    wrong = [name for name, array in arrays.items() if not same(reader.read(name), array)]
    assert not wrong


def _number(value):
    return value if value >= 0 else value + 2**64


def _numbers(values):
    return b"".join(varint_field(1, _number(value)) for value in values)


def layout_bytes(matrix, tensor_map, step=0, size=0, field=0, split=()):
    """ParallelLayouts; ``tensor_map`` of ints, or of lists for axes that several device axes cut."""
    nested = any(isinstance(item, (list, tuple)) for item in tensor_map)
    maps = [[item] if isinstance(item, int) else item for item in tensor_map] if nested else [tensor_map]
    return (
        bytes_field(1, _numbers(matrix))
        + b"".join(bytes_field(2, _numbers(item)) for item in maps)
        + bytes_field(3, _numbers(split))
        + bytes_field(4, b"")
        + b"".join(varint_field(number, _number(value)) for number, value in ((5, field), (6, step), (7, size)))
    )


def strategy_bytes(layouts, stage=0):
    """ParallelStrategyMap of {name: arguments of layout_bytes}."""
    operator = bytes_field(1, b"MatMul") + bytes_field(2, varint_field(1, stage) + bytes_field(2, _numbers([1, 1])))
    items = (bytes_field(1, name.encode()) + bytes_field(2, layout_bytes(**row)) for name, row in layouts.items())
    return varint_field(1, 1) + bytes_field(2, operator) + b"".join(bytes_field(3, item) for item in items)


def write_strategy(path, layouts, stage=0):
    """One strategy file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(strategy_bytes(layouts, stage))
    return path
