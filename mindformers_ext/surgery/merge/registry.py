# SPDX-License-Identifier: Apache-2.0
"""Every merge method by its name in ``merge_method``."""

from __future__ import annotations

from mindformers_ext.core.errors import UserError, nearest
from mindformers_ext.surgery.merge.breadcrumbs import BREADCRUMBS, BREADCRUMBS_TIES
from mindformers_ext.surgery.merge.dare_linear import DARE_LINEAR
from mindformers_ext.surgery.merge.dare_ties import DARE_TIES
from mindformers_ext.surgery.merge.della import DELLA, DELLA_LINEAR
from mindformers_ext.surgery.merge.linear import LINEAR
from mindformers_ext.surgery.merge.model_stock import MODEL_STOCK
from mindformers_ext.surgery.merge.nuslerp import NUSLERP
from mindformers_ext.surgery.merge.passthrough import PASSTHROUGH
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
    )
}
# Methods that users may know and that are not built: what to take instead.
NOT_BUILT = {
    "nearswap": "slerp or linear",
    "multislerp": "nuslerp or model_stock",
    "karcher": "nuslerp or model_stock",
    "arcee_fusion": "sce",
    "ram": "ties",
    "ramplus_tl": "ties",
}


def method_called(name: object) -> Method:
    """The method ``name``; an unknown one is a ``UserError`` that lists the choices."""
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    if name in NOT_BUILT:
        raise UserError(f"merge_method '{name}' is not built: the nearest that is, {NOT_BUILT[str(name)]}")
    raise UserError(
        f"merge_method '{name}' is unknown, {nearest(str(name), sorted(METHODS))} Choose one of {', '.join(METHODS)}"
    )
