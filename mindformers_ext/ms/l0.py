# SPDX-License-Identifier: Apache-2.0
"""Hard-concrete masks on a built network; ``pt.l0`` is the twin, and says what they are. Shapes are static.

A mask is sampled where it is used, from parameters that all places share: MindSpore's compiler finds the same
expression once.
"""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import DenseSpec
from mindformers_ext.core.pruning import (
    EPS,
    HIGH,
    LAMBDAS,
    LOGA_LIMITS,
    LOW,
    MASKS,
    NOISE,
    TARGETS,
    TEMPERATURE,
    VALUES,
    Z_LOGA,
    ZERO_SHIFT,
    PruningSpec,
)
from mindformers_ext.ms.attention import Linear
from mindformers_ext.ms.causal_lm import CausalLM, TokenEmbedding
from mindformers_ext.ms.norm import RmsNorm


class Held:
    """The parameters of all masks, by module, and the multipliers, by name."""

    def __init__(self, spec: PruningSpec) -> None:
        self.spec = spec
        self.z_loga: dict[str, Parameter] = {}
        self.noise: dict[str, Parameter] = {}
        self.values: dict[str, Parameter] = {}
        for name in spec.modules:
            shape = spec.source.mask_shape(name)
            at = f"{MASKS}{name}."
            self.z_loga[name] = _parameter(np.full(shape, LOGA_LIMITS[1]), at + Z_LOGA, True)
            self.noise[name] = _parameter(np.zeros(shape), at + NOISE)
            self.values[name] = _parameter(np.ones(shape), at + VALUES)
        names = [name for pair in spec.pairs for name in spec.lambda_names(pair)]
        self.lambdas = {name: _parameter(np.zeros(1), LAMBDAS + name, True) for name in names}
        self.targets = _parameter(np.zeros(len(spec.pairs)), TARGETS)

    def named(self) -> dict[str, Parameter]:
        """Every parameter by its name in the network."""
        parts = (self.z_loga, self.noise, self.values)
        found = {f"{MASKS}{name}.{end}": part[name] for part, end in zip(parts, (Z_LOGA, NOISE, VALUES), strict=True)
                 for name in part}  # fmt: skip
        return {**found, **{LAMBDAS + name: item for name, item in self.lambdas.items()}, TARGETS: self.targets}


def _parameter(value: np.ndarray, name: str, trained: bool = False) -> Parameter:
    return Parameter(Tensor(value.astype(np.float32)), name, requires_grad=trained)


class UnitMask(nn.Cell):
    """One mask, float32: sampled in training, the given values in evaluation. ``layer``: that one's part, None all."""

    def __init__(self, held: Held, name: str, layer: int | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.z_loga, self.noise, self.values = held.z_loga[name], held.noise[name], held.values[name]
        self.layer = layer

    def construct(self) -> Tensor:
        if not self.training:
            return self.values if self.layer is None else self.values[self.layer]
        loga, noise = self.z_loga, self.noise
        if self.layer is not None:
            loga, noise = loga[self.layer], noise[self.layer]
        stretched = ops.sigmoid((noise + loga) / TEMPERATURE) * (HIGH - LOW) + LOW
        return ops.clip_by_value(stretched, 0.0, 1.0)


class Kept(nn.Cell):
    """1 where a unit of a mask is left, else 0."""

    def __init__(self, mask: UnitMask) -> None:
        super().__init__(auto_prefix=False)
        self.mask = mask

    def construct(self) -> Tensor:
        return ops.stop_gradient(ops.cast(self.mask() != 0, ms.float32))


class HeadsMask(nn.Cell):
    """(H P): every query head's mask over its width."""

    def __init__(self, held: Held, layer: int) -> None:
        super().__init__(auto_prefix=False)
        source = held.spec.source
        self.groups, self.each = source.num_key_value_heads, source.heads_per_group
        self.whole = "head" in held.z_loga
        self.masks = nn.CellList(
            [UnitMask(held, name, layer) for name in ("head", "kv_head", "q_in_group") if name in held.z_loga]
        )
        self.both, self.by_group = len(self.masks) == 2, "kv_head" in held.z_loga
        self.ones_HP = Tensor(np.ones((source.num_attention_heads, source.head_dim), np.float32))
        self.group_ones = Tensor(np.ones((self.groups, self.each), np.float32))

    def construct(self) -> Tensor:
        first = self.masks[0]()
        if self.whole:
            z_H = first
        else:
            in_group = ops.reshape(first, (-1, 1)) if self.by_group else ops.reshape(first, (1, -1))
            if self.both:
                in_group = in_group * ops.reshape(self.masks[1](), (1, -1))
            z_H = ops.reshape(in_group * self.group_ones, (-1,))
        return ops.reshape(ops.reshape(z_H, (-1, 1)) * self.ones_HP, (-1,))


class OutputMask(nn.Cell):
    """(D) or (): the product of the masks of a half of a layer's output."""

    def __init__(self, masks: list[UnitMask]) -> None:
        super().__init__(auto_prefix=False)
        self.masks = nn.CellList(masks)

    def construct(self) -> Tensor:
        found = self.masks[0]()
        for mask in self.masks[1:]:
            found = found * mask()
        return found


class MaskedEmbedding(nn.Cell):
    """Rows of the table times a mask (D)."""

    def __init__(self, embedding: TokenEmbedding, mask: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.embedding_weight, self.gather, self.mask = embedding.embedding_weight, embedding.gather, mask

    def construct(self, ids_T: Tensor) -> Tensor:
        x_TD = self.gather(self.embedding_weight, ids_T, 0)
        return x_TD * ops.cast(self.mask(), x_TD.dtype)


class MaskedNorm(nn.Cell):
    """RMS normalisation over the hidden units that are left, times the mask. Input and output (T, D)."""

    def __init__(self, norm: RmsNorm, mask: UnitMask, eps: float, dtype: ms.Type) -> None:
        super().__init__(auto_prefix=False)
        self.weight, self.mask, self.eps, self.dtype = norm.weight, mask, eps, dtype
        self.one, self.product = Tensor(1.0, dtype), P.MatMul()

    def construct(self, x_TD: Tensor) -> Tensor:
        z_D = ops.cast(self.mask(), self.dtype)
        kept_D = ops.stop_gradient(ops.cast(z_D != 0, self.dtype))
        wide_TD = ops.cast(x_TD, self.dtype)
        square_T1 = self.product(wide_TD * wide_TD, ops.reshape(kept_D / ops.maximum(kept_D.sum(), self.one), (-1, 1)))
        y_TD = wide_TD * ops.rsqrt(square_T1 + self.eps) * (ops.cast(self.weight, self.dtype) * z_D)
        return ops.cast(y_TD, x_TD.dtype)


class MaskedLinear(nn.Cell):
    """The layer of what is masked before it, masked behind it; either may be None. Input (T, in), output (T, out)."""

    def __init__(self, linear: Linear, before: nn.Cell | None, after: nn.Cell | None) -> None:
        super().__init__(auto_prefix=False)
        self.linear = linear
        self.has_before, self.has_after = before is not None, after is not None
        self.masks = nn.CellList([mask for mask in (before, after) if mask is not None])

    def construct(self, x_TD: Tensor) -> Tensor:
        if self.has_before:
            x_TD = x_TD * ops.cast(self.masks[0](), x_TD.dtype)
        y_TD = self.linear(x_TD)
        if self.has_after:
            return y_TD * ops.cast(self.masks[-1](), y_TD.dtype)
        return y_TD


class Lagrangian(nn.Cell):
    """The penalty () that drives the masks to their targets, see ``surgery.prune.lagrangian``."""

    def __init__(self, held: Held) -> None:
        super().__init__(auto_prefix=False)
        spec = held.spec
        self.targets, self.pairs = held.targets, list(spec.pairs)
        self.scores = nn.CellList([Score(held.z_loga[name]) for name in spec.modules])
        names = [spec.lambda_names(pair) for pair in spec.pairs]
        self.first = ms.ParameterTuple([held.lambdas[first] for first, _ in names])
        self.second = ms.ParameterTuple([held.lambdas[second] for _, second in names])
        self.overall = nn.CellList([] if spec.target else [Overall(spec)])

    def construct(self) -> Tensor:
        scores: tuple = ()
        for score in self.scores:
            scores = scores + (score(),)
        if len(self.overall):
            return self.term(self.overall[0](scores), 0)
        total = self.term(1.0 - scores[0].mean(-1), 0)
        for place in range(1, len(self.pairs)):
            total = total + self.term(1.0 - scores[place].mean(-1), place)
        return total

    def term(self, found: Tensor, place: int) -> Tensor:
        """The penalty of one pair for expected sparsities (layers) or ()."""
        gap = found - self.targets[place]
        return (self.first[place] * gap + self.second[place] * gap * gap).mean()


class Score(nn.Cell):
    """P(mask > 0)."""

    def __init__(self, z_loga: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.z_loga = z_loga

    def construct(self) -> Tensor:
        return 1.0 - ops.clip_by_value(ops.sigmoid(ZERO_SHIFT - self.z_loga), EPS, 1.0 - EPS)


class Overall(nn.Cell):
    """Expected share of the prunable weights that go, () from the scores in the order of the modules."""

    def __init__(self, spec: PruningSpec) -> None:
        super().__init__(auto_prefix=False)
        source = spec.source
        self.place = {name: spec.modules.index(name) if name in spec.modules else -1 for name in _PARTS}
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

    def total(self, scores: tuple, name: str) -> Tensor:
        """Units of a layer that are left on average, (layers)."""
        if self.place[name] < 0:
            return self.layer_ones * self.size[name]
        return scores[self.place[name]].sum(-1) * self.layer_ones

    def whole(self, scores: tuple, name: str) -> Tensor:
        """Scores of layers, (layers)."""
        return self.layer_ones if self.place[name] < 0 else scores[self.place[name]]

    def construct(self, scores: tuple) -> Tensor:
        hiddens, kvs = self.total(scores, "hidden"), self.total(scores, self.keys)
        layers = self.whole(scores, "layer") * hiddens
        attentions = self.width * kvs * (self.total(scores, "q_in_group") + 1.0)
        mlps = 3.0 * self.total(scores, "intermediate")
        attention = (attentions * layers * self.whole(scores, "head_layer")).sum() * self.shares[0]
        return 1.0 - attention - (mlps * layers * self.whole(scores, "mlp")).sum() * self.shares[1]


_PARTS = ("hidden", "head", "kv_head", "q_in_group", "intermediate", "layer", "head_layer", "mlp")


def add_masks(network: CausalLM, spec: PruningSpec) -> Held:
    """Put the masks of ``spec`` into a dense network.

    Raises:
        UserError: a layer is a mixture of experts.
    """
    held, asked, model = Held(spec), {*spec.modules}, network.spec.model
    names = [(parameter, parameter.name) for parameter in network.get_parameters()]
    names += [(parameter, name) for name, parameter in held.named().items()]
    dtype = network.model.layers[0].attention_norm.norm_dtype if "hidden" in asked else None
    if "hidden" in asked:
        whole = UnitMask(held, "hidden")
        embedded = Kept(whole) if network.tied else whole
        network.model.tok_embeddings = MaskedEmbedding(network.model.tok_embeddings, embedded)
        network.model.norm_out = MaskedNorm(network.model.norm_out, whole, model.rms_norm_eps, dtype)
    for index, layer in enumerate(network.model.layers):
        if not isinstance(model.layer(index).feed_forward, DenseSpec):
            raise UserError(f"layer {index} is a mixture of experts: masks of experts are not built")
        if "hidden" in asked:
            for norm in ("attention_norm", "ffn_norm"):
                masked = MaskedNorm(getattr(layer, norm), UnitMask(held, "hidden"), model.rms_norm_eps, dtype)
                setattr(layer, norm, masked)
        heads = HeadsMask(held, index) if asked & {"head", "kv_head", "q_in_group"} else None
        inner = UnitMask(held, "intermediate", index) if "intermediate" in asked else None
        layer.attention.wo = MaskedLinear(layer.attention.wo, heads, _output(held, "head_layer", index))
        layer.feed_forward.w2 = MaskedLinear(layer.feed_forward.w2, inner, _output(held, "mlp", index))
    network.add_penalty(Lagrangian(held))
    for parameter, name in names:  # the parents put their own prefixes before them
        parameter.name = name
    return held


def _output(held: Held, half: str, layer: int) -> OutputMask | None:
    masks = [UnitMask(held, name, layer) for name in ("layer", half) if name in held.z_loga]
    masks += [UnitMask(held, "hidden")] if "hidden" in held.z_loga else []
    return OutputMask(masks) if masks else None
