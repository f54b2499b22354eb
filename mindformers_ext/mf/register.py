# SPDX-License-Identifier: Apache-2.0
"""Puts our classes into MindFormers' registry under names that a YAML can use; importing this module does it.

A plain MindFormers run gets them by ``import mindformers_ext.mf.register`` before ``Trainer``.
"""

from __future__ import annotations

from typing import Any

from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType as Kind
from mindformers.tools.register import MindFormerRegister
from mindspore.train import Callback

from mindformers_ext.mf.balance import MoETopkBiasBalanceCallback
from mindformers_ext.mf.checkpoint import WholeCheckpointMonitor
from mindformers_ext.mf.config import MixtralConfig, PortableLlamaConfig
from mindformers_ext.mf.load_monitor import MoELoadMonitor
from mindformers_ext.mf.monitor import MoELossMonitor
from mindformers_ext.mf.networks import MixtralForCausalLM, PortableLlamaForCausalLM
from mindformers_ext.mf.pipeline_step import PortablePipelineStepCell
from mindformers_ext.mf.step import PortableTrainOneStepCell
from mindformers_ext.mf.trainer import PortableCausalLanguageModelingTrainer
from mindformers_ext.ms.optim import FP32StateAdamWeightDecay, FusedAdamW


class ObsMonitor(Callback):
    """Older YAMLs list it to upload files to Huawei's object store; here it is accepted and does nothing."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        logger.info("ObsMonitor does nothing here: no file is uploaded. Remove it from callbacks to silence this.")


REGISTERED: tuple[tuple[str, type], ...] = (
    (Kind.CONFIG, MixtralConfig),
    (Kind.CONFIG, PortableLlamaConfig),
    (Kind.MODELS, MixtralForCausalLM),
    (Kind.MODELS, PortableLlamaForCausalLM),
    (Kind.WRAPPER, PortableTrainOneStepCell),
    (Kind.WRAPPER, PortablePipelineStepCell),
    (Kind.OPTIMIZER, FP32StateAdamWeightDecay),
    (Kind.OPTIMIZER, FusedAdamW),
    (Kind.CALLBACK, MoELossMonitor),
    (Kind.CALLBACK, WholeCheckpointMonitor),
    (Kind.CALLBACK, MoETopkBiasBalanceCallback),
    (Kind.CALLBACK, MoELoadMonitor),
    (Kind.CALLBACK, ObsMonitor),
    (Kind.TRAINER, PortableCausalLanguageModelingTrainer),
)

for _kind, _class in REGISTERED:
    MindFormerRegister.register_cls(_class, _kind)
