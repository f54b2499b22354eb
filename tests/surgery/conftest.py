# SPDX-License-Identifier: Apache-2.0
"""The merge methods' tests need torch."""

import pytest

pytest.importorskip("torch", reason="merge methods compute with torch")
