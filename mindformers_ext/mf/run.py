# SPDX-License-Identifier: Apache-2.0
"""From a checked configuration to MindFormers' Trainer: what ``run_mindformer.py`` calls last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindformers.core.context import build_context
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig
from mindformers.trainer import Trainer
from mindformers.utils.file_utils import set_output_path

import mindformers_ext.mf.register  # noqa: F401  puts our classes into MindFormers' registry
from mindformers_ext.core.config.file import dump_yaml
from mindformers_ext.core.config.lora import ADAPTER_CONFIG, lora_from_yaml
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.checkpoint.transform import TransformRequest
from mindformers_ext.jobs.run.slices import merge_slices, merged_file
from mindformers_ext.mf.adapt import upgrade
from mindformers_ext.mf.barrier import use_cpu_barrier

TRAINING = ("train", "finetune")


def run(config: Mapping[str, Any], extra_notes: tuple[str, ...] = (), merge: TransformRequest | None = None) -> Any:
    """Train (returns None), evaluate (the metrics by name) or predict (MindFormers' list) as ``run_mode`` says.

    Args:
        config: the YAML's content with the command line's options applied.
        extra_notes: lines for the log besides those about the upgrade.
        merge: slices that the first rank puts together before all ranks load them.

    The configuration that MindFormers really gets is kept as ``<output_dir>/run_config/<run_mode>.yaml``.
    """
    full = prepare(config, extra_notes)
    if merge is not None:
        _merge_once(merge, config)
    trainer = Trainer(full)
    mode = full.run_mode
    if mode in TRAINING:
        _keep_lora(config, Path(full.output_dir))
        return trainer.train()
    if mode == "eval":
        trainer.evaluate(eval_checkpoint=full.load_checkpoint or None)
        return getattr(trainer.trainer, "eval_result", None)
    result = trainer.predict(
        predict_checkpoint=full.load_checkpoint or None,
        input_data=full.input_data,
        batch_size=full.predict_batch_size,
        adapter_id=full.adapter_id,
    )
    _keep_texts(result, Path(full.output_dir) / "sample.txt")
    return result


def prepare(config: Mapping[str, Any], extra_notes: tuple[str, ...] = (), native: bool = False) -> MindFormerConfig:
    """MindFormers' configuration for ``config``, saved, its device opened and its notes logged.

    ``native`` leaves MindFormers' own classes in place.
    """
    device = (config.get("context") or {}).get("device_target", "Ascend")
    upgraded, notes = (dict(config), []) if native else upgrade(config, device)
    full = MindFormerConfig(str(_saved(upgraded)))
    set_output_path(full.output_dir)
    _open_device(full, device)
    if full.use_parallel and device == "CPU":
        use_cpu_barrier()
    for note in (*extra_notes, *notes):
        logger.info("mindformers_ext: %s", note)
    return full


def _merge_once(request: TransformRequest, config: Mapping[str, Any]) -> None:
    """Merge on rank 0 while the others wait; a failure there ends the job."""
    from mindformers.tools.utils import get_real_rank
    from mindspore.communication import comm_func

    if get_real_rank() == 0:
        spec = network_spec_from_yaml(config)
        logger.info("Merged weights: %s", merge_slices(request, spec))
    if config.get("use_parallel"):
        comm_func.barrier()
    if not merged_file(request).is_file():
        raise UserError(
            f"rank 0 has merged the weights to {merged_file(request)}, which this machine does not see: "
            "output_dir must be a folder that all machines share"
        )


def _keep_lora(config: Mapping[str, Any], folder: Path) -> None:
    """What ``tools/merge_lora.py`` must know about the adapters, in PEFT's words."""
    lora = lora_from_yaml(config)
    if lora:
        beside = folder / f".{ADAPTER_CONFIG}.{os.getpid()}"
        beside.write_text(json.dumps(lora.peft_words(), indent=1) + "\n", encoding="utf-8")
        os.replace(beside, folder / ADAPTER_CONFIG)


def _keep_texts(result: Any, path: Path) -> None:
    """The generated texts as plain text, one after the other; MindFormers' own file holds a printed list."""
    texts = [text for item in result for text in item.get("text_generation_text", ())]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    logger.info("The texts are in %s", path)


def _open_device(config: MindFormerConfig, device: str) -> None:
    """MindFormers' context; a device that MindSpore cannot use is the user's mistake."""
    try:
        build_context(config)
    except RuntimeError as error:
        if "nsupported device target" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise UserError(f"device_target {device} cannot be used: {first} Run with --device_target CPU.") from error


def _saved(config: Mapping[str, Any]) -> Path:
    """Write the configuration where the run's other files go; every process of a job writes the same content."""
    folder = Path(config.get("output_dir") or "./output") / "run_config"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.get('run_mode')}.yaml"
    beside = folder / f".{path.name}.{os.getpid()}"
    beside.write_text(dump_yaml(config), encoding="utf-8")
    os.replace(beside, path)
    return path
