# SPDX-License-Identifier: Apache-2.0
"""Runs token rows through a model layer by layer, and back: what a layer computes goes to a sink.

Only one layer's weights are in memory; what enters the layers is on disk. The way back multiplies the gradient by one
layer's Jacobian after the other, from the language model's loss summed over all tokens that are predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import psutil
from tqdm import tqdm

from mindformers_ext.core.config.run import PYTORCH
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.parameters import point_widths
from mindformers_ext.core.spec import DeviceSpec, NetworkSpec
from mindformers_ext.formats.disk import check_space
from mindformers_ext.jobs.engine.door import open_probe
from mindformers_ext.jobs.engine.protocols import LayerProbe
from mindformers_ext.jobs.experts.dense_model import StreamedModel
from mindformers_ext.jobs.experts.ranks import Share
from mindformers_ext.jobs.experts.states import Inputs, StateFile, States

Arrays = Mapping[str, np.ndarray]
Tell = Callable[[str], object]  # a line of what a job says while it works
Model = TypeVar("Model", bound=StreamedModel)
BASE = 350 * 10**6  # bytes of a process that has imported a framework
TOKENS = 2048  # that a layer computes at once, unless one row has more


@dataclass(frozen=True)
class Rows:
    """Token rows: ids (R, S) int32, padded on the right, and their lengths (R). ``trained``: bool (R, S), the tokens
    that are predicted; None: all but the first of each row."""

    ids: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int(self.lengths.sum())

    @property
    def predicted(self) -> int:
        """Tokens that are predicted where all but the first of a row are."""
        return int(np.maximum(self.lengths - 1, 0).sum())

    def share(self, share: Share) -> Rows:
        """Those of one process: every ``size``-th from its rank on, so that all together are the whole."""
        return self.at(slice(share.rank, None, share.size))

    def at(self, rows: slice) -> Rows:
        """Some of the rows."""
        return Rows(self.ids[rows], self.lengths[rows], None if self.trained is None else self.trained[rows])

    def counted(self, rows: range, length: int, mean: bool) -> np.ndarray:
        """float32 (rows, length): how much the prediction at each token counts: 1, or with ``mean`` one over how many
        the row has; 0 where the next token is not predicted."""
        inside = np.arange(1, length + 1)[None] < self.lengths[rows.start : rows.stop, None]
        if self.trained is not None:
            inside &= np.roll(self.trained[rows.start : rows.stop, :length], -1, axis=1)
        found = inside.astype(np.float32)
        return found / np.maximum(found.sum(1, keepdims=True), 1) if mean else found

    def digest(self, more: str) -> str:
        """A name for these rows and whatever ``more`` says."""
        hashed = sha256(more.encode())
        hashed.update(np.ascontiguousarray(self.ids).data)
        hashed.update(np.ascontiguousarray(self.lengths, np.int64).data)
        if self.trained is not None:
            hashed.update(np.packbits(self.trained).data)
        return hashed.hexdigest()


@dataclass(frozen=True)
class Part:
    """What a sink gets at once: tokens of ``rows`` (row numbers, one per token), which belong to batch ``batch``."""

    batch: int
    rows: np.ndarray


class Sink(Protocol):
    """Takes what the layers compute, layer after layer, part after part. ``nbytes``: what it holds at most."""

    values: tuple[str, ...]
    gradients: tuple[str, ...]
    nbytes: int

    def take(self, layer: int, part: Part, values: Arrays, gradients: Arrays) -> None:
        """float32 (tokens, width) at each asked point, padding taken out."""

    def end(self, layer: int) -> None:
        """The layer is over: what came is to be safe on the disk when this returns."""


class Nothing:
    """A sink of a pass that only moves on."""

    values: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    nbytes = 0

    def take(self, layer: int, part: Part, values: object, gradients: object) -> None:
        """Nothing."""

    def end(self, layer: int) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Course(Generic[Model]):
    """A model and the rows that go through it. ``batch``: rows of a batch, in whose order parts come. ``mean``: a row's
    loss is the mean over its predicted tokens; otherwise their sum."""

    model: Model
    rows: Rows
    engine: str
    device: DeviceSpec
    batch: int
    tokens: int = TOKENS
    quiet: bool = False
    mean: bool = False

    @property
    def length(self) -> int:
        """S."""
        return int(self.rows.ids.shape[1])

    def open(self) -> LayerProbe:
        """The engine's probe; imports the framework."""
        return open_probe(self.engine, NetworkSpec(model=self.model.spec, seq_length=self.length), self.device)

    def parts(self) -> Iterator[tuple[int, range, int]]:
        """(batch, rows, tokens a row) that are computed at once: never rows of two batches."""
        count = len(self.rows.ids)
        together = max(1, self.tokens // self.length)
        for first in range(0, count, self.batch):
            end = min(first + self.batch, count)
            for start in range(first, end, together):
                rows = range(start, min(start + together, end))
                longest = int(self.rows.lengths[start : rows.stop].max(initial=1))
                yield first // self.batch, rows, longest if self.engine == PYTORCH else self.length

    @property
    def count(self) -> int:
        """How many parts there are."""
        return sum(1 for _ in self.parts())

    def kept(self, rows: range, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Which of (rows, length) tokens are no padding, flat; and the row number of each that is kept."""
        inside = np.arange(length)[None] < self.rows.lengths[rows.start : rows.stop, None]
        return inside.reshape(-1), np.repeat(np.arange(rows.start, rows.stop), inside.sum(1))


@dataclass(frozen=True)
class Needs:
    """Bytes that a pass takes: of memory in this process, and of disk for what enters the layers."""

    memory: int
    disk: int


def needs(course: Course, sink: Sink, layers: int, backward: bool, loss: bool = False) -> Needs:
    """What the pass through ``layers`` layers takes, by arithmetic; nothing is opened. ``loss``: the head is computed,
    as it is with ``backward``."""
    model, spec = course.model, course.model.spec
    weights, largest = model.layer_bytes
    tokens = max(course.tokens // course.length, 1) * course.length
    narrow, wide = spec.hidden_size, spec.intermediate_size
    widths = point_widths(spec)
    taps = sum(widths[name] for name in (*sink.values, *sink.gradients))
    work = 4 * tokens * ((14 if backward else 6) * narrow + (6 if backward else 4) * wide + taps)
    head = 4 * (spec.vocab_size * narrow + 3 * 512 * spec.vocab_size + 4 * tokens * narrow) if backward or loss else 0
    embedding = 4 * 2 * (tokens + 4096) * narrow
    memory = BASE + sink.nbytes + max(weights + max(2 * largest, work), head, embedding)
    files = layers + 3 if backward else 2
    return Needs(memory, files * 4 * len(course.rows.ids) * course.length * narrow)


def check_needs(wanted: Needs, folder: Path, outputs: int = 0, available: int | None = None) -> None:
    """Refuse (``UserError``) what memory or the disk of ``folder`` cannot hold; ``outputs``: bytes written besides."""
    free = psutil.virtual_memory().available if available is None else available
    if wanted.memory > free:
        raise UserError(
            f"the pass needs about {wanted.memory / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free: "
            "lower --block_size, --batch_size or --save_interval, or use a machine with more"
        )
    check_space(folder, wanted.disk + outputs, inside=True)


def embed(course: Course, states: Inputs) -> None:
    """Keep what enters the first layer."""
    file = states.input_of(0)
    for _, rows, length in course.parts():
        file.write(rows, course.model.embed(course.rows.ids[rows.start : rows.stop, :length]))
    file.close()


def pass_on(course: Course, probe: LayerProbe | None, layer: int, came: Inputs, leaves: Inputs) -> None:
    """Every row through the layer that the probe holds, or past it where None; ``layer``: after whose number what
    enters and leaves it is called."""
    source, target = came.input_of(layer), leaves.input_of(layer + 1)
    for _, rows, length in course.parts():
        x = source.read(rows, length)
        target.write(rows, x if probe is None else probe.forward(x, ())[0])
    source.close()
    target.close()


def forward(course: Course, states: States, sink: Sink, layers: Sequence[int], keep_last: bool = False) -> None:
    """Run the rows up to the last of ``layers``; the sink sees those layers. What an earlier run has done is passed
    over. ``keep_last``: what leaves the last layer is kept too."""
    last = max(layers)
    start = states.done("forward")
    if start > last:
        return
    probe = course.open()
    if start == 0:
        embed(course, states)
    with _bar(course, "forward", last + 1 - start) as bar:
        for layer in range(start, last + 1):
            probe.fill(layer, course.model.layer(layer))
            came, leaves = states.input_of(layer), states.input_of(layer + 1)
            asked = sink.values if layer in layers else ()
            for batch, rows, length in course.parts():
                y, taps = probe.forward(came.read(rows, length), asked)
                if layer < last or keep_last:
                    leaves.write(rows, y)
                if asked:
                    _give(sink, course, layer, batch, rows, length, taps, {})
                bar.update()
            came.close()
            leaves.close()
            if asked:
                sink.end(layer)
            states.finish("forward", layer + 1)


def backward(course: Course, states: States, sink: Sink, layers: Sequence[int]) -> None:
    """From the loss, summed over the rows (see ``Course.mean``), back to the first of ``layers``, after ``forward`` of
    all layers with kept states. A token is the target of the one before it in its row."""
    count, first = course.model.spec.num_hidden_layers, min(layers)
    probe = course.open()
    if states.done("loss") == 0:
        _head(course, states, probe)
        states.finish("loss", 1)
    start = states.done("backward")
    with _bar(course, "backward", count - first - start) as bar:
        for layer in range(count - 1 - start, first - 1, -1):
            probe.fill(layer, course.model.layer(layer))
            came, behind, before = states.input_of(layer), states.gradient_of(layer + 1), states.gradient_of(layer)
            asked = layer in layers
            for batch, rows, length in course.parts():
                dx, values, gradients = probe.backward(
                    came.read(rows, length),
                    behind.read(rows, length),
                    sink.values if asked else (),
                    sink.gradients if asked else (),
                )
                before.write(rows, dx)
                if asked:
                    _give(sink, course, layer, batch, rows, length, values, gradients)
                bar.update()
            for file in (came, behind, before):
                file.close()
            if asked:
                sink.end(layer)
            states.finish("backward", count - layer)


def row_losses(course: Course, probe: LayerProbe, file: StateFile) -> np.ndarray:
    """float64 (R): sums of the cross entropy over each row's predicted tokens, from what leaves the last layer; the
    head is in memory."""
    found = []
    for _, rows, length in replace(course, tokens=course.length).parts():
        target = np.roll(course.rows.ids[rows.start : rows.stop, :length], -1, axis=1)
        found.append(probe.loss_alone(file.read(rows, length), target, course.rows.counted(rows, length, mean=False)))
    return np.array(found)


def mean_losses(course: Course, probe: LayerProbe, ways: Iterable[Inputs], layers: int) -> list[float]:
    """Mean cross entropy over the predicted tokens, from what leaves the last of ``layers`` layers of every way."""
    probe.fill_head(course.model.norm(), course.model.head())
    found = []
    for states in ways:
        file = states.input_of(layers)
        found.append(float(row_losses(course, probe, file).sum()) / max(course.rows.predicted, 1))
        file.close()
    return found


def _head(course: Course, states: States, probe: LayerProbe) -> None:
    """The loss's gradient at what leaves the last layer."""
    count = course.model.spec.num_hidden_layers
    probe.fill_head(course.model.norm(), course.model.head())
    came, leaves = states.input_of(count), states.gradient_of(count)
    for _, rows, length in course.parts():
        ids = course.rows.ids[rows.start : rows.stop, :length]
        target = np.roll(ids, -1, axis=1)
        counted = course.rows.counted(rows, length, course.mean)
        _, gradient = probe.loss(came.read(rows, length), target, counted)
        leaves.write(rows, gradient)
    came.close()
    leaves.close()


def _give(
    sink: Sink, course: Course, layer: int, batch: int, rows: range, length: int, values: Arrays, gradients: Arrays
) -> None:
    inside, numbers = course.kept(rows, length)
    whole = bool(inside.all())
    sink.take(
        layer,
        Part(batch, numbers),
        {name: array if whole else array[inside] for name, array in values.items()},
        {name: array if whole else array[inside] for name, array in gradients.items()},
    )


def _bar(course: Course, what: str, layers: int) -> tqdm:
    return tqdm(total=layers * course.count, desc=what, unit="part", disable=course.quiet or None, mininterval=1.0)
