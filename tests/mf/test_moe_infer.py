# SPDX-License-Identifier: Apache-2.0
"""MindFormers' ``MoEInfer`` as second judge of our experts for inference.

It needs two kernels that no CPU has, GroupedMatmul (inside its feed-forward) and MoeFinalizeRouting: here they are the
formulas of their documentation. Its routing, sorting and weighting are its own.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindformers.modules.transformer import moe as theirs
from mindspore import Tensor, nn, ops

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.ms.moe.dropless import ChosenExperts, EveryExpert, SlicedExperts, SortedRows
from tests.helpers.moe_twin import GATE, HIDDEN, W1, W2, W3, layer_of, random_rows, random_weights

EXPERTS, CHOSEN = 5, 2


class GroupedFeedForward(nn.Cell):
    """SwiGLU of sorted rows, group by group, in GMM's layout (E, in, out)."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = (Tensor(weights[name].transpose(0, 2, 1).copy()) for name in (W1, W3, W2))

    def construct(self, rows: Tensor, ends: Tensor) -> Tensor:
        """(kN, D) and where each expert's rows end."""
        parts, start = [], 0
        for expert, end in enumerate(ends.asnumpy().tolist()):
            if end > start:
                x = rows[start:end]
                gate = ops.matmul(x, self.w1[expert])
                parts.append(ops.matmul(gate * ops.sigmoid(gate) * ops.matmul(x, self.w3[expert]), self.w2[expert]))
            start = end
        return ops.cat(parts)


class Finalize(nn.Cell):
    """out[t] = x1[t] + sum over j of scale[t, j] * (row[place[j * N + t]] + bias[expert[t, j]])."""

    def shard(self, *strategies: object) -> Finalize:
        """One device has nothing to cut."""
        return self

    def construct(
        self, rows: Tensor, x1: Tensor, x2: Tensor | None, bias: Tensor, scale: Tensor, place: Tensor, expert: Tensor
    ) -> Tensor:
        """As the kernel's inputs."""
        tokens = x1.shape[0]
        for j in range(scale.shape[1]):
            row = ops.gather(rows, place[j * tokens : (j + 1) * tokens], 0) + ops.gather(bias, expert[:, j], 0)
            x1 = x1 + scale[:, j : j + 1] * row
        return x1


@pytest.fixture
def moe_infer(monkeypatch: pytest.MonkeyPatch):
    """Builds MindFormers' layer from our weights."""
    monkeypatch.setattr(theirs, "MoeFinalizeRouting", Finalize)
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)

    def build(weights: dict[str, np.ndarray]) -> nn.Cell:
        config = theirs.MoEConfig(expert_num=EXPERTS, num_experts_chosen=CHOSEN, routing_policy="TopkRouterV2")
        cell = theirs.MoEInfer(GroupedFeedForward(weights), HIDDEN, config, theirs.default_moeparallel_config)
        for parameter in cell.router.get_parameters():
            if parameter.shape == weights[GATE].shape:
                parameter.set_data(Tensor(weights[GATE]))
        return cell

    yield build
    ms.set_context(mode=before)


@pytest.mark.parametrize("crowded", [False, True])
def test_our_experts_equal_moe_infer(moe_infer, crowded: bool) -> None:
    """In an ordinary load, and with all tokens at two experts and none at the other three."""
    weights, x = random_weights(EXPERTS, 4), random_rows(8)
    if crowded:
        x = np.abs(x) + 0.1
        weights[GATE][:] = np.array([0.0, -3.0, 2.0, 3.0, -2.0])[:, None]
    expected = moe_infer(weights)(Tensor(x)).asnumpy()
    assert expected.shape == x.shape and np.abs(expected).max() > 0.1
    for form, grouped in ((ChosenExperts, False), (EveryExpert, False), (SlicedExperts, False), (SortedRows, True)):
        spec = MoESpec(num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN, capacity_factor=0.0, use_gmm=grouped)
        cell = layer_of(spec)
        for parameter in cell.get_parameters():
            parameter.set_data(Tensor(weights[parameter.name]))
        cell.set_train(False)
        rows = x[:1] if form is ChosenExperts else x  # which takes one token
        found = form(cell)(Tensor(rows), Tensor(np.ones(len(rows), np.int32))).asnumpy()
        np.testing.assert_allclose(found, expected[: len(rows)], rtol=0, atol=1e-5, err_msg=form.__name__)
