# SPDX-License-Identifier: Apache-2.0
"""MindSpore's graphs as text (``MS_DEV_SAVE_GRAPHS``): parameters, collectives, arithmetic, generated strategies.

One operator takes several lines: its call, ``: (input types) -> (output types)``, in graphs with sizes that are not
known the same with names of sizes, and comments that start with its scope. A graph may call others; how often each runs
in one step follows from the calls, both branches of a condition counting once.

How many blocks of numbers ``AlltoAllV`` moves stands in two lists, of what is sent and what is received, which are
known when it runs. Two that share a list move as many blocks: where one's size is known, so is the other's.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mindformers_ext.core.errors import UserError

COLLECTIVES = (
    "AllReduce",
    "AllGather",
    "ReduceScatter",
    "AlltoAll",
    "AlltoAllV",
    "AllToAllv",
    "Broadcast",
    "Send",
    "Receive",
)
PRODUCTS = ("MatMul", "BatchMatMul", "MatMulExt")
BYTES = {
    "Float64": 8,
    "Float32": 4,
    "Float16": 2,
    "BFloat16": 2,
    "Int64": 8,
    "Int32": 4,
    "Int16": 2,
    "Int8": 1,
    "UInt8": 1,
    "Bool": 1,
}
UNKNOWN = (0,)  # the shape of a tensor whose size the graph does not tell
_ENTRY = re.compile(r"# IR entry: @(\S+)")
_SUBGRAPH = re.compile(r"subgraph @([^\s(]+)\(")
_PARAMETER = re.compile(r"%para\d+_(\S+): <(?:Ref\[)?Tensor\[(\w+)\]\]?, \(([\d, ]*)\)")
_CALL = re.compile(r" = (?:PrimFunc_)?([A-Za-z]\w*)")
# A call names its graph, or, for a value that holds graphs (a closure, a chosen branch), those that it may hold.
_INVOKED = re.compile(r" = (?:call (@[^\s(]+)|%[\w.]+\[(@.*?)\]\()")
_GRAPH = re.compile(r"@([^\s(),\]]+)")
_UNSIZED = re.compile(r"Tensor\[(\w+)\]\]?, \(-1\)")
_LISTS = re.compile(r"AlltoAllV\([^,]+, (%\w+), (%\w+)\).*block_size: I64\((\d+)\)")
_TENSOR = re.compile(r"Tensor\[(\w+)\]\]?, \(([\d, ]*)\)")
_RANKS = re.compile(r"(?:group_rank_ids|rank_list): \(([\d, ]*)\)")
_PEER = re.compile(r"(?:dest_rank|src_rank): I64\((\d+)\)")
_GROUP = re.compile(r'group: "([^"]*)"')
_INSTANCE = re.compile(r"\{instance name: ([^}]*)\}")
_OWNER = re.compile(r'mirror_user_id: "([^"]*)"')
_SCOPE = re.compile(r"# Fullname with scope: \((.*)\)")


@dataclass(frozen=True)
class GraphTensor:
    """Type (``Float32``) and shape of one tensor on this rank."""

    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes; 0 for a type that is not known."""
        return math.prod(self.shape) * BYTES.get(self.kind, 0)


@dataclass(frozen=True)
class Collective:
    """One operator that moves data between ranks, and how often a step runs it.

    ``ranks`` are the members of its group, or sender and receiver. ``parameter`` is the weight whose gradient or slice
    it moves, '' for activations. ``scope`` tells the layer. ``lists``: what tells the sizes of an ``AlltoAllV``, in
    blocks of ``block`` numbers; its ``source`` and ``result`` have no numbers where the graph does not tell them.
    """

    kind: str
    source: GraphTensor
    result: GraphTensor
    group: str
    ranks: tuple[int, ...]
    instance: str
    parameter: str
    scope: str
    graph: str
    times: int = 1
    lists: tuple[str, ...] = ()
    block: int = 1

    @property
    def payload(self) -> int:
        """Bytes of the whole tensor that one run is about: the larger of input and output."""
        return max(self.source.nbytes, self.result.nbytes)


@dataclass(frozen=True)
class GraphFacts:
    """What one rank's whole graph holds. ``matmul_flops``: two per multiplication and addition of products; ``entry``:
    the graph's name, which holds that of the cell it was compiled from."""

    parameters: dict[str, GraphTensor]
    collectives: tuple[Collective, ...]
    operators: Counter[str]
    matmul_flops: int
    entry: str = ""


def read_graph(path: Path) -> GraphFacts:
    """Parameters, collectives and the number of operators by kind of the graph in ``path``.

    Raises:
        UserError: the file holds no graph.
    """
    parameters: dict[str, GraphTensor] = {}
    found: list[Collective] = []
    products: Counter[str] = Counter()
    calls: dict[str, Counter[str]] = {}
    operators: dict[str, Counter[str]] = {}
    entry, here = "", ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("%para"):
                match = _PARAMETER.match(line)
                if match:
                    parameters[match[1]] = GraphTensor(match[2], _numbers(match[3]))
            elif line.startswith("subgraph @"):
                here = _name(_SUBGRAPH.match(line), 1)
                calls[here], operators[here] = Counter(), Counter()
            elif line.startswith("  %") and here:
                kind = _name(_CALL.search(line), 1)
                operators[here][kind] += 1
                invoked = _INVOKED.search(line)
                if invoked:
                    calls[here].update(_GRAPH.findall(invoked[0]))
                if kind in COLLECTIVES:
                    found.append(_collective(kind, line, file, here))
                elif kind in PRODUCTS:
                    products[here] += _product_flops(next(file, ""))
            elif line.startswith("# IR entry"):
                entry = _name(_ENTRY.match(line), 1)
    if not calls:
        raise UserError(f"{path} holds no graph of MindSpore")
    times = _times(entry, calls)
    total: Counter[str] = Counter()
    for graph, counts in operators.items():
        for kind, count in counts.items():
            total[kind] += count * times.get(graph, 0)
    flops = sum(count * times.get(graph, 0) for graph, count in products.items())
    collectives = tuple(replace(item, times=times.get(item.graph, 0)) for item in _sized(found))
    return GraphFacts(parameters, collectives, total, flops, entry)


@dataclass(frozen=True)
class Unplanned:
    """An operator that took part in the cutting without a strategy of its own: it got a generated one."""

    kind: str
    scope: str
    strategy: str


_GENERATED = re.compile(r"gen_strategy: (\(\(.*?\)\))")


def unplanned_operators(path: Path) -> list[Unplanned]:
    """Operators of the graph after cutting (``step_parallel_end``) whose strategy MindSpore had to make up."""
    found = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if "gen_strategy" not in line or "in_strategy" in line:
                continue
            kind, strategy = _name(_CALL.search(line), 1), _name(_GENERATED.search(line), 1)
            next(file, "")
            found.append(Unplanned(kind, _name(_SCOPE.search(next(file, "")), 1), strategy))
    return found


def _collective(kind: str, line: str, following: Iterator[str], graph: str) -> Collective:
    """The operator of ``line``; reads its types and scope from the two lines after it."""
    left, _, right = next(following, "").partition("->")
    source, result = _first_tensor(left), _first_tensor(right)
    behind = next(following, "")
    if behind.startswith("      : (S:"):
        behind = next(following, "")
    scope, lists = _name(_SCOPE.search(behind), 1), _LISTS.search(line)
    ranks = _numbers(_name(_RANKS.search(line), 1)) or _numbers(_name(_PEER.search(line), 1))
    return Collective(
        kind,
        source,
        result,
        _name(_GROUP.search(line), 1),
        ranks,
        _name(_INSTANCE.search(line), 1),
        _name(_OWNER.search(line), 1),
        scope,
        graph,
        lists=(lists[1], lists[2]) if lists else (),
        block=int(lists[3]) if lists else 1,
    )


def _sized(found: list[Collective]) -> list[Collective]:
    """The same, with the sizes that follow from lists which others of their graph share."""
    blocks = {
        (item.graph, name): math.prod(tensor.shape) // item.block
        for item in found
        for name, tensor in zip(item.lists, (item.source, item.result), strict=False)
        if tensor.shape != UNKNOWN
    }

    def known(item: Collective, side: int, tensor: GraphTensor) -> GraphTensor:
        return replace(tensor, shape=(blocks.get((item.graph, item.lists[side]), 0) * item.block,))

    return [
        replace(item, source=known(item, 0, item.source), result=known(item, 1, item.result)) if item.lists else item
        for item in found
    ]


def _product_flops(types: str) -> int:
    """2 M K N per product, from the element counts alone: MK * KN / MN = K^2, for each of the leading products."""
    tensors = [_numbers(shape) for _, shape in _TENSOR.findall(types)]
    if len(tensors) < 3:
        return 0
    left, right, result = tensors[0], tensors[1], tensors[-1]
    leading = math.prod(result[:-2])
    inner = math.isqrt(math.prod(left) * math.prod(right) // max(math.prod(result) * leading, 1))
    return 2 * math.prod(result) * inner


def _first_tensor(text: str) -> GraphTensor:
    match, unsized = _TENSOR.search(text), _UNSIZED.search(text)
    if unsized and not (match and match.start() < unsized.start()):
        return GraphTensor(unsized[1], UNKNOWN)
    return GraphTensor(match[1], _numbers(match[2])) if match else GraphTensor("", ())


def _times(entry: str, calls: dict[str, Counter[str]]) -> dict[str, int]:
    """How often one step runs each graph. Graphs do not call each other in circles in a training step."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(graph: str) -> None:
        if graph in seen or graph not in calls:
            return
        seen.add(graph)
        for callee in calls[graph]:
            visit(callee)
        order.append(graph)

    visit(entry if entry in calls else next(iter(calls)))
    times = {order[-1]: 1}
    for graph in reversed(order):  # callers before callees
        for callee, count in calls[graph].items():
            if callee in calls:
                times[callee] = times.get(callee, 0) + count * times.get(graph, 0)
    return times


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


def _name(match: re.Match[str] | None, group: int) -> str:
    return match[group] if match else ""
