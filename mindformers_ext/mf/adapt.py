# SPDX-License-Identifier: Apache-2.0
"""Makes an older YAML run here without an edit, and says what it changed."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

from mindformers_ext.core.config.keys import MODEL, MODES
from mindformers_ext.core.config.mixture_words import PLACE
from mindformers_ext.core.config.run import ASCEND, CPU, TRAINER_KEY, data_spec_from_yaml
from mindformers_ext.core.config.train import GATE_SWITCHES
from mindformers_ext.core.config.values import section_at
from mindformers_ext.core.documents import DOCUMENT_IDS
from mindformers_ext.core.families import GENERIC_NAMES, Family, family_of_yaml
from mindformers_ext.mf.config import WRITTEN
from mindformers_ext.mf.mixture import SEED
from mindformers_ext.mf.noise import NOISE, may_draw

NOT_THEIRS = ("engine", TRAINER_KEY, "register_path")  # obeyed before MindFormers is opened
# Sections that describe the network; kept as written for ``mf.config``.
DESCRIBING = (
    "model",
    "moe_config",
    "parallel_config",
    "parallel",
    "runner_config",
    "use_parallel",
    "run_mode",
    "micro_batch_interleave_num",
    "recompute_config",
)
CALLBACK_NOTES = {
    "MFLossMonitor": "MoELossMonitor",
    "CheckpointMonitor": "WholeCheckpointMonitor",
    "TopkBiasBalanceCallback": "MoETopkBiasBalanceCallback",
    "MoEDropRateCallback": "MoELoadMonitor",
}


def adapt(config: Mapping[str, Any], device_target: str) -> tuple[dict[str, Any], list[str]]:
    """The configuration that MindFormers gets, and one line per change.

    - What MindFormers calls any LLaMA becomes a family of ours where ``core.families`` says so: with experts or masks,
      and dense wherever MindFormers' own cannot run, that is not on Ascend.
    - ``MFTrainOneStepCell`` becomes our train step and ``CausalLanguageModelingTrainer`` our trainer, which puts our
      callbacks behind MindFormers' names.
    - ``AdamW`` becomes our ``FusedAdamW``, the same numbers in one kernel, off Ascend and with float32 weights.
    - No more reading threads than cores; no optimizer states cut over data-parallel processes off Ascend.
    - Sink mode goes off on the CPU: MindFormers multiplies the epochs by the steps for it, MindSpore then runs without;
      and where gates or masks have noise, which comes with every step (``mf.noise``).

    ``config`` itself is not changed.
    """
    kept = {key: value for key, value in config.items() if key not in NOT_THEIRS and value is not None}
    result: dict[str, Any] = copy.deepcopy(kept)
    notes: list[str] = []
    family = family_of_yaml(config, device_target)
    if family is not None:
        _adapt_network(result, config, family, device_target, notes)
        _adapt_run(result, notes)
        _adapt_optimizer(result, device_target, notes)
    for section in ("train_dataset", "eval_dataset"):
        if result.get(section):
            result.setdefault(f"{section}_task", {"type": "CausalLanguageModelDataset"})
            result[f"{section}_task"]["dataset_config"] = result[section]
            _limit_workers(result[section], section, notes)
    loader, data = section_at(result, PLACE), data_spec_from_yaml(config, "train_dataset")
    if data and data.mixture:
        result["train_dataset"]["data_loader"] = {**loader, SEED: data.seed}
    _adapt_parallel(result, device_target, notes)
    for switch in GATE_SWITCHES:  # ``mf.networks`` reads the copy
        (result.get("runner_config") or {}).pop(switch.removeprefix("runner_config."), None)
    draws = family is not None and may_draw(family, section_at(config, MODEL))
    columns = (result.get("train_dataset") or {}).get("input_columns") or ["input_ids"]
    if family is not None and DOCUMENT_IDS in columns:  # the network is built for such rows
        result["model"]["model_config"][WRITTEN]["train_dataset"] = {"input_columns": list(columns)}
    if family is not None and result.get("train_dataset") and (draws or DOCUMENT_IDS in columns):
        # the names of what the network is called with
        result["train_dataset"]["construct_args_key"] = [*columns, NOISE] if draws else list(columns)
    why = ""
    if device_target == CPU:
        why = "the CPU has no data sinking"
    elif draws:
        why = "the noise of the gates comes with every step"
    elif family is not None and section_at(config, MODEL).get("l0_module"):
        why = "the noise of the masks comes with every step"
    runner = result.setdefault("runner_config", {}) if why else {}
    if why and runner.get("sink_mode", True):
        runner["sink_mode"] = False
        notes.append(f"runner_config.sink_mode becomes False: {why}")
    if device_target == CPU:
        result["postprocess_use_numpy"] = True  # sampling: MindSpore's own top-k has no CPU kernel
    return result, notes


def _adapt_parallel(result: dict[str, Any], device: str, notes: list[str]) -> None:
    """Between CPU processes only whole optimizers exist: MindSpore cuts their states on Ascend alone."""
    parallel = result.get("parallel") or {}
    mode = MODES.get(parallel.get("parallel_mode", 1), parallel.get("parallel_mode"))
    cut = result.get("use_parallel") and parallel.get("enable_parallel_optimizer")
    if cut and device != ASCEND and str(mode) in ("0", "data_parallel"):
        parallel["enable_parallel_optimizer"] = False
        notes.append(f"enable_parallel_optimizer becomes False: data parallel on {device} keeps whole optimizer states")
    if parallel.get("pipeline_config"):  # MindSpore wants both keys
        parallel["pipeline_config"] = {
            "pipeline_interleave": False,
            "pipeline_scheduler": "1f1b",
            **parallel["pipeline_config"],
        }


def _limit_workers(dataset: dict[str, Any], section: str, notes: list[str]) -> None:
    """MindSpore refuses more reading threads than the machine has cores."""
    cores, workers = os.cpu_count() or 1, dataset.get("num_parallel_workers", 8)
    if isinstance(workers, int) and workers > cores:
        dataset["num_parallel_workers"] = cores
        notes.append(f"{section}.num_parallel_workers becomes {cores}: this machine has no more cores")


def _adapt_network(
    result: dict[str, Any], written: Mapping[str, Any], family: Family, device: str, notes: list[str]
) -> None:
    """Our network of ``family``, which the YAML names or means."""
    model = result["model"]
    words, arch = model["model_config"], model.setdefault("arch", {})
    if (words.get("type"), arch.get("type")) == GENERIC_NAMES:
        experts = (result.get("moe_config") or words.get("moe_config") or {}).get("expert_num")
        why = f"MindFormers' own does not run on {device}"
        if family.has_experts or words.get("l0_module"):
            why = f"it has {experts} experts" if family.has_experts else "it has masks"
        words["type"], arch["type"] = family.yaml_names[0]
        notes.append(f"{GENERIC_NAMES[1]} becomes {arch['type']}: {why}")
    words[WRITTEN] = copy.deepcopy({key: written[key] for key in DESCRIBING if key in written})
    words.pop("pet_config", None)  # MindFormers would look for its own linear layers; ``mf.networks`` reads the copy
    words["use_flash_attention"] = False  # ours is chosen by device; MindFormers refuses it without use_past
    if words.get("use_past"):
        words["use_past"] = False
        if written.get("run_mode") == "predict":
            notes.append("use_past becomes False: MindFormers' generation recomputes the sequence for every token")
    for section in (result.get("moe_config"), words.get("moe_config")):
        if section and section.get("aux_loss_factor") == 0:
            section.pop("aux_loss_factor")  # off for us; MindFormers' own check refuses 0


def _adapt_run(result: dict[str, Any], notes: list[str]) -> None:
    wrapper = result.get("runner_wrapper")
    if wrapper and wrapper.get("type", "MFTrainOneStepCell") == "MFTrainOneStepCell":
        wrapper["type"] = "PortableTrainOneStepCell"
        notes.append("MFTrainOneStepCell becomes PortableTrainOneStepCell: its overflow check runs on every device")
    trainer = result.setdefault("trainer", {})
    if trainer.get("type", "CausalLanguageModelingTrainer") == "CausalLanguageModelingTrainer":
        trainer["type"] = "PortableCausalLanguageModelingTrainer"
        for callback in result.get("callbacks") or []:
            name = callback.get("type")
            if name in CALLBACK_NOTES:
                notes.append(f"callback {name} becomes {CALLBACK_NOTES[name]}")


def _adapt_optimizer(result: dict[str, Any], device: str, notes: list[str]) -> None:
    """Ours computes what MindFormers' AdamW does and keeps its checkpoint names; see ``ms.optim``."""
    optimizer = result.get("optimizer") or {}
    weights = result["model"]["model_config"].get("param_init_type", "float16")
    plain = not optimizer.get("swap") and not optimizer.get("use_fused")
    if optimizer.get("type") == "AdamW" and device != ASCEND and weights == "float32" and plain:
        for off in ("swap", "use_fused"):
            optimizer.pop(off, None)
        optimizer["type"] = "FusedAdamW"
        notes.append("AdamW becomes FusedAdamW: the same update in one kernel")
