# SPDX-License-Identifier: Apache-2.0
"""``tools/prune.py``: what it writes is the masked model in stock transformers; what it refuses leaves nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.cli.prune import main
from mindformers_ext.jobs.prune.masks_file import read_masks
from tests.helpers.prune_cases import CASES, GQA, MHA, oracle_masks
from tests.helpers.prune_folders import transformers_logits, write_case_masks, write_folder
from tests.helpers.prune_oracle import logits

IDS = np.arange(9) * 5 % 23
REGULAR = [name for name in CASES if name not in ("halves", "no intermediate in one layer")]


def cut(case_name: str, place: Path, *more: str) -> int:
    case = CASES[case_name]
    dense, masks = write_folder(case, place / "dense"), write_case_masks(case, place / "masks.npz")
    words = ["cut", str(dense), "--masks", str(masks), "--output", str(place / "out"), "--quiet", *more]
    return main(words)


@pytest.mark.parametrize("name", REGULAR)
def test_transformers_computes_the_masked_model(name: str, tmp_path: Path) -> None:
    assert cut(name, tmp_path) == 0
    case, found = CASES[name], transformers_logits(tmp_path / "out", IDS)
    expected = logits(case.weights(), IDS, case.sizes(), oracle_masks(case.masks()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


def test_the_folder_says_what_was_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cut("groups, both", tmp_path) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 4)
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())
    values = CASES["groups, both"].values()
    assert report["layers"] == np.flatnonzero(values["layer"]).tolist()
    assert report["kept"]["kv_head"] == [np.flatnonzero(row).tolist() for row in values["kv_head"]]
    before, after = report["parameters"]["before"], report["parameters"]["after"]
    assert before - 3 * 2 * 12 - 12 - 2 * 23 * 12 == GQA.prunable()
    left = replace(GQA, hidden_size=8, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
    assert after - 2 * 2 * 8 - 8 - 2 * 23 * 8 == left.prunable()
    np.testing.assert_array_equal(read_masks(tmp_path / "out" / "masks.npz").values["layer"], values["layer"])
    capsys.readouterr()
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "kv_head             4  2" in capsys.readouterr().out


def test_the_head_is_scaled_only_when_asked_for(tmp_path: Path) -> None:
    assert cut("soft", tmp_path, "--fold_lm_head") == 0
    case = CASES["soft"]
    expected = logits(case.weights(), IDS, case.sizes(), oracle_masks(case.masks()))
    assert np.abs(transformers_logits(tmp_path / "out", IDS) - expected).max() > 0.1


def test_masks_off_their_target_are_refused_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES["hidden alone"]
    dense, target = write_folder(case, tmp_path / "dense"), replace(MHA, hidden_size=5)
    masks = write_case_masks(case, tmp_path / "masks.npz", target, off=0.09)
    words = ["cut", str(dense), "--masks", str(masks), "--output", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 3
    assert "off the target: hidden by 0.0900" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--force"]) == 0
    near = write_case_masks(case, tmp_path / "near.npz", target, off=0.02)
    assert main([*words[:3], str(near), *words[4:], "--overwrite"]) == 0
    assert "hidden by 0.0200" in capsys.readouterr().err


def test_bad_inputs_have_their_own_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = write_folder(CASES["soft"], tmp_path / "dense")
    good = write_case_masks(CASES["soft"], tmp_path / "good.npz")
    (tmp_path / "text.npz").write_text("no archive")
    arrays = dict(np.load(good))
    np.savez(tmp_path / "nan.npz", **{**arrays, "hidden_z": np.full(12, np.nan, np.float32)})
    np.savez(tmp_path / "stranger.npz", **{**arrays, "tail_z": np.ones(3, np.float32)})
    np.savez(tmp_path / "shape.npz", **{**arrays, "head_z": np.ones((3, 5), np.float32)})
    np.savez(tmp_path / "nothing.npz", **{**arrays, "hidden_z": np.zeros(12, np.float32)})
    np.savez(tmp_path / "unnamed.npz", **{name: array for name, array in arrays.items() if name != "source"})
    np.savez(tmp_path / "objects.npz", source=np.array([{}], object))
    other = write_case_masks(CASES["groups, both"], tmp_path / "other.npz")
    halves = write_case_masks(CASES["halves"], tmp_path / "halves.npz")
    cases = {
        "text": "holds no masks",
        "nan": "hidden has values that are no numbers from 0 to 1",
        "stranger": "holds 'tail_z', which is no mask",
        "shape": "head has shape [3, 5]: this model's is [3, 4]",
        "nothing": "hidden_size is 0",
        "unnamed": "does not say of which model its masks are",
        "objects": "holds no masks",
        other.stem: "its num_attention_heads is 4, the masks' 12",
        halves.stem: "keep one half alone",
        "absent": "holds no masks",
    }
    for name, message in cases.items():
        words = ["cut", str(dense), "--masks", str(tmp_path / f"{name}.npz"), "--output", str(tmp_path / "out")]
        assert main(words) == 2, name
        assert message in capsys.readouterr().err, name
    for more, message in (
        (["--next_yaml", "next.yaml", "--masks", str(good)], "--next_yaml of a model folder"),
        (["--config", "run.yaml", "--masks", str(good)], "--config of a model folder"),
        ([], "a model folder has no masks"),
    ):
        assert main(["cut", str(dense), "--output", str(tmp_path / "out"), *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["masks", str(tmp_path / "nowhere"), "--output", str(tmp_path / "m.npz")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "m.npz").exists()
