# SPDX-License-Identifier: Apache-2.0
"""What every test shares. Loads no framework: tests/unit must stay under a minute."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# a shell's background job ignores SIGINT, and so would every process that a test interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("GLOG_v", "3")  # MindSpore: errors only; read when it is first imported
# MindSpore fails to import where a tokenizer has loaded protobuf's C implementation before it.
os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
os.environ.setdefault("MS_COMPILER_CACHE_ENABLE", "0")  # no graph of an earlier run (ms/kept_graphs.py)
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
def remote_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where transformers copies a model's own code before it runs it. One for a process: it becomes a package."""
    from transformers import dynamic_module_utils

    folder = tmp_path_factory.mktemp("remote_code")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def wiki_file(shared_data: Path) -> Path:
    """WikiText-2's validation split."""
    return shared_data / "wiki.valid.tokens"


@pytest.fixture(scope="session", params=["llama2", "mixtral"])
def real_tokenizer(request: pytest.FixtureRequest, shared_data: Path) -> Path:
    """The SentencePiece models of LLaMA-2 and Mixtral, one after the other."""
    return shared_data / f"{request.param}_tokenizer.model"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked gpu are skipped where torch sees no CUDA device, those marked long without --all, and those marked
    turn where the commit's choice is another one."""
    turn = item.get_closest_marker("turn")
    if turn and item.nodeid not in item.session.stash.get(TURNS, {item.nodeid}):
        pytest.skip(f"runs with --all; this commit's turn of {turn.args[0]!r} is another")
    long = item.get_closest_marker("long")
    if long and not item.config.getoption("everything"):
        pytest.skip(f"runs with --all; {long.args[0]}")
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device on this machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What the suite has beyond pytest's own options."""
    parser.addoption(
        "--all",
        dest="everything",
        action="store_true",
        help="also tests marked long, every one that is marked turn, and every rank of every file's dry run (otherwise "
        "some, chosen by the commit)",
    )


@pytest.fixture(scope="session")
def commit(request: pytest.FixtureRequest, repo_root: Path) -> str | None:
    """The tree's commit, which chooses what dry runs compile beside the fixed ranks; None: all of them."""
    return None if request.config.getoption("everything") else commit_of(repo_root)


def commit_of(root: Path) -> str:
    """The hash of the commit that is checked out; "0" where there is none, as in an unpacked archive."""
    words = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return "0"
    return found.stdout.strip() or "0"


def pytest_report_header(config: pytest.Config) -> str:
    """What is left out."""
    if config.getoption("everything"):
        return "all tests; dry runs compile every rank"
    return f"without tests marked long; commit {commit_of(config.rootpath)} chooses ranks, and tests that take turns"


# Folders in the order in which they start, the longest files first, so that short ones fill the end.
ORDER = (
    "tests/mf",
    "tests/cli/dryrun",
    "tests/families",
    "tests/parity",
    "tests/cli",
    "tests/ms",
    "tests/pt",
    "tests/surgery",
    "tests/unit",
)


def scope(nodeid: str) -> str:
    """Tests with the same scope run in one process, one after the other: those of one file, or what is said here."""
    file, _, test = nodeid.partition("::")
    if file.startswith("tests/mf/"):
        return "tests/mf"  # they share a trained job
    if file.startswith("tests/cli/dryrun/") and test.startswith("test_"):
        return f"{file}[{test.partition('[')[2]}"  # each job has its own ranks
    if file in ("tests/cli/run/test_quickstart.py", "tests/cli/docs/test_readme.py"):
        return "quickstart"  # one run for both
    return file


TURNS = pytest.StashKey[set[str]]()  # tests marked turn that run; without --all only


def whose_turn(groups: dict[str, list[str]], commit: str) -> set[str]:
    """Of each group's tests the one that ``commit`` (hexadecimal) chooses."""
    return {tests[int(commit, 16) % len(tests)] for tests in groups.values()}


@pytest.hookimpl(trylast=True)  # after -k and -m: whoever asks for one test gets it
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Folders in the order of ``ORDER``; inside, everything keeps its place. Those marked turn are chosen from."""
    groups = defaultdict(list)
    for item in items:
        for mark in item.iter_markers("turn"):
            groups[mark.args[0]].append(item.nodeid)
    if groups and not config.getoption("everything"):
        session.stash[TURNS] = whose_turn(groups, commit_of(config.rootpath))
    items.sort(
        key=lambda item: next((n for n, folder in enumerate(ORDER) if item.nodeid.startswith(folder)), len(ORDER))
    )


def pytest_collection_finish() -> None:
    """What collection has imported stays: MindSpore collects garbage many times in each compilation, and would look at
    all of it (7 % of the time of tests/ms)."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``: whoever is free takes the next scope."""
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

        def remove_node(self, node: Any) -> str | None:
            """A test that ends its process has failed: the other tests of its scope go on without it."""
            for tests in self.assigned_work[node].values():
                for name, is_done in tests.items():
                    if not is_done:
                        tests[name] = True
                        super().remove_node(node)
                        return name
            return super().remove_node(node)

    return ByScope(config, log)
