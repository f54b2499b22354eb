# SPDX-License-Identifier: Apache-2.0
"""What a LLaMA-MoE v2 is cut into: neurons and gates of each layer, from files or by default, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import Problems, UserError, listed
from mindformers_ext.core.families import MIXTRAL
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.jobs.experts.v2.forms import Sizes
from mindformers_ext.jobs.experts.v2.layer_tables import GATE, GATES, INDICES, RESIDUAL, Layer, LayerTable, read_table
from mindformers_ext.surgery.experts.split import LayerSplit

PLAIN_STYLE = MIXTRAL.name
RESIDUAL_STYLE = f"{MIXTRAL.name}-residual"
STYLES = (PLAIN_STYLE, RESIDUAL_STYLE)


@dataclass(frozen=True, kw_only=True)
class MixtralParts:
    """What is asked for. ``experts`` None: as the neurons' file has; ``scale`` None: experts / chosen, of a residual
    model 1. ``share``: neurons may stand in several experts, or in none. ``pad``: neurons of zeros are added until
    experts are alike. ``truncate``: gates of more experts are cut to the first ones."""

    style: str
    experts: int | None
    chosen: int | None
    scale: float | None = None
    ends: int = 0
    gates: Path | None = None
    indices: Path | None = None
    share: bool = False
    truncate: bool = False
    pad: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Made:
    """Splits and gates, float32 (E, D), of the layers with experts; of a split ``width`` is that with padding."""

    sizes: Sizes
    splits: Mapping[int, LayerSplit]
    gates: Mapping[int, np.ndarray]
    notes: tuple[str, ...]


def make_parts(asked: MixtralParts, spec: ModelSpec, weights: str) -> Made:
    """Everything by layer. ``weights``: fingerprint of the model.

    Raises:
        UserError: options or files that do not fit; all that can be told at once is in one message.
    """
    table = read_table(asked.indices, INDICES) if asked.indices else None
    gates = read_table(asked.gates, GATES) if asked.gates else None
    _check_origin(table, gates, weights)
    experts = _experts(asked, table)
    _check_options(asked, experts, spec)
    layers = range(asked.ends, spec.num_hidden_layers - asked.ends)
    if table:
        splits, notes = _read_splits(asked, table, experts, layers, spec.intermediate_size)
    else:
        splits, notes = _sequential(asked, experts, layers, spec.intermediate_size)
    chosen = asked.chosen or 0
    default = 1.0 if asked.style == RESIDUAL_STYLE else experts / chosen
    first = splits[layers[0]]
    sizes = Sizes(
        layers=spec.num_hidden_layers,
        ends=asked.ends,
        experts=experts,
        chosen=chosen,
        size=first.sizes[0],
        always=sum(first.residual_sizes),
        whole=spec.intermediate_size,
        scale=default if asked.scale is None else asked.scale,
    )
    why = (
        "as given" if asked.scale is not None else "by default" + ("" if first.residual else f", {experts} / {chosen}")
    )
    notes.append(f"scale_factor {sizes.scale:g} ({why}): the sum of the chosen experts is multiplied by it")
    if gates is None:
        notes.append(
            "no --gate_weights_file: gates are random, and experts are chosen at random until they are trained"
        )
        found = {layer: random_gate(experts, spec.hidden_size, asked.seed, layer) for layer in layers}
    else:
        found = {layer: _gate(asked, gates, layer, experts, spec.hidden_size) for layer in layers}
    return Made(sizes, splits, found, tuple(notes))


def random_gate(experts: int, width: int, seed: int, layer: int) -> np.ndarray:
    """float32 (E, D), uniform between -1 / sqrt(D) and 1 / sqrt(D), as a linear layer starts; each layer has draws of
    its own."""
    bound = 1 / math.sqrt(width)
    drawn = np.random.default_rng((seed, layer)).uniform(-bound, bound, (experts, width))
    return drawn.astype(np.float32)


def _check_origin(table: LayerTable | None, gates: LayerTable | None, weights: str) -> None:
    for found in (table, gates):
        if found:
            found.check_made_from(model=weights)
    if table and gates:
        table.check_made_from(gate_weights=gates.digest)


def _experts(asked: MixtralParts, table: LayerTable | None) -> int:
    if asked.style == RESIDUAL_STYLE and table is None:
        raise UserError(
            f"--style {RESIDUAL_STYLE} needs --neuron_indices_file: give what split --method gradient wrote"
        )
    told = {sum(name != RESIDUAL for name in layer) for layer in table.layers.values()} if table else set()
    if len(told) > 1:
        raise UserError(f"'{asked.indices}' has layers of {listed(sorted(told))} experts: split all layers alike")
    if asked.experts is None and not told:
        raise UserError("--num_experts is missing: give the number of experts in each layer")
    if told and asked.experts not in (None, *told):
        raise UserError(
            f"--num_experts {asked.experts}, but '{asked.indices}' has {told.pop()} routed experts: leave the option "
            "out, or give the file of this number"
        )
    return told.pop() if told else int(asked.experts or 0)


def _check_options(asked: MixtralParts, experts: int, spec: ModelSpec) -> None:
    problems = Problems("options")
    if experts < 1:
        problems.add(f"--num_experts {experts}", "give 1 or more")
    if asked.chosen is None:
        problems.add("--top_k is missing", "give how many experts a token passes")
    elif not 1 <= asked.chosen <= max(experts, 1):
        problems.add(f"--top_k {asked.chosen} of {experts} experts", f"choose 1 to {max(experts, 1)}")
    if asked.scale is not None and not 0 < asked.scale < math.inf:
        problems.add(f"--scale_factor {asked.scale}", "give a number above 0")
    if asked.ends < 0 or 2 * asked.ends >= spec.num_hidden_layers:
        problems.add(
            f"--num_moe_contract_layers {asked.ends} of {spec.num_hidden_layers} layers",
            "no layer would be MoE" if asked.ends > 0 else "give 0 or more",
        )
    if asked.indices is not None and asked.pad:
        problems.add("--pad_intermediate beside --neuron_indices_file", "the file says which neurons experts have")
    if asked.indices is None and asked.share:
        problems.add("--share_neurons without --neuron_indices_file", "neurons in their order are never shared")
    problems.raise_if_any()


def _sequential(
    asked: MixtralParts, experts: int, layers: range, width: int
) -> tuple[dict[int, LayerSplit], list[str]]:
    rest = width % experts
    if rest and not asked.pad:
        near = [n for n in range(1, width + 1) if width % n == 0]
        near = sorted(sorted(near, key=lambda n: abs(n - experts))[:4])
        raise UserError(
            f"intermediate_size {width} cannot be cut into {experts} experts of one size: choose one of "
            f"{listed(near)}, or add neurons of zeros with --pad_intermediate"
        )
    size = -(-width // experts)
    parts = tuple(np.split(np.arange(size * experts), experts))
    notes = [f"{size * experts - width} neurons of zeros are added to {width}"] if rest else []
    return dict.fromkeys(layers, LayerSplit(size * experts, parts)), notes


def _read_splits(
    asked: MixtralParts, table: LayerTable, experts: int, layers: range, width: int
) -> tuple[dict[int, LayerSplit], list[str]]:
    splits: dict[int, LayerSplit] = {}
    covered = []
    for layer in layers:
        where = f"'{table.path}', layer {layer}"
        if layer not in table.layers:
            raise UserError(f"'{table.path}' lacks layer {layer}: give the split of this model")
        split = _split(asked, table.layers[layer], experts, width, where)
        always = split.residual[0].size if split.residual else 0
        first = splits.get(layers[0], split)
        if len({*split.sizes, *first.sizes}) > 1 or always != sum(first.residual_sizes):
            raise UserError(
                f"{where}: experts of {listed(sorted(set(split.sizes)))} neurons and {always} residual ones, the first "
                f"has {listed(sorted(set(first.sizes)))} and {sum(first.residual_sizes)}: all must be alike"
            )
        used = np.unique(np.concatenate((*split.experts, *split.residual))).size
        if not split.is_partition:
            if not asked.share:
                raise UserError(
                    f"{where}: {used} of {width} neurons are used, {sum(split.sizes) + always} times in all: neurons "
                    "that are shared or left out want --share_neurons"
                )
            covered.append(used / width)
        splits[layer] = split
    share = f"{100 * min(covered):.1f} % of a layer's neurons are in some expert, at least" if covered else ""
    return splits, [share] if share else []


def _split(asked: MixtralParts, layer: Layer, experts: int, width: int, where: str) -> LayerSplit:
    if (RESIDUAL in layer) != (asked.style == RESIDUAL_STYLE):
        kind = "has" if RESIDUAL in layer else "has no"
        other = RESIDUAL_STYLE if RESIDUAL in layer else PLAIN_STYLE
        raise UserError(f"{where} {kind} residual neurons: give --style {other}, or another file")
    routed = tuple(layer[str(number)] for number in range(experts))
    try:
        return LayerSplit(width, routed, (layer[RESIDUAL],) if RESIDUAL in layer else ())
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _gate(asked: MixtralParts, table: LayerTable, layer: int, experts: int, width: int) -> np.ndarray:
    if layer not in table.layers:
        raise UserError(f"'{table.path}' lacks layer {layer}: give the gates of this model")
    gate = table.layers[layer][GATE]
    if gate.shape[0] > experts and gate.shape[1] == width and asked.truncate:
        return gate[:experts]
    if gate.shape != (experts, width):
        more = ": --truncate_gates takes the first ones" if gate.shape[0] > experts and gate.shape[1] == width else ""
        raise UserError(
            f"'{table.path}', layer {layer}: found a gate {list(gate.shape)}, expected {[experts, width]}{more}"
        )
    return gate
