# SPDX-License-Identifier: Apache-2.0
"""Compiled graphs that later processes find again, so that the second start of a model does not compile.

MindSpore's own cache (``MS_COMPILER_CACHE_ENABLE``) knows a graph by how many were compiled before it in the process
and by the files that its entry script imports: another model, another shape or another order of calls is given a wrong
graph. So each job's graphs get a folder of their own, whose name is a digest of all that they were compiled from;
MindSpore is shown a copy, made of bytes that have the digests beside them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import mindspore as ms
from mindspore import nn
from mindspore.graph import api

import mindformers_ext
from mindformers_ext.core.cache_home import cache_folder
from mindformers_ext.core.config.run import CPU

ENABLE, PATH = "MS_COMPILER_CACHE_ENABLE", "MS_COMPILER_CACHE_PATH"  # MindSpore's: where one stands, it is left alone
DIGESTS, SCRIPT = "digests.json", "compile_dependency.hash"  # the second is MindSpore's, of what the entry script reads
KEPT = 64  # folders, of a megabyte or a few each; the longest unused ones go
SETTINGS = ("mode", "device_target", "jit_level", "max_call_depth")  # of MindSpore's context


class _Shown:
    """What MindSpore sees: one folder for the whole process, since it writes to the first one that it was told."""

    def __init__(self) -> None:
        self.own: tempfile.TemporaryDirectory[str] | None = None
        self.graphs = 0  # that were compiled or found so far: MindSpore's number of the next one
        self.works = True

    def folder(self) -> Path:
        """Where graphs lie while the process lives."""
        self.own = self.own or tempfile.TemporaryDirectory(prefix="graphs-")
        return Path(self.own.name)

    def files(self, first: int) -> list[Path]:
        """Files of the graphs from number ``first`` on, and what tells of the script."""
        names = [f"compile_cache_{number}.mindir" for number in range(first, self.graphs)]
        return sorted(path for name in (*names, SCRIPT) for path in self.folder().rglob(name))

    @contextmanager
    def on(self, count: int) -> Iterator[None]:
        """``count`` graphs are compiled; where that fails, nobody knows the next one's number."""
        self.works = False
        os.environ.update({ENABLE: "1", PATH: str(self.folder())})
        try:
            yield
        finally:
            del os.environ[ENABLE], os.environ[PATH]
        self.works, self.graphs = True, self.graphs + count


_shown = _Shown()


def compile_kept(cell: nn.Cell, facts: object, graphs: Sequence[Callable[[], None]]) -> None:
    """Calls each of ``graphs``, which compiles one, by those that an earlier process left.

    Args:
        cell: by the names, shapes and types of its parameters; their values are no part of a graph.
        facts: what else decides the graphs: the network's description and the job's shapes. Its ``repr`` counts.
        graphs: the same in the same order for the same facts.
    """
    told = ENABLE in os.environ or PATH in os.environ
    on_cpu = ms.get_context("device_target") == CPU  # what a kept graph of another device does was never run
    if told or not on_cpu or not _shown.works or not _has_script():
        for compile_one in graphs:
            compile_one()
        return
    place, first = cache_folder("graphs") / _digest(cell, facts), _shown.graphs
    found = _taken(place, _shown.folder())
    with _shown.on(len(graphs)):
        for compile_one in graphs:
            compile_one()
    made = _digests(_shown.files(first), _shown.folder())
    if len(made) == len(graphs) + 1 and made != found:
        _keep(_shown.folder(), made, place)


def _has_script() -> bool:
    """Whether the process runs a file, which MindSpore reads for its imports."""
    return bool(api.entry_script_path) and os.path.isfile(api.entry_script_path)


def _digest(cell: nn.Cell, facts: object) -> str:
    """64 hexadecimal digits for all that decides a graph and its number."""
    parameters = sorted((item.name, tuple(item.shape), str(item.dtype)) for item in cell.get_parameters())
    settings = [(name, ms.get_context(name)) for name in SETTINGS]
    words = sorted(item for item in os.environ.items() if item[0].startswith("MS_"))
    script = Path(api.entry_script_path)
    about = (
        *(ms.__version__, sys.version, settings, words, _shown.graphs, str(script)),
        *(hashlib.sha256(script.read_bytes()).hexdigest(), parameters, facts),
    )
    digest = hashlib.sha256(repr(about).encode())
    for path in sorted(Path(mindformers_ext.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _digests(files: Iterable[Path], folder: Path) -> dict[str, str]:
    """The SHA-256 of files below ``folder``."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _taken(place: Path, own: Path) -> dict[str, str] | None:
    """Copy what is kept at ``place`` into ``own``; its digests, or None and nothing where it is not whole, or others
    may write there."""
    try:
        about = place.stat()
        if about.st_uid != os.getuid() or about.st_mode & 0o022:
            return None
        told = dict(json.loads((place / DIGESTS).read_text(encoding="utf-8")))
        files = [path for path in place.rglob("*") if path.is_file() and path.name != DIGESTS]
        if _digests(files, place) != told:
            return None
        for name in told:
            (own / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(place / name, own / name)
        os.utime(place)  # used now
        return told
    except (OSError, ValueError, TypeError):
        return None


def _keep(own: Path, made: Mapping[str, str], place: Path) -> None:
    """Files of ``own`` at ``place``. Where that cannot be, the next process compiles again; nothing else changes."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".", dir=place.parent))  # for this user alone
    except OSError:
        return
    try:
        for name in made:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(own / name, folder / name)
        (folder / DIGESTS).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        os.rename(folder, place)
        old = sorted((path.stat().st_mtime, path) for path in place.parent.iterdir() if not path.name.startswith("."))
        for _, path in old[:-KEPT]:
            shutil.rmtree(path, ignore_errors=True)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
