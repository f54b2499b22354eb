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

from mindformers_ext.core.families import FAMILIES, Family
from mindformers_ext.mf.balance import MoETopkBiasBalanceCallback
from mindformers_ext.mf.checkpoint import WholeCheckpointMonitor
from mindformers_ext.mf.config import PortableLlamaConfig
from mindformers_ext.mf.load_monitor import MoELoadMonitor
from mindformers_ext.mf.mixture import MixtureDataset
from mindformers_ext.mf.monitor import MoELossMonitor
from mindformers_ext.mf.networks import PortableLlamaForCausalLM
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
    (Kind.WRAPPER, PortableTrainOneStepCell),
    (Kind.WRAPPER, PortablePipelineStepCell),
    (Kind.OPTIMIZER, FP32StateAdamWeightDecay),
    (Kind.OPTIMIZER, FusedAdamW),
    (Kind.CALLBACK, MoELossMonitor),
    (Kind.CALLBACK, WholeCheckpointMonitor),
    (Kind.CALLBACK, MoETopkBiasBalanceCallback),
    (Kind.CALLBACK, MoELoadMonitor),
    (Kind.CALLBACK, ObsMonitor),
    (Kind.DATASET_LOADER, MixtureDataset),
    (Kind.TRAINER, PortableCausalLanguageModelingTrainer),
)

CLASSES: dict[str, tuple[type[PortableLlamaConfig], type[PortableLlamaForCausalLM]]] = {}  # by the family's name


def register_families() -> None:
    """Give MindFormers a configuration and a network class under every name of our families; safe to call again."""
    for family in FAMILIES.values():
        if not family.yaml_names or family.name in CLASSES:
            continue
        CLASSES[family.name] = config, network = _classes(family)
        for config_name, name in family.yaml_names:
            MindFormerRegister.register_cls(config, Kind.CONFIG, config_name)
            MindFormerRegister.register_cls(network, Kind.MODELS, name)


def _classes(family: Family) -> tuple[type[PortableLlamaConfig], type[PortableLlamaForCausalLM]]:
    if family == PortableLlamaConfig.family:
        return PortableLlamaConfig, PortableLlamaForCausalLM
    config_name, name = family.yaml_names[0]
    config = type(config_name, (PortableLlamaConfig,), {"family": family, "__module__": __name__})
    network = type(name, (PortableLlamaForCausalLM,), {"config_class": config, "__module__": __name__})
    return config, network


for _kind, _class in REGISTERED:
    MindFormerRegister.register_cls(_class, _kind)
register_families()
