# SPDX-License-Identifier: Apache-2.0
"""Gates of a LLaMA-MoE v2 from what enters the dense model's feed-forward parts: centres of clusters, or tokens.

One pass through the model with one layer in memory; of each layer a sample of tokens is held and clustered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.formats.atomic import fresh_file, refuse_existing
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.jobs.experts.calibration import opened
from mindformers_ext.jobs.experts.probe import Part, Tell, check_needs, needs
from mindformers_ext.jobs.experts.ranks import alone
from mindformers_ext.jobs.experts.sample import Drawn, draw
from mindformers_ext.jobs.experts.v2.layer_tables import GATE, GATES, LayerTable
from mindformers_ext.jobs.experts.v2.table_stage import TableRequest, table_by_pass
from mindformers_ext.surgery.experts.bounded import METRICS, TRIED, bounded_clusters

CLUSTERING, RANDOM = METHODS = ("clustering", "random")
PART = ".gate_{}.npy"  # a layer's gate, until all are there
CROWDED = 2.0  # times the mean of first choices: an expert that many tokens find is told of


@dataclass(frozen=True, kw_only=True)
class GatesRequest(TableRequest):
    """What is asked for. ``features``: tokens of a layer that are clustered at most. ``normalise``: centres of length
    1, which the published program does not make."""

    KIND = GATES
    experts: int = 16
    method: str = CLUSTERING
    jitter: float = 0.1
    metric: str = METRICS[0]
    passes: int = 100
    seed: int = 114514
    starts: int = 10
    features: int = 131072
    normalise: bool = False

    def collect(self, problems: Problems) -> None:
        """Add options that do not fit."""
        super().collect(problems)
        for name, value in (("num_experts", self.experts), ("max_iter", self.passes), ("n_jobs", self.starts)):
            problems.positive(f"--{name}", value)
        problems.positive("--max_features", self.features)
        problems.one_of("--method", self.method, METHODS)
        problems.one_of("--distance_metric", self.metric, METRICS)
        if not np.isfinite(self.jitter):
            problems.add(f"--balance_jitter_factor {self.jitter}", "give 0 (equal sizes) or a little more")


@dataclass
class GateSink:
    """Keeps a layer's tokens of the sample (``jobs.experts.probe.Sink``), and turns them into a gate, which is kept in
    a file of its own until all are there."""

    request: GatesRequest
    drawn: Drawn
    width: int
    place: Path
    tell: Tell
    values: tuple[str, ...] = ("mlp_input",)
    gradients: tuple[str, ...] = ()
    seen: int = 0
    x: np.ndarray = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.x = np.empty((self.drawn.count, self.width), np.float32)
        scores = 8 * self.request.experts  # a few copies of (E, tokens)
        self.nbytes = 4 * self.drawn.count * (self.width + scores) + 4 * 2 * TRIED * self.width

    def take(self, layer: int, part: Part, values: Mapping[str, np.ndarray], gradients: object) -> None:
        """Keep the part's tokens that are in the sample."""
        count = len(part.rows)
        first, end = np.searchsorted(self.drawn.kept, (self.seen, self.seen + count))
        self.x[self.drawn.slots[first:end]] = values["mlp_input"][self.drawn.kept[first:end] - self.seen]
        self.seen += count

    def end(self, layer: int) -> None:
        """Make the layer's gate."""
        self.seen = 0
        gate, said = make_gate(self.request, self.x, layer)
        with fresh_file(self.place / PART.format(layer), overwrite=True) as beside, beside.open("wb") as file:
            np.save(file, gate)
        self.tell(f"layer {layer}: {said}")


def make_gate(request: GatesRequest, x: np.ndarray, layer: int) -> tuple[np.ndarray, str]:
    """float32 (E, D) from tokens (n, D), and what became of them."""
    if request.method == RANDOM:
        if len(x) < request.experts:
            raise UserError(f"{len(x)} tokens for {request.experts} gates: give more text, or fewer --num_experts")
        chosen = np.random.default_rng((request.seed, layer)).permutation(len(x))[: request.experts]
        gate, said = x[chosen].copy(), "tokens drawn"
    else:
        found = bounded_clusters(
            x, request.experts, request.jitter, request.metric, request.seed, request.starts, request.passes
        )
        sizes = np.bincount(found.labels, minlength=request.experts)
        gate, said = found.centres, f"clusters of {sizes.min()} to {sizes.max()} tokens, inertia {found.inertia:.6g}"
    if request.normalise:
        gate = gate / np.maximum(np.linalg.norm(gate, axis=1, keepdims=True), 1e-12)
    counts = np.bincount((x @ gate.T).argmax(1), minlength=request.experts)
    said += f"; as a gate's first choice {counts.tolist()}"
    idle, crowded = int((counts == 0).sum()), int((counts > CROWDED * counts.mean()).sum())
    warned = [f"{idle} experts get no token"] * (idle > 0) + [f"{crowded} get over twice the mean"] * (crowded > 0)
    return gate.astype(np.float32), said + (f" (warning: {', '.join(warned)})" if warned else "")


def write_gates(request: GatesRequest, tell: Tell = lambda line: None) -> LayerTable | None:
    """Write the file of gates, None with ``dry_run``. A killed run goes on where it was.

    Raises:
        UserError: options, texts or a model that do not fit; too little memory or disk; a file that exists.
    """
    request.check()
    share = alone("gates are made")
    refuse_existing(request.path, request.overwrite)
    with opened(request.calibration, share, not request.dry_run) as start:
        spec = start.model.spec
        if start.tokens < request.experts:
            raise UserError(f"{start.tokens} tokens for {request.experts} experts: give more text")
        drawn = draw(start.every.lengths, share, request.features, request.seed)
        sink = GateSink(request, drawn, spec.hidden_size, request.save_path, tell)
        wanted = needs(start.course, sink, spec.num_hidden_layers, backward=False)
        for line in (
            *start.notes,
            f"{start.rows} rows, {start.tokens} tokens, {drawn.count} of them clustered in each layer; memory about "
            f"{wanted.memory / 1e9:.2f} GB, for any number of layers",
        ):
            tell(line)
        if request.dry_run:
            return None
        check_needs(wanted, request.save_path)
        about = {"model": fingerprint(start.model.reader), "texts": start.every.digest(""), "experts": request.experts}
        about |= {name: getattr(request, name) for name in ("method", "seed", "normalise", "features")}
        if request.method == CLUSTERING:
            about |= {name: getattr(request, name) for name in ("jitter", "metric", "passes", "starts")}
        return table_by_pass(request, start, sink, about, PART, lambda path: {GATE: np.load(path, allow_pickle=False)})
