# SPDX-License-Identifier: Apache-2.0
"""The penalty that drives masks to their targets, of parameters that every device has whole; see ``ms.l0``."""

from __future__ import annotations

from collections.abc import Mapping

import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mindformers_ext.core.pruning import EPS, MODULES, ZERO_SHIFT, PruningSpec
from mindformers_ext.ms.strategies import Shards, of_one


class Lagrangian(nn.Cell):
    """The penalty (), see ``surgery.prune.lagrangian``.

    Args:
        spec: the masks.
        z_loga: their parameters by module.
        lambdas: multipliers by name.
        targets: of every pair of them.
        shards: the network's strategies.
    """

    def __init__(
        self,
        spec: PruningSpec,
        z_loga: Mapping[str, Parameter],
        lambdas: Mapping[str, Parameter],
        targets: Parameter,
        shards: Shards | None = None,
    ) -> None:
        super().__init__(auto_prefix=False)
        shards = shards or Shards()
        self.targets, self.count, self.by_module = targets, len(spec.pairs), spec.target is not None
        self.z_loga = ParameterTuple([z_loga[name] for name in spec.modules])
        layers = spec.source.num_hidden_layers
        parts = [_Part(name, spec, self.by_module) for name in spec.modules]
        sizes = [layers if MODULES[part.name][1] or not self.by_module else 1 for part in parts]
        self.parts = nn.CellList(
            [
                shards.local(part, "layer values" if MODULES[part.name][1] else "vector", of_one(size))
                for part, size in zip(parts, sizes, strict=True)
            ]
        )
        names = [spec.lambda_names(pair) for pair in spec.pairs]
        self.first = ParameterTuple([lambdas[first] for first, _ in names])
        self.second = ParameterTuple([lambdas[second] for _, second in names])
        self.terms = nn.CellList([shards.local(Term(place), "penalty", _one_number) for place in range(self.count)])
        self.add = shards.shard(P.Add(), "totals")
        self.stack = shards.shard_list(P.Stack(), "-", len(parts))
        self.overall = shards.local(Overall(spec), "layer values", of_one(1))

    def construct(self) -> Tensor:
        found: tuple = ()
        for place in range(len(self.parts)):
            found = found + (self.parts[place](self.z_loga[place]),)
        if not self.by_module:
            found = (self.overall(self.stack(found)),)
        total = self.term(found[0], 0)
        for place in range(1, self.count):
            total = self.add(total, self.term(found[place], place))
        return ops.reshape(total, ())

    def term(self, found: Tensor, place: int) -> Tensor:
        """The penalty (1) of one pair."""
        return self.terms[place](found, self.first[place], self.second[place], self.targets)


class Term(nn.Cell):
    """The penalty (1) of the pair ``place``: of expected sparsities (layers) or (1), its multipliers (1), and the
    targets of all pairs."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def construct(self, found: Tensor, first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
        gap = found - targets[self.place]
        return ops.reshape((first * gap + second * gap * gap).mean(), (1,))


class _Part(nn.Cell):
    """What the penalty takes of the parameters of a mask: their expected sparsity, (layers) or (1); or for the size of
    all weights the units of each layer that are left on average, or of masks of layers the scores, (layers)."""

    def __init__(self, name: str, spec: PruningSpec, sparsity: bool) -> None:
        super().__init__()
        self.name, self.sparsity = name, sparsity
        self.of_layers = MODULES[name][0] == "num_hidden_layers"
        self.layer_ones = Tensor(np.ones(spec.source.num_hidden_layers, np.float32))

    def construct(self, z_loga: Tensor) -> Tensor:
        score = 1.0 - ops.clip_by_value(ops.sigmoid(ZERO_SHIFT - z_loga), EPS, 1.0 - EPS)  # P(mask > 0)
        if self.sparsity:
            return ops.reshape(1.0 - score.mean(-1), (-1,))
        if self.of_layers:
            return score
        return score.sum(-1) * self.layer_ones


class Overall(nn.Cell):
    """Expected share (1) of the prunable weights that go, of what is left (modules, layers), see ``_Part``."""

    def __init__(self, spec: PruningSpec) -> None:
        super().__init__()
        source = spec.source
        self.place = {name: spec.modules.index(name) if name in spec.modules else -1 for name in MODULES}
        self.size = {
            "hidden": float(source.hidden_size),
            "head": float(source.num_key_value_heads),
            "kv_head": float(source.num_key_value_heads),
            "q_in_group": float(source.heads_per_group),
            "intermediate": float(source.intermediate_size),
        }
        self.keys = "head" if "head" in spec.modules else "kv_head"
        self.layer_ones = Tensor(np.ones(source.num_hidden_layers, np.float32))
        self.width = 2.0 * source.head_dim
        counted, prunable = spec.counted(), float(spec.prunable())
        self.shares = float(counted[0]) / prunable, float(counted[1]) / prunable

    def total(self, left: Tensor, name: str) -> Tensor:
        """Units of a layer that are left on average, (layers)."""
        if self.place[name] < 0:
            return self.layer_ones * self.size[name]
        return left[self.place[name]]

    def whole(self, left: Tensor, name: str) -> Tensor:
        """Scores of layers, (layers)."""
        return self.layer_ones if self.place[name] < 0 else left[self.place[name]]

    def construct(self, left: Tensor) -> Tensor:
        hiddens, kvs = self.total(left, "hidden"), self.total(left, self.keys)
        layers = self.whole(left, "layer") * hiddens
        attentions = self.width * kvs * (self.total(left, "q_in_group") + 1.0)
        mlps = 3.0 * self.total(left, "intermediate")
        attention = (attentions * layers * self.whole(left, "head_layer")).sum() * self.shares[0]
        return ops.reshape(1.0 - attention - (mlps * layers * self.whole(left, "mlp")).sum() * self.shares[1], (1,))


def _one_number(found: list, first: list, second: list, targets: list) -> list:
    return [1]
