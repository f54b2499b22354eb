# SPDX-License-Identifier: Apache-2.0
"""The commands of research/training_free/README.md as written, with a small model and little text."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mindformers_ext.cli import experts, mfext
from tests.cli.docs.test_readme import commands
from tests.helpers.tiny_llama import make_llama, sentences

FOLDER = "research/training_free"
PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {
    "python tools/build_experts.py": experts.main,
    "python -m mindformers_ext": mfext.main,
}
RUN_ELSEWHERE = "python tools/bench/"  # tests/cli/docs/test_bench.py, with a small model
SHORT = {"--tokens 8192": "--tokens 600", "--held_out_tokens 6144": "--held_out_tokens 300"}
SHORT |= {"--block_size 512": "--block_size 32", "--max_new_tokens 20": "--max_new_tokens 3"}


def readme(repo_root: Path, name: str = "README.md") -> list[str]:
    return commands((repo_root / FOLDER / name).read_text("utf-8"))


def test_the_commands_run_in_their_order(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_llama(tmp_path / "data" / "SmolLM2-135M-Instruct")
    for number, name in enumerate(("first", "second")):
        text = ". ".join(sentences(120, number))
        (tmp_path / "data" / f"wiki.{name}_half.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert readme(repo_root) == readme(repo_root, "README_CN.md")
    for command in readme(repo_root):
        if command.startswith(RUN_ELSEWHERE):
            assert (repo_root / command.split()[1]).is_file()
            continue
        for long, short in SHORT.items():
            command = command.replace(long, short)
        program = next(name for name in PROGRAMS if command.startswith(name + " "))
        assert PROGRAMS[program](shlex.split(command.removeprefix(program))) == 0, f"{command}\n{capsys.readouterr()}"
    kinds = {"smol_moe": "qwen2_moe", "smol_auto": "qwen2_moe", "smol_threshold": "llama_moe"}
    for name, kind in {**kinds, "smol_upcycled": "mixtral"}.items():
        assert json.loads(Path("data", name, "config.json").read_text())["model_type"] == kind
    assert Path("data/smol_moe.ckpt").stat().st_size > 0 and Path("data/smol_moe/ladder.png").is_file()
    said = capsys.readouterr().out
    assert "--shared auto, sums of the layers' divergences by S" in said and "router threshold" in said
