# SPDX-License-Identifier: Apache-2.0
"""Where every operator's tensors lie on the devices of one pipeline stage: the network's strategies as data.

The devices of a stage form a box of three axes, ``outer`` x ``ep`` x ``mp`` with data_parallel = outer * ep: experts
are split over ``ep``, wide matrices over ``mp``. MindSpore compiles the network as if it ran on one device and moves a
tensor wherever two neighbours want it differently; an operator without a strategy would get a made-up one and a hidden
exchange, so each has a row in ``STRATEGIES``.

A part that needs nothing from other devices (norm, attention of one head, routing of one group) is compiled as one
operator whose inside sees this device's slice only (MindSpore's ``Morph``): the very cell that runs on one device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mindspore.ops.operations as P
from mindspore import Tensor, nn
from mindspore.parallel import Layout

from mindformers_ext.core.config.keys import SHARDED_MODES
from mindformers_ext.core.spec import NetworkSpec, ParallelSpec

AXES = ("outer", "ep", "mp")
PER_GROUP = ("tok", "tok -", "tok -")  # the loss, report and counts of routing groups
# One word per dimension of a tensor: "-" not cut, or what it is cut by. "dp" is data parallel, "tok" cuts the tokens
# (also over mp under sequence parallel, which "seq" stands for), "head" and "table" cut the vocabulary where it is cut.
# Per operator: inputs -> outputs; without outputs MindSpore derives them.
STRATEGIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "tokens": (("dp -",), ("dp -",)),
    "own targets": (("dp -",), ("dp", "dp")),
    "targets": (("dp -", "dp -"), ("dp", "dp")),
    "embedding": (("table -", "rows"), ("tok -",)),
    "norm": (("tok -", "-"), ("tok -",)),
    "project in": (("dp -", "mp -"), ()),
    "bias": (("dp mp", "mp"), ()),
    "whole bias": (("tok -", "-"), ()),
    "head norm": (("dp - mp -", "-"), ("dp - mp -",)),
    "rotary": (("dp - mp -", "- - - -", "- - - -"), ("dp - mp -",)),
    "attend": (("dp - mp", "dp - mp", "dp - mp"), ("dp - mp",)),
    "rotary documents": (("dp - mp -", "dp - - -", "dp - - -"), ("dp - mp -",)),
    "attend documents": (("dp - mp", "dp - mp", "dp - mp", "dp -"), ("dp - mp",)),
    "document tables": (("dp -", "- - - -", "- - - -"), ("dp - - -", "dp - - -")),
    "counted": (("dp -",), ("dp",)),
    # attention whose heads are experts: who passes which is routed by groups of tokens
    "pass experts": (("tok - -",), ("tok - -", "tok - -", "tok")),
    "pass counted experts": (("tok - -", "tok -"), ("tok - -", "tok - -", "tok")),
    "attend experts": (("dp - mp",) * 5, ("dp - mp",)),
    "attend experts in documents": (("dp - mp",) * 5 + ("dp -",), ("dp - mp",)),
    "passed biases": (("tok -", "- -"), ()),
    "project out": (("dp mp", "- mp"), ("tok -",)),
    "residual": (("tok -", "tok -"), ()),
    "feed forward": (("dp mp", "dp mp"), ("dp mp",)),
    "gate": (("tok -", "- -"), ()),
    "gate rows": (("tok -",), ("tok -",)),
    "noise": (("dp -",), ("dp -",)),
    "noises": (("dp -",), ()),
    "slots": (("tok - -", "-"), ("tok - -", "tok - -", "tok - -", "tok - -", "tok - -", *PER_GROUP)),
    "counted slots": (
        ("tok - -", "-", "tok -"),
        ("tok - -", "tok - -", "tok - -", "tok - -", "tok - -", *PER_GROUP),
    ),
    "dispatch": (("tok - -", "tok - -", "tok - -", "tok - -"), ("tok - - -",)),
    # G = (outer, ep, seq) groups and E experts: tokens to their experts and back, over ep
    "to experts": (("outer - seq ep - -",), ()),
    "expert in": (("ep outer -", "ep mp -"), ()),
    "expert": (("ep outer mp", "ep outer mp"), ("ep outer mp",)),
    # summed over mp on every device: with a cut output MindSpore would scatter the experts and not the rows
    "expert out": (("ep outer mp", "ep - mp"), ()),
    "expert biases": (("ep -",), ()),
    "expert bias": (("ep outer -", "ep - -"), ()),
    "from experts": (("ep outer seq - - -",), ()),
    # the shared experts' rows
    "gated rows": (("tok -", "tok -"), ("tok -",)),
    "scaled rows": (("tok -",), ("tok -",)),
    "spread scores": (("dp -", "mp -"), ()),
    "weighed hidden": (("dp mp", "dp mp"), ()),
    "mean rows": (("tok -", "tok -", "tok -"), ("tok -",)),
    "combine": (("tok - - -", "tok - -", "tok - -", "tok - -", "tok - -"), ("tok - -",)),
    # each device gives its own rows and gets them back multiplied (ms.moe.exchange)
    "grouped experts": (("tok - - -", "tok -", "ep mp -", "ep mp -", "ep - mp"), ("tok - - -",)),
    "grouped biased experts": (("tok - - -", "tok -", "ep mp -", "ep mp -", "ep - mp", "ep -"), ("tok - - -",)),
    "group mean": (("tok",), ()),
    "groups": (("tok", "tok"), ()),
    "scaled groups": (("tok", ""), ()),
    "reports": (("- tok -",), ()),
    "report": (("- -",), ("- -", "-")),
    "kept report": (("tok -",), ("tok -",)),
    "kept reports": (("tok -", "tok -"), ()),
    "head": (("rest -", "head -"), ()),
    "rows": (("rest -", "rest", "rest"), ("rest",)),
    "row sums": (("- rest",), ()),
    "total": (("-",), ()),
    "total and scalar": (("-", ""), ()),
    "totals": (("-", "-"), ()),
    "logits": (("rest head",), ()),
    "scalars": (("", ""), ()),
    "scalar": (("",), ()),
    # masks (``ms.l0``): whole on every device, which takes the part that its own slice of a tensor is multiplied by
    "layer mask": (("- -", "- -"), ("-",)),
    "layer values": (("- -",), ("-",)),
    "vectors": (("-", "-"), ("-",)),
    "vector": (("-",), ("-",)),
    "masked rows": (("tok -", "-"), ("tok -",)),
    "masked columns": (("dp mp", "mp"), ("dp mp",)),
    "masked norm": (("tok -", "-", "-"), ("tok -",)),
    "penalty": (("-", "-", "-", "-"), ("-",)),
}


class Shards:
    """The strategies of one network. On one device nothing is wrapped and nothing changes."""

    def __init__(self, spec: NetworkSpec | None = None) -> None:
        parallel = spec.parallel if spec else ParallelSpec()
        self.active = parallel.parallel_mode in SHARDED_MODES and parallel.device_num > 1
        self.dp, self.mp = (parallel.data_parallel, parallel.model_parallel) if self.active else (1, 1)
        self.ep = parallel.expert_parallel if spec and spec.model.moe and self.active else 1
        self.outer = self.dp // self.ep
        self.sizes = {"outer": self.outer, "ep": self.ep, "mp": self.mp}
        self.stages = parallel.pipeline_stage if self.active else 1
        rows = spec.model.vocab_size if spec else 1
        self.head_is_cut = self.mp > 1 and not parallel.vocab_emb_dp and rows % self.mp == 0
        tokens = AXES if parallel.use_seq_parallel else AXES[:2]
        self.words: dict[str, tuple[str, ...]] = {
            **{axis: (axis,) for axis in AXES},
            "dp": AXES[:2],
            "tok": tokens,
            "seq": tokens[2:],
            "outer+mp": ("outer", "mp"),
            "head": ("mp",) if self.head_is_cut else (),
            "table": ("mp",) if self.head_is_cut else (),
            "rows": AXES[:2] if self.head_is_cut else tokens,
            "rest": AXES[:2] if self.head_is_cut else tokens,
            "-": (),
        }

    def layout(self, text: str) -> Layout:
        """The layout that a row's text means, one word per dimension."""
        box = Layout(tuple(self.sizes.values()), AXES)
        axes = (self.words[word] for word in text.split())
        return box(*(names if len(names) > 1 else names[0] if names else "None" for names in axes))

    def counts(self, text: str) -> tuple[int, ...]:
        """The same as numbers of parts, which every operator takes: then MindSpore lays the first dimension over the
        slowest axes, as ``layout`` does wherever a row does not name ``outer`` or ``ep``."""
        return tuple(math.prod(self.sizes[axis] for axis in self.words[word]) for word in text.split())

    def shard(self, primitive: P.Primitive, row: str) -> P.Primitive:
        """``primitive`` with the strategy of ``row``."""
        if not self.active:
            return primitive
        named = any(axis in text.split() for text in STRATEGIES[row][0] for axis in AXES[:2])
        place = self.layout if named else self.counts
        inputs, outputs = (tuple(map(place, side)) for side in STRATEGIES[row])
        return primitive.shard(inputs, outputs) if outputs else primitive.shard(inputs)

    def shard_list(self, primitive: P.Primitive, text: str, count: int) -> P.Primitive:
        """``primitive`` of a list of ``count`` tensors that all lie as ``text`` says."""
        if not self.active:
            return primitive
        return primitive.shard((self.counts(text),) * count)

    def region(self, function: Callable, row: str, shape: Callable, kind: Callable) -> Any:
        """``function`` of a fixed number of tensors as one operator of the cut graph; None on one device."""
        if not self.active:
            return None
        inputs, outputs = STRATEGIES[row]
        region = P.Morph(function, shape, kind).add_prim_attr("self_define_shard", True)
        return region.shard(in_strategy=tuple(map(self.layout, inputs)), out_strategy=tuple(map(self.layout, outputs)))

    def local(self, cell: nn.Cell, row: str, shape: Callable | None = None, kind: Callable | None = None) -> nn.Cell:
        """``cell`` run by every device on its own slices.

        Args:
            cell: has no parameters; its sizes are those of a slice.
            row: its row in ``STRATEGIES``.
            shape: whole output shape or shapes from the whole input shapes; default the first input's.
            kind: the same for the types.
        """
        if not self.active:
            return cell
        return _Local(cell, self, row, shape, kind)

    def stage(self, cell: nn.Cell, stage: int) -> nn.Cell:
        """Put ``cell`` on a pipeline stage."""
        if self.stages > 1:
            cell.pipeline_stage = stage
        return cell


class _Local(nn.Cell):
    """A cell as one operator of the cut graph. MindSpore wants a plain function with a fixed number of arguments."""

    def __init__(self, cell: nn.Cell, shards: Shards, row: str, shape: Callable | None, kind: Callable | None) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell
        place = len(STRATEGIES[row][0]) - 1
        run = (self.run_1, self.run_2, self.run_3, self.run_4, self.run_5, self.run_6)[place]
        first = (_first_of_1, _first_of_2, _first_of_3, _first_of_4, _first_of_5, _first_of_6)[place]
        self.region = shards.region(run, row, shape or first, kind or first)

    def construct(self, *inputs: Tensor) -> Any:
        return self.region(*inputs)

    def run_1(self, a: Tensor) -> Any:
        """The cell on one input."""
        return self.cell(a)

    def run_2(self, a: Tensor, b: Tensor) -> Any:
        """The cell on two inputs."""
        return self.cell(a, b)

    def run_3(self, a: Tensor, b: Tensor, c: Tensor) -> Any:
        """The cell on three inputs."""
        return self.cell(a, b, c)

    def run_4(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Any:
        """The cell on four inputs."""
        return self.cell(a, b, c, d)

    def run_5(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor) -> Any:
        """The cell on five inputs."""
        return self.cell(a, b, c, d, e)

    def run_6(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> Any:
        """The cell on six inputs."""
        return self.cell(a, b, c, d, e, f)


def of_one(size: int) -> Callable:
    """The shape (size), whatever that of the one input is, for ``Shards.local``."""

    def shape(a: list) -> list:
        return [size]

    return shape


def of_two(size: int) -> Callable:
    """The same of two inputs."""

    def shape(a: list, b: list) -> list:
        return [size]

    return shape


def _first_of_1(a: Any) -> Any:
    return a


def _first_of_2(a: Any, b: Any) -> Any:
    return a


def _first_of_3(a: Any, b: Any, c: Any) -> Any:
    return a


def _first_of_4(a: Any, b: Any, c: Any, d: Any) -> Any:
    return a


def _first_of_5(a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
    return a


def _first_of_6(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
    return a
