# SPDX-License-Identifier: Apache-2.0
"""What carving a real model into a mixture costs, without training: held-out loss of our recipe, of CMoE, and of static
cuts of equal size with and without the same refit; paired differences with standard errors over rows of text.

    python tools/bench/carve_quality.py MODEL --calibration text.txt --held_out other.txt --output output/carve

For each of ``--seeds`` another draw of the calibration's rows is measured; all are judged on the same held-out rows,
and over several seeds a row's losses are averaged before they are compared. Eight groups of neurons: S2A2 is 50 %
active, S3A2 62.5 %, S3A3 75 %. No model is written. What stands in the output already is not computed again, so a
killed run goes on, with the layer it was at. Some of ``--ways`` can be measured first, others later.
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse
import json
import resource
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mindformers_ext.cli.text_options import add_texts, texts_of
from mindformers_ext.core.families import THRESHOLD
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.jobs.experts.carve.losses import DENSE, Judged
from mindformers_ext.jobs.experts.carve.run import digest_of, measure
from mindformers_ext.jobs.experts.texts import ready
from mindformers_ext.surgery.experts.carve.recipes import (
    LEAST_SQUARES,
    METHODS,
    NONE,
    REPRESENTATIVE,
    RIDGE,
    Recipe,
)

GROUPS = 8
SHARES = {"75": (3, 3), "62.5": (3, 2), "50": (2, 2)}  # of the neurons, in %: shared, active
PLAIN = Recipe(method="emp", experts=GROUPS, shared=2, active=2, router=RIDGE, refit=NONE)
FITTED = replace(PLAIN, refit=LEAST_SQUARES)
WAYS = {
    "emp + refit": FITTED,
    "emp": PLAIN,
    "emp + threshold + refit": replace(FITTED, router=THRESHOLD),
    "cmoe": replace(PLAIN, method="cmoe", router=REPRESENTATIVE),
    "rel": replace(PLAIN, method="rel"),
    "rel + refit": replace(FITTED, method="rel"),
    "wifv": replace(PLAIN, method="wifv"),
    "wifv + bias": replace(PLAIN, method="wifv", bias=True),
    "wifv + refit": replace(FITTED, method="wifv"),
    "cmoe + ridge + refit": replace(FITTED, method="cmoe"),
    "random + refit": replace(FITTED, method="random"),
    "expertweaver": replace(PLAIN, method="expertweaver", router=METHODS["expertweaver"].router),
}
FIRST = ("emp + refit", "cmoe", "rel", "rel + refit", "wifv", "wifv + refit")


def options() -> argparse.ArgumentParser:
    """The bench's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path)
    add("--output", type=Path, required=True)
    add("--shares", nargs="+", default=[*SHARES], choices=[*SHARES])
    add("--ways", nargs="+", default=[*FIRST], choices=[*WAYS])
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add_texts(parser)
    parser.set_defaults(tokens=8192, held_out_tokens=12288, block_size=512, quiet=False)
    return parser


def measured(words: argparse.Namespace, seed: int) -> Judged:
    """The losses of all shares and ways, named "50 emp + refit" and so on."""
    recipes = {}
    for share in words.shares:
        shared, active = SHARES[share]
        for way in words.ways:
            recipes[f"{share} {way}"] = replace(WAYS[way], shared=shared, active=active, seed=seed)
    folder = words.output / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with ready(words.model, texts_of(words, seed)) as start:
        return measure(start, recipes, folder, digest_of(start), {}, quiet=False)


def table(judged: Judged, words: argparse.Namespace, title: str) -> list[str]:
    """Lines of one seed, or of the mean over seeds; differences are to the first of the ways asked for."""
    found = [f"{title}: dense {judged.mean(DENSE):.4f} on {int(judged.tokens.sum())} tokens, {len(judged.tokens)} rows"]
    for share in words.shares:
        first = f"{share} {words.ways[0]}"
        for way in sorted(words.ways, key=lambda way: judged.mean(f"{share} {way}")):
            name = f"{share} {way}"
            added, error = judged.difference(name, DENSE)
            line = f"  {share:>5} %  {way:22} {added:+.4f} +- {error:.4f}"
            if name != first:
                apart, spread = judged.difference(name, first)
                line += f"   to '{words.ways[0]}' {apart:+.4f} +- {spread:.4f}"
            found.append(line)
    return found


def main() -> None:
    """Print a table; ``carve.json`` holds the figures of every row of text."""
    words = options().parse_args()
    torch.set_num_threads(1)
    started, cpu = time.monotonic(), time.process_time()
    every = {seed: measured(words, seed) for seed in words.seeds}
    lines = [line for seed, judged in every.items() for line in table(judged, words, f"seed {seed}")]
    first = every[words.seeds[0]]
    if len(every) > 1:
        names = [*first.losses]
        means = {name: np.mean([judged.losses[name] for judged in every.values()], axis=0) for name in names}
        lines += table(Judged(means, first.tokens), words, f"mean of {len(every)} seeds")
    write_text(
        words.output / "carve.json",
        json.dumps({str(seed): judged.json() for seed, judged in every.items()}, indent=1) + "\n",
    )
    lines.append(
        f"{time.monotonic() - started:.0f} s, {time.process_time() - cpu:.0f} s of CPU in this run, "
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"
    )
    print("\n".join(lines))
    write_text(words.output / "carve.txt", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
