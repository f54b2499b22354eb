# SPDX-License-Identifier: Apache-2.0
"""The parity tests share what the tests of MindSpore networks share."""

from tests.ms.conftest import _own_folder, mode  # noqa: F401
