# SPDX-License-Identifier: Apache-2.0
"""Starts a command, or says what to set up first: ``python -m mindformers_ext.cli.start convert --help``.

Every entry point goes through here, with whatever Python the user happens to have. So this file and the two
``__init__.py`` above it keep to the syntax of Python 3.8 and to the standard library.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

OLDEST = (3, 10)
NOT_SET_UP = 2
# [project.dependencies] of pyproject.toml, as they are imported: what every command needs
CORE = ("numpy", "yaml", "safetensors", "ml_dtypes", "tqdm", "psutil")
# what some commands need, and notice under way
MORE = (
    *("mindspore", "mindformers", "torch", "triton", "transformers"),
    *(
        "sentencepiece",
        "tokenizers",
        "pyarrow",
        "scipy",
        "datasketch",
        "jinja2",
        "fastchat",
        "matplotlib",
        "tensorboardX",
        "huggingface_hub",
        "ray",
    ),
)
SET_UP = """\
Set up once, in the folder of this repository, then activate the environment:
  bash scripts/setup_env.sh
  source .venv/bin/activate"""


def start(command: str, argv: Sequence[str] | None = None) -> int:
    """Exit code of ``cli/<command>.py``, run with ``argv`` (default: the process's).

    2, with the way to set up, where Python is too old or a package is missing.
    """
    if is_not_set_up():
        return NOT_SET_UP
    try:
        code: int = importlib.import_module(f"mindformers_ext.cli.{command}").main(argv)
        return code
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in MORE or importlib.util.find_spec(name):
            raise
        return _refuse(f"{sys.executable} has no {name}, which this command needs")


def is_not_set_up(more: Sequence[str] = ()) -> bool:
    """Whether Python is too old, or what every command needs, or one of ``more``, is missing; then it is said."""
    if sys.version_info < OLDEST:  # noqa: UP036 (an older one reads this line)
        _refuse(f"Python {sys.version.split()[0]} ({sys.executable}) is too old: 3.10 to 3.12 is needed")
        return True
    missing = [name for name in (*CORE, *more) if importlib.util.find_spec(name) is None]
    if missing:
        _refuse(f"{sys.executable} has no {', '.join(missing)}: this package is not set up for it")
    return bool(missing)


def check_installed(name: str) -> None:
    """``ModuleNotFoundError``, which ``start`` explains, where the package ``name`` is not there."""
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def mfext() -> int:
    """The console script."""
    return start("mfext")


def _refuse(found: str) -> int:
    print(f"error: {found}.\n{SET_UP}", file=sys.stderr)
    return NOT_SET_UP


if __name__ == "__main__":
    raise SystemExit(start(sys.argv[1], sys.argv[2:]))
