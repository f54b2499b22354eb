# SPDX-License-Identifier: Apache-2.0
"""From a checked configuration to MindFormers' Trainer: what ``run_mindformer.py`` calls last."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mindspore as ms
from mindformers.core.context import build_context
from mindformers.tools.logger import get_logger, logger
from mindformers.tools.register import MindFormerConfig
from mindformers.trainer import Trainer
from mindformers.utils.file_utils import set_output_path

from mindformers_ext.core.config.keys import SHARDED_MODES
from mindformers_ext.core.config.lora import lora_from_yaml
from mindformers_ext.core.config.run import CPU, TRAINING, run_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.plain_file import AFRESH, open_plain
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.checkpoint.transform import TransformRequest
from mindformers_ext.jobs.run.checks import CheckedRun
from mindformers_ext.jobs.run.keep import keep_config, keep_lora
from mindformers_ext.jobs.run.quiet import Passed
from mindformers_ext.jobs.run.slices import merge_slices, merged_file
from mindformers_ext.mf.adapt import adapt
from mindformers_ext.mf.barrier import use_cpu_barrier
from mindformers_ext.mf.config import WRITTEN, remember
from mindformers_ext.mf.register import register_families  # importing it registers our other classes
from mindformers_ext.mf.trainer import BASE


def run(config: Mapping[str, Any], checked: CheckedRun | None = None) -> Any:
    """Train (returns None), evaluate (the metrics by name) or predict (MindFormers' list) as ``run_mode`` says.

    Args:
        config: the YAML's content with the command line's options applied, and with what the checks have settled.
        checked: what they have made of it; None reads ``config`` as it is, which does not tell what lies below
            resumed adapters.

    The configuration that MindFormers really gets is kept as ``<output_dir>/run_config/<run_mode>.yaml``.
    """
    asked = checked.run if checked else run_spec_from_yaml(config)
    if checked is None and asked.resume and asked.has_adapters:
        raise UserError("a resumed run with pet_config needs what jobs.run.checks.check_run makes of it")
    full = prepare(config, checked)
    if not any(isinstance(handler, Passed) for handler in get_logger().handlers):
        get_logger().addHandler(Passed())
    if checked and checked.merge:
        _merge_once(checked.merge, checked.build.network, checked.run.use_parallel)
    if asked.base:
        full[BASE] = asked.base
    seed_draws(asked.seed)
    trainer = Trainer(full)
    mode = full.run_mode
    if mode in TRAINING:
        keep_lora(checked.build.lora if checked else lora_from_yaml(config), Path(full.output_dir), asked)
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


def seed_draws(seed: int) -> None:
    """The global seed, which MindFormers leaves unset where it is 0. On a cluster it is left alone: MindSpore would
    start all slices of one shape from the same values."""
    if ms.get_auto_parallel_context("parallel_mode") not in SHARDED_MODES:
        ms.set_seed(seed)


def prepare(config: Mapping[str, Any], checked: CheckedRun | None = None, native: bool = False) -> MindFormerConfig:
    """MindFormers' configuration, saved, its device opened and all notes logged; arguments as for ``run``.

    ``native`` leaves MindFormers' own classes in place.
    """
    asked = checked.run if checked else run_spec_from_yaml(config)
    device = asked.device.target
    register_families()  # those that have been added since
    adapted, notes = (dict(config), []) if native else adapt(config, device)
    if checked and (written := adapted["model"]["model_config"].get(WRITTEN)):
        remember(written, checked.build)
    full = MindFormerConfig(str(keep_config(adapted, Path(asked.output_dir))))
    set_output_path(full.output_dir)
    _open_device(full, device)
    if full.use_parallel and device == CPU:
        use_cpu_barrier()
    for note in (*(checked.notes if checked else ()), *notes):
        logger.info("mindformers_ext: %s", note)
    return full


def _merge_once(request: TransformRequest, spec: NetworkSpec, together: bool) -> None:
    """Merge on rank 0 while the others wait; a failure there ends the job."""
    from mindformers.tools.utils import get_real_rank
    from mindspore.communication import comm_func

    if get_real_rank() == 0:
        logger.info("Merged weights: %s", merge_slices(request, spec))
    if together:
        comm_func.barrier()
    if not merged_file(request).is_file():
        raise UserError(
            f"rank 0 has merged the weights to {merged_file(request)}, which this machine does not see: "
            "output_dir must be a folder that all machines share"
        )


def _keep_texts(result: Any, path: Path) -> None:
    """The generated texts as plain text, one after the other; MindFormers' own file holds a printed list."""
    texts = [text for item in result for text in item.get("text_generation_text", ())]
    with os.fdopen(open_plain(path, AFRESH), "w", encoding="utf-8") as file:
        file.writelines(f"{text}\n" for text in texts)
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
