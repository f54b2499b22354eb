# SPDX-License-Identifier: Apache-2.0
"""``mfext``: its table, its helps, its completion; nothing heavy is loaded to show them."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mindformers_ext import __version__
from mindformers_ext.cli import completion, mfext
from mindformers_ext.cli.mfext import ROWS, command_of

NAMES = [row.name for row in ROWS]
WITH_COMMAND = [row for row in ROWS if row.command]
HELPS = """
import contextlib, io, json, sys
from mindformers_ext.cli.mfext import ROWS, main
texts = {}
for name in ["", *(row.name for row in ROWS)]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*([name] if name else []), "--help"])
    texts[name] = out.getvalue()
print(json.dumps([texts, sorted(name for name in sys.modules if "." not in name)]))
"""


@pytest.fixture(scope="module")
def helps(repo_root: Path) -> tuple[dict[str, str], set[str]]:
    """Every help, and the packages that showing them has loaded."""
    done = subprocess.run([sys.executable, "-c", HELPS], cwd=repo_root, capture_output=True, text=True, check=True)
    texts, modules = json.loads(done.stdout)
    return texts, set(modules)


def test_showing_every_help_loads_nothing_heavy(helps: tuple[dict[str, str], set[str]]) -> None:
    assert not helps[1] & {"numpy", "torch", "mindspore", "transformers", "mindformers", "ml_dtypes", "safetensors"}


def test_a_command_that_multiplies_nothing_has_no_threads_of_blas(repo_root: Path, tmp_path: Path) -> None:
    count = "import sys, os; from mindformers_ext.cli.mfext import main; code = main(sys.argv[1:]); import numpy; "
    count += "print(len(os.listdir('/proc/self/task')))"
    environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    words = [sys.executable, "-c", count, "inspect", str(tmp_path / "no.ckpt")]
    done = subprocess.run(words, cwd=repo_root, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_the_help_lists_every_command_with_examples(helps: tuple[dict[str, str], set[str]]) -> None:
    text = helps[0][""]
    assert all(f"\n  {row.name} " in text and row.summary in text for row in ROWS)
    assert "examples:" in text and "mfext predict" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_commands_help_has_its_name_here(name: str, helps: tuple[dict[str, str], set[str]]) -> None:
    text = helps[0][name]
    assert f"mfext {name}" in text.split("\n\n")[0]
    assert "python tools/" not in text.replace("python tools/dataset_preprocess/llama/alpaca_converter.py", "")
    assert "python convert_weight.py" not in text


@pytest.mark.parametrize("row", [row for row in WITH_COMMAND if row.script], ids=lambda row: row.name)
def test_it_has_the_older_commands_options(row: mfext.Row) -> None:
    older = importlib.import_module(f"mindformers_ext.cli.{row.module}").COMMAND
    ours = command_of(row)
    assert [action.option_strings for action in ours.parser()._actions] == [
        action.option_strings for action in older.parser()._actions
    ]
    assert ours.run is older.run and ours.read is older.read and older.prog not in ours.parser().format_usage()


def test_words_go_on_to_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mfext.main(["inspect", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
    assert mfext.main(["mergekit-yaml", str(tmp_path / "none.yaml"), str(tmp_path / "out"), "--lazy-unpickle"]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert mfext.main(["--version"]) == 0 and __version__ in capsys.readouterr().out


def test_a_name_that_does_not_exist_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert mfext.main(["convrt"]) == 2
    assert "did you mean 'convert'" in capsys.readouterr().err
    assert mfext.main([]) == 2 and "--help" in capsys.readouterr().err


def completed(script: str, *words: str, path: str | None = None) -> set[str]:
    line = f'{script}\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _mfext; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", line, "bash", *words], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["mfext", "tra"], {"transform", "train"}),
        (["mfext", ""], set(NAMES)),
        (["mfext", "convert", "--dt"], {"--dtype"}),
        (["mfext", "eval", "--engine", ""], {"auto", "ms", "pt"}),
        (["mfext", "merge", ""], {"yaml", "moe"}),
        (["mfext", "merge", "moe", "--to-m"], {"--to-mindspore"}),
        (["mfext", "completion", ""], {"bash", "zsh", "fish"}),
        (["mfext", "inspect", "file"], set()),
    ],
)
def test_bash_completes(words: list[str], found: set[str], bash_script: str) -> None:
    assert completed(bash_script, *words) == found


@pytest.fixture(scope="module")
def bash_script() -> str:
    return "\n".join(completion.bash(completion.table()))


def test_mergekits_names_give_way_to_mergekit(bash_script: str, tmp_path: Path) -> None:
    installed = tmp_path / "mergekit-yaml"
    installed.write_text("#!/bin/sh\necho mergekit itself\n")
    installed.chmod(0o755)
    mine = tmp_path / "mfext"
    mine.write_text('#!/bin/sh\necho mfext "$@"\n')
    mine.chmod(0o755)
    words = ["bash", "-c", f"{bash_script}\nmergekit-yaml a b; mergekit-moe c d"]
    environment = dict(os.environ, PATH=f"{tmp_path}:/usr/bin:/bin")
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["mergekit itself", "mfext mergekit-moe c d"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_theirs(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.main([shell]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in NAMES) and "--dtype" in text or "-l dtype" in text
    assert "%(" not in text
    if shutil.which(shell):
        path = tmp_path / "script"
        path.write_text(text)
        subprocess.run([shell, "-n", str(path)], check=True)
