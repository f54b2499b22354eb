# SPDX-License-Identifier: Apache-2.0
"""Gates, scores and neurons of LLaMA-MoE v2 in three formats, and as the published programs write them with torch."""

from __future__ import annotations

import errno
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.experts.states import StateFile
from mindformers_ext.jobs.experts.v2 import layer_tables
from mindformers_ext.jobs.experts.v2.layer_tables import (
    GATES,
    INDICES,
    SCORES,
    SUFFIXES,
    LayerTable,
    beside_of,
    read_table,
    write_table,
)

DRAWS = np.random.default_rng(0)
LAYERS: dict[str, dict[int, dict[str, np.ndarray]]] = {
    GATES: {layer: {"gate": DRAWS.normal(size=(3, 5)).astype(np.float32)} for layer in (0, 2, 10)},
    SCORES: {layer: {str(c): DRAWS.random(7).astype(np.float32) for c in range(11)} for layer in range(2)},
    INDICES: {layer: {str(e): DRAWS.permutation(6)[:2] for e in range(12)} for layer in range(2)},
    "residual": {layer: {"residual": np.array([5, 1]), "0": np.array([3]), "1": np.array([2])} for layer in range(2)},
}


def test_a_table_stands_only_beside_what_tells_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(path: Path, *more: object) -> None:
        assert beside_of(path).is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(layer_tables, "write_tables", dies)
    with pytest.raises(KeyboardInterrupt):
        write_table(tmp_path / "file.pt", LayerTable(GATES, LAYERS[GATES]))
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_is_told_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = StateFile(tmp_path / "states.f32", 4, 2)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="states.f32"):
        file.write(range(1), np.zeros((1, 4, 2), np.float32))
    file.close()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", LAYERS)
def test_every_format_gives_back_what_was_written(name: str, suffix: str, tmp_path: Path) -> None:
    kind = name if name != "residual" else INDICES
    table = LayerTable(kind, LAYERS[name], {"model": "ab", "gate_weights": "cd"})
    path = tmp_path / f"file{suffix}"
    write_table(path, table)
    found = read_table(path, kind)
    assert found.digest == table.digest and {**found.about}["gate_weights"] == "cd"
    assert [*found.layers] == [*LAYERS[name]]
    for layer, arrays in LAYERS[name].items():
        assert found.layers[layer].keys() == arrays.keys()
        assert all(np.array_equal(found.layers[layer][part], array) for part, array in arrays.items())
    with pytest.raises(UserError, match="exists"):
        write_table(path, table)
    with pytest.raises(UserError, match="holds|expected"):
        read_table(path, next(other for other in (GATES, SCORES, INDICES) if other != kind))


def test_a_pt_is_what_the_published_programs_read(tmp_path: Path) -> None:
    for name, layers in LAYERS.items():
        write_table(tmp_path / f"{name}.pt", LayerTable(name if name != "residual" else INDICES, layers))
    gates, scores, shared, residual = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in LAYERS)
    assert gates[10].dtype == torch.float32 and gates[10].shape == (3, 5)
    assert [*scores[1]] == [*range(11)] and scores[1][10].tolist() == LAYERS[SCORES][1]["10"].tolist()
    assert shared[0][11] == LAYERS[INDICES][0]["11"].tolist() and len(shared[0]) == 12
    assert residual[1] == {"residual": [5, 1], 0: [3], 1: [2]}


def test_what_torch_saved_elsewhere_is_read(tmp_path: Path) -> None:
    path = tmp_path / "gates.pt"
    torch.save(OrderedDict({0: torch.ones(2, 3, dtype=torch.bfloat16), 1: torch.zeros(2, 3).double()}), path)
    table = read_table(path, GATES)
    assert table.layers[0]["gate"].tolist() == [[1.0] * 3] * 2 and not table.about
    torch.save({0: {0: torch.arange(3.0), 1: torch.zeros(3)}}, path)
    assert read_table(path, SCORES).layers[0]["0"].tolist() == [0, 1, 2]


class Runs:
    def __reduce__(self) -> Any:
        return os.getcwd, ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({0: Runs()}, "is refused"),
        ({0: torch.tensor([[1.0, float("nan")]])}, "NaN"),
        ({0: {0: torch.zeros(3)}}, "numbers of 2 dimension"),
        ({"a": torch.zeros(2, 2)}, "has a layer called 'a'"),
        ([torch.zeros(2, 2)], "holds no table of layers"),
        ({0: {0: {0: {0: {0: {}}}}}}, "not plain numbers"),
    ],
)
def test_what_is_no_such_file_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "gates.pt")
    with pytest.raises(UserError, match=said):
        read_table(tmp_path / "gates.pt", GATES)


def test_the_note_beside_must_be_of_the_file(tmp_path: Path) -> None:
    path, other = tmp_path / "gates.pt", LayerTable(GATES, {0: {"gate": np.zeros((2, 2), np.float32)}})
    write_table(path, LayerTable(GATES, LAYERS[GATES], {"model": "ab"}))
    noted = json.loads(beside_of(path).read_text())
    assert noted["kind"] == GATES and noted["model"] == "ab"
    table = read_table(path, GATES)
    table.check_made_from(model="ab", gate_weights="unknown there", scores=None)
    with pytest.raises(UserError, match="made from other model"):
        table.check_made_from(model="cd")
    torch.save({0: torch.tensor(other.layers[0]["gate"])}, path)
    with pytest.raises(UserError, match="tells of another file"):
        read_table(path, GATES)
