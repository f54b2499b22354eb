# SPDX-License-Identifier: Apache-2.0
"""Our .ckpt and .safetensors codecs against MindSpore's own load and save, both directions."""

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
import torch

from mindformers_ext.formats.ms_ckpt import CkptFile, CkptWriter
from mindformers_ext.formats.ms_file import CheckpointMeta, open_checkpoint, open_writer, read_meta
from mindformers_ext.formats.tensors import MappingReader

KINDS = {
    "float64": ms.float64,
    "float32": ms.float32,
    "float16": ms.float16,
    "bfloat16": ms.bfloat16,
    "int64": ms.int64,
    "int32": ms.int32,
    "int16": ms.int16,
    "int8": ms.int8,
    "uint64": ms.uint64,
    "uint32": ms.uint32,
    "uint16": ms.uint16,
    "uint8": ms.uint8,
    "bool": ms.bool_,
}


def numpy_type(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def arrays_of(name):
    rng = np.random.default_rng(3)
    kind = numpy_type(name)
    shapes = {"model.a.weight": (3, 4), "b": (7,), "scalar": (), "cube": (2, 3, 5), "one": (1,)}
    return {key: np.asarray(rng.normal(size=shape) * 9).astype(kind) for key, shape in shapes.items()}


def as_numpy(parameter):
    """MindSpore's own bfloat16 array is another registered type with the same bits."""
    if parameter.dtype == ms.bfloat16:
        return parameter.float().asnumpy().astype(ml_dtypes.bfloat16)
    return parameter.asnumpy()


def as_tensor(array):
    if array.dtype == ml_dtypes.bfloat16:
        return ms.Tensor(array.astype(np.float32)).astype(ms.bfloat16)
    return ms.Tensor(array)


def assert_same(left, right):
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert left.tobytes() == right.tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slice_bytes", [2**29, 8])
def test_mindspore_reads_ours(tmp_path, kind, slice_bytes):
    arrays = arrays_of(kind)
    path = tmp_path / "x.ckpt"
    with CkptWriter(path, slice_bytes) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
    loaded = ms.load_checkpoint(str(path))
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == KINDS[kind]
        assert_same(as_numpy(loaded[name]), array)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("crc", [False, True])
def test_we_read_mindspores(tmp_path, kind, crc):
    arrays = arrays_of(kind)
    path = tmp_path / "x.ckpt"
    ms.save_checkpoint([{"name": k, "data": as_tensor(v)} for k, v in arrays.items()], str(path), crc_check=crc)
    reader = CkptFile(path)
    assert reader.check_crc() is crc
    assert list(reader.infos) == list(arrays)
    for name, array in arrays.items():
        assert_same(reader.read(name), array)


def test_bytes_equal_mindspores_own(tmp_path):
    arrays = arrays_of("float32")
    ms.save_checkpoint([{"name": k, "data": as_tensor(v)} for k, v in arrays.items()], str(tmp_path / "theirs.ckpt"))
    with CkptWriter(tmp_path / "ours.ckpt") as writer:
        for name, array in arrays.items():
            writer.add(name, array)
    assert (tmp_path / "ours.ckpt").read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()


def test_tensors_that_mindspore_cuts_into_slices(tmp_path, monkeypatch):
    """MindSpore cuts at 512 MiB; its limit (in KiB) is lowered here, its code is what runs."""
    monkeypatch.setattr("mindspore.train.serialization.SLICE_SIZE", 1)
    array = np.arange(3000, dtype=np.float32).reshape(30, 100)
    path = tmp_path / "x.ckpt"
    ms.save_checkpoint(
        [{"name": "a", "data": ms.Tensor(array)}, {"name": "b", "data": ms.Tensor(array[:1])}], str(path)
    )
    reader = CkptFile(path)
    assert len(reader._tensors["a"].blocks) == 12
    assert_same(reader.read("a"), array)
    assert_same(reader.read("a", (7,)), array[7])
    assert_same(reader.read("b"), array[:1])


def test_a_training_checkpoint_with_counters_and_words(tmp_path):
    net = ms.nn.Dense(3, 2)
    path = tmp_path / "x.ckpt"
    extra = {
        "epoch_num": 4,
        "step_num": 17,
        "global_step": ms.Tensor([17], ms.int32),
        "loss_scale": 65536.0,
        "remark": "text of any length",
    }
    ms.save_checkpoint(net, str(path), append_dict=extra)
    reader = CkptFile(path)
    assert_same(reader.read("weight"), net.weight.asnumpy())
    assert reader.read("epoch_num") == 4 and reader.read("step_num") == 17
    assert reader.read("global_step").tolist() == [17] and reader.read("loss_scale") == 65536.0
    assert str(reader.read("remark").reshape(-1)[0]) == "text of any length"


def test_mindspore_reads_our_safetensors_and_we_read_its(tmp_path):
    meta = CheckpointMeta(config={"model_type": "llama"}, dtype="mixed", source="here")
    arrays = {
        f"{kind}.{name}": array
        for kind in ("float32", "float16", "bfloat16", "int32", "bool")
        for name, array in arrays_of(kind).items()
    }
    path = tmp_path / "x.safetensors"
    with open_writer(path, path.suffix, list(MappingReader(arrays).infos.values()), meta) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
    reader = open_checkpoint(path)
    assert read_meta(path, reader) == meta
    loaded = ms.load_checkpoint(str(path), format="safetensors")
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        assert_same(as_numpy(loaded[name]), array)
    theirs = tmp_path / "theirs.safetensors"
    ms.save_checkpoint([{"name": k, "data": v} for k, v in loaded.items()], str(theirs), format="safetensors")
    reader = open_checkpoint(theirs)
    assert read_meta(theirs, reader) is None
    for name, array in arrays.items():
        assert_same(reader.read(name), array)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "int64"])
def test_tensors_of_both_frameworks_are_sources(kind):
    array = arrays_of(kind)["cube"]
    theirs = torch.from_numpy(array.astype(np.float32)).to(getattr(torch, kind))
    theirs.requires_grad_(theirs.is_floating_point())
    reader = MappingReader({"torch": theirs, "numpy": array, "mindspore": as_tensor(array)})
    for name in ("torch", "numpy", "mindspore"):
        assert_same(reader.read(name), array)
