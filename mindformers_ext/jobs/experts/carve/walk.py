# SPDX-License-Identifier: Apache-2.0
"""A dense model carved layer by layer: each layer is measured on what the carved ones before it leave.

One layer and what is measured of it are in memory; what enters the layers is on disk, of the text that is measured and
of the text that judges. A run that was killed goes on with the layer that it was at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.jobs.engine.protocols import LayerProbe
from mindformers_ext.jobs.experts.carve.layer_files import LayerFiles
from mindformers_ext.jobs.experts.dense_model import DenseModel
from mindformers_ext.jobs.experts.probe import Course, Nothing, Part, embed, forward, row_losses
from mindformers_ext.jobs.experts.states import StateFile, States
from mindformers_ext.jobs.experts.texts import Ready
from mindformers_ext.surgery.experts.carve.carved import CarvedLayer
from mindformers_ext.surgery.experts.carve.recipes import Recipe, carve_layer
from mindformers_ext.surgery.experts.carve.sample import LayerSample

POINTS = ("mlp_input", "hidden", "mlp_output")
FORWARD, DENSE = "forward", "dense"


@dataclass
class StateLengths:
    """A sink of ``probe.forward``: the lengths of what leaves each layer, a file per layer in ``folder``."""

    folder: Path
    nbytes: int = 0
    values: tuple[str, ...] = ("output",)
    gradients: tuple[str, ...] = ()
    found: list[np.ndarray] = field(default_factory=list)

    def take(self, layer: int, part: Part, values: Mapping[str, np.ndarray], gradients: object) -> None:
        """Keep a part's lengths."""
        self.found.append(np.linalg.norm(values["output"].astype(np.float64), axis=1))

    def end(self, layer: int) -> None:
        """Write the layer's."""
        self.folder.mkdir(exist_ok=True)
        np.save(self.folder / f"{layer}.npy", np.concatenate(self.found))
        self.found.clear()

    def weights(self, layer: int) -> np.ndarray:
        """float64 (T): one over the square of each length, so that an error counts as a share of the state.

        Raises:
            UserError: the lengths are not there as they were written.
        """
        try:
            lengths = np.load(self.folder / f"{layer}.npy", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"'{self.folder}' lacks what the dense pass wrote: remove it and start again") from error
        return np.asarray(1.0 / np.maximum(lengths, np.finfo(np.float32).tiny) ** 2)


@dataclass(frozen=True)
class Walker:
    """Takes the rows of ``ready`` through a model. ``folder``: of scratch files; ``digest``: of all that decides."""

    ready: Ready
    folder: Path
    digest: str
    bar: tqdm

    @property
    def lengths(self) -> StateLengths:
        """Those of the dense model's states."""
        return StateLengths(self.folder / "lengths")

    def dense(self) -> np.ndarray:
        """The dense model's loss of each row that judges; what the weights of tokens are made of is written."""
        measured, judged = self._pair(DENSE, None)
        layers = self.ready.model.spec.num_hidden_layers
        forward(self.ready.measured, measured, self.lengths, range(layers))
        forward(self.ready.judged, judged, Nothing(), (layers - 1,), keep_last=True)
        self.bar.update(layers)
        return self._losses(self.ready.judged, self.ready.judged.open(), judged)

    def carved(self, name: str, recipe: Recipe, files: LayerFiles | None) -> np.ndarray:
        """The loss of each row that judges, of the model carved by ``recipe``."""
        measured, judged = self.ready.measured, self.ready.judged
        here, there = self._pair(name, recipe)
        start, layers = here.done(FORWARD), measured.model.spec.num_hidden_layers
        if files is not None and not all(files.is_done(layer) for layer in range(start)):
            start = 0
        probe = measured.open()
        if start == 0:
            for course, states in ((measured, here), (judged, there)):
                embed(course, states)
        self.bar.update(start)
        for layer in range(start, layers):
            self.bar.set_postfix_str(f"layer {layer}", refresh=False)
            probe.fill(layer, measured.model.layer(layer))
            carved = self._layer(probe, recipe, layer, here)
            if files is not None:
                files.write(layer, carved)
            _move(judged, probe, there.input_of(layer), there.input_of(layer + 1), carved)
            here.finish(FORWARD, layer + 1)
            self.bar.update()
        return self._losses(judged, probe, there)

    def once(self, name: str, recipe: Recipe | None, files: LayerFiles | None = None) -> np.ndarray:
        """The loss of each row that judges, computed or as an earlier run has left it; of the dense model with
        ``recipe`` None. ``files``: where the carved layers are kept.

        Raises:
            UserError: the model, the text or what an earlier run has left is damaged.
        """
        path, mark, layers = self.folder / f"{name}.json", self._mark(recipe), self.ready.model.spec.num_hidden_layers
        found = read_object(path) if path.is_file() else {}
        kept = files is None or all(files.is_done(layer) for layer in range(layers))
        if found.get("mark") == mark and kept:
            self.bar.update(layers)
            return np.array(found["losses"], np.float64)
        path.unlink(missing_ok=True)  # what it stands for is written over from here on
        self.bar.set_description_str(name, refresh=False)
        if recipe is None:
            losses = self.dense()
        else:
            losses = self.carved(name, recipe, files)
        write_text(path, json.dumps({"mark": mark, "losses": losses.tolist()}) + "\n")
        for states in self._pair(name, recipe):
            states.remove()
        return losses

    def _layer(self, probe: LayerProbe, recipe: Recipe, layer: int, states: States) -> CarvedLayer:
        """Measure a layer, carve it, and take the measured rows through it."""
        course, came, leaves = self.ready.measured, states.input_of(layer), states.input_of(layer + 1)
        sample = sample_of(course, probe, layer, (came, leaves), self.lengths.weights(layer), whole=False)
        came.close()
        carved = carve_layer(sample, recipe, layer)
        x, hidden, done = sample.x, sample.hidden, 0
        for _, rows, length in course.parts():
            inside, texts = course.kept(rows, length)
            before = leaves.read(rows, length)
            flat = before.reshape(-1, before.shape[-1])
            flat[inside] += carved.output(x[done : done + len(texts)], hidden[done : done + len(texts)])
            leaves.write(rows, before)
            done += len(texts)
        leaves.close()
        return carved

    def _losses(self, course: Course, probe: LayerProbe, states: States) -> np.ndarray:
        probe.fill_head(course.model.norm(), course.model.head())
        file = states.input_of(course.model.spec.num_hidden_layers)
        try:
            return row_losses(course, probe, file)
        finally:
            file.close()

    def _mark(self, recipe: Recipe | None) -> str:
        """A name of all that decides the losses of a way."""
        return sha256(f"{self.digest} {recipe}".encode()).hexdigest()

    def _pair(self, name: str, recipe: Recipe | None) -> tuple[States, States]:
        """What enters the layers, of the text that is measured and of the text that judges."""
        width, mark = self.ready.model.spec.hidden_size, self._mark(recipe)
        first, second = (
            States(self.folder / f"{name}.{end}", course.length, width, mark, keep=False)
            for end, course in (("measured", self.ready.measured), ("judged", self.ready.judged))
        )
        return first, second


def sample_of(
    course: Course[DenseModel],
    probe: LayerProbe,
    layer: int,
    files: tuple[StateFile, StateFile],
    weights: np.ndarray,
    whole: bool,
) -> LayerSample:
    """What the layer in memory computes of the course's rows; ``files``: what they come from, and what leaves it goes
    to: as the dense layer computes it, or with ``whole`` false without its feed-forward part. ``weights``: as
    ``LayerSample.weights``."""
    model, tokens, done = course.model, course.rows.tokens, 0
    x = np.empty((tokens, model.spec.hidden_size), np.float32)
    hidden = np.empty((tokens, model.spec.intermediate_size), np.float32)
    numbers = np.empty(tokens, np.int64)
    for _, rows, length in course.parts():
        y, taps = probe.forward(files[0].read(rows, length), POINTS)
        files[1].write(rows, y if whole else y - taps["mlp_output"].reshape(y.shape))
        inside, texts = course.kept(rows, length)
        part = slice(done, done + len(texts))
        x[part], hidden[part], numbers[part] = taps["mlp_input"][inside], taps["hidden"][inside], texts
        done += len(texts)
    matrices = (model.matrix(name, layer) for name in ("gate_proj", "up_proj", "down_proj"))
    return LayerSample(x, hidden, weights, numbers, *matrices)


def _move(course: Course, probe: LayerProbe, came: StateFile, leaves: StateFile, carved: CarvedLayer) -> None:
    """Take rows through the carved layer."""
    for _, rows, length in course.parts():
        y, taps = probe.forward(came.read(rows, length), POINTS)
        own = carved.output(taps["mlp_input"], taps["hidden"]) - taps["mlp_output"]
        leaves.write(rows, y + own.reshape(y.shape))
    came.close()
    leaves.close()
