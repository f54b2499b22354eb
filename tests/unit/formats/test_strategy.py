# SPDX-License-Identifier: Apache-2.0
"""Strategy files alone: MindSpore's own (tests/golden), ours, and every kind of damage. tests/ms has the judge."""

import json
import shutil

import numpy as np
import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.strategy import SliceLayout, read_strategy
from tests.helpers.sliced import DP4, DP8, JSON, PP2, PP4, shape_of, strategy_bytes, write_strategy

ROW = dict(matrix=[2, 2], tensor_map=[1, -1])


@pytest.mark.parametrize(
    ("folder", "devices", "stages", "optimizer"), [(PP2, 8, 2, 8), (DP4, 8, 1, 8), (DP8, 16, 1, 2), (PP4, 4, 4, 4)]
)
def test_real_files_cut_every_tensor_without_gap_or_overlap(folder, devices, stages, optimizer):
    strategy = read_strategy(folder)
    assert (strategy.devices, len(strategy.stages), strategy.world) == (devices, stages, devices * stages)
    assert max(layout.opt_size for stage in strategy.stages for layout in stage.values()) == optimizer
    for stage in strategy.stages:
        for name, layout in stage.items():
            shape = shape_of(name)
            assert layout.fault(shape) is None
            seen = np.zeros(shape, int)
            boxes = {layout.place(rank): layout.box(shape, rank) for rank in range(devices)}
            for box in boxes.values():
                seen[box] += 1
            assert (seen == 1).all(), name
            assert len(boxes) == np.prod(layout.parts)


def test_what_the_ranks_of_the_real_run_hold():
    strategy = read_strategy(PP2)
    first, last = strategy.stages
    assert "model.tok_embeddings.embedding_weight" in first and "lm_head.weight" not in first
    assert "lm_head.weight" in last and "model.layers.1.ffn_norm.weight" not in last
    w1 = first["model.layers.0.feed_forward.ffn.w1.weight"]  # experts over 2 ranks, ffn width over 4
    assert w1.box((4, 64, 32), 6) == (slice(2, 4), slice(32, 48), slice(0, 32))
    wo = first["model.layers.0.attention.wo.weight"]  # columns over 4 ranks, the optimizer's half over the 2 replicas
    assert [wo.box((32, 32), rank) for rank in (1, 5)] == [(slice(0, 16), slice(8, 16)), (slice(16, 32), slice(8, 16))]


def test_json_says_what_protobuf_says(tmp_path):
    source = JSON / "ckpt_strategy_rank_0.json"
    rows = json.loads(source.read_text())["parallel_layout_item"]
    layouts = {
        name: dict(
            matrix=row["dev_matrix"],
            tensor_map=row["tensor_map"],
            step=row["opt_weight_shard_step"],
            size=row["opt_weight_shard_size"],
        )
        for name, row in rows.items()
    }
    ours = read_strategy(write_strategy(tmp_path / "s.ckpt", layouts))
    theirs = read_strategy(source)
    assert ours.stages == theirs.stages
    assert len(theirs.names()) == 69
    assert all(theirs.stages[0][name].fault(tuple(row["tensor_shape"])) is None for name, row in rows.items())


def test_several_device_axes_cut_one_tensor_axis():
    layout = SliceLayout((2, 3, 2), ((0, 2), ()))
    assert layout.parts == (4, 1)
    # rank 7 = (1, 0, 1): device axis 0 (the fastest) is the slower of the two cuts
    assert layout.place(7) == (3, 0) and layout.place(1) == (2, 0) and layout.place(6) == (1, 0)


def test_a_folder_with_a_file_of_each_rank_or_with_a_merged_one(tmp_path):
    for rank in range(16):
        shutil.copy(PP2 / f"ckpt_strategy_rank_{rank // 8 * 8}.ckpt", tmp_path / f"ckpt_strategy_rank_{rank}.ckpt")
    expected = read_strategy(PP2).stages
    assert read_strategy(tmp_path).stages == expected
    merged = {}
    for stage in (0, 1):
        merged |= {
            f"{stage}-{name}": dict(
                matrix=list(layout.device_matrix), tensor_map=[[*axes] or [-1] for axes in layout.tensor_map]
            )
            for name, layout in expected[stage].items()
            if layout.opt_size == 1
        }
    write_strategy(tmp_path / "alone" / "merged.ckpt", merged)
    alone = read_strategy(tmp_path / "alone")
    assert [len(stage) for stage in alone.stages] == [
        sum(layout.opt_size == 1 for layout in stage.values()) for stage in expected
    ]
    write_strategy(tmp_path / "merged_ckpt_strategy.ckpt", merged)  # left by another run: it lacks parameters
    with pytest.raises(UserError, match="'merged_ckpt_strategy.ckpt' and 'ckpt_strategy_rank_0.ckpt' describe stage 0"):
        read_strategy(tmp_path)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (dict(matrix=[2, 0], tensor_map=[1]), "device matrix [2, 0]"),
        (dict(matrix=[2, 2], tensor_map=[2]), "tensor map [[2]] over device matrix [2, 2]"),
        (dict(matrix=[2, 2], tensor_map=[-2]), "tensor map [[-2]]"),
        (dict(matrix=[2, 2], tensor_map=[1, 1]), "tensor map [[1], [1]]"),
        (dict(matrix=[2**30], tensor_map=[0]), "device matrix"),
        (dict(matrix=[2, 2], tensor_map=[0], field=3), "unevenly or by fields"),
        (dict(matrix=[2, 2], tensor_map=[0], split=[3, 5]), "unevenly or by fields"),
        (dict(matrix=[2, 2], tensor_map=[0], step=2, size=3), "size 3 and step 2 over 2 equal ranks"),
        (dict(matrix=[2, 2], tensor_map=[0], step=1, size=2), "which are 2 apart"),
        (dict(matrix=[2, 2], tensor_map=[0], step=0, size=2), "size 2 and step 0"),
        (dict(matrix=[2, 2], tensor_map=[], step=1, size=4), "size 4 and step 1"),
    ],
)
def test_layouts_that_make_no_sense_are_named(tmp_path, row, text):
    with pytest.raises(UserError) as error:
        read_strategy(write_strategy(tmp_path / "s.ckpt", {"a.weight": ROW, "b.weight": row}))
    assert text in str(error.value) and "'b.weight' of stage 0 in 's.ckpt'" in str(error.value)


def test_files_that_do_not_belong_together(tmp_path):
    def refused(text, path=tmp_path):
        with pytest.raises(UserError, match=text):
            read_strategy(path)

    refused("does not exist", tmp_path / "nowhere")
    refused("holds no strategy files")
    write_strategy(tmp_path / "s_rank_4.ckpt", {"a": ROW}, stage=1)
    refused("stage 1 without stage 0")
    refused("stage 1 without stage 0", tmp_path / "s_rank_4.ckpt")
    write_strategy(tmp_path / "s_rank_0.ckpt", {"b": ROW})
    assert read_strategy(tmp_path).world == 8
    write_strategy(tmp_path / "s_rank_1.ckpt", {"b": ROW | dict(tensor_map=[0, -1])})
    refused("'s_rank_1.ckpt' and 's_rank_0.ckpt' describe stage 0 differently")
    (tmp_path / "s_rank_1.ckpt").unlink()
    write_strategy(tmp_path / "s_rank_8.ckpt", {"b": ROW})
    refused("beyond the 8 that it describes: s_rank_8.ckpt")
    (tmp_path / "s_rank_8.ckpt").unlink()
    write_strategy(tmp_path / "s_rank_4.ckpt", {"a": dict(matrix=[8], tensor_map=[0])}, stage=1)
    refused("device matrices of 4, 8 ranks")
    write_strategy(tmp_path / "s_rank_4.ckpt", {}, stage=1)
    refused("'s_rank_4.ckpt' describes no parameters")
    (tmp_path / "s_rank_4.ckpt").write_bytes(b"")
    refused("has 0 bytes")
    (tmp_path / "s_rank_4.json").write_text("{}")
    refused("mixes .ckpt and .json")


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[]",
        "{}",
        '{"parallel_layout_item": {}, "parallel_strategy_item": {}}',
        "[" * 100_000,
        "\xff",
        '{"parallel_layout_item": {"a": 3}, "parallel_strategy_item": {}}',
        '{"parallel_layout_item": {"a": {"dev_matrix": [2], "tensor_map": [0], "field": 0, "opt_weight_shard_step": 0,'
        ' "opt_weight_shard_size": true}}, "parallel_strategy_item": {"m": {"stage": 0}}}',
        '{"parallel_layout_item": {"a": {"dev_matrix": ["2"], "tensor_map": [0], "field": 0, "opt_weight_shard_step":'
        ' 0, "opt_weight_shard_size": 0}}, "parallel_strategy_item": {"m": {"stage": 0}}}',
        '{"parallel_layout_item": {"a": 1, "a": 2}, "parallel_strategy_item": {}}',
        '{"parallel_layout_item": {}, "parallel_strategy_item": {"m": {"stage": -1}}}',
    ],
)
def test_json_of_other_kinds_is_refused(tmp_path, text):
    path = tmp_path / "s.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="s.json'"):
        read_strategy(path)


def test_damaged_protobuf_is_refused_or_still_a_strategy(tmp_path):
    """Cut anywhere, or with any bytes changed: never another exception than UserError, never a wild allocation."""
    whole = strategy_bytes({f"model.layers.{n}.w": ROW | dict(step=1, size=-1) for n in range(4)})
    path, refused = tmp_path / "s.ckpt", 0
    rng = np.random.default_rng(1)
    mutants = [whole[:length] for length in range(len(whole))]
    for _ in range(500):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(0, 256)
        mutants.append(bytes(data))
    for data in mutants:
        path.write_bytes(data)
        try:
            read_strategy(path)
        except UserError:
            refused += 1
    assert refused > len(mutants) // 2
