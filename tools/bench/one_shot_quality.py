# SPDX-License-Identifier: Apache-2.0
"""What every way to prune in one shot costs on a real model: held-out loss at 20 and 40 % fewer parameters.

One pass measures; then each measure cuts the feed-forward width (with ``--axes`` other sizes too) and, by itself, the
depth, to each share of the whole model's parameters, embeddings included. Cuts of the width are judged as they are and
with output matrices fitted anew by least squares, FLAP's also with its bias. Beside them stand random cuts, drawn with
each of ``--seeds``, and the whole model. No model is written.

    python tools/bench/one_shot_quality.py MODEL --calibration text.txt --held_out other.txt --output output/one_shot

What ``quality.json`` in the output holds already is not computed again, so a killed run goes on. On two cores a model
of 135 million parameters takes about an hour of processor time with these defaults.
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mindformers_ext.cli.text_options import add_texts, texts_of
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.parameters import parameter_count
from mindformers_ext.core.pruning import ModelShape
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.jobs.prune.one_shot.cuts import FITTED, MAGNITUDE, Cut, Workbench, chosen_by, open_workbench
from mindformers_ext.jobs.prune.one_shot.depth import order_of
from mindformers_ext.jobs.prune.one_shot.importance import measured
from mindformers_ext.jobs.prune.one_shot.importance_file import Importance, provenance
from mindformers_ext.jobs.prune.one_shot.targets import fewer_layers, sized, with_fewer
from mindformers_ext.jobs.prune.quality import ORIGINAL, RANDOM
from mindformers_ext.surgery.prune.importance import METHODS
from mindformers_ext.surgery.prune.least_squares import LEAST_SQUARES, NONE

KINDS = ("forward", "taylor")
Making = Callable[[], Cut | None]


def options() -> argparse.ArgumentParser:
    """The bench's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path)
    add("--output", type=Path, required=True)
    add("--order_tokens", type=int, default=512, help="of the calibration, by which ppl tries to leave out layers")
    add("--shares", type=float, nargs="+", default=[0.2, 0.4])
    add("--axes", nargs="+", default=["intermediate_size"])
    add("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    add("--depths", nargs="*", default=["bi", "ppl"], choices=["bi", "ppl"])
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add_texts(parser)
    parser.set_defaults(tokens=8192, held_out_tokens=4096, block_size=512, quiet=True)
    return parser


def widths(
    bench: Workbench, found: Importance, target: ModelShape, words: argparse.Namespace
) -> Iterator[tuple[str, Making]]:
    """Cuts of the width by name, made when they are asked for."""
    ways = [(method, method, 0) for method in words.methods]
    ways += [(f"{RANDOM} {seed}", RANDOM, seed) for seed in words.seeds]
    for name, method, seed in ways:
        if method == "flap" and target.hidden_size != bench.shape.hidden_size:
            continue
        values = chosen_by(bench, method, found, target, seed)
        for refit in (NONE, LEAST_SQUARES):
            if refit != NONE and seed != words.seeds[0] and method == RANDOM:
                continue
            yield name + ("" if refit == NONE else f" + {refit}"), partial(bench.cut, values, refit)
        if method == "flap":
            yield "flap + bias", partial(bench.cut, values, bias=found)


def depths(
    bench: Workbench, found: Importance, target: ModelShape, words: argparse.Namespace
) -> Iterator[tuple[str, Making]]:
    """Cuts of the depth by name."""
    import numpy as np

    def by_order() -> Cut:
        path = words.output / "importance.npz"
        order = order_of(bench, found, target, path, words.order_tokens, False, print)
        mask = np.ones(bench.shape.num_hidden_layers)
        mask[list(order.layers)] = 0.0
        return Cut({"layer": mask})

    def by(method: str, seed: int = 0) -> Cut:
        return Cut(chosen_by(bench, method, found, target, seed))

    known: dict[str, Making] = {
        "bi": partial(by, "minitron"),
        "ppl": by_order,
        MAGNITUDE: partial(by, MAGNITUDE),
    }
    for name in (*words.depths, *([MAGNITUDE] if words.depths else [])):
        yield f"depth {name}", known[name]
    for seed in words.seeds if words.depths else ():
        yield f"depth {RANDOM} {seed}", partial(by, RANDOM, seed)


class Kept:
    """Figures in a file, each computed once."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.figures = path, dict[str, Any]()
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["about"] != about:
                raise UserError(f"'{path}' holds figures of another model, text or options: choose another --output")
            self.figures = found["figures"]
        self.about = about

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures called ``name``."""
        if name not in self.figures:
            self.figures[name] = make()
            write_text(self.path, json.dumps({"about": self.about, "figures": self.figures}, indent=1) + "\n")
            print(f"{name}: {self.figures[name]['loss']:.4f}, {self.figures[name]['seconds']:.1f} s", flush=True)
        return self.figures[name]


def judged(bench: Workbench, make: Making) -> dict[str, Any]:
    """Loss, time, and how far fitted matrices are from what they were."""
    started = time.monotonic()
    cut = make()
    found: dict[str, Any] = {"loss": bench.loss(cut)}
    if cut is not None and cut.fits:
        found |= {name: sum(getattr(fit, name) for fit in cut.fits) / len(cut.fits) for name in ("before", "after")}
        for folder in bench.scratch.glob(f"{FITTED}*"):  # of this cut: it is not needed any more
            shutil.rmtree(folder)
    return found | {"seconds": time.monotonic() - started}


def main() -> None:
    """Print a table; ``quality.json`` holds the figures."""
    words = options().parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    words.output.mkdir(parents=True, exist_ok=True)
    with open_workbench(words.model, texts_of(words), words.output / "work") as bench:
        found = measured(bench.start, words.output / "importance.npz", KINDS, False, print)
        rows = bench.start.judged.rows
        about = {
            "importance": provenance(found.about),
            "held_out": rows.digest(""),
            "held_out_tokens": rows.predicted,
            "tokens": bench.start.measured.rows.tokens,
            "order_tokens": words.order_tokens,
            "axes": words.axes,
        }
        kept = Kept(words.output / "quality.json", about)
        base = kept.once(ORIGINAL, lambda: judged(bench, lambda: None))["loss"]
        whole = parameter_count(bench.dense.model)
        table = [f"held-out loss on {rows.predicted} tokens: the whole model of {whole} parameters {base:.4f}"]
        for share in words.shares:
            width = with_fewer(bench.dense.model, share, words.axes)
            deep = replace(bench.shape, num_hidden_layers=fewer_layers(bench.dense.model, share))
            lines = []
            for shape, ways in ((width, widths), (deep, depths)):
                left = parameter_count(sized(bench.dense.model, shape)) / whole
                for name, make in ways(bench, found, shape, words):
                    figures = kept.once(f"{share:g} {name}", partial(judged, bench, make))
                    lines.append((figures["loss"], f"{name:28} {left:6.1%}  {figures['loss']:.4f}"))
            table.append(f"{share:.0%} fewer parameters")
            table += [f"  {text}  ({loss - base:+.4f})" for loss, text in sorted(lines)]
    print("\n".join(table))
    (words.output / "quality.txt").write_text("\n".join(table) + "\n", encoding="utf-8")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
