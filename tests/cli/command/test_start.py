# SPDX-License-Identifier: Apache-2.0
"""Every entry point, started by a Python that was never set up."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mindformers_ext.cli import start
from tests.helpers.floors import FLOORS, PACKAGE

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = (".", "tools", "tools/dataset_preprocess/llama", "research/mixtral", "research/llama_moe")
BENCHES = [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "tools" / "bench").glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")  # the others are parts of these
]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
READ_BY_ANY = [
    *SCRIPTS,
    *(f"{PACKAGE}/{name}" for name in ("__init__.py", "__main__.py", "cli/__init__.py", "cli/start.py")),
]
# -S: no package is found, as in a Python of the system
BARE = [sys.executable, "-S"]
CLEAN = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}


def refused(words: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        words, cwd=folder, env=CLEAN | environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    assert "bash scripts/setup_env.sh" in done.stderr and "source .venv/bin/activate" in done.stderr
    return done.stderr


def test_there_are_scripts() -> None:
    assert len(BENCHES) >= 8 and len(SCRIPTS) >= 17 and "run_mindformer.py" in SCRIPTS


@pytest.mark.parametrize("script", [*SCRIPTS, *BENCHES])
def test_a_script_names_what_is_missing_and_how_to_set_up(script: str, tmp_path: Path) -> None:
    assert "numpy, yaml" in refused([*BARE, str(ROOT / script), "--help"], tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["msrun_launcher.sh", "torchrun_launcher.sh"])
def test_a_launcher_does_so_too(script: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    words = ["bash", str(ROOT / "scripts" / script), "run_mindformer.py --config x.yaml", "2"]
    refused(words, tmp_path, PYTHON=str(python))
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_the_module_does_so_too() -> None:
    refused([*BARE, "-m", PACKAGE, "--help"], ROOT)


@pytest.mark.parametrize("name", READ_BY_ANY)
def test_python_3_8_can_read_it(name: str) -> None:
    ast.parse((ROOT / name).read_text("utf-8"), feature_version=(3, 8))


def test_an_old_python_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 8, 20))
    assert start.start("convert", []) == 2
    assert "3.10 to 3.12" in capsys.readouterr().err


def test_a_framework_that_lacks_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> int:
        start.check_installed(argv[0])
        return 0

    monkeypatch.setitem(sys.modules, "mindformers_ext.cli.made_up", types.SimpleNamespace(main=main))
    monkeypatch.setattr(start, "MORE", (*start.MORE, "no_such_framework"))
    assert start.start("made_up", ["no_such_framework"]) == 2
    assert "no no_such_framework, which this command needs" in capsys.readouterr().err
    assert start.start("made_up", ["json"]) == 0
    with pytest.raises(ModuleNotFoundError):  # not ours: a fault, and shown as one
        start.start("made_up", ["something_else"])


def test_the_lists_of_packages_are_whole() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.S | re.M)[1]
    named = re.findall(r'^ +"([\w]+)', block, re.M)
    assert ["yaml" if name == "pyyaml" else name for name in named] == list(start.CORE)
    used = set().union(*(floor.third | floor.late_third for floor in FLOORS.values()))
    assert used <= {*start.CORE, *start.MORE}


def test_quickstart_explains_itself_from_any_folder(tmp_path: Path) -> None:
    script = os.path.relpath(ROOT / "scripts" / "quickstart.sh", tmp_path)
    done = subprocess.run(["bash", script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--steps N" in done.stdout, done.stderr
