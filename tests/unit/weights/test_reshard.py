# SPDX-License-Identifier: Apache-2.0
"""Cutting and merging: inverse for random layouts, any part on demand, and every contradiction named."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.ms_ckpt import CkptFile, CkptWriter
from mindformers_ext.formats.safetensors_file import SafetensorsFile, SafetensorsFileWriter
from mindformers_ext.formats.strategy import SliceLayout, Strategy, read_strategy
from mindformers_ext.formats.tensors import MappingReader, TensorInfo
from mindformers_ext.weights import boxes
from mindformers_ext.weights.boxes import pieces, read_box, sizes, whole_box
from mindformers_ext.weights.reshard import SlicedReader, open_sliced
from mindformers_ext.weights.reshard_plan import plan_reshard
from tests.helpers.sliced import DP4, PP2, PP4, assert_holds, cut, golden_arrays, same, write_ranks

DTYPES = (np.float32, np.float16, np.int8, ml_dtypes.bfloat16)


@st.composite
def layouts(draw, devices):
    """Any layout over ``devices`` ranks (a product of small primes): matrix, tensor map with several axes, twins."""
    matrix, rest = [], devices
    while rest > 1:
        size = draw(st.sampled_from([size for size in range(2, rest + 1) if rest % size == 0]))
        matrix.append(size)
        rest //= size
    matrix = draw(st.permutations([*matrix, *draw(st.sampled_from([[], [1]]))]))
    axes = draw(st.permutations(range(len(matrix))))
    ndim = draw(st.integers(1, 3))
    tensor_map = [[] for _ in range(ndim)]
    for axis in axes:
        place = draw(st.integers(-1, ndim - 1))
        if place >= 0:
            tensor_map[place].append(axis)
    used = {axis for item in tensor_map for axis in item}
    twins = int(np.prod([size for place, size in enumerate(matrix) if len(matrix) - 1 - place not in used]))
    size = draw(st.sampled_from([size for size in range(1, twins + 1) if twins % size == 0]))
    return SliceLayout(tuple(matrix), tuple(map(tuple, tensor_map)), size)


@st.composite
def cases(draw):
    devices = draw(st.sampled_from([1, 2, 4, 6, 8, 12]))
    stages = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    arrays, held = {}, [{} for _ in range(stages)]
    for number in range(draw(st.integers(1, 4))):
        layout = draw(layouts(devices))
        shape = tuple(count * draw(st.integers(1, 3)) for count in layout.parts)
        arrays[f"t{number}"] = (rng.normal(size=shape) * 50).astype(draw(st.sampled_from(DTYPES)))
        held[draw(st.integers(0, stages - 1))][f"t{number}"] = layout
    return arrays, Strategy(tuple(held), devices, "drawn")


def reader_of(strategy, arrays, extras=None):
    return SlicedReader(
        {rank: MappingReader(held) for rank, held in enumerate(cut(strategy, arrays, extras))}, strategy
    )


@settings(max_examples=150, deadline=None)
@given(case=cases(), data=st.data(), run=st.sampled_from([1, 16, 2**14]))
def test_merging_undoes_cutting_and_any_part_can_be_read(case, data, run):
    arrays, strategy = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxes, "RUN", run)  # 1 never reads more than asked for, 2**14 always reads whole rows
        reader = reader_of(strategy, arrays)
        assert_holds(reader, arrays)
        name = data.draw(st.sampled_from(sorted(arrays)))
        index = []
        for size in arrays[name].shape[: data.draw(st.integers(0, arrays[name].ndim))]:
            start = data.draw(st.integers(0, size - 1))
            index.append(start if data.draw(st.booleans()) else slice(start, data.draw(st.integers(start, size))))
        assert same(reader.read(name, tuple(index)), np.array(arrays[name][tuple(index)], order="C"))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), arrays_and_source=cases())
def test_cutting_anew_equals_cutting_the_whole(data, arrays_and_source):
    arrays, source = arrays_and_source
    devices = data.draw(st.sampled_from([1, 2, 4, 6]))
    target = {
        name: data.draw(layouts(devices).filter(lambda layout, name=name: layout.fault(arrays[name].shape) is None))
        for name in arrays
    }
    strategy = Strategy((target,), devices, "target")
    reader = reader_of(source, arrays)
    plan = plan_reshard(reader.infos, strategy)
    for rank, expected in enumerate(cut(strategy, arrays)):
        got = {part.info.name: reader.read(part.info.name, part.box) for part in plan.ranks[rank]}
        assert got.keys() == expected.keys()
        assert all(
            same(got[name], expected[name]) and got[name].shape == part.info.shape
            for name, part in zip(got, plan.ranks[rank], strict=True)
        )


@settings(max_examples=100, deadline=None)
@given(shape=st.lists(st.integers(1, 7), max_size=4), limit=st.integers(1, 60), seed=st.integers(0, 99))
def test_pieces_are_consecutive_and_small(shape, limit, seed):
    rng = np.random.default_rng(seed)
    array = np.arange(int(np.prod(shape)), dtype=np.int16).reshape(shape)
    box = tuple(slice(start := int(rng.integers(0, size)), int(rng.integers(start, size)) + 1) for size in shape)
    parts = [array[piece] for piece in pieces(box, 2, limit)]
    assert np.array_equal(np.concatenate([part.ravel() for part in parts]), array[box].ravel())
    assert all(part.nbytes <= max(limit, 2) for part in parts)


def test_narrow_columns_are_read_in_bounded_memory(monkeypatch):
    """One column of 1000 is read by whole rows, and no more than a piece of them at once."""
    monkeypatch.setattr(boxes, "PIECE", 64_000)
    array = np.arange(1_000_000, dtype=np.float32).reshape(1000, 1000)
    largest = []

    class Watched(MappingReader):
        def read(self, name, index=()):
            result = super().read(name, index)
            largest.append(result.nbytes)
            return result

    got = read_box(Watched({"a": array}), "a", (slice(0, 1000), slice(7, 8)))
    assert np.array_equal(got, array[:, 7:8])
    assert max(largest) <= 64_000 and len(largest) < 100


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_the_real_run_merges_from_files(tmp_path, suffix):
    strategy = read_strategy(PP2)
    arrays = golden_arrays(strategy.names(), ml_dtypes.bfloat16)
    extras = {"global_step": np.int32([7]), "learning_rate": np.float32([1e-4])}
    write_ranks(tmp_path, cut(strategy, arrays, extras), suffix)
    reader = open_sliced(tmp_path, PP2)
    assert_holds(reader, arrays | extras)
    assert reader.unlisted == tuple(extras)
    assert len(reader.absent) == 43 and all(name.startswith("accu_grads.") for name in reader.absent)
    reader.close()


def change(**changes):
    """Ranks of the real run, one of them changed: {rank: {name: array or None}}."""
    strategy = read_strategy(PP2)
    arrays = golden_arrays(strategy.names())
    ranks = cut(strategy, arrays, {"global_step": np.int32([7])})
    for key, edits in changes.items():
        held = ranks[int(key[1:])]
        for name, array in edits.items():
            held.pop(name, None)
            if array is not None:
                held[name] = array
    return strategy, ranks


WQ = "model.layers.0.attention.wq.weight"


@pytest.mark.parametrize(
    ("edits", "texts"),
    [
        (dict(r3={WQ: None}), [f"'{WQ}' is missing in rank_3"]),
        (dict(r3={WQ: None, "model.layers.1.ffn_norm.weight": None}), [WQ, "layers.1.ffn_norm", "2 problems"]),
        (dict(r3={"adam_m." + WQ: None}), [f"'adam_m.{WQ}' is missing in rank_3"]),
        (dict(r3={WQ: np.zeros((4, 31), np.float32)}), [f"'{WQ}' is", "(4, 32) in rank_0", "(4, 31) in rank_3"]),
        (dict(r3={WQ: np.zeros((4, 32), np.float16)}), [f"'{WQ}' is", "float16(4, 32) in rank_3"]),
        (dict(r3={"global_step": np.int32([8])}), ["'global_step' differs between rank_0 and rank_3"]),
        (dict(r3={"global_step": None}), ["'global_step' is in rank_0, not in rank_3"]),
        (dict(r9={WQ: np.zeros((4, 32), np.float32)}), [f"'{WQ}' is in rank_9", "other pipeline stages"]),
        ({f"r{rank}": {WQ: np.zeros(4, np.float32)} for rank in range(8)}, ["has 1 axes in rank_0", WQ]),
        ({f"r{rank}": {WQ: None} for rank in range(8)}, [f"'{WQ}' is missing in rank_0, 1, 2, 3, 4, 5, 6, 7"]),
    ],
)
def test_ranks_that_contradict_the_strategy_are_named(edits, texts):
    strategy, ranks = change(**edits)
    with pytest.raises(UserError) as error:
        SlicedReader({rank: MappingReader(held) for rank, held in enumerate(ranks)}, strategy)
    assert all(text in str(error.value) for text in texts), str(error.value)


def test_a_tensor_that_two_stages_share():
    """Tied embeddings: the first stage's parts are taken; stages of different shape are refused."""
    rows, columns = SliceLayout((4,), ((0,), ())), SliceLayout((2, 2), ((), (0,)))
    strategy = Strategy(({"tied": rows}, {"tied": columns}), 4, "drawn")
    arrays = {"tied": np.arange(64, dtype=np.float32).reshape(8, 8)}
    reader = reader_of(strategy, arrays)
    assert_holds(reader, arrays)
    reader.check_copies()
    plan = plan_reshard(reader.infos, strategy)
    assert [rank[0].info.shape for rank in plan.ranks] == [(2, 8)] * 4 + [(8, 4)] * 4
    held = cut(strategy, arrays)
    held[7]["tied"] = held[7]["tied"] + 1
    other = SlicedReader({rank: MappingReader(part) for rank, part in enumerate(held)}, strategy)
    with pytest.raises(UserError, match="'tied' differs between rank_5 and rank_7"):
        other.check_copies()
    for rank in range(4, 8):
        held[rank]["tied"] = held[rank]["tied"][:4]
    with pytest.raises(UserError, match=r"float32\(8, 8\) and float32\(4, 8\) in stages 0, 1"):
        SlicedReader({rank: MappingReader(part) for rank, part in enumerate(held)}, strategy)


def test_folders_that_do_not_hold_one_file_for_each_rank(tmp_path):
    strategy, ranks = change()
    write_ranks(tmp_path, ranks)

    def refused(*texts, strategy_dir=PP2, folder=tmp_path):
        with pytest.raises(UserError) as error:
            open_sliced(folder, strategy_dir)
        assert all(text in str(error.value) for text in texts), str(error.value)

    refused("16 ranks, the strategy describes 8", strategy_dir=DP4)
    (tmp_path / "rank_5").rename(tmp_path / "was_5")
    refused("rank_5 is missing, rank_15 is there")
    (tmp_path / "was_5").rename(tmp_path / "rank_5")
    (tmp_path / "rank_15").rename(tmp_path / "was_15")
    refused("15 ranks, the strategy describes 16; rank_15 is missing")
    (tmp_path / "was_15").rename(tmp_path / "rank_15")
    extra = tmp_path / "rank_2" / "mixtral_rank_2-4_2.ckpt"
    extra.write_bytes(b"x")
    refused("rank_2 holds 2 checkpoint files: mixtral_rank_2-3_2.ckpt, mixtral_rank_2-4_2.ckpt")
    extra.unlink()
    (tmp_path / "rank_2" / "mixtral_rank_2-3_2.ckpt").rename(tmp_path / "away.ckpt")
    refused("rank_2 holds no checkpoint file")
    for rank in range(16):
        (tmp_path / f"rank_{rank}").rename(tmp_path / f"was_{rank}")
    refused("holds one rank, strategy", "describes 16")
    (tmp_path / "away.ckpt").unlink()
    refused("holds neither rank folders")
    refused("does not exist", folder=tmp_path / "nowhere")


def test_every_tensor_of_both_sides_has_a_place():
    strategy = read_strategy(PP4)
    arrays = golden_arrays(read_strategy(PP2).names())
    infos = dict(MappingReader(arrays | {"global_step": np.int32([7])}).infos)
    plan = plan_reshard(infos, strategy)
    assert [sum(part.info.name == "global_step" for part in rank) for rank in plan.ranks] == [1] * 16
    assert {part.info.name for rank in plan.ranks for part in rank} == set(infos)
    assert [*plan.left] == ["state that the target strategy lists and the source lacks"]  # accu_grads

    without = {name: info for name, info in infos.items() if not name.startswith("adam_v.")}
    left = plan_reshard(without, strategy).left["state that the target strategy lists and the source lacks"]
    assert sum(name.startswith("adam_v.") for name in left) == 43
    weights = Strategy(
        tuple(
            {name: layout for name, layout in stage.items() if name.startswith(("model.", "lm_"))}
            for stage in strategy.stages
        ),
        strategy.devices,
        "without an optimizer",
    )
    left = plan_reshard(infos, weights).left["optimizer state, not in the target strategy"]
    assert len(left) == 2 * 43

    def refused(text, infos, **options):
        with pytest.raises(UserError, match=text):
            plan_reshard(infos, strategy, **options)

    stranger = TensorInfo("model.layers.9.x", (3, 4), np.dtype(np.float32))
    refused("1 tensors not in the target strategy: model.layers.9.x", infos | {stranger.name: stranger})
    for options in (dict(unlisted="copy"), dict(whole_on_ranks=frozenset([stranger.name]))):
        ranks = plan_reshard(infos | {stranger.name: stranger}, strategy, **options).ranks
        assert all(sum(part.info == stranger for part in rank) == 1 for rank in ranks)
    refused("1 tensors missing in the source: " + WQ, {name: infos[name] for name in infos if name != WQ})
    refused(r"shape \(33, 32\) cannot be cut", infos | {WQ: TensorInfo(WQ, (33, 32), np.dtype(np.float32))})
    refused(r"shape \(32,\) has 1 axes, its strategy 2", infos | {WQ: TensorInfo(WQ, (32,), np.dtype(np.float32))})


@pytest.mark.parametrize("slice_bytes", [7, 64, 10**6])
def test_writing_in_parts_gives_the_same_bytes(tmp_path, slice_bytes):
    array = np.arange(60, dtype=np.float32).reshape(4, 5, 3)
    info = TensorInfo("a", array.shape, array.dtype)
    parts = [array[piece] for piece in pieces(whole_box(array.shape), 4, 32)]
    for suffix, make in (
        (".ckpt", lambda path: CkptWriter(path, slice_bytes)),
        (".safetensors", lambda path: SafetensorsFileWriter(path, [info], {})),
    ):
        with make(tmp_path / f"one{suffix}") as writer:
            writer.add("a", array)
        with make(tmp_path / f"parts{suffix}") as writer:
            writer.add_parts(info, iter(parts))
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"parts{suffix}").read_bytes()
        for wrong in (parts[:-1], [*parts, parts[0]], [part.astype(np.int32) for part in parts]):
            with pytest.raises(ValueError, match="'a'"), make(tmp_path / f"wrong{suffix}") as writer:
                writer.add_parts(info, wrong)
    assert same(CkptFile(tmp_path / "parts.ckpt").read("a"), array)
    assert same(SafetensorsFile(tmp_path / "parts.safetensors").read("a"), array)
    assert sizes(whole_box(array.shape)) == array.shape
