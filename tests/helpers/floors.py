# SPDX-License-Identifier: Apache-2.0
"""The floor table of the package: who may import whom. An arrow only goes down.

The checker reads source text only (no import is executed), takes a root folder, and returns one line per violation.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "mindformers_ext"


@dataclass(frozen=True)
class Floor:
    """What a folder may import besides itself; the `late` ones only inside a function."""

    ours: frozenset[str] = frozenset()
    late_ours: frozenset[str] = frozenset()
    third: frozenset[str] = frozenset()
    late_third: frozenset[str] = frozenset()


def _floor(ours: str = "", third: str = "", late_ours: str = "", late_third: str = "") -> Floor:
    return Floor(*(frozenset(words.split()) for words in (ours, late_ours, third, late_third)))


# numpy is the common array library of every folder that touches arrays. tensorboardX and matplotlib write the pictures
# of a training run; both stay inside functions. So does transformers, by which pt/hf_reference.py judges our networks.
FLOORS = {
    "core": _floor("", "yaml numpy"),
    "formats": _floor("core", "numpy safetensors ml_dtypes"),
    "weights": _floor("core formats", "numpy ml_dtypes"),
    "data": _floor(
        "core formats", "numpy", late_third="sentencepiece fastchat tokenizers pyarrow jinja2 datasketch scipy"
    ),
    "surgery": _floor("core weights", "numpy torch"),
    "ms": _floor("core", "numpy mindspore"),
    "pt": _floor("core", "numpy torch triton", late_third="transformers"),
    "jobs": _floor(
        "core formats weights data surgery", "numpy tqdm psutil", late_third="matplotlib huggingface_hub ray"
    ),
    "mf": _floor("core data ms jobs", "numpy mindspore mindformers", late_third="tensorboardX"),
    "cli": _floor("jobs weights core", late_ours="mf"),
    "scripts": _floor("cli"),  # root scripts and tools/ (tools/bench/ measures, and may import what it measures)
}
ENGINE_DOOR = ("jobs", "engine", "door.py")  # the one file of jobs/ that may open ms or pt, inside a function
# Code that is copied into a model's folder and run there by transformers: it stands alone, and nobody imports it.
SAVED, SAVED_FLOOR = ("jobs", "checkpoint", "model_code"), _floor("", "torch transformers")
LEAN = ("mf", "lean.py")  # imports on its first use what MindFormers imports at its own import
STARTS = (("cli", "start.py"), ("cli", "mfext.py"), ("cli", "experts.py"))  # import a command of cli/ by its name
STOREYS = ("core", "formats", "weights data", "surgery ms pt", "jobs", "mf", "cli", "scripts")
# The inner order of a folder, lowest first: what stands on one line never sees each other. Loose files stand as `name`.
INNER = {
    "core": (
        "errors capacity philox stages family figures documents preferences",
        "families plain_file",
        "log byte_sizes json_text weight_fit layers rope",
        "attention",
        "spec",
        "parameters pruning",
        "config",
        "cluster",
    ),
    "jobs": (
        "engine items",
        "checkpoint",
        "run",
        "preprocess merge mixing predict launch",
        "experts",
        "prune",
        "train dryrun",
    ),
}
INNER_NUMBER = {
    house: {name: number for number, names in enumerate(order) for name in names.split()}
    for house, order in INNER.items()
}
NUMBER = {folder: number for number, folders in enumerate(STOREYS) for folder in folders.split()}


@dataclass(frozen=True)
class Import:
    """One imported module: `target` is dotted and absolute; `late` means inside a function or under TYPE_CHECKING."""

    target: str
    line: int
    late: bool


@dataclass
class _Walker(ast.NodeVisitor):
    """Collects imports, plain, relative and by importlib, with whether they are late."""

    package: list[str]  # dotted package of the file, for relative imports
    found: list[Import] = field(default_factory=list)
    dynamic: list[int] = field(default_factory=list)  # lines that import a name only known at run time
    depth: int = 0

    def _add(self, target: str, line: int) -> None:
        self.found.append(Import(target, line, self.depth > 0))

    def _deeper(self, node: ast.AST) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _deeper  # noqa: N815 (names given by ast)

    def visit_If(self, node: ast.If) -> None:
        if not ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return self.generic_visit(node)
        self.depth += 1
        for child in node.body:
            self.visit(child)
        self.depth -= 1
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = [node.module] if node.module else []
        if node.level:
            base = self.package[: len(self.package) - node.level + 1] + base
        for alias in node.names:
            self._add(".".join([*base, alias.name]), node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self._add(name.value, node.lineno)
            else:
                self.dynamic.append(node.lineno)
        self.generic_visit(node)


def imports_of(path: Path, root: Path) -> _Walker:
    """Every import of the file, in reading order."""
    walker = _Walker(list(path.relative_to(root).parent.parts))
    walker.visit(ast.parse(path.read_text(encoding="utf-8")))
    return walker


def floored_files(root: Path) -> Iterator[tuple[Path, str]]:
    """(file, floor) for the package, the root scripts and the thin tools; floor is "" where the table knows none."""
    for path in sorted((root / PACKAGE).rglob("*.py")):
        inside = path.relative_to(root / PACKAGE).parts
        if inside == ("__main__.py",):
            yield path, "scripts"
        elif inside != ("__init__.py",):
            yield path, inside[0] if len(inside) > 1 and inside[0] in FLOORS else ""
    scripts = [*sorted(root.glob("*.py")), *sorted((root / "tools").rglob("*.py"))]
    for path in scripts:
        if path.relative_to(root).parts[:2] != ("tools", "bench"):
            yield path, "scripts"


def _judge(item: Import, floor: str, door: bool) -> str | None:
    """Why the import is not allowed, or None."""
    rule = FLOORS[floor]
    parts = item.target.split(".")
    if parts[0] == PACKAGE:
        folder = parts[1] if len(parts) > 1 else ""
        if folder == floor or folder in rule.ours or folder not in FLOORS:
            return None
        if folder in rule.late_ours or (door and folder in ("ms", "pt")):
            return None if item.late else f"imports {folder}/ at the top of the file; only inside a function"
        if NUMBER[folder] == NUMBER[floor]:
            return f"imports its sibling {folder}/"
        return f"imports {folder}/ (may: {', '.join(sorted(rule.ours)) or 'nothing of ours'})"
    if parts[0] in sys.stdlib_module_names or parts[0] in rule.third:
        return None
    if parts[0] in rule.late_third:
        return None if item.late else f"imports {parts[0]} at the top of the file; only inside a function"
    return f"imports {parts[0]} (third party allowed: {', '.join(sorted(rule.third | rule.late_third)) or 'none'})"


def _room(parts: tuple[str, ...] | list[str]) -> str:
    """The inner folder or loose file of a dotted or slashed place below the package: ("core", "spec.py") -> "spec"."""
    return parts[1].removesuffix(".py") if len(parts) > 1 else ""


def _judge_inner(item: Import, where: tuple[str, ...]) -> str | None:
    """Why the import breaks the inner order of its folder, or None."""
    house, parts = (where[0] if where else ""), item.target.split(".")
    if house not in INNER or parts[0] != PACKAGE or parts[1:2] != [house]:
        return None
    numbers, here, there = INNER_NUMBER[house], _room(where), _room(parts[1:])
    if here == there or here == "__init__" or there == "":
        return None
    for room in (here, there):
        if room not in numbers:
            return f"{house}/{room} has no place in the inner order of {house}/"
    if numbers[there] < numbers[here]:
        return None
    return f"imports {house}/{there} (inner order of {house}/: {' < '.join(INNER[house])})"


def _judge_saved(item: Import, where: tuple[str, ...]) -> str | None:
    """Why the import is not allowed to code that is saved with a model, or of it by other code, or None."""
    parts = item.target.split(".")
    target = tuple(parts[1 : 1 + len(SAVED)]) == SAVED and parts[0] == PACKAGE
    if where[: len(SAVED)] != SAVED:
        return f"imports {'/'.join(SAVED)}, which is copied and never imported" if target else None
    if target or parts[0] in sys.stdlib_module_names or parts[0] in SAVED_FLOOR.third:
        return None
    return f"imports {parts[0]} in code that is saved with a model (allowed: its own files, torch, transformers)"


def check_floors(root: Path) -> list[str]:
    """One line per import that the floor table does not allow."""
    problems = []
    for path, floor in floored_files(root):
        where = path.relative_to(root)
        if not floor:
            problems.append(f"{where}: stands on no floor of the table")
            continue
        door = where.parts[1:] == ENGINE_DOOR
        walker = imports_of(path, root)
        inside = where.parts[1:]
        saved = inside[: len(SAVED)] == SAVED
        faults = [
            (item.line, why)
            for item in walker.found
            if (
                why := _judge_saved(item, inside)
                or (not saved and (_judge(item, floor, door) or _judge_inner(item, inside)))
            )
        ]
        if not door and inside not in (LEAN, *STARTS):
            faults += [(line, "imports a module whose name is only known at run time") for line in walker.dynamic]
        problems += dict.fromkeys(f"{where}:{line}: {floor} {why}" for line, why in faults)
    return problems
