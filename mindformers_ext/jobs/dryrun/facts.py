# SPDX-License-Identifier: Apache-2.0
"""What a dry run found out about one rank, as plain values that go to JSON and back."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mindformers_ext.core.cluster.traffic import sent_bytes
from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.graph_text import Collective, GraphFacts, Unplanned, read_graph, unplanned_operators

# MindSpore's own words in a collective's name or scope tell what it is for; the first that matches.
PURPOSES = (
    ("PARALLEL_GLOBALNORM", "norm"),
    ("parallel_optimizer", "weights"),
    ("irror", "gradients"),
    ("-TokenEmbedding/", "embedding"),
    ("redistribution", "layout"),
    ("forward_op", "partial sums"),
    ("Grad_AllGather/", "layout"),
    ("Grad_ReduceScatter/", "partial sums"),
    ("Grad_AllReduce/", "partial sums"),
    ("-ExchangedProducts/AllReduce", "partial sums"),
    ("-ExchangedProducts/", "experts"),  # how many rows the others have
    ("virtual", "data"),
)
KINDS = ("weight", "gradient", "optimizer", "cache", "other")
GRAPHS_OF = {"prompt": "PromptGraph", "token": "TokenGraph"}  # of a prediction: what one does, and its cell
ACCUMULATOR = "accu_grads"
WEIGHTS = (".weight", "_weight")


@dataclass(frozen=True)
class ParameterFact:
    """One parameter on one rank. ``kind``: weight, gradient, optimizer, cache or other (step counters, loss scale)."""

    name: str
    kind: str
    dtype: str
    whole: tuple[int, ...]
    local: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class TrafficFact:
    """Collectives of one kind and purpose in one group: how many a step runs, their payload, what this rank sends."""

    kind: str
    purpose: str
    ranks: tuple[int, ...]
    count: int
    payload: int
    sent: int


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """A rank's result; '' as error means success.

    Seconds: start, build, compile. Ranks share the imports (start): they count for the one that starts first and are
    0 for the others, so the sum over ranks is what was spent. ``peak_rss`` in bytes, of the rank's own process: it
    begins with the modules that were imported for all (0.4 GB, counted for each rank), not with the peak of importing.
    """

    rank: int
    stage: int
    error: str = ""
    start_seconds: float = 0.0
    build_seconds: float = 0.0
    compile_seconds: float = 0.0
    peak_rss: int = 0
    batch: tuple[tuple[int, ...], ...] = ()
    parameters: tuple[ParameterFact, ...] = ()
    traffic: tuple[TrafficFact, ...] = ()
    operators: Mapping[str, int] = field(default_factory=dict)
    matmul_flops: int = 0
    unplanned: tuple[Unplanned, ...] = ()
    strategy_file: str = ""

    @property
    def compiles(self) -> bool:
        """Whether the compiler accepted this rank's graph."""
        return not self.error

    def nbytes(self, kind: str) -> int:
        """Bytes of this rank's parameters of one kind."""
        return sum(parameter.nbytes for parameter in self.parameters if parameter.kind == kind)

    def largest(self, count: int = 10) -> list[ParameterFact]:
        """The largest parameters, largest first."""
        return sorted(self.parameters, key=lambda item: (-item.nbytes, item.name))[:count]

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``rank_facts_from_json`` reads them back."""
        return asdict(self)


def rank_facts_from_json(path: Path) -> RankFacts:
    """The facts that ``to_json`` gave, read from a file."""
    words = json.loads(path.read_text(encoding="utf-8"))
    words["batch"] = tuple(tuple(shape) for shape in words["batch"])
    words["parameters"] = tuple(
        ParameterFact(**{**row, "whole": tuple(row["whole"]), "local": tuple(row["local"])})
        for row in words["parameters"]
    )
    words["traffic"] = tuple(TrafficFact(**{**row, "ranks": tuple(row["ranks"])}) for row in words["traffic"])
    words["unplanned"] = tuple(Unplanned(**row) for row in words["unplanned"])
    return RankFacts(**words)


def rank_facts(graphs: Path, whole: Mapping[str, Sequence[int]], trained: Sequence[str]) -> dict[str, Any]:
    """Fields of ``RankFacts`` that stand in the graphs which MindSpore wrote below ``graphs``.

    Args:
        graphs: MS_DEV_SAVE_GRAPHS_PATH; the graphs lie below it in a folder per rank.
        whole: the uncut shape of every parameter.
        trained: names of the trained parameters.
    """
    graph = read_graph(_graph_file(graphs, "*_validate_*.ir"))
    cut = sorted(graphs.rglob("step_parallel_end_*.ir"))  # none outside semi-auto parallel
    return {
        "parameters": parameter_facts(graph, whole, trained),
        "traffic": traffic_facts(graph.collectives),
        "operators": dict(graph.operators.most_common()),
        "matmul_flops": graph.matmul_flops,
        "unplanned": tuple(unplanned_operators(cut[-1])) if cut else (),
    }


def prediction_facts(
    graphs: Path, whole: Mapping[str, Sequence[int]], world: int, wanted: Sequence[str]
) -> dict[str, Any]:
    """The same fields from the graphs that generate.

    Args:
        graphs: as in ``rank_facts``.
        whole: the uncut shape of every weight.
        world: processes that hold the network together.
        wanted: of ``GRAPHS_OF``, what was compiled.
    """
    found = [read_graph(path) for path in sorted(graphs.rglob("*_validate_*.ir"))]
    parameters: dict[str, ParameterFact] = {}
    traffic: list[TrafficFact] = []
    operators: Counter[str] = Counter()
    flops = 0
    for phase in wanted:
        graph = next((graph for graph in found if GRAPHS_OF[phase] in graph.entry), None)
        if graph is None:
            raise UserError(f"MindSpore wrote no graph of {GRAPHS_OF[phase]} below {graphs}")
        for name, tensor in graph.parameters.items():
            if name in whole or name.startswith("cache."):
                kind = "weight" if name in whole else "cache"
                shape = tuple(whole.get(name, (tensor.shape[0] * world, *tensor.shape[1:])))
                parameters[name] = ParameterFact(name, kind, tensor.kind, shape, tensor.shape, tensor.nbytes)
        everyone = [replace(item, ranks=item.ranks or tuple(range(world))) for item in graph.collectives]
        traffic += [
            replace(row, purpose=f"{phase}: {'sums' if row.kind == 'AllReduce' else 'logits'}")
            for row in traffic_facts(everyone)
        ]
        operators.update(graph.operators)
        flops += graph.matmul_flops
    return {
        "parameters": tuple(parameters.values()),
        "traffic": tuple(traffic),
        "operators": dict(operators.most_common()),
        "matmul_flops": flops,
    }


def _graph_file(graphs: Path, pattern: str) -> Path:
    found = sorted(graphs.rglob(pattern))
    if not found:
        raise UserError(f"MindSpore wrote no graph below {graphs}")
    return found[-1]


def parameter_facts(
    graph: GraphFacts, whole: Mapping[str, Sequence[int]], trained: Sequence[str]
) -> tuple[ParameterFact, ...]:
    """The parameters that this rank's graph holds; those of other pipeline stages are not in it."""
    weights = set(trained)
    facts = []
    for name, tensor in graph.parameters.items():
        if name in whole:
            shape = tuple(whole[name])
            facts.append(ParameterFact(name, _kind(name, weights), tensor.kind, shape, tensor.shape, tensor.nbytes))
    return tuple(facts)


def _kind(name: str, trained: set[str]) -> str:
    prefix, _, rest = name.partition(".")
    if rest in trained:
        return "gradient" if prefix == ACCUMULATOR else "optimizer"
    return "weight" if name in trained or name.endswith(WEIGHTS) else "other"  # frozen weights end alike


def traffic_facts(collectives: Sequence[Collective]) -> tuple[TrafficFact, ...]:
    """Collectives grouped by kind, purpose and members."""
    rows: dict[tuple[str, str, tuple[int, ...]], list[int]] = defaultdict(lambda: [0, 0, 0])
    for item in collectives:
        row = rows[(item.kind, purpose(item), item.ranks)]
        row[0] += item.times
        row[1] += item.times * item.payload
        row[2] += item.times * sent_bytes(item.kind, item.payload, len(item.ranks))
    return tuple(TrafficFact(*key, *values) for key, values in sorted(rows.items()))


def purpose(item: Collective) -> str:
    """What a collective is for: experts, pipeline, gradients, weights, norm, layout, ..."""
    if item.kind in ("Send", "Receive"):
        return "pipeline"
    if item.kind.lower().startswith("alltoall"):
        return "experts"
    words = f"{item.instance} {item.scope}"
    found = next((name for word, name in PURPOSES if word in words), "other")
    return "gradients" if found == "weights" and item.kind != "AllGather" else found
