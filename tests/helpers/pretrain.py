# SPDX-License-Identifier: Apache-2.0
"""The configuration that jobs of a cluster are made from in tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from tests.helpers.specs import PRETRAIN_YAML


def changed(changes: Mapping[str, Any]) -> dict[str, Any]:
    """``PRETRAIN_YAML`` with dotted keys set."""
    config = yaml.safe_load(PRETRAIN_YAML)
    for path, value in changes.items():
        *parents, last = path.split(".")
        section = config
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value
    return config
