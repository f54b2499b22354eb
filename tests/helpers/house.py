# SPDX-License-Identifier: Apache-2.0
"""House rules as functions of a root folder: each returns one line per violation. Floors are in floors.py."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.floors import PACKAGE, SAVED

SPDX = "# SPDX-License-Identifier: Apache-2.0"
MAX_FILE, MAX_FUNCTION, MAX_INIT, MAX_THIN = 400, 60, 40, 30
# batch, sequence, tokens, model, ffn, experts, chosen, capacity, heads, kv heads, head width, vocabulary, groups
LEGEND = "BSTDFEKCHNPVG"
SUFFIX = re.compile(r"^[a-z]\w*_([A-Z]+)$")
TEXT = {".py", ".sh", ".md", ".toml", ".yaml", ".yml", ".json", ".lock", ".txt", ".cfg", ""}
SKIPPED = {"output", "build", "dist", "kernel_meta"}  # results, ignored by git; hidden folders but .ci are skipped too
MACHINE = re.compile(r"(?<![\w.~}-])/(?:home|root|Users|work|opt|tmp|mnt)/\w[^\s\"'`)]*")
ENGINES = ("ms", "pt")


def _skipped(folder: str) -> bool:
    return folder in SKIPPED or folder.endswith(".egg-info") or (folder.startswith(".") and folder != ".ci")


def files(root: Path, *folders: str, suffixes: frozenset[str] | set[str] = frozenset({".py"})) -> Iterator[Path]:
    """Files below the folders (the whole tree without any), in order, without result folders."""
    for folder in folders or ("",):
        for here, below, names in os.walk(root / folder):
            below[:] = sorted(name for name in below if not _skipped(name))
            yield from (Path(here) / name for name in sorted(names) if Path(name).suffix in suffixes)


def trees(root: Path, *folders: str) -> Iterator[tuple[str, ast.Module]]:
    """(path from root, syntax tree) of each Python file."""
    for path in files(root, *folders):
        yield str(path.relative_to(root)), ast.parse(path.read_text(encoding="utf-8"))


def thin_files(root: Path) -> list[Path]:
    """Entry points at the root and tools, without the measurements."""
    tools = [p for p in files(root, "tools") if p.relative_to(root).parts[1] != "bench"]
    return [*sorted(root.glob("*.py")), *tools]


def _limit(path: Path, thin: list[Path]) -> int:
    if path in thin:
        return MAX_THIN
    return MAX_INIT if path.name == "__init__.py" else MAX_FILE


def check_sizes(root: Path) -> list[str]:
    """Lines per file and per function."""
    problems, thin = [], thin_files(root)
    for path in files(root):
        where, text = path.relative_to(root), path.read_text(encoding="utf-8")
        lines, limit = len(text.splitlines()), _limit(path, thin)
        if lines > limit:
            problems.append(f"{where}: {lines} lines, at most {limit}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION:
                    problems.append(f"{where}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}")
    return problems


def check_spdx(root: Path) -> list[str]:
    """The licence line comes first (after #!, if any)."""
    problems = []
    for path in files(root):
        lines = path.read_text(encoding="utf-8").splitlines()
        first = lines[1:2] if lines and lines[0].startswith("#!") else lines[:1]
        if first != [SPDX]:
            problems.append(f"{path.relative_to(root)}: first line is not {SPDX!r}")
    return problems


def _locals(function: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that a function binds: arguments and assignments."""
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno


def check_shape_letters(root: Path) -> list[str]:
    """Local names in the engines end in capitals of the legend only."""
    problems = {}
    for where, tree in trees(root, *(f"{PACKAGE}/{engine}" for engine in ENGINES)):
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            for name, line in _locals(function):
                match = SUFFIX.match(name)
                if match and set(match[1]) - set(LEGEND):
                    problems[f"{where}:{line}: {name} has shape letters outside {LEGEND}"] = None
    return list(problems)


def _is_parameter(value: ast.AST | None) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in ("Parameter", "Buffer")


def _parameter_names(node: ast.AST) -> Iterator[str]:
    """Names under which the node makes a parameter or buffer: they enter checkpoints."""
    if isinstance(node, ast.Assign | ast.AnnAssign) and _is_parameter(node.value):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Attribute):
                yield target.attr
    if isinstance(node, ast.Call):
        if ast.unparse(node.func).split(".")[-1] in ("register_parameter", "register_buffer"):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))
        if _is_parameter(node):
            for keyword in node.keywords:
                if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
                    yield str(keyword.value.value)


def check_parameter_names(root: Path) -> list[str]:
    """Shape letters never enter a parameter's name."""
    return [
        f"{where}:{node.lineno}: parameter {name} carries shape letters"
        for where, tree in trees(root, *(f"{PACKAGE}/{engine}" for engine in ENGINES))
        for node in ast.walk(tree)
        for name in _parameter_names(node)
        if SUFFIX.match(name)
    ]


FAMILY_HOMES = {f"{PACKAGE}/core/families.py"}
# the same words with another meaning: a kind of tokenizer, and a chat template, as users of other tools name them
OTHER_MEANING = {(f"{PACKAGE}/cli/preprocess.py", "llama"), (f"{PACKAGE}/jobs/merge/templates.py", "mistral")}


def family_words() -> frozenset[str]:
    """Every name under which a family is known somewhere, from its row."""
    from mindformers_ext.core.families import FAMILIES, GENERIC_NAMES

    rows = FAMILIES.values()
    pairs = [*(pair for row in rows for pair in row.yaml_names), GENERIC_NAMES]
    return frozenset(
        {*(row.name for row in rows), *(row.hf_class for row in rows), *(n for pair in pairs for n in pair)}
    )


def check_family_names(root: Path) -> list[str]:
    """A family's names stand in ``core.families`` alone; everything else reads its row."""
    words = family_words()
    return [
        f"{where}:{node.lineno}: the family name {node.value!r} outside core/families.py: read its row"
        for where, tree in trees(root, PACKAGE)
        if where not in FAMILY_HOMES and not where.startswith(f"{PACKAGE}/{'/'.join(SAVED)}/")  # stands alone
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in words and (where, node.value) not in OTHER_MEANING
    ]


def check_bare_except(root: Path) -> list[str]:
    """No bare except."""
    return [
        f"{where}:{node.lineno}: bare except"
        for where, tree in trees(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]


def check_print(root: Path) -> list[str]:
    """print only in cli/, tools/ and tests/."""
    allowed = (f"{PACKAGE}/cli/", "tools/", "tests/")
    return [
        f"{where}:{node.lineno}: print outside cli/, tools/ and tests/"
        for where, tree in trees(root)
        if not where.startswith(allowed)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def check_long_reasons(root: Path) -> list[str]:
    """Each mark ``long`` names a file of tests that is there, which shows the same with less."""
    problems = []
    for where, tree in trees(root, "tests"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.long":
                reason = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
                named = re.findall(r"tests/[\w/]+\.py", str(reason))
                if not named or not all((root / name).is_file() for name in named):
                    problems.append(f"{where}:{node.lineno}: long names no test that shows the same: {reason!r}")
    return problems


def check_machine_paths(root: Path) -> list[str]:
    """No file names a folder of somebody's machine."""
    problems = []
    for path in files(root, suffixes=TEXT):
        if path.name == ".git":  # of a worktree: git's own, and it names a folder
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            problems += [f"{path.relative_to(root)}:{number}: machine path {hit}" for hit in MACHINE.findall(line)]
    return problems


YAML_UNSAFE = {"full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}
YAML_UNSAFE |= {"Loader", "FullLoader", "UnsafeLoader", "CLoader", "CFullLoader", "CUnsafeLoader"}


def _safe_loaders(tree: ast.Module) -> set[str]:
    """SafeLoader, its C twin, and classes of this file that inherit from them."""
    safe = {"SafeLoader", "CSafeLoader"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).split(".")[-1] in safe for base in node.bases):
            safe.add(node.name)
    return safe


def check_yaml(root: Path) -> list[str]:
    """PyYAML only with safe loaders."""
    problems = []
    for where, tree in trees(root):
        safe = _safe_loaders(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "yaml":
                named = [alias.name for alias in node.names if alias.name in YAML_UNSAFE | {"load", "load_all"}]
                problems += [f"{where}:{node.lineno}: from yaml import {name}" for name in named]
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml" and node.attr in YAML_UNSAFE:
                problems.append(f"{where}:{node.lineno}: yaml.{node.attr} is not safe")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("yaml.load", "yaml.load_all"):
                loader = [k.value for k in node.keywords if k.arg == "Loader"] + node.args[1:2]
                if not loader or ast.unparse(loader[0]).split(".")[-1] not in safe:
                    problems.append(f"{where}:{node.lineno}: {ast.unparse(node.func)} without a safe loader")
    return problems
