# SPDX-License-Identifier: Apache-2.0
"""What every test shares. Loads no framework: tests/unit must stay under a minute."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("GLOG_v", "3")  # MindSpore: errors only; read when it is first imported
# MindSpore fails to import where a tokenizer has loaded protobuf's C implementation before it.
os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warns when a test forks


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Root folder of the working tree."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data(repo_root: Path) -> Path:
    """Real texts and tokenizers beside the working tree; tests that need them are skipped where they are not."""
    folder = repo_root.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder shared/data beside the working tree")
    return folder


@pytest.fixture(scope="session")
def wiki_file(shared_data: Path) -> Path:
    """WikiText-2's validation split."""
    return shared_data / "wiki.valid.tokens"


@pytest.fixture(scope="session", params=["llama2", "mixtral"])
def real_tokenizer(request: pytest.FixtureRequest, shared_data: Path) -> Path:
    """The SentencePiece models of LLaMA-2 and Mixtral, one after the other."""
    return shared_data / f"{request.param}_tokenizer.model"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked gpu are skipped, with the reason, where torch sees no CUDA device."""
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device on this machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n 2`` one process takes the dry runs, which only compile, and the other all other tests, in order."""
    from xdist.scheduler import LoadScopeScheduling

    class TwoLanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "dry runs" if nodeid.startswith("tests/cli/test_dryrun") else "others"

        def remove_node(self, node: Any) -> str | None:
            """A test that ends its process has failed: the other tests of its lane go on without it."""
            for tests in self.assigned_work[node].values():
                for name, is_done in tests.items():
                    if not is_done:
                        tests[name] = True
                        super().remove_node(node)
                        return name
            return super().remove_node(node)

    return TwoLanes(config, log)
