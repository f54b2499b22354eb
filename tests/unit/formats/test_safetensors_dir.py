# SPDX-License-Identifier: Apache-2.0
"""Safetensors folders, with the safetensors library as the judge, and whole-or-nothing outputs."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mindformers_ext.core.byte_sizes import read_size
from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import fresh_file, fresh_folder
from mindformers_ext.formats.dtypes import TABLE
from mindformers_ext.formats.safetensors_dir import (
    INDEX,
    SINGLE,
    SafetensorsDir,
    SafetensorsDirWriter,
    split_shards,
)
from mindformers_ext.formats.safetensors_file import SafetensorsFile, SafetensorsFileWriter
from mindformers_ext.formats.tensors import MappingReader, TensorInfo


def tensors(dtype=np.float32):
    rng = np.random.default_rng(1)
    shapes = {"a": (3, 4), "b.weight": (5,), "scalar": (), "cube": (2, 6, 3), "empty": (0, 2)}
    return {name: np.asarray(rng.normal(size=shape) * 9).astype(dtype) for name, shape in shapes.items()}


def infos(arrays):
    return list(MappingReader(arrays).infos.values())


def write(folder, arrays, max_bytes=10**9):
    folder.mkdir(exist_ok=True)
    with SafetensorsDirWriter(folder, infos(arrays), max_bytes) as writer:
        for name, array in arrays.items():
            writer.add(name, array)


def assert_reads(reader, arrays):
    assert set(reader.infos) == set(arrays)
    for name, array in arrays.items():
        got = reader.read(name)
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.long)
def test_every_type_round_trips(tmp_path, row):
    arrays = tensors(row.numpy)
    write(tmp_path, arrays)
    assert_reads(SafetensorsDir(tmp_path), arrays)


@pytest.mark.parametrize("row", [row for row in TABLE if row.long != "bfloat16"], ids=lambda row: row.long)
def test_the_library_reads_ours_and_we_read_the_librarys(tmp_path, row):
    arrays = tensors(row.numpy)
    write(tmp_path / "ours", arrays)
    judged = load_file(tmp_path / "ours" / SINGLE)
    assert_reads(MappingReader(judged), arrays)
    (tmp_path / "theirs").mkdir()
    save_file(arrays, tmp_path / "theirs" / SINGLE, metadata={"format": "pt"})
    assert_reads(SafetensorsDir(tmp_path / "theirs"), arrays)


def test_metadata_and_mixed_types_stay_aligned(tmp_path):
    arrays = {"half": np.ones(3, np.float16), "flag": np.ones(1, bool), "double": np.ones(2), "bf": tensors()["a"]}
    arrays["bf"] = arrays["bf"].astype(ml_dtypes.bfloat16)[:, :3].copy()
    write(tmp_path, arrays)
    file = SafetensorsFile(tmp_path / SINGLE)
    assert file.metadata == {"format": "pt"}
    raw = (tmp_path / SINGLE).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    for name, array in arrays.items():
        assert (start + header[name]["data_offsets"][0]) % array.dtype.itemsize == 0
    with safe_open(tmp_path / SINGLE, framework="numpy") as judge:
        assert set(judge.keys()) == set(arrays)
        np.testing.assert_array_equal(judge.get_tensor("double"), arrays["double"])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_parts_equal_numpys(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("parts")
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    array = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    write(folder, {"x": array})
    index = []
    for size in shape[: data.draw(st.integers(0, len(shape)))]:
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start, size))
        index.append(data.draw(st.sampled_from([start, slice(start, stop), slice(None)])))
    np.testing.assert_array_equal(SafetensorsDir(folder).read("x", tuple(index)), array[tuple(index)])


def test_shards_and_index(tmp_path):
    arrays = {f"t{i}": np.full((4,), i, np.float32) for i in range(5)}
    write(tmp_path, arrays, max_bytes=33)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 80 and index["weight_map"]["t4"] == names[2]
    assert_reads(SafetensorsDir(tmp_path), arrays)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=30), limit=st.integers(1, 40))
def test_shards_hold_everything_in_order_and_no_more_than_asked(sizes, limit):
    targets = [TensorInfo(f"t{i}", (size,), np.dtype("u1")) for i, size in enumerate(sizes)]
    shards = split_shards(targets, limit)
    assert [info for shard in shards for info in shard] == targets
    assert all(len(shard) == 1 or sum(info.nbytes for info in shard) <= limit for shard in shards)


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("2GiB", 2**31), ("500 mb", 5 * 10**8), ("12", 12)])
def test_sizes(text, size):
    assert read_size(text, "--max_shard_size", bare=True) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5 parsecs", "5IB", "1e3"])
def test_wrong_sizes(text):
    with pytest.raises(UserError, match="5GB"):
        read_size(text, "--max_shard_size", bare=True)


def sharded(folder):
    write(folder, {f"t{i}": np.full((4,), i, np.float32) for i in range(5)}, max_bytes=33)
    return folder / "model-00002-of-00003.safetensors"


def test_missing_and_cut_shards_are_named_together(tmp_path):
    middle = sharded(tmp_path)
    os.truncate(middle, middle.stat().st_size - 1)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="2 problems") as error:
        SafetensorsDir(tmp_path)
    assert middle.name in str(error.value) and "model-00003-of-00003.safetensors" in str(error.value)


def test_shards_of_another_model(tmp_path):
    middle = sharded(tmp_path)
    save_file({"t2": np.zeros(4, np.float32), "stranger": np.zeros(4, np.float32)}, middle)
    with pytest.raises(UserError) as error:
        SafetensorsDir(tmp_path)
    assert "'t3' is not in " + middle.name in str(error.value) and "'stranger'" in str(error.value)
    save_file({"t0": np.zeros(4, np.float32)}, middle)
    with pytest.raises(UserError, match="'t0' is in .*00001.* and in .*00002"):
        SafetensorsDir(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["x"]}}',
    ],
)
def test_broken_index(tmp_path, index):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(UserError, match="index"):
        SafetensorsDir(tmp_path)


def test_folders_without_usable_weights(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        SafetensorsDir(tmp_path / "none")
    with pytest.raises(UserError, match="no safetensors weights: "):
        SafetensorsDir(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="safe_serialization"):
        SafetensorsDir(tmp_path)
    for name in ("x.safetensors", "y.safetensors"):
        save_file({name: np.zeros(1)}, tmp_path / name)
    with pytest.raises(UserError, match="2 safetensors files but no"):
        SafetensorsDir(tmp_path)
    (tmp_path / "y.safetensors").unlink()
    assert set(SafetensorsDir(tmp_path).infos) == {"x.safetensors"}
    save_file({"z": np.zeros(1)}, tmp_path / SINGLE)
    (tmp_path / INDEX).write_text('{"weight_map": {"x.safetensors": "x.safetensors"}}')
    with pytest.raises(UserError, match="holds both"):
        SafetensorsDir(tmp_path)


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(shape=(2,), kind="F32", offsets=(0, 8)):
    return {"dtype": kind, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header, data",
    [
        (b"", b""),
        (b"[1]", b""),
        (b"\xff\xfe", b""),
        (b'{"a": 1}', b""),
        (b'{"a":{},"a":{}}', b""),
        (b"[" * 5000, b""),
        ({"a": entry()}, b"1234567"),
        ({"a": entry()}, b"123456789"),
        ({"a": entry(offsets=(1, 9))}, b"123456789"),
        ({"a": entry((2**40, 2**40))}, b"12345678"),
        ({"a": entry((-2,))}, b"12345678"),
        ({"a": entry((True, 2))}, b"12345678"),
        ({"a": entry(kind="F8_E4M3", shape=(8,))}, b"12345678"),
        ({"a": entry(offsets=(8, 0))}, b"12345678"),
        ({"a": entry(), "b": entry()}, b"12345678"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, b"123456789012"),
        ({"__metadata__": {"format": 1}, "a": entry()}, b"12345678"),
        ({"a": entry(offsets=(0, 8, 9))}, b"12345678"),
    ],
)
def test_broken_files_are_user_errors(tmp_path, header, data):
    path = tmp_path / "x.safetensors"
    raw_file(path, header, data)
    with pytest.raises(UserError, match="x.safetensors"):
        SafetensorsFile(path)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / SINGLE
    write(tmp_path, tensors())
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            SafetensorsFile(path)
    path.write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    with pytest.raises(UserError, match="header of 4611686018427387904 bytes"):
        SafetensorsFile(path)


def test_a_file_cut_after_opening(tmp_path):
    write(tmp_path, tensors())
    reader = SafetensorsDir(tmp_path)
    os.truncate(tmp_path / SINGLE, 200)
    with pytest.raises(UserError, match="cut while being read"):
        [reader.read(name) for name in reader.infos]
    reader.close()
    reader.close()


def test_the_writer_holds_its_caller_to_the_announcement(tmp_path):
    arrays = tensors()
    with pytest.raises(ValueError, match="were not written"):
        with SafetensorsFileWriter(tmp_path / "x", infos(arrays), {}) as writer:
            writer.add("a", arrays["a"])
    with SafetensorsFileWriter(tmp_path / "y", infos({"a": arrays["a"]}), {}) as writer:
        with pytest.raises(ValueError, match="announced as float32"):
            writer.add("a", arrays["a"].astype(np.float16))
        with pytest.raises(KeyError):
            writer.add("a", arrays["a"])
        writer._waiting.clear()
    with pytest.raises(ValueError, match="twice"):
        SafetensorsFileWriter(tmp_path / "z", infos({"a": arrays["a"]}) * 2, {})


def test_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "out.ckpt"
    with pytest.raises(RuntimeError), fresh_file(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    (target.parent / ".out.ckpt.0123456789ab.partial").write_text("left by a killed run, longer than the new text")
    with fresh_file(target) as partial:
        partial.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole" and list(target.parent.iterdir()) == [target]
    with pytest.raises(UserError, match="exists.*--overwrite"), fresh_file(target):
        pass
    with fresh_file(target, overwrite=True) as partial:
        assert target.read_text() == "whole"
        partial.write_text("new")
        with pytest.raises(UserError, match="written by another process"), fresh_file(target, overwrite=True):
            pass
    assert target.read_text() == "new"
    with pytest.raises(UserError, match="is a folder"), fresh_file(tmp_path):
        pass


def test_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "hf"
    with pytest.raises(RuntimeError), fresh_folder(target) as partial:
        (partial / "a").write_text("half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    dead = target.parent / ".hf.0123456789ab.partial"
    dead.mkdir()
    (dead / "stale").write_text("left by a killed run")
    target.mkdir()  # an empty folder is no obstacle
    with fresh_folder(target) as partial:
        (partial / "a").write_text("whole")
    assert [path.name for path in target.iterdir()] == ["a"] and list(target.parent.iterdir()) == [target]
    with pytest.raises(UserError, match="exists"), fresh_folder(target):
        pass
    with pytest.raises(RuntimeError), fresh_folder(target, overwrite=True) as partial:
        raise RuntimeError
    assert (target / "a").read_text() == "whole"
    with fresh_folder(target, overwrite=True) as partial:
        (partial / "b").write_text("new")
        with pytest.raises(UserError, match="written by another process"), fresh_folder(target, overwrite=True):
            pass
    assert [path.name for path in target.iterdir()] == ["b"] and list(target.parent.iterdir()) == [target]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"), fresh_folder(tmp_path / "file"):
        pass
