# SPDX-License-Identifier: Apache-2.0
"""Structured pruning while training, as frozen descriptions: which units have masks, of which shape, to which target.

The method is Sheared-LLaMA's (Xia et al. 2023, arXiv:2310.06694) with hard-concrete masks (Louizos et al. 2018,
arXiv:1712.01312). A mask is a number of 0 to 1 that a unit's output is multiplied by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mindformers_ext.core.errors import Problems
from mindformers_ext.core.spec import ModelSpec

# The hard-concrete distribution: a binary one of TEMPERATURE, stretched to (LOW, HIGH) and cut to 0 and 1.
LOW, HIGH, TEMPERATURE, EPS = -0.1, 1.1, 2.0 / 3.0, 1e-6
SHARPNESS = 0.8  # of a deterministic mask
LOGA_LIMITS = math.log(0.01), math.log(100.0)  # a mask's parameter stays between; it begins at the upper one
ZERO_SHIFT = TEMPERATURE * math.log(-LOW / HIGH)  # -1.5985968485: P(mask > 0) = sigmoid(parameter - shift)

# By name: the size of the model that a mask's units make up, and whether every layer has its own.
MODULES = {
    "hidden": ("hidden_size", False),
    "head": ("num_attention_heads", True),
    "kv_head": ("num_key_value_heads", True),
    "q_in_group": ("heads_per_group", True),
    "intermediate": ("intermediate_size", True),
    "layer": ("num_hidden_layers", False),
    "head_layer": ("num_hidden_layers", False),
    "mlp": ("num_hidden_layers", False),
}
GROUPED = ("kv_head", "q_in_group")  # what "head" becomes with grouped queries
REFUSED = {name: "a head's width stays as it is" for name in ("qk_head_dim", "vo_head_dim")}
# Names of what is trained and given beside the network's weights; those of LLM-Shearing.
ROOT = "model.l0_module."
MASKS, LAMBDAS, TARGETS = ROOT + "masks.", ROOT + "lambdas.", ROOT + "targets"
Z_LOGA, NOISE, VALUES = "z_loga", "noise", "values"
BESIDE_MASKS = (  # endings of what base weights lack
    ".z_loga",
    ".noise",
    ".values",
    "l0_module.targets",
    *(f"l0_module.lambdas.lambda_{number}{pair}" for number in (1, 2) for pair in ("", *(f"_{m}" for m in MODULES))),
)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a dense decoder that pruning changes, and the width of a head, which it does not."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    num_hidden_layers: int

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a key."""
        return self.num_attention_heads // self.num_key_value_heads

    def units(self, module: str) -> int:
        """Units of one mask vector."""
        return int(getattr(self, MODULES[module][0]))

    def mask_shape(self, module: str) -> tuple[int, ...]:
        """(units), or (layers, units)."""
        per_layer = (self.num_hidden_layers,) if MODULES[module][1] else ()
        return (*per_layer, self.units(module))

    def attention_weights(self) -> int:
        """Weights of one layer's q, k, v and output projections."""
        return 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)

    def mlp_weights(self) -> int:
        """Weights of one layer's feed-forward part."""
        return 3 * self.hidden_size * self.intermediate_size

    def prunable(self) -> int:
        """Weights of all layers without norms."""
        return self.num_hidden_layers * (self.attention_weights() + self.mlp_weights())


def shape_of_model(model: ModelSpec) -> ModelShape:
    """The sizes of ``model``."""
    return ModelShape(**{name: getattr(model, name) for name in ModelShape.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class PruningSpec:
    """A run that prunes.

    ``modules``: those with masks that are trained; ``whole``: those asked for whose target is the source, which stay
    ones. With ``target`` each module is driven to its size, in every layer; without, all of them together to
    ``target_sparsity`` of the weights. The target rises in a straight line from ``start_sparsity`` over
    ``warmup_steps``. ``lag_lr``: learning rate of masks and multipliers. ``eval_target_model``: evaluation keeps as
    many units as the target, otherwise as many as are expected. ``importance``: a file of what was measured, in whose
    order masks begin, at ``start_sparsity``; None: all begin at the upper limit.
    """

    source: ModelShape
    modules: tuple[str, ...]
    whole: tuple[str, ...] = ()
    target: ModelShape | None = None
    target_sparsity: float = 0.5
    start_sparsity: float = 0.0
    warmup_steps: int = 0
    eval_target_model: bool = True
    lag_lr: float = 1.0
    importance: str | None = None

    @property
    def pairs(self) -> tuple[str, ...]:
        """What has a pair of multipliers: every module, or "" for all together."""
        return self.modules if self.target else ("",)

    def lambda_names(self, pair: str) -> tuple[str, str]:
        """The names of a pair behind ``LAMBDAS``."""
        ending = f"_{pair}" if pair else ""
        return f"lambda_1{ending}", f"lambda_2{ending}"

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Name, shape, and whether it is trained, of every number (float32) that a training step takes besides the
        network's own."""
        for name in self.modules:
            yield f"{MASKS}{name}.{Z_LOGA}", self.source.mask_shape(name), True
            yield f"{MASKS}{name}.{NOISE}", self.source.mask_shape(name), False
        yield from ((LAMBDAS + name, (1,), True) for pair in self.pairs for name in self.lambda_names(pair))
        yield TARGETS, (len(self.pairs),), False

    def sparsity(self, pair: str) -> float:
        """The final target of a pair: share of units, or of weights, that are to go."""
        if self.target is None:
            return self.target_sparsity
        return 1.0 - self.target.units(pair) / self.source.units(pair)

    def targets(self, step: int) -> tuple[float, ...]:
        """The target of every pair in the update after ``step`` updates."""
        share = min(1.0, step / self.warmup_steps) if self.warmup_steps > 0 else 1.0
        return tuple(self.start_sparsity + (self.sparsity(pair) - self.start_sparsity) * share for pair in self.pairs)

    def counted(self) -> tuple[bool, bool]:
        """Whether attention and the feed-forward part count among the weights that can go."""
        asked = {*self.modules, *self.whole}
        everything = "hidden" in asked or "layer" in asked
        return everything or bool(asked & {"head", *GROUPED, "head_layer"}), everything or bool(
            asked & {"intermediate", "mlp"}
        )

    def prunable(self) -> int:
        """Weights that can go."""
        attention, mlp = self.counted()
        parts = attention * self.source.attention_weights() + mlp * self.source.mlp_weights()
        return self.source.num_hidden_layers * parts


def resolve_modules(
    names: tuple[str, ...], source: ModelShape, target: ModelShape | None, problems: Problems
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Modules with masks to train, and those that stay whole, of the YAML's names."""
    for name in names:
        if name in REFUSED:
            problems.add(f"pruning_modules has {name}", f"{REFUSED[name]}: leave it out")
        else:
            problems.one_of("pruning_modules", name, tuple(MODULES))
    if len(set(names)) != len(names) or not names:
        problems.add(f"pruning_modules={list(names)}", "name each module once, and at least one")
    if "layer" in names and {"head_layer", "mlp"} & {*names}:
        problems.add(f"pruning_modules={list(names)} has layer beside its halves", "give layer, or head_layer and mlp")
    grouped = source.heads_per_group > 1
    if not grouped and {*GROUPED} & {*names}:
        problems.add(f"pruning_modules={list(names)}", "this model has no groups of query heads: use head")
    if "head" in names and {*GROUPED} & {*names}:
        problems.add(f"pruning_modules={list(names)} has head beside its parts", "give head, or kv_head and q_in_group")
    problems.raise_if_any()
    asked: list[str] = []
    for name in names:
        asked += GROUPED if name == "head" and grouped else (name,)
    if target is None:
        return tuple(asked), ()
    _check_unlisted(asked, source, target, problems)
    whole = tuple(name for name in asked if target.units(name) == source.units(name))
    return tuple(name for name in asked if name not in whole), whole


def _check_unlisted(asked: list[str], source: ModelShape, target: ModelShape, problems: Problems) -> None:
    """A size can only change where a mask of it was asked for."""
    by_size: Mapping[str, set[str]] = {
        "hidden_size": {"hidden"},
        "intermediate_size": {"intermediate"},
        "num_hidden_layers": {"layer", "head_layer", "mlp"},
        "num_attention_heads": {"head", *GROUPED},
        "num_key_value_heads": {"head", "kv_head"},
    }
    for size, modules in by_size.items():
        ours, theirs = getattr(source, size), getattr(target, size)
        if ours != theirs and not modules & {*asked}:
            problems.add(
                f"target_model changes {size} from {ours} to {theirs}", f"add {min(modules)} to pruning_modules"
            )
    problems.raise_if_any()
