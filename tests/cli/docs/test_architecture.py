# SPDX-License-Identifier: Apache-2.0
"""ARCHITECTURE.md and docs/formats.md against the code: floors, inner orders, places, variables, the worked example."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.floors import FLOORS, INNER, NUMBER, PACKAGE

# What the example's family must be able to do, run behind its text in a process of its own: a registry is global.
CHECK = """
from mindformers_ext.core.config.hf import hf_config_from_spec, model_spec_from_hf
from mindformers_ext.core.parameters import model_weights
from mindformers_ext.weights.convert import rule_set
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
spec = model_spec_from_hf(dict(model_type="tinymoe", num_key_value_heads=2, mlp_only_layers=[0, 3], **sizes))
assert spec.dense_layers == (0, 3) and spec.moe.gate == "mlp" and spec.moe.shared_expert.gated
assert model_spec_from_hf(hf_config_from_spec(spec)) == spec
made = {name: shape for binding in rule_set(spec).bindings for name, shape in binding.ms.items()}
assert made == {weight.name: weight.shape for weight in model_weights(spec)}
assert made["model.layers.1.feed_forward.routed_experts.router.out.weight"] == (4, 4)
"""


@pytest.fixture(scope="module")
def text(repo_root: Path) -> str:
    return (repo_root / "ARCHITECTURE.md").read_text("utf-8")


def words(cell: str) -> set[str]:
    return set() if cell == "-" else set(re.findall(r"\w+", cell))


def split_late(cell: str) -> tuple[set[str], set[str]]:
    early, _, late = cell.partition("(late)")
    return words(early.strip("; ") or "-"), words(late.strip() or "-")


def test_the_floor_table_is_the_one_that_is_held(text: str) -> None:
    rows = re.findall(r"^\| (\d+) \| (\w+) \| (.*?) \| (.*?) \|$", text, re.M)
    assert {folder: int(number) for number, folder, *_ in rows} == NUMBER
    for _, folder, ours, third in rows:
        floor = FLOORS[folder]
        assert split_late(ours) == (floor.ours, floor.late_ours), folder
        assert split_late(third) == (floor.third, floor.late_third), folder


def test_the_inner_orders_are_the_ones_that_are_held(text: str) -> None:
    for house, order in INNER.items():
        (line,) = re.findall(rf"^- {house}: (.*)$", text, re.M)
        assert [words(names) for names in line.split("<")] == [set(names.split()) for names in order], house


def test_the_tree_names_every_folder_and_every_loose_file_of_core(repo_root: Path, text: str) -> None:
    tree = re.search(r"## The tree\n```\n(.*?)```", text, re.S)[1]
    package = repo_root / PACKAGE
    for folder in (package, package / "jobs", package / "core"):
        for item in folder.iterdir():
            if item.is_dir() and item.name != "__pycache__":
                assert re.search(rf"\b{item.name}/", tree), f"{item} is not in the tree"
    for item in (package / "core").glob("*.py"):
        assert item.name == "__init__.py" or item.name in tree, f"{item} is not in the tree"


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "docs/formats.md", "README.md", "README_CN.md"])
def test_every_named_place_exists(repo_root: Path, name: str) -> None:
    content = (repo_root / name).read_text("utf-8")
    inside, outside = "|".join(sorted(FLOORS)), "tests|tools|scripts|configs|research|docs"
    for place in re.findall(rf"(?<![\w/-])(?:{inside})/[a-z0-9_/]+\.py\b", content):
        assert (repo_root / PACKAGE / place).is_file(), f"{name} names {place}"
    for place in re.findall(rf"(?<![\w/-])(?:{outside})/[\w/-]+\.(?:py|sh|md|yaml)\b", content):
        assert (repo_root / place).is_file(), f"{name} names {place}"


def test_our_variables_are_listed(repo_root: Path, text: str) -> None:
    sources = [*(repo_root / PACKAGE).rglob("*.py"), *(repo_root / "scripts").glob("*.sh")]
    used = {name for path in sources for name in re.findall(r"\bMFEXT_[A-Z_]+\b", path.read_text("utf-8"))}
    assert used == set(re.findall(r"\bMFEXT_[A-Z_]+\b", text))


def test_every_variable_that_is_read_or_set_by_name_is_listed(repo_root: Path, text: str) -> None:
    """Names in capitals, behind ``environ``, ``environment`` and ``variables``."""
    sources = [path for folder in (PACKAGE, "tools") for path in (repo_root / folder).rglob("*.py")]
    form = r"""(?:environ|environment|variables)(?:\.\w+\(|\[)\s*f?["']([A-Z][A-Z0-9_]+)["']"""
    used = {(name, path) for path in sources for name in re.findall(form, path.read_text("utf-8"))}
    assert len(used) > 15
    assert not {f"{name} in {path}" for name, path in used if not re.search(rf"`{name}`", text)}


def test_the_example_of_a_family_works(repo_root: Path, text: str) -> None:
    example, *gates = re.findall(r"```python\n(.*?)```", text, re.S)
    done = subprocess.run(
        [sys.executable, "-c", example + CHECK], cwd=repo_root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for gate in gates:  # in an engine: what they import is there
        for node in ast.walk(ast.parse(gate)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(PACKAGE):
                source = (repo_root / node.module.replace(".", "/")).with_suffix(".py").read_text("utf-8")
                for alias in node.names:
                    assert re.search(rf"^(?:class |def )?{alias.name}\b", source, re.M), f"{node.module}.{alias.name}"


def test_the_readmes_lead_here(repo_root: Path) -> None:
    for name in ("README.md", "README_CN.md"):
        content = (repo_root / name).read_text("utf-8")
        assert "(ARCHITECTURE.md)" in content and "(docs/formats.md)" in content
