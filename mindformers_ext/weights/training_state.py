# SPDX-License-Identifier: Apache-2.0
"""Training state in a MindSpore checkpoint: declared here, so that an export drops it knowingly and nothing else."""

from __future__ import annotations

import re

from mindformers_ext.core.parameters import ROUTED

_ROUTER = rf"feed_forward\.({re.escape(ROUTED)})?router\.router"
# Kept by training in every router, unknown to Hugging Face's model.
ROUTER_STATE = (
    (rf"model\.layers\.\d+\.{_ROUTER}\.topk_bias", "router bias, unknown to Hugging Face"),
    (rf"model\.layers\.\d+\.{_ROUTER}\.(expert_load|fi_parameter)", "router statistics"),
)
_PARAMETER = r"(model\.|lm_head\.).+"

MS_TRAINING_STATE = (
    (
        rf"(adam_m|adam_v|exp_avg|exp_avg_sq|max_exp_avg_sq|moment1|moment2|moments|vhat|muon_m|accu_grads)\.{_PARAMETER}",
        "optimizer state",
    ),
    (r"(beta1_power|beta2_power|learning_rate|afactor_step)", "optimizer state"),
    (r"(global_step|epoch_num|step_num|current_iterator_step|last_overflow_iterator_step)", "counters"),
    (r"(scale_sense|loss_scale|global_batch_size|graceful_exit|graceful_init)", "train-step state"),
    (r"(data\.mixture|hook\.\d+\.\w+)", "state of the data and of hooks"),
    (r"(list_index|scale_window_up_count|scale_window_down_count)", "train-step state"),
)
