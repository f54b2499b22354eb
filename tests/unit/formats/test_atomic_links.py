# SPDX-License-Identifier: Apache-2.0
"""What stands under a name that an output uses on its way is never followed, emptied or replaced through a link."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats import atomic
from mindformers_ext.formats.atomic import fresh_file, fresh_folder, fresh_group, scratch_folder, write_text
from mindformers_ext.formats.blocks import open_new

HEX = "0123456789ab"
NAMES = (".m.partial", ".m.old", f".m.{HEX}.partial", f".m.{HEX}.old", f".m.{os.getpid()}", f".m.{HEX}.text")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder that somebody else needs."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "kept").write_text("kept")
    return folder


def write(how: str, path: Path) -> None:
    if how == "text":
        write_text(path, "new")
    elif how == "file":
        with fresh_file(path, overwrite=True) as beside:
            beside.write_text("new")
    else:
        with (fresh_folder if how == "folder" else fresh_group)(path, overwrite=True) as beside:
            (beside / "m").write_text("new")


@pytest.mark.parametrize("how", ["text", "file", "folder", "group"])
@pytest.mark.parametrize("target", ["victim", "victim/kept"])
def test_links_planted_under_temporary_names_are_left_alone(
    how: str, target: str, tmp_path: Path, victim: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in NAMES:
        (out / name).symlink_to(tmp_path / target)
    write(how, out / "m")
    assert (victim / "kept").read_text() == "kept" and list(victim.iterdir()) == [victim / "kept"]
    assert not (out / "m").is_symlink() and (out / "m").exists()
    assert {item.name for item in out.iterdir()} == {*NAMES, "m"}


@pytest.mark.parametrize("how", ["text", "file", "folder"])
def test_an_output_that_is_a_link_is_replaced_not_followed(how: str, tmp_path: Path, victim: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "m").symlink_to(victim if how == "folder" else victim / "kept")
    write(how, out / "m")
    assert not (out / "m").is_symlink() and [item.name for item in out.iterdir()] == ["m"]
    assert (victim / "kept").read_text() == "kept" and list(victim.iterdir()) == [victim / "kept"]


def test_a_new_file_is_not_opened_through_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "link").symlink_to(victim / "kept")
    with pytest.raises(UserError, match="is a link, which is not followed"):
        open_new(tmp_path / "link")
    assert (victim / "kept").read_text() == "kept"


def test_names_cannot_be_foreseen(tmp_path: Path) -> None:
    seen = set()
    for _ in range(3):
        with fresh_file(tmp_path / "m", overwrite=True) as beside:
            seen.add(beside.name)
    assert len(seen) == 3 and [item.name for item in tmp_path.iterdir()] == ["m"]


def test_what_dead_runs_left_is_removed_and_what_live_ones_write_is_not(tmp_path: Path) -> None:
    texts = [tmp_path / f".m.{HEX[:-1]}{end}.text" for end in "ab"]
    for path in texts:
        path.write_text("half")
    folder = tmp_path / f".m.{HEX}.partial"
    (folder / "states").mkdir(parents=True)
    with texts[1].open() as live:
        fcntl.flock(live, fcntl.LOCK_EX)
        write_text(tmp_path / "m", "new")
    assert (tmp_path / "m").read_text() == "new" and not texts[0].exists() and texts[1].exists()
    texts[1].unlink()
    with scratch_folder(tmp_path / "m") as beside:
        assert beside.parent == tmp_path and beside.is_dir() and not folder.exists()
    assert os.listdir(tmp_path) == ["m"]


def test_two_that_begin_at_once_do_not_both_give_up(tmp_path: Path) -> None:
    """Each sees the other's hidden file: both step back, and after a moment one writes."""
    done, refused = [], []
    barrier = threading.Barrier(3)

    def run(number: int) -> None:
        barrier.wait()
        try:
            with fresh_file(tmp_path / "m", overwrite=True) as beside:
                beside.write_text(str(number))
            done.append(number)
        except UserError:
            refused.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done and len(done) + len(refused) == 3
    assert (tmp_path / "m").read_text() in map(str, done) and [item.name for item in tmp_path.iterdir()] == ["m"]


def test_one_removed_before_it_was_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may take a file that is not locked yet for a dead one."""
    lock, removed = fcntl.flock, []

    def late(descriptor: int, kind: int) -> None:
        for item in [] if removed else list(tmp_path.glob(".m.*.partial")):
            removed.append(item)
            item.unlink()
        lock(descriptor, kind)

    monkeypatch.setattr(atomic.fcntl, "flock", late)
    with fresh_file(tmp_path / "m") as beside:
        beside.write_text("new")
    assert removed and (tmp_path / "m").read_text() == "new"
