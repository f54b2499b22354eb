# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run resumes from, and whether it fits: no framework, files of the real format."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.ms_ckpt import CkptWriter
from mindformers_ext.jobs.checkpoint.saved import (
    check_shapes,
    checkpoint_file,
    choose_resume,
    fault,
    last_whole,
    note_size,
    remove_leftovers,
    saved_in,
    set_aside,
)
from mindformers_ext.weights.convert import rule_set

MOE = MoESpec(num_local_experts=3, num_experts_per_tok=2)
MODEL = ModelSpec(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    moe=MOE,
)


def write(path: Path, tensors=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with CkptWriter(path) as writer:
        for name, array in (tensors or {"a": np.ones((50, 50), np.float32), "b": np.ones(3, np.float32)}).items():
            writer.add(name, array)
    return path


def named(folder, label, rank=0, run=""):
    return folder / f"rank_{rank}" / f"tiny_rank_{rank}{run}-{label}.ckpt"


def test_steps_are_ordered_by_number_and_run(tmp_path):
    for label, run in (("1_10", ""), ("1_9", ""), ("2_1", ""), ("1_3", "_1")):
        write(named(tmp_path, label, run=run))
    (tmp_path / "rank_0" / "other.ckpt").write_bytes(b"")
    assert [(saved.run, saved.label) for saved in saved_in(tmp_path / "rank_0")] == [
        (0, "1_9"),
        (0, "1_10"),
        (0, "2_1"),
        (1, "1_3"),
    ]
    assert choose_resume(tmp_path).saved.path == named(tmp_path, "1_3", run="_1")  # a later run's file is newer


@pytest.mark.parametrize("keep", [1, 60, -1])
def test_a_cut_file_is_passed_over(tmp_path, keep):
    good, half = write(named(tmp_path, "1_3")), write(named(tmp_path, "1_6"))
    note_size(good)
    note_size(half)
    half.write_bytes(half.read_bytes()[:keep])
    (tmp_path / "rank_0" / "tiny_rank_0-1_9.tmp").write_bytes(b"half")
    point = choose_resume(tmp_path)
    assert point.saved.path == good and last_whole(tmp_path / "rank_0").path == good
    assert any("1_6" in reason for reason in point.passed_over)
    assert any("1_9.tmp was being written" in reason for reason in point.passed_over)
    assert [path.name for path in remove_leftovers(tmp_path)] == ["tiny_rank_0-1_9.tmp"]


def test_a_file_cut_between_two_tensors_is_known_by_its_size(tmp_path):
    whole = write(named(tmp_path, "1_3"))
    note_size(whole)
    assert fault(whole) is None
    size = whole.stat().st_size
    write(whole, {"a": np.ones((50, 50), np.float32)})  # whole in itself, but "b" is gone
    assert f"instead of {size}" in fault(whole)


def test_every_rank_must_have_the_step(tmp_path):
    for label in ("1_3", "1_6"):
        for rank in range(2):
            write(named(tmp_path, label, rank))
    named(tmp_path, "1_6", 1).unlink()
    point = choose_resume(tmp_path)
    assert point.saved.label == "1_3" and "1 of 2 ranks" in point.passed_over[0]


def test_a_named_file_is_taken_and_must_be_whole(tmp_path):
    write(named(tmp_path, "1_3")), write(named(tmp_path, "1_6"))
    assert choose_resume(tmp_path, "tiny_rank_0-1_3").saved.label == "1_3"
    with pytest.raises(UserError, match="nothing to resume from"):
        choose_resume(tmp_path, "tiny_rank_0-1_4")


def test_nothing_whole_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no folder rank_0"):
        choose_resume(tmp_path)
    named(tmp_path, "1_3").parent.mkdir()
    named(tmp_path, "1_3").write_bytes(b"\x0a\xff")
    with pytest.raises(UserError, match="nothing to resume from"):
        choose_resume(tmp_path)


def test_setting_aside_leaves_earlier_steps_and_runs(tmp_path):
    started = time.time()
    for label in ("1_3", "1_6", "2_1"):
        write(named(tmp_path, label))
    os.utime(named(tmp_path, "2_1"), (started - 100, started - 100))  # of an earlier run
    moved = set_aside(tmp_path / "rank_0", (1, 5), started - 1)
    assert [path.name for path in moved] == ["tiny_rank_0-1_6.ckpt.unusable"]
    assert {saved.label for saved in saved_in(tmp_path / "rank_0")} == {"1_3", "2_1"}


def weights_of(model):
    return {
        name: np.zeros(shape, np.float32) for binding in rule_set(model).bindings for name, shape in binding.ms.items()
    }


def test_shapes_are_compared_and_named(tmp_path):
    weights = weights_of(MODEL)
    extra = {
        "adam_m.lm_head.weight": np.zeros(2, np.float32),
        "global_step": np.zeros(1, np.int32),
        "model.layers.0.feed_forward.router.router.topk_bias": np.zeros(3, np.float32),
    }
    check_shapes(write(tmp_path / "good.ckpt", weights | extra), MODEL)
    weights["lm_head.weight"] = np.zeros((21, 8), np.float32)
    del weights["model.norm_out.weight"]
    weights["model.layers.2.ffn_norm.weight"] = np.zeros(8, np.float32)
    with pytest.raises(UserError) as error:
        check_shapes(write(tmp_path / "bad.ckpt", weights), MODEL)
    for words in (
        "lm_head.weight is (21, 8), the network has (20, 8)",
        "1 weights missing: model.norm_out.weight",
        "model.layers.2.ffn_norm.weight",
    ):
        assert words in str(error.value)


def test_the_file_that_a_folder_stands_for(tmp_path):
    assert checkpoint_file(tmp_path) is None
    newest = [write(named(tmp_path, label)) for label in ("1_9", "1_10")][-1]
    assert checkpoint_file(tmp_path) == newest and checkpoint_file(newest) == newest


@pytest.mark.parametrize("foreign", ["rank_0.bak", "rank_", "rank_x", "rank_-1", "rank_1 (copy)", "rank_99999999999"])
def test_foreign_folders_beside_the_ranks_are_no_ranks(tmp_path, foreign):
    kept = write(named(tmp_path, "1_3"))
    write(tmp_path / foreign / "tiny_rank_0-9_9.ckpt")
    half = tmp_path / foreign / "x.tmp"
    half.write_bytes(b"mine")
    assert choose_resume(tmp_path).saved.path == kept
    assert remove_leftovers(tmp_path) == [] and half.exists()
