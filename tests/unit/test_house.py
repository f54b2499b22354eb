# SPDX-License-Identifier: Apache-2.0
"""The house rules of this repository, held for the real tree and shown to bite on planted violations."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import house
from tests.helpers.floors import PACKAGE, check_floors

FRAMEWORKS = {"mindspore", "torch", "mindformers", "transformers"}
LIGHT = ("core", "formats", "weights", "data", "cli")  # floors 0-2, and what --help loads

Check = Callable[[Path], list[str]]
CHECKS: list[Check] = [
    check_floors,
    house.check_sizes,
    house.check_spdx,
    house.check_shape_letters,
    house.check_parameter_names,
    house.check_family_names,
    house.check_bare_except,
    house.check_print,
    house.check_machine_paths,
    house.check_long_reasons,
    house.check_yaml,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_tree_keeps_the_rule(check: Check, repo_root: Path) -> None:
    problems = check(repo_root)
    assert not problems, "\n" + "\n".join(problems)


def lines(count: int) -> str:
    return "x = 1\n" * count


# Each row plants one file (path, text); the check must name it with a line that holds the third word.
PLANTED: list[tuple[Check, str, str, str]] = [
    (check_floors, "core/a.py", "import torch", "imports torch"),
    (check_floors, "core/a.py", "from mindformers_ext.formats import x", "core imports formats/"),
    (check_floors, "core/a.py", "from ..formats import x", "core imports formats/"),
    (check_floors, "core/a.py", "from .. import jobs", "core imports jobs/"),
    (check_floors, "formats/a.py", "def f():\n    import mindformers_ext.weights.rules", "formats imports weights/"),
    (check_floors, "formats/a.py", "import yaml", "imports yaml"),
    (check_floors, "weights/a.py", "from mindformers_ext.data import x", "sibling data/"),
    (check_floors, "weights/a.py", "import safetensors.numpy", "imports safetensors"),
    (check_floors, "data/a.py", "import sentencepiece", "only inside a function"),
    (check_floors, "surgery/a.py", "from mindformers_ext.formats import x", "surgery imports formats/"),
    (check_floors, "ms/a.py", "from mindformers_ext.pt import x", "sibling pt/"),
    (check_floors, "pt/models/a.py", "from ...ms.models import x", "sibling ms/"),
    (check_floors, "ms/a.py", "from mindformers_ext.weights import x", "ms imports weights/"),
    (check_floors, "ms/a.py", "import mindformers", "imports mindformers"),
    (check_floors, "jobs/train/train.py", "def f():\n    from mindformers_ext import ms", "jobs imports ms/"),
    (check_floors, "jobs/train/train.py", 'import importlib\nimportlib.import_module("torch")', "imports torch"),
    (check_floors, "jobs/train/train.py", "def f(n):\n    importlib.import_module(n)", "only known at run time"),
    (check_floors, "jobs/engine/door.py", "from mindformers_ext import pt", "only inside a function"),
    (check_floors, "jobs/run/a.py", "from mindformers_ext.jobs.train.train import x", "imports jobs/train"),
    (check_floors, "jobs/merge/a.py", "def f():\n    from ..predict import x", "imports jobs/predict"),
    (check_floors, "jobs/a.py", "from mindformers_ext.jobs.run import x", "jobs/a has no place"),
    (check_floors, "core/spec.py", "from mindformers_ext.core.config import keys", "imports core/config"),
    (check_floors, "core/extras/a.py", "from mindformers_ext.core import errors", "core/extras has no place"),
    (check_floors, "mf/a.py", "from mindformers_ext.weights import x", "mf imports weights/"),
    (check_floors, "cli/a.py", "import mindformers_ext.mf.register", "only inside a function"),
    (check_floors, "cli/a.py", "def f():\n    from mindformers_ext.ms import x", "cli imports ms/"),
    (check_floors, "../tools/a.py", "from mindformers_ext.jobs import x", "scripts imports jobs/"),
    (check_floors, "../run_a.py", "import yaml", "imports yaml"),
    (check_floors, "jobs/checkpoint/model_code/a.py", "import numpy", "saved with a model"),
    (check_floors, "jobs/checkpoint/model_code/a.py", "from mindformers_ext.core import errors", "saved with a model"),
    (
        check_floors,
        "jobs/experts/a.py",
        "def f():\n    from ..checkpoint.model_code import x",
        "copied and never imported",
    ),
    (check_floors, "extras/a.py", "", "stands on no floor"),
    (check_floors, "loose.py", "", "stands on no floor"),
    (house.check_sizes, "core/a.py", lines(401), "401 lines, at most 400"),
    (house.check_sizes, "core/__init__.py", lines(41), "41 lines, at most 40"),
    (house.check_sizes, "../tests/ms/test_a.py", lines(401), "401 lines, at most 400"),
    (house.check_sizes, "../run_a.py", lines(31), "31 lines, at most 30"),
    (house.check_sizes, "../tools/d/a.py", lines(31), "31 lines, at most 30"),
    (house.check_sizes, "ms/a.py", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
    (house.check_spdx, "core/a.py", '"""No licence line."""', "first line"),
    (house.check_shape_letters, "ms/a.py", "def f(x):\n    h_BSX = x", "h_BSX"),
    (house.check_shape_letters, "pt/a.py", "class A:\n    def f(self, mask_L): ...", "mask_L"),
    (house.check_parameter_names, "ms/a.py", "class A:\n    def f(self):\n        self.w_DF = Parameter(1)", "w_DF"),
    (house.check_parameter_names, "pt/a.py", 'def f(m):\n    m.register_buffer("load_E", 1)', "load_E"),
    (house.check_parameter_names, "ms/a.py", 'def f(x):\n    return ms.Parameter(x, name="w_ED")', "w_ED"),
    (house.check_family_names, "jobs/run/a.py", 'ours = name == "mixtral"', "family name 'mixtral'"),
    (house.check_family_names, "mf/a.py", 'NAMES = ("LlamaConfig", "LlamaForCausalLM")', "'LlamaForCausalLM'"),
    (house.check_bare_except, "core/a.py", "try:\n    x = 1\nexcept:\n    x = 2", "bare except"),
    (house.check_print, "jobs/a.py", 'print("hello")', "print outside"),
    (house.check_machine_paths, "core/a.py", f'DATA = "/{"home"}/me/data"', "machine path"),
    (house.check_machine_paths, "../configs/a.yaml", f"data: /{'tmp'}/x/train", "machine path"),
    (house.check_long_reasons, "../tests/a.py", 'import pytest\npytest.mark.long("six here")', "names no test"),
    (house.check_long_reasons, "../tests/a.py", 'import pytest\npytest.mark.long("tests/b.py")', "names no test"),
    (house.check_yaml, "core/a.py", "import yaml\nyaml.load(t)", "without a safe loader"),
    (house.check_yaml, "core/a.py", "import yaml\nyaml.load(t, yaml.FullLoader)", "yaml.FullLoader"),
    (house.check_yaml, "core/a.py", "from yaml import unsafe_load", "unsafe_load"),
    (house.check_yaml, "core/a.py", "import yaml\nclass L(yaml.Loader): ...\nyaml.load(t, Loader=L)", "without a safe"),
]


@pytest.mark.parametrize(
    ("check", "path", "text", "word"), PLANTED, ids=[f"{check.__name__}-{word}" for check, _, _, word in PLANTED]
)
def test_a_planted_violation_is_named(check: Check, path: str, text: str, word: str, tmp_path: Path) -> None:
    file = (tmp_path / PACKAGE / path).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    found = [line for line in check(tmp_path) if word in line]
    assert found, f"nothing named {word!r}: {check(tmp_path)}"
    assert str(file.relative_to(tmp_path)) in found[0]


ALLOWED = {
    "core/a.py": "import yaml\nimport numpy as np\nclass S(yaml.SafeLoader): ...\nx = yaml.load(t, Loader=S)",
    "data/a.py": "from ..formats import x\ndef f():\n    import sentencepiece",
    "jobs/engine/door.py": "def f(name):\n    from mindformers_ext import ms\n    importlib.import_module(name)",
    "jobs/train/a.py": "from typing import TYPE_CHECKING\nimport tqdm\nfrom mindformers_ext.jobs.run import x\n",
    "cli/a.py": 'import argparse\ndef f():\n    from mindformers_ext.mf import x\nprint("hello")',
    "ms/models/mixtral.py": "from .. import norm\nfrom ...core import x\ndef f(x_BSD, y_KT): h_EDF = MAX_LEN = y_KT\n",
    "weights/mixtral.py": "from mindformers_ext import __version__",
    "../tools/bench/a.py": "import torch, mindspore\nprint(1)\n" + lines(100),
}


def test_what_is_allowed_is_not_named(tmp_path: Path) -> None:
    for path, text in ALLOWED.items():
        file = (tmp_path / PACKAGE / path).resolve()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{house.SPDX}\n{text}", encoding="utf-8")
    assert [line for check in CHECKS for line in check(tmp_path)] == []


def loaded_by(modules: list[str], root: Path) -> dict[str, list[str]]:
    """Imports the modules one by one in a fresh interpreter: which packages (top level) each of them adds."""
    code = (
        "import importlib, json, sys\n"
        "seen, added = set(sys.modules), {}\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "    added[name] = sorted({m.split('.')[0] for m in set(sys.modules) - seen})\n"
        "    seen = set(sys.modules)\n"
        "print(json.dumps(added))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(modules)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_light_floors_load_no_framework(repo_root: Path) -> None:
    paths = [p for folder in LIGHT for p in house.files(repo_root, f"{PACKAGE}/{folder}") if p.stem != "__main__"]
    names = [".".join(p.relative_to(repo_root).with_suffix("").parts).removesuffix(".__init__") for p in paths]
    added = loaded_by(names, repo_root)
    heavy = {name: hit for name, packages in added.items() if (hit := FRAMEWORKS & set(packages))}
    assert not heavy


def test_the_package_itself_loads_nothing(repo_root: Path) -> None:
    third = set(loaded_by([PACKAGE], repo_root)[PACKAGE]) - set(sys.stdlib_module_names)
    assert third == {PACKAGE}
