# SPDX-License-Identifier: Apache-2.0
"""A group of files appears whole, in an order that a killed run cannot mistake for a whole one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import fresh_group, recover_group, write_text


def fill(folder: Path, text: str, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).write_text(text)


NAMES = ("x0", "x1", "x0.db", "x1.db")


def test_the_first_file_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda old, new: (moved.append(Path(new).name), rename(old, new)))
    with fresh_group(tmp_path / "x") as folder:
        fill(folder, "new", NAMES)
    assert moved == ["x1.db", "x0.db", "x1", "x0"]
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted(NAMES)


def test_an_error_leaves_the_old_files(tmp_path: Path) -> None:
    fill(tmp_path, "old", NAMES)
    with pytest.raises(RuntimeError), fresh_group(tmp_path / "x", overwrite=True) as folder:
        fill(folder, "new", NAMES)
        raise RuntimeError
    with pytest.raises(UserError, match="exists"), fresh_group(tmp_path / "x") as folder:
        fill(folder, "new", NAMES)
    assert {item.read_text() for item in tmp_path.iterdir()} == {"old"}


def test_replacing_takes_the_first_file_away_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "old", NAMES)

    def killed(old: str, new: str) -> None:
        raise RuntimeError

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(RuntimeError), fresh_group(tmp_path / "x", overwrite=True) as folder:
        fill(folder, "new", NAMES)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_cleared_and_two_runs_are_kept_apart(tmp_path: Path) -> None:
    dead = tmp_path / ".x.0123456789ab.partial"
    dead.mkdir()
    fill(dead, "half", ("x7",))
    with fresh_group(tmp_path / "x") as folder:
        assert not list(folder.iterdir())
        with pytest.raises(UserError, match="being written by another process"), fresh_group(tmp_path / "x"):
            pass
        fill(folder, "new", ("x",))
    assert [item.name for item in tmp_path.iterdir()] == ["x"]


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "meta.json"
    write_text(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("moves", range(len(NAMES) + 1))
def test_a_kill_between_the_moves_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int, overwrite: bool
) -> None:
    if overwrite:
        fill(tmp_path, "old", NAMES)
    rename, done = os.rename, []

    def killed(old: str, new: str) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt  # stands for SIGKILL: what it would leave is put back below
        done.append(new)
        rename(old, new)

    monkeypatch.setattr(os, "rename", killed)
    monkeypatch.setattr("shutil.rmtree", lambda *given, **named: None)  # nothing is cleared after a SIGKILL
    with suppress(KeyboardInterrupt), fresh_group(tmp_path / "x", overwrite) as folder:
        fill(folder, "new", NAMES)
    monkeypatch.undo()
    recover_group(tmp_path / "x")
    left = {item.name: item.read_text() for item in tmp_path.iterdir()}
    assert left in ({}, dict.fromkeys(NAMES, "new")) and bool(left) == (moves == len(NAMES))
    with fresh_group(tmp_path / "x", overwrite=bool(left)) as folder:
        fill(folder, "newer", NAMES)
    assert {item.name: item.read_text() for item in tmp_path.iterdir()} == dict.fromkeys(NAMES, "newer")


def test_a_list_of_moves_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    partial = tmp_path / "other" / ".x.0123456789ab.partial"
    partial.mkdir()
    fill(tmp_path, "mine", ("x.db", "y"))
    (partial / ".moving").write_text("x/../../y\n../x.db\n/x\nx\nx0")
    (partial / "x").write_text("waits")
    recover_group(tmp_path / "other" / "x")
    assert not partial.exists() and (tmp_path / "y").exists() and (tmp_path / "x.db").exists()
