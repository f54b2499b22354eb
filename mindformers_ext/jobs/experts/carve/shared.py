# SPDX-License-Identifier: Apache-2.0
"""How many groups of neurons every token should pass, layer by layer (``--shared auto``).

Of the groups that are active in a layer, S are shared and the others chosen. Each layer and each S is tried by itself:
the dense model with that one layer carved, and how far its predictions are from the dense model's on rows of the
calibration that it is not carved on. What a layer costs does not depend on S, so each layer takes its best. A file has
one S for all layers: that of the least sum.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import sha256
from itertools import product
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.jobs.engine.protocols import LayerProbe
from mindformers_ext.jobs.experts.carve.cost import layer_carving, layer_pass
from mindformers_ext.jobs.experts.carve.walk import FORWARD, POINTS, Walker, sample_of
from mindformers_ext.jobs.experts.probe import Course, embed, pass_on
from mindformers_ext.jobs.experts.states import States, Stream
from mindformers_ext.jobs.experts.texts import Ready
from mindformers_ext.surgery.experts.carve.divergence import divergence, log_shares
from mindformers_ext.surgery.experts.carve.recipes import LayeredRecipe, Recipe, carve_layer

TOKENS, SHARE, CHUNK = 2048, 4, 256  # that judge at most; one row of so many judges; whose logits are held at once
KEPT = "shared.json"  # beside the losses of a run that was killed


def choices(recipe: Recipe) -> range:
    """The S that are tried: at least one group is shared, and at least one chosen."""
    return range(1, recipe.shared + recipe.active)


def halves(course: Course) -> tuple[Course, Course]:
    """The rows of the calibration that layers are carved on, and those that judge S.

    Raises:
        UserError: there is one row.
    """
    rows = len(course.rows.ids)
    if rows < 2:
        raise UserError("--shared auto keeps a row of the calibration apart: give more --tokens, or less --block_size")
    last = max(1, min(rows // SHARE, TOKENS // course.length))
    first = course.rows.at(slice(rows - last)), course.rows.at(slice(rows - last, None))
    return replace(course, rows=first[0], batch=rows - last), replace(course, rows=first[1], batch=last)


@dataclass(frozen=True, eq=False)
class SharedLadder:
    """``found`` (layers, choices): nats per token that predictions are off with that layer alone carved, for each S of
    ``tried``; ``tokens`` have judged."""

    tried: range
    found: np.ndarray
    tokens: int

    def by_layer(self) -> tuple[int, ...]:
        """The best S of each layer; of equal ones the lower."""
        return tuple(self.tried[place] for place in self.found.argmin(1))

    def one(self) -> int:
        """The best S for all layers."""
        return self.tried[int(self.found.sum(0).argmin())]

    def recipe(self, recipe: Recipe, alike: bool) -> Recipe:
        """With the S that were found: one for all layers where they are to be ``alike``."""
        total = recipe.shared + recipe.active
        if alike:
            return replace(recipe, shared=self.one(), active=total - self.one())
        return LayeredRecipe(
            **{item.name: getattr(recipe, item.name) for item in fields(Recipe)}, by_layer=self.by_layer()
        )

    def words(self, alike: bool) -> str:
        """What was found, in a sentence."""
        sums = ", ".join(f"{s}: {value:.4f}" for s, value in zip(self.tried, self.found.sum(0), strict=True))
        least = float(self.found.min(1).sum())
        found = f"--shared auto, sums of the layers' divergences by S ({self.tokens} tokens): {sums}; "
        layers = " ".join(map(str, self.by_layer()))
        if not alike:
            return f"{found}each layer its best: {least:.4f} (S = {layers})"
        if len({*self.by_layer()}) == 1:
            return f"{found}S = {self.one()} is the best in every layer"
        return (
            f"{found}{self.one()} for all layers; each its best would be {least:.4f} (S = {layers}), which no file "
            "holds: --format none measures it"
        )

    def json(self) -> dict[str, Any]:
        """All of it for a file."""
        return {"tried": [*self.tried], "by_layer": [*self.by_layer()], "divergences": self.found.tolist()} | {
            "tokens": self.tokens
        }


def search(walker: Walker, recipe: Recipe) -> SharedLadder:
    """Try every S in every layer, or take what an earlier run has found; a killed one goes on with its layer. The dense
    model's pass is there already.

    Raises:
        UserError: too few rows, or a layer that cannot be carved.
    """
    tried, place = choices(recipe), walker.folder / KEPT
    carving, judging = halves(walker.ready.measured)
    mark = sha256(f"{walker.digest} {recipe} {tried} {len(judging.rows.ids)}".encode()).hexdigest()
    if place.is_file():
        kept = read_object(place)
        if kept.get("mark") == mark:
            return SharedLadder(tried, np.array(kept["found"], np.float64), judging.rows.tokens)
    streams = _Streams(
        walker,
        carving,
        judging,
        recipe,
        States(walker.folder / "shared", carving.length, carving.model.spec.hidden_size, mark, keep=False),
    )
    found = streams.climbed()
    write_text(place, json.dumps({"mark": mark, "found": found.tolist()}) + "\n")
    streams.states.remove()
    return SharedLadder(tried, found, judging.rows.tokens)


@dataclass(frozen=True)
class _Streams:
    """The rows that judge, once for the dense model and for each layer and S; all in the folder of ``states``, which
    are the dense model's of the rows to carve on."""

    walker: Walker
    carving: Course
    judging: Course
    recipe: Recipe
    states: States

    def of(self, layer: int, shared: int) -> Stream:
        """Of the dense model with one layer carved."""
        return self._named(f"{layer}_{shared}")

    @property
    def dense(self) -> Stream:
        """Of the dense model."""
        return self._named("dense")

    def _named(self, name: str) -> Stream:
        return Stream(self.states.folder, name, self.judging.length, self.judging.model.spec.hidden_size)

    def climbed(self) -> np.ndarray:
        """float64 (layers, choices)."""
        layers, start = self.carving.model.spec.num_hidden_layers, self.states.done(FORWARD)
        probe = self.carving.open()
        if start == 0:
            embed(self.carving, self.states)
            embed(self.judging, self.dense)
        self.walker.bar.update(start)
        for layer in range(start, layers):
            self.walker.bar.set_postfix_str(f"layer {layer}", refresh=False)
            probe.fill(layer, self.carving.model.layer(layer))
            for before, shared in product(range(layer), choices(self.recipe)):
                stream = self.of(before, shared)
                pass_on(self.judging, probe, layer, stream, stream)
            self._try(probe, layer)
            self.states.finish(FORWARD, layer + 1)
            self.walker.bar.update()
        return self._divergences()

    def _try(self, probe: LayerProbe, layer: int) -> None:
        """Carve the layer with every S, and send the rows that judge through each."""
        files = self.states.input_of(layer), self.states.input_of(layer + 1)
        weights = self.walker.lengths.weights(layer)[: self.carving.rows.tokens]
        sample = sample_of(self.carving, probe, layer, files, weights, whole=True)
        came, dense = self.dense.input_of(layer), self.dense.input_of(layer + 1)
        for shared in choices(self.recipe):
            total = self.recipe.shared + self.recipe.active
            carved = carve_layer(sample, replace(self.recipe, shared=shared, active=total - shared), layer)
            leaves = self.of(layer, shared).input_of(layer + 1)
            for _, rows, length in self.judging.parts():
                y, taps = probe.forward(came.read(rows, length), POINTS)
                dense.write(rows, y)
                own = carved.output(taps["mlp_input"], taps["hidden"]) - taps["mlp_output"]
                leaves.write(rows, y + own.reshape(y.shape))
            leaves.close()
        for file in (*files, came, dense):
            file.close()

    def _divergences(self) -> np.ndarray:
        course, model, tried = self.judging, self.judging.model, choices(self.recipe)
        layers = model.spec.num_hidden_layers
        head, done = np.empty((model.spec.vocab_size, model.spec.hidden_size), np.float32), 0
        for block in model.head():
            head[done : done + len(block)] = block
            done += len(block)
        shares = partial(log_shares, norm=model.norm(), head=head, epsilon=model.spec.rms_norm_eps)
        total = np.zeros((layers, len(tried)))
        for _, rows, length in replace(course, tokens=course.length).parts():
            inside, _ = course.kept(rows, length)
            dense = self._last(self.dense, rows, length)[inside]
            for start in range(0, len(dense), CHUNK):
                wanted = shares(dense[start : start + CHUNK])
                for layer, place in np.ndindex(total.shape):
                    own = self._last(self.of(layer, tried[place]), rows, length)[inside]
                    total[layer, place] += divergence(wanted, shares(own[start : start + CHUNK]))
        return total / course.rows.tokens

    def _last(self, stream: Stream, rows: range, length: int) -> np.ndarray:
        """(T, D) of what leaves the last layer."""
        file = stream.input_of(self.judging.model.spec.num_hidden_layers)
        found = file.read(rows, length)
        file.close()
        return found.reshape(-1, found.shape[-1])


def disk(ready: Ready, tried: Sequence[int]) -> int:
    """Bytes of what enters the layers on every way."""
    course, spec = halves(ready.measured)[1], ready.model.spec
    ways = 1 + spec.num_hidden_layers * len(tried)
    return 2 * 4 * ways * len(course.rows.ids) * course.length * spec.hidden_size


def products_of_search(ready: Ready, recipe: Recipe) -> float:
    """Multiplications and additions of a search; rough."""
    carving, judging = halves(ready.measured)
    layers, tried, spec = ready.model.spec.num_hidden_layers, len(choices(recipe)), ready.model.spec
    passes = carving.rows.tokens + judging.rows.tokens * tried * (1 + (layers - 1) / 2)
    once = layer_pass(ready, passes) + tried * layer_carving(ready, recipe, carving.rows.tokens)
    return layers * once + 2.0 * judging.rows.tokens * layers * tried * spec.hidden_size * spec.vocab_size
