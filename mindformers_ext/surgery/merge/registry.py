# SPDX-License-Identifier: Apache-2.0
"""Every merge method by its name in ``merge_method``."""

from __future__ import annotations

from mindformers_ext.surgery.merge.arcee_fusion import ARCEE_FUSION
from mindformers_ext.surgery.merge.breadcrumbs import BREADCRUMBS, BREADCRUMBS_TIES
from mindformers_ext.surgery.merge.dare_linear import DARE_LINEAR
from mindformers_ext.surgery.merge.dare_ties import DARE_TIES
from mindformers_ext.surgery.merge.della import DELLA, DELLA_LINEAR
from mindformers_ext.surgery.merge.karcher import KARCHER
from mindformers_ext.surgery.merge.linear import LINEAR
from mindformers_ext.surgery.merge.model_stock import MODEL_STOCK
from mindformers_ext.surgery.merge.multislerp import MULTISLERP
from mindformers_ext.surgery.merge.nearswap import NEARSWAP
from mindformers_ext.surgery.merge.nuslerp import NUSLERP
from mindformers_ext.surgery.merge.passthrough import PASSTHROUGH
from mindformers_ext.surgery.merge.ram import RAM, RAMPLUS_TL
from mindformers_ext.surgery.merge.sce import SCE
from mindformers_ext.surgery.merge.settings import Method
from mindformers_ext.surgery.merge.slerp import SLERP
from mindformers_ext.surgery.merge.task_arithmetic import TASK_ARITHMETIC
from mindformers_ext.surgery.merge.ties import TIES

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        LINEAR,
        SLERP,
        TASK_ARITHMETIC,
        TIES,
        DARE_LINEAR,
        DARE_TIES,
        PASSTHROUGH,
        BREADCRUMBS,
        BREADCRUMBS_TIES,
        DELLA,
        DELLA_LINEAR,
        MODEL_STOCK,
        NUSLERP,
        SCE,
        KARCHER,
        MULTISLERP,
        NEARSWAP,
        ARCEE_FUSION,
        RAM,
        RAMPLUS_TL,
    )
}


def method_called(name: str) -> Method:
    """The method ``name``, one of ``names.NAMES``."""
    return METHODS[name]
