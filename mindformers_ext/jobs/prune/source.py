# SPDX-License-Identifier: Apache-2.0
"""The weights that are cut, by Hugging Face's names, from a model folder or from a pruning run's checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.config.hf import hf_config_from_spec, model_spec_from_hf
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.tensors import Reader, TensorInfo
from mindformers_ext.jobs.checkpoint.source import open_hf, read_config
from mindformers_ext.jobs.prune.trained import TrainedRun, WithoutMasks, opened
from mindformers_ext.weights.convert import plan_to_hf, plan_to_mindspore, rule_set
from mindformers_ext.weights.layouts import resolve_layout
from mindformers_ext.weights.plan import PlannedTensor
from mindformers_ext.weights.views import whole


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of the dense model: where its data is, its dimensions in size letters, its layer."""

    step: PlannedTensor
    dims: str
    layer: int | None


@dataclass(frozen=True)
class DenseSource:
    """An open dense model."""

    reader: Reader
    tensors: tuple[DenseTensor, ...]
    config: Mapping[str, Any]
    model: ModelSpec


@contextmanager
def open_folder(folder: Path) -> Iterator[DenseSource]:
    """A Hugging Face folder; what it lacks or has too much is a ``UserError``."""
    config = read_config(folder)
    model = _dense(model_spec_from_hf(config), str(folder))
    with closing(open_hf(folder)) as reader:
        plan_to_mindspore(reader, model)  # every tensor is there and fits
        steps = [
            PlannedTensor(TensorInfo(name, shape, reader.infos[name].dtype), whole(name, shape))
            for binding in rule_set(model).bindings
            for name, shape in binding.hf.items()
        ]
        yield DenseSource(reader, _with_dims(steps, model), config, model)


@contextmanager
def open_trained(run: TrainedRun, base: Path | None) -> Iterator[DenseSource]:
    """A pruning run's checkpoint; ``base``: the folder of the model it began with, for its config.json."""
    model = _dense(run.model, str(run.yaml))
    config = read_config(base) if base else hf_config_from_spec(model)
    if base:
        model = _dense(model_spec_from_hf(config), str(base))
    with opened(run) as reader:
        plain = WithoutMasks(reader)
        layout = resolve_layout(plain.infos, model, None)
        steps = plan_to_hf(plain, model, layout=layout).steps
        yield DenseSource(plain, _with_dims(list(steps), model), config, model)


def _dense(model: ModelSpec, where: str) -> ModelSpec:
    if model.moe:
        raise UserError(f"'{where}' is a mixture of experts: only dense models are cut by masks")
    return model


def _with_dims(steps: list[PlannedTensor], model: ModelSpec) -> tuple[DenseTensor, ...]:
    known: dict[str, tuple[str, int | None]] = {}
    for rule in rule_set(model).rules:
        for layer in range(model.num_hidden_layers) if rule.per_layer else (None,):
            known |= {template.format(layer=layer): (dims, layer) for template, dims in rule.hf_templates}
    return tuple(DenseTensor(step, *known[step.target.name]) for step in steps)
