# SPDX-License-Identifier: Apache-2.0
"""Unknown keys in the sections that belong to MindFormers' trainer, named before MindFormers trips over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindformers_ext.core.config.run import TRAINING
from mindformers_ext.core.config.values import section_at
from mindformers_ext.core.errors import Problems

# Arguments of MindFormers 1.9.0's classes; a section whose ``type`` is not here is left to MindFormers.
ARGUMENTS: dict[str, dict[str, str]] = {
    "optimizer": {
        "AdamW": "betas eps weight_decay learning_rate use_fused swap",
        "FusedAdamW": "betas eps weight_decay learning_rate",
        "FP32StateAdamWeightDecay": "beta1 beta2 eps weight_decay learning_rate",
    },
    "lr_schedule": {
        "CosineWithWarmUpLR": "learning_rate warmup_steps total_steps num_cycles lr_end warmup_lr_init warmup_ratio "
        "decay_steps decay_ratio warmup_epochs",
        "LinearWithWarmUpLR": "learning_rate total_steps warmup_steps warmup_lr_init warmup_ratio warmup_epochs",
        "ConstantWarmUpLR": "learning_rate warmup_steps warmup_lr_init warmup_ratio total_steps warmup_epochs",
    },
    "runner_wrapper": dict.fromkeys(
        ("MFTrainOneStepCell", "PortableTrainOneStepCell"),
        "use_clip_grad max_grad_norm scale_sense local_norm calculate_per_token_loss use_skip_data_by_global_norm "
        "global_norm_spike_threshold print_separate_loss enable_check_overflow",
    ),
    "runner_wrapper.scale_sense": {
        "DynamicLossScaleUpdateCell": "loss_scale_value scale_factor scale_window",
        "FixedLossScaleUpdateCell": "loss_scale_value",
    },
}
# Keys of MindFormers' own files that no release of it reads (its classes take any key), and what happens in truth.
DEAD: dict[str, str] = {
    "runner_wrapper.enable_check_overflow": "MindFormers has never read it; every step looks for an overflow",
}
CALLBACKS: dict[str, str] = {
    "MFLossMonitor": "per_print_times tensorboard check_for_nan_in_loss_and_grad calculate_per_token_loss "
    "print_separate_loss learning_rate micro_batch_num micro_batch_interleave_num origin_epochs dataset_size "
    "global_batch_size gradient_accumulation_steps initial_epoch initial_step",
    "CheckpointMonitor": "prefix directory config save_checkpoint_steps save_checkpoint_seconds keep_checkpoint_max "
    "keep_checkpoint_per_n_minutes integrated_save save_network_params save_trainable_params async_save saved_network "
    "append_info enc_key enc_mode exception_save checkpoint_format remove_redundancy embedding_local_norm_threshold "
    "save_optimizer use_checkpoint_health_monitor health_ckpts_record_dir",
    "TopkBiasBalanceCallback": "balance_via_topk_bias topk_bias_update_rate expert_num micro_batch_num "
    "gradient_accumulation_steps",
    **dict.fromkeys(
        ("MoEDropRateCallback", "MoELoadMonitor"), "expert_num capacity_factor num_layers mtp_depth per_print_times"
    ),
}


def check_sections(config: Mapping[str, Any], mode: str) -> list[str]:
    """Check, for training, the keys of optimizer, schedule, wrapper and callbacks; returns a note per dead key.

    Raises:
        UserError: lists every unknown key with the nearest known one, and sections that are missing.
    """
    problems = Problems("configuration")
    if mode not in TRAINING:
        return []
    for path, kinds in ARGUMENTS.items():
        _check(path, section_at(config, path), kinds, problems)
    for place, callback in enumerate(config.get("callbacks") or []):
        if not isinstance(callback, Mapping) or "type" not in callback:
            problems.add(f"callbacks.{place}={callback!r} has no type", "write '- type: MFLossMonitor'")
        else:
            _check(f"callbacks.{place}", callback, CALLBACKS, problems)
    if not config.get("optimizer"):
        problems.add("the section optimizer is missing", "add it, for example type: AdamW")
    problems.raise_if_any()
    return [
        f"{path}={section_at(config, section)[name]!r} has no effect: {truth}"
        for path, truth in DEAD.items()
        for section, _, name in [path.rpartition(".")]
        if name in section_at(config, section)
    ]


def _check(path: str, section: Mapping[str, Any], kinds: Mapping[str, str], problems: Problems) -> None:
    known = kinds.get(str(section.get("type")))
    if known is not None:
        problems.unknown_keys(f"{path} ({section['type']})", section, ("type", "auto_register", *known.split()))
