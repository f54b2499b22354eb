# SPDX-License-Identifier: Apache-2.0
"""YAML written so that every reader gets the same values back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper without anchors: a section used twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never write ``&id001``."""
        return True


def yaml_text(config: Mapping[str, Any]) -> str:
    """``config`` as YAML, keys in their order; plain mappings, lists and scalars only."""
    return yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
