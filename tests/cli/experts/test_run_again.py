# SPDX-License-Identifier: Apache-2.0
"""A run again: what stands on a stage that has changed is made anew, the rest is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mindformers_ext.cli.experts import main
from tests.cli.experts import test_convert

made = test_convert.made  # model, text, split and gates


def test_what_stands_on_a_changed_stage_is_made_again(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_path": str(made / "dense"), "save_path": str(tmp_path / "work"), "num_experts": 4}
    config |= {"overwrite": True, "quiet": True, "convert": {"save_path": str(tmp_path / "moe")}}
    before = b""
    for seed, changed in ((0, True), (0, False), (1, True)):  # the words of convert stay the same
        path = tmp_path / "experts.yaml"
        path.write_text(yaml.safe_dump(config | {"split": {"method": "random", "seed": seed}}), encoding="utf-8")
        assert main(["run", str(path)]) == 0
        assert ("is there already" in capsys.readouterr().out) == (not changed)
        after = (tmp_path / "moe" / "expert_neurons.npz").read_bytes()
        assert (after != before) == changed
        before = after
