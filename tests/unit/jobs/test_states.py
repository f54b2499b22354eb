# SPDX-License-Identifier: Apache-2.0
"""The folder of a pass: one process at a time, known by its digest, gone when it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.experts.states import States, remove_left


def test_a_folder_is_one_process_s_until_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / ".states_0"
    first = States(folder, 4, 2, "a", keep=False)
    first.input_of(0).close()
    first.finish("forward", 2)
    for other in (lambda: States(folder, 4, 2, "a", keep=False), lambda: remove_left(folder)):
        with pytest.raises(UserError, match="another process is at work"):
            other()
    del first  # as at a kill
    again = States(folder, 4, 2, "a", keep=False)
    assert again.done("forward") == 2
    again.remove()
    assert not folder.exists()
    assert States(folder, 4, 2, "a", keep=False).done("forward") == 0
    remove_left(folder)
    remove_left(folder)  # of what is not there nothing is said
    assert not folder.exists()
