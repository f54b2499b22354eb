# SPDX-License-Identifier: Apache-2.0
"""The rows of an upcycled mixture's router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mindformers_ext.core.errors import UserError, listed
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.jobs.experts.upcycle.request import KMEANS, NORMAL, ZEROS, UpcycleRequest
from mindformers_ext.jobs.experts.v2.layer_tables import GATE, GATES, read_table
from mindformers_ext.jobs.merge.models import Model
from mindformers_ext.jobs.merge.moe import per_segment
from mindformers_ext.surgery.merge.random_gates import random_rows


@dataclass(frozen=True)
class RouterSizes:
    """``layers``: those that are mixtures, of ``count`` in all; ``shared``: experts whose gate says one half."""

    layers: tuple[int, ...]
    count: int
    hidden: int
    shared: int


def router_rows(request: UpcycleRequest, model: Model, sizes: RouterSizes) -> Callable[[], np.ndarray]:
    """Checks the request's router; what it returns makes the rows, float32 (layers, experts and shared ones, hidden).

    Segments of one copy have one row, and so one score: they are chosen together and weigh the same.

    Raises:
        UserError: a file of gates that does not fit.
    """
    copies = request.experts // request.granularity
    gates = _gates(request, model, sizes, copies) if request.router == KMEANS else None

    def rows() -> np.ndarray:
        if request.router == ZEROS:
            found = np.zeros((sizes.count, request.experts, sizes.hidden), np.float32)
        elif request.router == NORMAL:
            shape = (sizes.count, request.experts, sizes.hidden)
            found = random_rows(shape, request.seed, False) * np.float32(request.router_std)
        elif gates is None:
            shape = (sizes.count, copies, sizes.hidden)
            found = random_rows(shape, request.seed, False) * np.float32(request.router_std)
            found = per_segment(found, copies, request.granularity)
        else:
            found = per_segment(gates, copies, request.granularity)
        always = np.zeros((sizes.count, sizes.shared, sizes.hidden), np.float32)
        return np.concatenate([found, always], axis=1)

    return rows


def _gates(request: UpcycleRequest, model: Model, sizes: RouterSizes, copies: int) -> np.ndarray:
    """Centres of hidden states that the stage ``gates`` wrote, float32 (layers, copies, hidden)."""
    if request.gates is None:
        raise UserError(
            f"--router {KMEANS} needs --gate_weights_file: give what build_experts.py gates wrote with "
            f"--num_experts {copies}"
        )
    table = read_table(request.gates, GATES)
    table.check_made_from(model=fingerprint(model.reader))
    missing = [layer for layer in sizes.layers if layer not in table.layers]
    if missing:
        raise UserError(f"'{request.gates}' has no gates of layers {listed(missing)}: make them of this model")
    found = np.zeros((sizes.count, copies, sizes.hidden), np.float32)
    for layer in sizes.layers:
        rows = table.layers[layer][GATE]
        if rows.shape != found[layer].shape:
            raise UserError(
                f"'{request.gates}', layer {layer}: {list(rows.shape)}, and {copies} copies of a model of width "
                f"{sizes.hidden} need {list(found[layer].shape)}: make gates with --num_experts {copies}"
            )
        found[layer] = rows
    return found
