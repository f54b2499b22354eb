# SPDX-License-Identifier: Apache-2.0
"""What the parity tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore writes rank_0/ and kernel_meta/ where it stands when a graph does not compile: not into the tree."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["GRAPH", "PYNATIVE"])
def mode(request: pytest.FixtureRequest) -> str:
    """Runs the test in both of MindSpore's modes."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE if request.param == "GRAPH" else ms.PYNATIVE_MODE)
    return request.param
