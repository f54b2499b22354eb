# SPDX-License-Identifier: Apache-2.0
"""The model card of an upcycled model."""

from __future__ import annotations

from dataclasses import asdict

from mindformers_ext.core.config.file import dump_yaml
from mindformers_ext.jobs.experts.dense_model import model_name
from mindformers_ext.jobs.experts.upcycle.request import UpcycleRequest
from mindformers_ext.jobs.merge.sidecars import Card

CARD_COPY = "upcycling.yml"


def card_of(request: UpcycleRequest, source: str) -> Card:
    """The card: what was made of a ``source`` ("dense model"), from which model and by which options. The
    folder is named without where it lies."""
    name = model_name(request.model)
    words = asdict(request) | {"model": name, "gates": request.gates.name if request.gates else None}
    told = {key: value for key, value in words.items() if key != "output" and value is not None}
    return Card(
        method=request.method,
        models=(name,),
        base=None,
        config=dump_yaml(told),
        copy=CARD_COPY,
        what=f"A mixture of experts upcycled from a {source}, to be trained on, by the method",
        tags=("upcycling", "moe"),
    )
