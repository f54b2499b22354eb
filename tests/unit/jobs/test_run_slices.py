# SPDX-License-Identifier: Apache-2.0
"""What every device loads in data parallel: a whole file, the copies of ranks, or slices that are merged first."""

from dataclasses import replace

import numpy as np
import pytest

from mindformers_ext.core.config.run import run_spec_from_yaml, settled_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec, ParallelSpec
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.formats.strategy import read_strategy
from mindformers_ext.jobs.run.slices import merge_slices, settle_slices
from mindformers_ext.weights.convert import rule_set
from tests.helpers.sliced import cut, write_ranks, write_strategy
from tests.unit.jobs.test_checkpoints import MODEL, write

SPEC = NetworkSpec(model=MODEL, seq_length=8, parallel=ParallelSpec(parallel_mode="data_parallel", device_num=2))
ARRAYS = {
    name: np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for binding in rule_set(MODEL).bindings
    for name, shape in binding.ms.items()
}


def settle(path, spec=SPEC, **words):
    """(notes, merge request, the changed configuration)."""
    config = {
        "load_checkpoint": str(path),
        "use_parallel": spec.parallel.device_num > 1,
        "output_dir": "out",
        "auto_trans_ckpt": True,
        **words,
    }
    asked = run_spec_from_yaml({"run_mode": "train", **config})
    settled, notes, merge = settle_slices(asked, spec)
    return notes, merge, settled_yaml(config, asked, settled)


@pytest.fixture
def slices(tmp_path):
    """Weights of three ranks that cut the experts, beside state that no layout names."""
    rows = {
        name: {"matrix": [3], "tensor_map": [0 if array.ndim == 3 else -1] + [-1] * (array.ndim - 1)}
        for name, array in ARRAYS.items()
    }
    strategy = write_strategy(tmp_path / "strategy" / "ckpt_strategy_rank_0.ckpt", rows)
    ranks = cut(read_strategy(strategy), ARRAYS, {"step_num": np.array([7], np.int32)})
    write_ranks(tmp_path / "saved", ranks)
    write_ranks(tmp_path / "saved", ranks, name="mixtral_rank_{}-3_9")
    return tmp_path


def test_slices_are_merged_by_their_strategy(slices):
    notes, merge, config = settle(
        slices / "saved", src_strategy_path_or_dir=str(slices / "strategy"), output_dir=str(slices / "out")
    )
    assert "the slices of 3 ranks" in notes[0] and not config["auto_trans_ckpt"]
    path = merge_slices(merge, SPEC)
    assert str(path) == config["load_checkpoint"] and path.parent.parent == slices / "out/transformed_checkpoint/saved"
    reader = CkptFile(path)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(reader.read(name), array)
    assert reader.read("step_num") == 7
    reader.close()
    assert merge_slices(merge, SPEC) == path  # a second run replaces the file
    other = replace(SPEC, model=replace(MODEL, vocab_size=21))
    with pytest.raises(UserError, match=r"embedding_weight is \(20, 8\), the network has \(21, 8\)"):
        merge_slices(merge, other)


def test_slices_without_what_they_need_are_refused(slices):
    for words in ({}, {"auto_trans_ckpt": False, "src_strategy_path_or_dir": "s"}):
        with pytest.raises(UserError, match="holds the slices of 3 ranks.*src_strategy_path_or_dir"):
            settle(slices / "saved", **words)


def test_a_whole_file_is_loaded_as_it_is(tmp_path):
    path = write(tmp_path / "whole.ckpt", ARRAYS)
    notes, merge, config = settle(path)
    assert merge is None and config["load_checkpoint"] == str(path) and not config["auto_trans_ckpt"]
    assert len(notes) == 1 and "holds whole weights" in notes[0]
    assert settle(path, auto_trans_ckpt=False)[0] == []


@pytest.mark.parametrize(("saved", "runs", "shared"), [(2, 2, False), (1, 2, True), (2, 4, True), (2, 1, False)])
def test_copies_of_data_parallel_ranks_serve_any_number(tmp_path, saved, runs, shared):
    write_ranks(tmp_path, [ARRAYS] * saved)
    spec = replace(SPEC, parallel=replace(SPEC.parallel, device_num=runs))
    notes, merge, config = settle(tmp_path, spec, auto_trans_ckpt=False)
    first = str(tmp_path / "rank_0" / "mixtral_rank_0-3_2.ckpt")
    assert merge is None and config["load_checkpoint"] == (first if shared else str(tmp_path))
    assert len(notes) == shared


def test_semi_auto_parallel_keeps_mindformers_way(slices):
    spec = replace(SPEC, parallel=replace(SPEC.parallel, parallel_mode="semi_auto_parallel"))
    notes, merge, config = settle(slices / "saved", spec, src_strategy_path_or_dir="s")
    assert (notes, merge, config["auto_trans_ckpt"]) == ([], None, True)
