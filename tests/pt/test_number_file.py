# SPDX-License-Identifier: Apache-2.0
"""Small files of torch.save: what is written is what torch reads by default; older ones are data, whatever they ask."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mindformers_ext.core.errors import UserError
from mindformers_ext.pt.number_file import read_numbers, write_numbers
from mindformers_ext.pt.pickle_values import read_values

VALUES = {
    "labels": [3, 0, 70000, 2] * 50,
    "lists": [[1, 2], [3]],
    "tensor": np.arange(6, dtype=np.float16).reshape(2, 3),
    "tensors by name": {"gate_network.0.weight": np.ones((2, 3), np.float32), "empty": np.zeros((0, 4))},
}


def equal(first: object, second: object) -> bool:
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[name], second[name]) for name in first)
    return np.array_equal(first, second) if isinstance(first, np.ndarray) else first == second


@pytest.mark.parametrize("name", VALUES)
def test_what_is_written_is_read_by_torchs_default_and_by_us(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "layers.0.weight", tmp_path / "another"
    write_numbers(first, VALUES[name])
    write_numbers(second, VALUES[name])
    assert first.read_bytes() == second.read_bytes()
    assert equal(read_numbers(first), VALUES[name]) and equal(read_numbers(first, allow_pickle=True), VALUES[name])
    loaded = torch.load(first)
    loaded = {n: t.numpy() for n, t in loaded.items()} if isinstance(loaded, dict) else loaded
    assert equal(loaded.numpy() if isinstance(loaded, torch.Tensor) else loaded, VALUES[name])


OLD = {
    "numpy numbers": ([np.int32(5), np.int64(-1), np.float64(2.5)], [5, -1, 2.5]),
    "array": (np.arange(6.0).reshape(2, 3).T, np.arange(6.0).reshape(2, 3).T),
    "view of a tensor": (torch.arange(12.0).reshape(3, 4)[1:, ::2].T, np.arange(12.0).reshape(3, 4)[1:, ::2].T),
    "bfloat16": ({"w": torch.tensor([1.5, -2], dtype=torch.bfloat16)}, {"w": np.array([1.5, -2])}),
    "parameter": (torch.nn.Linear(2, 1, bias=False).requires_grad_(False).state_dict(), None),
}


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_older_files_are_read_as_data(name: str, protocol: int, tmp_path: Path) -> None:
    value, expected = OLD[name]
    torch.save(value, tmp_path / "old", pickle_protocol=protocol)
    found = read_numbers(tmp_path / "old", allow_pickle=True)
    assert equal(found, {"weight": value["weight"].numpy()} if expected is None else expected)
    if protocol > 2 or "numpy" in name:
        with pytest.raises(UserError, match="--allow_pickle"):
            read_numbers(tmp_path / "old")


class Runs:
    ran = False

    def __reduce__(self) -> tuple:
        return _run, ()


def _run() -> None:
    Runs.ran = True


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("allow", [False, True])
def test_nothing_of_a_file_is_run(protocol: int, allow: bool, tmp_path: Path) -> None:
    torch.save([Runs()], tmp_path / "evil", pickle_protocol=protocol)
    with pytest.raises(UserError):
        read_numbers(tmp_path / "evil", allow)
    assert not Runs.ran


def test_a_file_that_is_damaged_or_claims_too_much_is_told(tmp_path: Path) -> None:
    (tmp_path / "none").write_bytes(b"1234")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps("text", 5))
    for name in ("none", "zip", "missing"):
        for allow in (False, True):
            with pytest.raises(UserError):
                read_numbers(tmp_path / name, allow)
    torch.save(torch.zeros(1).expand(4000, 4000), tmp_path / "wide")
    for allow in (False, True):
        with pytest.raises(UserError, match="less data than its shape needs"):
            read_numbers(tmp_path / "wide", allow)
    one = [0] * 5000
    torch.save([one] * 5000, tmp_path / "named often")
    with pytest.raises(UserError, match="more than"):
        read_numbers(tmp_path / "named often")


def test_damaged_pickles_give_values_or_a_users_error() -> None:
    draws, values, told = np.random.default_rng(0), 0, 0
    whole = [pickle.dumps(value, protocol) for value, _ in list(OLD.values())[:2] for protocol in (2, 5)]
    for turn in range(600):
        data = bytearray(whole[turn % len(whole)])
        for place in draws.integers(0, len(data), 1 + turn % 3):
            data[place] = draws.integers(256)
        end = draws.integers(1, len(data)) if turn % 5 == 0 else len(data)
        try:
            read_values(bytes(data[:end]), "file", lambda key: b"")
            values += 1
        except UserError as error:
            assert "'file' " in str(error)
            told += 1
    assert values > 20 and told > 400, "both are met"
