# SPDX-License-Identifier: Apache-2.0
"""The model card of a carved mixture: what it is, how it was made, and what it loses."""

from __future__ import annotations

from collections.abc import Mapping

from mindformers_ext.jobs.experts.carve.export import how_to_load, weight_words
from mindformers_ext.jobs.experts.carve.losses import DENSE, MEANING, Judged
from mindformers_ext.jobs.experts.carve.request import MEASURED_ONLY, OURS, CarveRequest
from mindformers_ext.jobs.experts.dense_model import model_name


def card(request: CarveRequest, judged: Judged, figures: Mapping[str, float], measured: int) -> str:
    """README.md, as the hub shows it."""
    recipe, name = request.recipe, model_name(request.model)
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- moe",
        "---",
        f"# {name}, carved into a mixture",
        "",
        f"**{judged.verdict()}.**",
        "",
        f"Every layer's neurons are cut into {recipe.experts} groups of one size: {recipe.shared} are computed for "
        f"every token, {recipe.active} of the other {recipe.experts - recipe.shared} are chosen. Nothing was trained: "
        f"method `{recipe.method}`, router `{recipe.router}`, refit `{recipe.refit}`, seed {recipe.seed}, measured on "
        f"{measured} tokens.",
        "",
    ]
    if request.form != MEASURED_ONLY:
        lines += [f"It is {how_to_load(request.form, request.output.folder)}.", ""]
    if request.form not in (MEASURED_ONLY, OURS):
        lines += [f"In this file {weight_words(figures)}.", ""]
    lines += [
        f"## Loss on {int(judged.tokens.sum())} held-out tokens",
        "",
        "Nats per token; differences with standard errors over rows of text, paired.",
        "",
        "| way | loss | to dense | what is computed |",
        "|---|---|---|---|",
    ]
    for way in sorted(judged.losses, key=judged.mean):
        apart, error = judged.difference(way, DENSE)
        more = "" if way == DENSE else f"{apart:+.4f} ± {error:.4f}"
        lines.append(f"| {way} | {judged.mean(way):.4f} | {more} | {MEANING[way]} |")
    return "\n".join(lines) + "\n"
