# SPDX-License-Identifier: Apache-2.0
"""Fused experts of a Mixtral file seen as one matrix per expert: which rows are whose, and what is left alone."""

import numpy as np
import pytest

from mindformers_ext.formats.tensors import MappingReader
from mindformers_ext.jobs.checkpoint.fused import unfused

E, F, D = 4, 3, 5


@pytest.mark.parametrize("spelling", ["mlp", "block_sparse_moe"])
def test_every_expert_gets_its_own_rows(spelling):
    rng = np.random.default_rng(0)
    gate_up, down, router = (rng.normal(size=shape) for shape in ((E, 2 * F, D), (E, D, F), (E, D)))
    stem = f"model.layers.11.{spelling}."
    reader = unfused(
        MappingReader(
            {
                stem + "experts.gate_up_proj": gate_up,
                stem + "experts.down_proj": down,
                stem + "gate.weight": router,
                "model.norm.weight": router[0],
            }
        ),
        "mixtral",
    )
    assert len(reader.infos) == 3 * E + 2
    moe = "model.layers.11.block_sparse_moe."
    for index in ((), (1,), (slice(1, 3),), (slice(1, 3), slice(2, 4))):
        for e in range(E):
            for name, expected in (("w1", gate_up[e, :F]), ("w3", gate_up[e, F:]), ("w2", down[e])):
                name = f"{moe}experts.{e}.{name}.weight"
                assert reader.infos[name].shape == expected.shape
                np.testing.assert_array_equal(reader.read(name, index), expected[index])
        np.testing.assert_array_equal(reader.read(moe + "gate.weight", index), router[index])
    np.testing.assert_array_equal(reader.read("model.norm.weight", (slice(1, 3),)), router[0, 1:3])


def test_a_tensor_that_has_no_halves_keeps_its_name():
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert list(unfused(MappingReader({name: np.zeros((E, 2 * F + 1, D))}), "mixtral").infos) == [name]
