# SPDX-License-Identifier: Apache-2.0
"""Hard-concrete masks on a built network: a mask is data that a layer multiplies by; names are those of ``ms.l0``.

In training masks are sampled from their parameters and given noise, in evaluation they are the given ``values``.
Where nothing is pruned a network has none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import DenseSpec
from mindformers_ext.core.pruning import EPS, HIGH, LOGA_LIMITS, LOW, TEMPERATURE, ZERO_SHIFT, PruningSpec
from mindformers_ext.pt.causal_lm import CausalLM, TokenEmbedding
from mindformers_ext.pt.feed_forward import SwiGlu
from mindformers_ext.pt.linear import Linear
from mindformers_ext.pt.norm import RmsNorm

Factor = Callable[[], Tensor]


class UnitMask(nn.Module):
    """The parameter of one mask, the noise of this step, and the values of evaluation; all of one shape, float32."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.z_loga = nn.Parameter(torch.full(shape, LOGA_LIMITS[1]))
        self.register_buffer("noise", torch.zeros(shape))
        self.register_buffer("values", torch.ones(shape))

    def forward(self) -> Tensor:
        """The mask, see ``surgery.prune.hard_concrete.sample``."""
        if not self.training:
            return self.get_buffer("values")
        y = torch.sigmoid((self.get_buffer("noise") + self.z_loga) / TEMPERATURE)
        return (LOW + (HIGH - LOW) * y).clamp(0.0, 1.0)

    def score(self) -> Tensor:
        """P(mask > 0)."""
        return 1.0 - torch.sigmoid(ZERO_SHIFT - self.z_loga).clamp(EPS, 1.0 - EPS)


class L0Masks(nn.Module):
    """All masks of a network, what they multiply, and the penalty that drives them to the target.

    ``draw`` makes the masks of one forward pass; the factors read them. ``forward``: the Lagrangian ().
    """

    def __init__(self, spec: PruningSpec) -> None:
        super().__init__()
        self.spec = spec
        self.masks = nn.ModuleDict({name: UnitMask(spec.source.mask_shape(name)) for name in spec.modules})
        names = [name for pair in spec.pairs for name in spec.lambda_names(pair)]
        self.lambdas = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in names})
        self.register_buffer("targets", torch.zeros(len(spec.pairs)))
        self.drawn: dict[str, Tensor] = {}

    def draw(self) -> None:
        """The masks of this pass, from here on the same for every layer, recomputed or not."""
        self.drawn = {name: mask() for name, mask in self.masks.items()}

    def of_layer(self, name: str, layer: int) -> Tensor:
        """(units), or of whole layers ()."""
        return self.drawn[name][layer]

    def hidden(self) -> Tensor:
        """(D)."""
        return self.drawn["hidden"]

    def kept(self) -> Tensor:
        """(D): 1 where a hidden unit is left."""
        return (self.drawn["hidden"] != 0).float()

    def heads(self, layer: int) -> Tensor:
        """(H P): every query head's mask over its width."""
        source = self.spec.source
        if "head" in self.drawn:
            z_H = self.of_layer("head", layer)
        else:
            device = next(iter(self.drawn.values())).device
            kv = self.drawn.get("kv_head"), source.num_key_value_heads
            queries = self.drawn.get("q_in_group"), source.heads_per_group
            z_N, own = (torch.ones(n, device=device) if z is None else z[layer] for z, n in (kv, queries))
            z_H = (z_N[:, None] * own[None]).reshape(-1)
        return z_H.repeat_interleave(source.head_dim)

    def output(self, half: str, layer: int) -> Tensor:
        """(D) or (): what attention ("head_layer") or the feed-forward part ("mlp") is multiplied by."""
        found = [self.of_layer(name, layer) for name in ("layer", half) if name in self.drawn]
        found += [self.drawn["hidden"]] if "hidden" in self.drawn else []
        return found[0] if len(found) == 1 else found[0] * found[1]

    def forward(self) -> Tensor:
        """See ``surgery.prune.lagrangian``."""
        scores = {name: mask.score() for name, mask in self.masks.items()}
        targets = self.get_buffer("targets")
        total = targets.new_zeros(())
        for place, pair in enumerate(self.spec.pairs):
            found = 1.0 - scores[pair].mean(-1) if pair else self.overall(scores)
            first, second = (self.lambdas[name] for name in self.spec.lambda_names(pair))
            gap = found - targets[place]
            total = total + (first * gap + second * gap * gap).mean()
        return total

    def overall(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Expected share of the prunable weights that go, ()."""
        source, ones = self.spec.source, torch.ones(self.spec.source.num_hidden_layers)
        ones = ones.to(next(iter(scores.values())).device)

        def total(name: str, size: int) -> Tensor:
            return scores[name].sum(-1) * ones if name in scores else size * ones

        hidden = scores["hidden"].sum() if "hidden" in scores else float(source.hidden_size)
        kv = total("head" if "head" in scores else "kv_head", source.num_key_value_heads)
        queries = kv * total("q_in_group", source.heads_per_group)
        whole = scores.get("layer", ones)
        attention = 2.0 * hidden * source.head_dim * (queries + kv) * scores.get("head_layer", ones) * whole
        mlp = 3.0 * hidden * total("intermediate", source.intermediate_size) * scores.get("mlp", ones) * whole
        counted = self.spec.counted()
        return 1.0 - (counted[0] * attention.sum() + counted[1] * mlp.sum()) / self.spec.prunable()


class MaskedEmbedding(nn.Module):
    """Rows of the table times the hidden mask; draws the masks, for it is computed first.

    A tied head reads the same table, which can be cut but not scaled: then a unit that is left counts as 1.
    """

    def __init__(self, embedding: TokenEmbedding, draw: Callable[[], None], factor: Factor | None) -> None:
        super().__init__()
        self.embedding_weight, self.draw, self.factor = embedding.embedding_weight, draw, factor

    def forward(self, ids_T: Tensor) -> Tensor:
        self.draw()
        x_TD = F.embedding(ids_T, self.embedding_weight)
        return x_TD if self.factor is None else x_TD * self.factor().to(x_TD.dtype)


class MaskedNorm(nn.Module):
    """RMS normalisation over the hidden units that are left, times the mask: as one of their number would do.

    Input and output (..., D); no gradient passes through the count.
    """

    def __init__(self, norm: RmsNorm, mask: Factor) -> None:
        super().__init__()
        self.weight, self.eps, self.dtype, self.mask = norm.weight, norm.eps, norm.dtype, mask

    def forward(self, x: Tensor) -> Tensor:
        z_D = self.mask().to(self.dtype)
        kept_D = (z_D != 0).to(self.dtype).detach()
        wide = x.to(self.dtype)
        square = (wide * wide * kept_D).sum(-1, keepdim=True) / kept_D.sum().clamp(min=1.0)
        return (wide * torch.rsqrt(square + self.eps) * self.weight.to(self.dtype) * z_D).to(x.dtype)


class MaskedLinear(nn.Module):
    """(W (x * before) + b) * after. Input (T, in), output (T, out); W and b are the layer's own."""

    def __init__(self, linear: Linear, before: Factor | None, after: Factor | None) -> None:
        super().__init__()
        self.weight, self.bias, self.before, self.after = linear.weight, linear.bias, before, after

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.before is not None:
            x_TD = x_TD * self.before().to(x_TD.dtype)
        bias = None if self.bias is None else self.bias.to(x_TD.dtype)
        y_TD = F.linear(x_TD, self.weight.to(x_TD.dtype), bias)
        return y_TD if self.after is None else y_TD * self.after().to(y_TD.dtype)


def add_masks(network: CausalLM, spec: PruningSpec) -> L0Masks:
    """Put the masks of ``spec`` into a dense network.

    Raises:
        UserError: a layer is a mixture of experts.
    """
    model = network.spec.model
    masks, asked = L0Masks(spec), {*spec.modules}
    network.model.l0_module = masks
    hidden = masks.hidden if "hidden" in asked else None
    embedded = masks.kept if network.tied else masks.hidden
    network.model.tok_embeddings = MaskedEmbedding(
        network.model.tok_embeddings, masks.draw, embedded if hidden else None
    )
    if hidden:
        network.model.norm_out = MaskedNorm(network.model.norm_out, hidden)
    heads = bool(asked & {"head", "kv_head", "q_in_group"})
    for index, layer in enumerate(network.model.layers):
        if not isinstance(model.layer(index).feed_forward, DenseSpec) or not isinstance(layer.feed_forward, SwiGlu):
            raise UserError(f"layer {index} is a mixture of experts: masks of experts are not built")
        if hidden:
            layer.attention_norm = MaskedNorm(layer.attention_norm, hidden)
            layer.ffn_norm = MaskedNorm(layer.ffn_norm, hidden)
        after = {
            half: partial(masks.output, half, index) if asked & {"hidden", "layer", half} else None
            for half in ("head_layer", "mlp")
        }
        before = partial(masks.heads, index) if heads else None
        layer.attention.wo = MaskedLinear(layer.attention.wo, before, after["head_layer"])
        inner = partial(masks.of_layer, "intermediate", index) if "intermediate" in asked else None
        layer.feed_forward.w2 = MaskedLinear(layer.feed_forward.w2, inner, after["mlp"])
    return masks
