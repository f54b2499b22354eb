# SPDX-License-Identifier: Apache-2.0
"""Adds trained LoRA adapters into the base weights: W + alpha / rank * B A, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mindformers_ext.core.config.lora import ADAPTER_CONFIG, LORA_A, LORA_B
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.atomic import flush, fresh_file
from mindformers_ext.formats.dtypes import cast
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.formats.ms_file import CheckpointMeta, check_suffix, open_checkpoint, open_writer, sidecar
from mindformers_ext.formats.tensors import Array, Reader
from mindformers_ext.jobs.checkpoint.saved import checkpoint_file
from mindformers_ext.jobs.checkpoint.source import own_meta

OPTIMIZER = ("adam_m.", "adam_v.")


@dataclass(frozen=True)
class Merged:
    """What a merge has done."""

    layers: tuple[str, ...]
    tensors: int
    scale: float


def merge_lora(base: Path, adapter: Path, output: Path, scale: float | None = None, overwrite: bool = False) -> Merged:
    """Write ``base`` with the adapters of ``adapter`` added to ``output``, in the types of ``base``.

    Args:
        base: the weights the adapters were trained on, ``.ckpt`` or ``.safetensors`` of the dense layout.
        adapter: a checkpoint of the finetuning run, or its ``checkpoint`` folder (rank 0's newest).
        output: file to write.
        scale: lora_alpha / lora_rank; None reads it from the run's ``adapter_config.json``.
        overwrite: replace an existing output.

    Raises:
        UserError: no adapters, one of their layers is not in the base, shapes that do not fit, no scale.
    """
    check_suffix(output)
    file = checkpoint_file(adapter) if adapter.exists() else None
    if file is None:
        raise UserError(
            f"adapter {adapter} is no checkpoint: give a .ckpt of the finetuning run, or its folder 'checkpoint'"
        )
    factor = scale_of(file) if scale is None else scale
    with closing(open_checkpoint(base)) as weights, closing(open_checkpoint(file)) as adapters:
        layers = _layers(weights, adapters, base, file)
        meta = own_meta(base, weights)
        if meta is None:
            meta = CheckpointMeta(config={}, dtype="mixed", source=base.name)
        meta = replace(meta, hash="", source=f"{base.name} + {file.name}")
        with fresh_file(output, overwrite) as partial:
            with open_writer(partial, output.suffix, list(weights.infos.values()), meta) as writer:
                for name, array in _stream(weights, adapters, layers, factor):
                    writer.add(name, array)
            if output.suffix == ".ckpt":
                flush(partial)
                with closing(CkptFile(partial)) as written:
                    described = replace(meta, hash=fingerprint(written))
                with fresh_file(sidecar(output), overwrite=True) as description:
                    description.write_text(described.to_text(), encoding="utf-8")
        return Merged(tuple(layers), len(weights.infos), factor)


def scale_of(file: Path) -> float:
    """lora_alpha / r of the ``adapter_config.json`` above ``checkpoint/rank_0/FILE``.

    Raises:
        UserError: there is none, or it holds no such numbers.
    """
    places = [folder / ADAPTER_CONFIG for folder in file.resolve().parents[:3]]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(
            f"no {ADAPTER_CONFIG} lies beside {file} or up to two folders above: give --lora_scaling "
            "(lora_alpha / lora_rank of the run)"
        )
    adapter = read_object(found, "give --lora_scaling")
    try:
        return float(adapter["lora_alpha"]) / float(adapter["r"])
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{found} holds no lora_alpha and r: give --lora_scaling") from error


def _layers(weights: Reader, adapters: Reader, base: Path, file: Path) -> list[str]:
    """The adapted layers, each with both adapters and a weight of their shape."""
    found = [
        name.removesuffix(f".{LORA_A}")
        for name in adapters.infos
        if name.endswith(f".{LORA_A}") and not name.startswith(OPTIMIZER)
    ]
    if not found:
        raise UserError(
            f"{file} holds no LoRA adapters (names that end in {LORA_A}): give a checkpoint of a run with pet_config"
        )
    problems = Problems(f"adapters {file} do not fit {base}")
    for name in found:
        low, high = adapters.infos[f"{name}.{LORA_A}"].shape, adapters.infos.get(f"{name}.{LORA_B}")
        weight = weights.infos.get(f"{name}.weight")
        if high is None:
            problems.add(f"{name}.{LORA_B} is missing", "the checkpoint is not whole")
        elif weight is None:
            problems.add(f"{name}.weight is not in the base", "give the weights the adapters were trained on")
        elif weight.shape != (high.shape[0], low[1]) or high.shape[1] != low[0]:
            problems.add(
                f"{name}: A {low}, B {high.shape}, weight {weight.shape}",
                "give the weights the adapters were trained on",
            )
    problems.raise_if_any()
    return found


def _stream(weights: Reader, adapters: Reader, layers: list[str], scale: float) -> Iterator[tuple[str, Array]]:
    adapted = {f"{name}.weight": name for name in layers}
    for name, info in weights.infos.items():
        array = weights.read(name)
        if name in adapted:
            low, high = (adapters.read(f"{adapted[name]}.{part}").astype(np.float32) for part in (LORA_A, LORA_B))
            array, lost = cast(array.astype(np.float32) + np.float32(scale) * (high @ low), info.dtype)
            if lost:
                raise UserError(
                    f"{name}: {lost} merged weights are beyond the range of {info.dtype}: convert the base "
                    "to bf16 or fp32 first"
                )
        yield name, array
