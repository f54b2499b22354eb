# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for CANN's libraries, with which MindSpore's Ascend compiler starts on a machine without an NPU.

MindSpore's wheel holds the whole Ascend compiler but links it to CANN. Every function that it asks of CANN is made
here as a C function that returns 0: enough for ``MS_SIMULATION_LEVEL=0``, which compiles graphs and runs nothing.
The list of functions is read from the installed wheel, so another MindSpore or another CPU gets its own folder.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mindformers_ext.core.cache_home import cache_folder
from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.elf import read_library

FORM = 2  # raise it when what is generated changes: old folders are then left alone and a new one is made
# The libraries without which MindSpore's Ascend plugin does not load. Others of CANN (operator packages) stay absent:
# with them MindSpore would try to build kernels.
LIBRARIES = (
    "ascendcl",
    "ge_runner",
    "graph",
    "hccl",
    "runtime",
    "platform",
    "c_sec",
    "nnopbase",
    "ascend_hal",
    "msprofiler",
)
SYSTEM = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2", "librt.so.1")
# MindSpore's own stand-in for a function that waits for the device returns at once, and the thread that calls it in a
# loop would take a whole core from the compiler. A preloaded library sleeps in its place.
BUSY = "SimuFuncIaclrtProcessReport"
PAUSE = 20000  # microseconds
CANN_VERSION = "8.5.0"  # what the hccl package tells MindSpore; only compared with a list
SIMULATION = "MS_SIMULATION_LEVEL"
_C_NAME = re.compile(r"[A-Za-z_.$][\w.$@]*")


@dataclass(frozen=True)
class Stubs:
    """A folder of stand-ins for one MindSpore and one CPU architecture."""

    folder: Path
    mindspore: Path

    def environment(self, rank: int, ranks: int, base: Mapping[str, str]) -> dict[str, str]:
        """The environment in which one process compiles for Ascend as ``rank`` of ``ranks``.

        Only for the process that compiles: where the simulation is on, MindSpore does not compute on a CPU either.
        """
        lib = self.mindspore / "lib"
        places = [self.folder / "latest" / "lib64", lib, lib / "plugin" / "ascend"]
        pause = self.folder / "pause" / "libpause.so"
        preload = {"LD_PRELOAD": _joined([pause], base.get("LD_PRELOAD", ""))} if pause.is_file() else {}
        return {
            **base,
            **preload,
            "LD_LIBRARY_PATH": _joined(places, base.get("LD_LIBRARY_PATH", "")),
            "PYTHONPATH": _joined([self.folder / "python"], base.get("PYTHONPATH", "")),
            SIMULATION: "0",
            "RANK_SIZE": str(ranks),
            "RANK_ID": str(rank),
        }


def _joined(places: Iterable[Path], before: str) -> str:
    return os.pathsep.join([*map(str, places), *filter(None, [before])])


def ensure_stubs(cache: Path | None = None) -> Stubs:
    """The stand-ins for the installed MindSpore, made on first use (a few seconds).

    Raises:
        UserError: no MindSpore, one without the Ascend plugin, or no C compiler.
    """
    mindspore, version = _installed()
    plugin = mindspore / "lib" / "plugin" / "libmindspore_ascend.so.2"
    if not plugin.is_file():
        raise UserError(
            f"the installed MindSpore {version} has no Ascend plugin ({plugin.name} is missing): install "
            "the wheel for Linux from PyPI"
        )
    machine = read_library(plugin).machine
    folder = (cache or cache_folder("ascend_stubs")) / f"mindspore-{version}-{machine}-{FORM}"
    if not folder.is_dir():
        _make(folder, wanted_functions(mindspore / "lib"), busy_functions(mindspore / "lib"))
    return Stubs(folder, mindspore)


def _installed() -> tuple[Path, str]:
    """Folder and version of MindSpore, without importing it."""
    spec = importlib.util.find_spec("mindspore")
    if spec is None or spec.origin is None:
        raise UserError("a dry run needs MindSpore, which is not installed: pip install mindformers_ext[mindspore]")
    return Path(spec.origin).parent, metadata.version("mindspore")


def wanted_functions(lib: Path) -> list[str]:
    """Names that the Ascend libraries below ``lib`` ask for and that nothing on this machine defines, sorted."""
    plugin = lib / "plugin"
    users = [*plugin.glob("libmindspore*ascend.so*"), *(plugin / "ascend").rglob("*.so")]
    asked = {path: read_library(path) for path in users}
    others = [read_library(path) for folder in (lib, plugin) for path in folder.glob("*.so*") if path not in asked]
    names = set().union(*(library.undefined for library in asked.values()))
    names -= set().union(*(library.defined for library in (*asked.values(), *others)))
    # MindSpore's own names that nobody defines belong to plugins of other devices, Python's to the interpreter
    names = {name for name in names if "mindspore" not in name and not name.startswith(("Py", "_Py"))}
    system = [ctypes.CDLL(name) for name in SYSTEM]
    return sorted(name for name in names if not any(hasattr(library, name) for library in system))


def busy_functions(lib: Path) -> list[str]:
    """Names of the functions below ``lib`` that should wait and do not; none where this MindSpore has no such."""
    libraries = (read_library(path) for path in (lib / "plugin" / "ascend").glob("libmindspore*.so"))
    return sorted({name for library in libraries for name in library.defined if BUSY in name})


def pause_source(functions: Iterable[str]) -> str:
    """C text that defines each function to sleep a moment and return 0."""
    lines = ["extern int usleep(unsigned);\n"]
    for place, name in enumerate(functions):
        lines.append(
            f'long pause_{place}(void) __asm__("{name}");\nlong pause_{place}(void) {{ usleep({PAUSE}); return 0; }}\n'
        )
    return "".join(lines)


def c_source(functions: Iterable[str]) -> str:
    """C text that defines each function to return 0, under its exact (C++) name, on every architecture."""
    lines = []
    for place, name in enumerate(functions):
        if not _C_NAME.fullmatch(name):
            raise UserError(f"the symbol {name!r} cannot be written in C: this MindSpore is not known here")
        lines.append(f'long stub_{place}(void) __asm__("{name}");\nlong stub_{place}(void) {{ return 0; }}\n')
    return "".join(lines)


def _make(folder: Path, functions: list[str], busy: list[str]) -> None:
    """Fill ``folder`` beside and rename it; of two processes that make it at once, the second one's work is dropped."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None or shutil.which(compiler) is None:
        raise UserError(
            "a dry run builds stand-ins for CANN's libraries once and needs a C compiler: install gcc or "
            "clang, or name one in the variable CC"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".stubs-", dir=folder.parent))
    try:
        # MindSpore looks for the folder that aclrtMalloc came from, and wants it to look like CANN's
        libraries = beside / "latest" / "lib64"
        libraries.mkdir(parents=True)
        (beside / "stubs.c").write_text(c_source(functions), encoding="ascii")
        first = libraries / f"lib{LIBRARIES[0]}.so"
        _compile([compiler, "-shared", "-fPIC", "-O1", "-nostdlib", "-o", str(first), str(beside / "stubs.c")])
        for name in LIBRARIES[1:]:
            (libraries / f"lib{name}.so").symlink_to(first.name)
        if busy:
            (beside / "pause").mkdir()
            (beside / "pause.c").write_text(pause_source(busy), encoding="ascii")
            _compile(
                [
                    compiler,
                    "-shared",
                    "-fPIC",
                    "-O1",
                    "-nostdlib",
                    "-o",
                    str(beside / "pause" / "libpause.so"),
                    str(beside / "pause.c"),
                ]
            )
        package = beside / "python" / "hccl"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "sys_version.py").write_text(f'__sys_version__ = "{CANN_VERSION}"\n', encoding="ascii")
        beside.chmod(0o755)
        if not folder.is_dir():
            _rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _rename(beside: Path, folder: Path) -> None:
    try:
        os.rename(beside, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"the C compiler {command[0]} could not build the stand-ins of CANN's libraries: {last[0]}")
