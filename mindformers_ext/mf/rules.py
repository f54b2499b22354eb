# SPDX-License-Identifier: Apache-2.0
"""Rules of MindFormers that do not hold for our networks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mindformers.tools.check_rules  # noqa: F401  the module below

MODULE, RULE = "mindformers.tools.check_rules", "_check_moe_parallel_valid"


@contextmanager
def experts_without_sequence_parallel() -> Iterator[None]:
    """For as long as it lasts, MindFormers takes experts with model parallel but without sequence parallel.

    It did until June 2025, and refuses them since because they are slower; ``core.cluster.cluster_rules`` says that in
    the log.
    """
    module = sys.modules[MODULE]
    rule = getattr(module, RULE, None)
    if rule is None:  # a release before the rule
        yield
        return
    setattr(module, RULE, _anything)
    try:
        yield
    finally:
        setattr(module, RULE, rule)


def _anything(*_: Any) -> None:
    return None
