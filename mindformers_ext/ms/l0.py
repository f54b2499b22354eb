# SPDX-License-Identifier: Apache-2.0
"""Hard-concrete masks on a built network; ``pt.l0`` is the twin, and says what they are. Shapes are static.

A mask is sampled where it is used, from parameters that all places share: MindSpore's compiler finds the same
expression once. On many devices every device has the parameters of all masks whole, samples the same mask, and
multiplies its own slice by its own part of it; gradients are summed as those of other weights are.
"""

from __future__ import annotations

from collections.abc import Iterable

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import DenseSpec
from mindformers_ext.core.pruning import (
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
    PruningSpec,
)
from mindformers_ext.ms.attention import Linear
from mindformers_ext.ms.causal_lm import CausalLM, TokenEmbedding
from mindformers_ext.ms.lagrangian import Lagrangian
from mindformers_ext.ms.norm import RmsNorm
from mindformers_ext.ms.strategies import Shards, of_one, of_two


class Held:
    """The parameters of all masks, by module, and the multipliers, by name; on every device whole."""

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
    # whole in the optimizer too: a hook reads and sets it between steps
    return Parameter(Tensor(value.astype(np.float32)), name, requires_grad=trained, parallel_optimizer=False)


class OfLayer(nn.Cell):
    """What a layer takes of numbers (L, units) or (L): (units) or (1). ``layer`` None: all of them."""

    def __init__(self, layer: int | None) -> None:
        super().__init__()
        self.layer = layer

    def construct(self, numbers: Tensor) -> Tensor:
        if self.layer is None:
            return numbers
        if numbers.ndim == 1:
            return numbers[self.layer : self.layer + 1]
        return numbers[self.layer]


class Sampled(nn.Cell):
    """A mask of its parameters and this step's noise, see ``surgery.prune.hard_concrete.sample``."""

    def __init__(self, layer: int | None) -> None:
        super().__init__()
        self.part = OfLayer(layer)

    def construct(self, loga: Tensor, noise: Tensor) -> Tensor:
        stretched = ops.sigmoid((self.part(noise) + self.part(loga)) / TEMPERATURE) * (HIGH - LOW) + LOW
        return ops.clip_by_value(stretched, 0.0, 1.0)


class UnitMask(nn.Cell):
    """One mask, float32: sampled in training, the given values in evaluation. ``layer``: that one's part, None all."""

    def __init__(self, held: Held, name: str, layer: int | None = None, shards: Shards | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.z_loga, self.noise, self.values = held.z_loga[name], held.noise[name], held.values[name]
        shards, shape = shards or Shards(), self.z_loga.shape
        units = shape[-1] if layer is None or len(shape) == 2 else 1
        rows = ("layer mask", "layer values") if len(shape) == 2 else ("vectors", "vector")
        self.sampled = shards.local(Sampled(layer), rows[0], of_two(units))
        self.given = shards.local(OfLayer(layer), rows[1], of_one(units))

    def construct(self) -> Tensor:
        if self.training:
            return self.sampled(self.z_loga, self.noise)
        return self.given(self.values)


class Kept(nn.Cell):
    """1 where a unit of a mask is left, else 0."""

    def __init__(self, mask: UnitMask, shards: Shards) -> None:
        super().__init__(auto_prefix=False)
        self.mask, self.kept = mask, shards.local(NonZero(), "vector")

    def construct(self) -> Tensor:
        return self.kept(self.mask())


class NonZero(nn.Cell):
    """1.0 where a number is not 0, else 0.0; no gradient passes."""

    def construct(self, z: Tensor) -> Tensor:
        return ops.stop_gradient(ops.cast(z != 0, ms.float32))


class HeadsMask(nn.Cell):
    """(H P): every query head's mask over its width."""

    def __init__(self, held: Held, layer: int, shards: Shards) -> None:
        super().__init__(auto_prefix=False)
        names = [name for name in ("head", "kv_head", "q_in_group") if name in held.z_loga]
        self.masks = nn.CellList([UnitMask(held, name, layer, shards) for name in names])
        self.both = len(names) == 2
        source = held.spec.source
        width = source.num_attention_heads * source.head_dim
        shape = of_two(width) if self.both else of_one(width)
        self.spread = shards.local(SpreadHeads(held.spec, names[0]), "vectors" if self.both else "vector", shape)

    def construct(self) -> Tensor:
        if self.both:
            return self.spread(self.masks[0](), self.masks[1]())
        return self.spread(self.masks[0]())


class SpreadHeads(nn.Cell):
    """(H P) of a mask of heads, of groups (``first`` "kv_head"), of the heads in one, or of both."""

    def __init__(self, spec: PruningSpec, first: str) -> None:
        super().__init__()
        source = spec.source
        self.whole, self.by_group = first == "head", first == "kv_head"
        self.ones_HP = Tensor(np.ones((source.num_attention_heads, source.head_dim), np.float32))
        self.group_ones = Tensor(np.ones((source.num_key_value_heads, source.heads_per_group), np.float32))

    def construct(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        if self.whole:
            z_H = first
        else:
            in_group = ops.reshape(first, (-1, 1)) if self.by_group else ops.reshape(first, (1, -1))
            if second is not None:
                in_group = in_group * ops.reshape(second, (1, -1))
            z_H = ops.reshape(in_group * self.group_ones, (-1,))
        return ops.reshape(ops.reshape(z_H, (-1, 1)) * self.ones_HP, (-1,))


class OutputMask(nn.Cell):
    """(D) or (1): the masks of a half of a layer's output, one or two, multiplied."""

    def __init__(self, masks: list[UnitMask], shards: Shards) -> None:
        super().__init__(auto_prefix=False)
        self.masks, self.both = nn.CellList(masks), len(masks) == 2
        self.product = shards.local(Product(), "vectors", _second)

    def construct(self) -> Tensor:
        if self.both:
            return self.product(self.masks[0](), self.masks[1]())
        return self.masks[0]()


class Product(nn.Cell):
    """x z, in the type of x."""

    def construct(self, x: Tensor, z: Tensor) -> Tensor:
        return x * ops.cast(z, x.dtype)


class MaskedEmbedding(nn.Cell):
    """Rows of the table times a mask (D)."""

    def __init__(self, embedding: TokenEmbedding, mask: nn.Cell, shards: Shards) -> None:
        super().__init__(auto_prefix=False)
        self.embedding_weight, self.gather, self.mask = embedding.embedding_weight, embedding.gather, mask
        self.times = shards.local(Product(), "masked rows")

    def construct(self, ids_T: Tensor) -> Tensor:
        return self.times(self.gather(self.embedding_weight, ids_T, 0), self.mask())


class MaskedNorm(nn.Cell):
    """RMS normalisation over the hidden units that are left, times the mask. Input and output (T, D)."""

    def __init__(self, norm: RmsNorm, mask: UnitMask, eps: float, shards: Shards) -> None:
        super().__init__(auto_prefix=False)
        self.weight, self.mask = norm.weight, mask
        self.norm = shards.local(KeptRms(eps, norm.norm_dtype), "masked norm")

    def construct(self, x_TD: Tensor) -> Tensor:
        return self.norm(x_TD, self.weight, self.mask())


class KeptRms(nn.Cell):
    """The computation of ``MaskedNorm``: x (T, D), weight (D) and mask (D); the mean is over the D that are not 0."""

    def __init__(self, eps: float, dtype: ms.Type) -> None:
        super().__init__()
        self.eps, self.dtype = eps, dtype
        self.one, self.product = Tensor(1.0, dtype), P.MatMul()

    def construct(self, x_TD: Tensor, weight: Tensor, mask_D: Tensor) -> Tensor:
        z_D = ops.cast(mask_D, self.dtype)
        kept_D = ops.stop_gradient(ops.cast(z_D != 0, self.dtype))
        wide_TD = ops.cast(x_TD, self.dtype)
        square_T1 = self.product(wide_TD * wide_TD, ops.reshape(kept_D / ops.maximum(kept_D.sum(), self.one), (-1, 1)))
        y_TD = wide_TD * ops.rsqrt(square_T1 + self.eps) * (ops.cast(weight, self.dtype) * z_D)
        return ops.cast(y_TD, x_TD.dtype)


class MaskedLinear(nn.Cell):
    """The layer of what is masked before it, masked behind it; either may be None. Input (T, in), output (T, out)."""

    def __init__(self, linear: Linear, before: nn.Cell | None, after: nn.Cell | None, shards: Shards) -> None:
        super().__init__(auto_prefix=False)
        self.linear = linear
        self.has_before, self.has_after = before is not None, after is not None
        self.masks = nn.CellList([mask for mask in (before, after) if mask is not None])
        self.times_in = shards.local(Product(), "masked columns")
        self.times_out = shards.local(Product(), "masked rows")

    def construct(self, x_TD: Tensor) -> Tensor:
        if self.has_before:
            x_TD = self.times_in(x_TD, self.masks[0]())
        y_TD = self.linear(x_TD)
        if self.has_after:
            return self.times_out(y_TD, self.masks[-1]())
        return y_TD


def add_masks(network: CausalLM, spec: PruningSpec) -> Held:
    """Put the masks of ``spec`` into a dense network.

    Raises:
        UserError: a layer is a mixture of experts.
    """
    held, asked, model, shards = Held(spec), {*spec.modules}, network.spec.model, Shards(network.spec)
    names = [(parameter, parameter.name) for parameter in network.get_parameters()]
    names += [(parameter, name) for name, parameter in held.named().items()]
    last = shards.stages - 1

    def masked_norm(norm: RmsNorm) -> MaskedNorm:
        return MaskedNorm(norm, UnitMask(held, "hidden", None, shards), model.rms_norm_eps, shards)

    if "hidden" in asked:
        whole = UnitMask(held, "hidden", None, shards)
        embedded = Kept(whole, shards) if network.tied else whole
        embedding = MaskedEmbedding(network.model.tok_embeddings, embedded, shards)
        network.model.tok_embeddings = shards.stage(embedding, 0)
        network.model.norm_out = shards.stage(masked_norm(network.model.norm_out), last)
    for index, layer in enumerate(network.model.layers):
        if not isinstance(model.layer(index).feed_forward, DenseSpec):
            raise UserError(f"layer {index} is a mixture of experts: masks of experts are not built")
        if "hidden" in asked:
            layer.attention_norm, layer.ffn_norm = masked_norm(layer.attention_norm), masked_norm(layer.ffn_norm)
        heads = HeadsMask(held, index, shards) if asked & {"head", "kv_head", "q_in_group"} else None
        inner = UnitMask(held, "intermediate", index, shards) if "intermediate" in asked else None
        attended, fed = (_output(held, half, index, shards) for half in ("head_layer", "mlp"))
        layer.attention.wo = MaskedLinear(layer.attention.wo, heads, attended, shards)
        layer.feed_forward.w2 = MaskedLinear(layer.feed_forward.w2, inner, fed, shards)
    network.add_penalty(shards.stage(Lagrangian(spec, held.z_loga, held.lambdas, held.targets, shards), last))
    for parameter, name in names:  # the parents put their own prefixes before them
        parameter.name = name
    return held


def climbing(parameters: Iterable[Parameter]) -> dict[str, int]:
    """-1 by the name of each that climbs the loss: the multipliers."""
    return {item.name: -1 for item in parameters if item.name.startswith(LAMBDAS)}


def _output(held: Held, half: str, layer: int, shards: Shards) -> OutputMask | None:
    masks = [UnitMask(held, name, layer, shards) for name in ("layer", half) if name in held.z_loga]
    masks += [UnitMask(held, "hidden", None, shards)] if "hidden" in held.z_loga else []
    return OutputMask(masks, shards) if masks else None


def _second(a: list, b: list) -> list:
    return b
