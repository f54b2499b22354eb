# SPDX-License-Identifier: Apache-2.0
"""What one layer of a network is, as frozen descriptions: attention, dense feed-forward, mixture with its routing.

Field names are Hugging Face's where Hugging Face has a name, and the field's standard term elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mindformers_ext.core.errors import Problems
from mindformers_ext.core.families import GATES, NOISY_GATES, THRESHOLD, UNBALANCED_GATES

Sizes = tuple[tuple[int, ...], ...]  # by layer, of each expert
DTYPE_NAMES = ("float32", "float16", "bfloat16")
# every other word for them: MindFormers', torch's, the command lines' of both
DTYPE_WORDS = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
AUX_LOSS_TYPES = ("expert", "device", "comm")
LAYERWISE, SWITCH, LEGACY_CONSTANT = BALANCES = ("layerwise", "switch", "legacy_constant")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
AUX_LOSS_REDUCTIONS = ("sum", "mean")
LOAD_FORMS = ("correct", "reference")
# Fields of ``MoESpec`` that the gates of ``UNBALANCED_GATES`` read alone, and those that they do not read.
NOISY_WORDS = (
    "gate_use_softmax",
    "gate_use_balance",
    "gate_balance_loss_weight",
    "gate_add_noise",
    "gate_noise_epsilon",
    "multiply_gate_scores",
    "score_scale_factor",
    "load_compat",
)
_QUIET_WORDS = (
    "use_gating_sigmoid",
    "routed_scaling_factor",
    "topk_method",
    "n_group",
    "topk_group",
    "aux_losses",
    "aux_loss_type",
    "z_loss_factor",
    "balance_via_topk_bias",
)
# What a gate by threshold says in LLaMA-MoE's words: it has no noise, no loss, and adds experts up as they are.
THRESHOLD_WORDS: Mapping[str, Any] = {
    "gate_use_softmax": False,
    "gate_use_balance": False,
    "gate_add_noise": False,
    "multiply_gate_scores": False,
    "score_scale_factor": 1.0,
    "load_compat": LOAD_FORMS[0],
    "use_gmm": False,
}
# Fields of ``SharedExpertSpec`` that mean something where ``weighs_each`` alone, and their words in files.
RESIDUAL_WORDS = {
    "gate_use_softmax": "gate_use_softmax_residual",
    "multiply_gate_scores": "multiply_gate_scores_residual",
    "expert_sizes": "size_experts_residual",
    "use_weighting": "use_weighting",
}
# The points of a dense layer at which a probe looks, in the order in which they are computed, and their widths:
# D model, F feed-forward, HP all heads (core/parameters.py). A mixture has those of width D.
POINTS = {
    "input": "D",  # what enters the layer
    "attention_input": "D",  # behind the norm in front of attention
    "context": "HP",  # what attention mixed, head by head: what enters wo
    "attention_output": "D",  # what attention adds
    "mlp_input": "D",  # behind the norm in front of the feed-forward part
    "gate_linear": "F",  # w1 x, before the activation
    "gate": "F",  # silu(w1 x)
    "hidden": "F",  # silu(w1 x) * w3 x, what enters w2
    "mlp_output": "D",  # what the feed-forward part adds
    "output": "D",  # what leaves the layer
}
# Those that a mixture has besides; E experts.
MIXTURE_POINTS = {
    "chosen": "E",  # 1 where the token chose the expert
    "gate_weights": "E",  # what the expert's output is multiplied by; 0 where not chosen
    "expert_norms": "E",  # Euclidean norm of the expert's output; 0 where not chosen
    "gate_hidden": "E",  # of a gate of two layers ("mlp_noisy") what enters the second one
}


def dtype_name(word: object) -> str | None:
    """The name in ``DTYPE_NAMES`` that ``word`` means in any command or file ("bf16", "torch.half"), None if none."""
    name = str(word).lower().removeprefix("torch.")  # mindspore's own types print as Float32
    name = DTYPE_WORDS.get(name, name)
    return name if name in DTYPE_NAMES else None


def expert_sizes_told(moe: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """``expert_sizes`` of ``MoESpec`` from its read fields and the model's: None where they say what goes unsaid."""
    shared: SharedExpertSpec | None = moe.get("shared_expert")
    width = model["intermediate_size"] - (shared.intermediate_size if shared else 0)
    return {"expert_sizes": told_sizes(moe.get("expert_sizes"), moe["num_local_experts"], width, model)}


def told_sizes(sizes: Sizes | None, experts: int, width: int, model: Mapping[str, Any]) -> Sizes | None:
    """Sizes of the experts of every layer, None where all are ``width / experts``; wrong ones as they are."""
    if sizes is None or len(sizes) != model["num_hidden_layers"] or any(len(layer) != experts for layer in sizes):
        return sizes
    return None if {size * experts for layer in sizes for size in layer} == {width} else sizes


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Grouped-query attention. ``qkv_bias``: q, k and v have a bias (Qwen2), ``out_bias``: the output projection too;
    ``qk_norm``: q and k of every head are normalised before they are turned (Qwen3; Henry et al. 2020,
    arXiv:2010.04245). ``window``: tokens that a token sees, itself included (Beltagy et al. 2020, arXiv:2004.05150,
    section 3.1); None: all before it. ``experts``: key/value heads, each with its query heads, are experts
    (``core.attention``); a token has keys and values in those alone that it passes."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False
    qk_norm: bool = False
    out_bias: bool = False
    window: int | None = None
    experts: MoESpec | None = None


@dataclass(frozen=True, kw_only=True)
class DenseSpec:
    """A SwiGLU feed-forward layer that every token passes; ``bias``: its three products have one."""

    intermediate_size: int
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class SharedExpertSpec:
    """Experts beside the routed ones that every token passes (DeepSeekMoE, arXiv:2401.06066, section 3.2), held as one
    of ``intermediate_size``. Its output is multiplied by ``scale`` and, where ``gated``, by the sigmoid of a token's
    logit (Qwen2-MoE).

    ``weighs_each``: LLaMA-MoE's residual experts (arXiv:2406.16554). Each of the ``num_experts`` is multiplied by its
    score of a linear gate, the softmax over them or with ``gate_use_softmax`` off the logit, and by ``scale`` (one, or
    one per layer); with ``multiply_gate_scores`` off by nothing. ``expert_sizes``: per layer, None where all are alike.
    ``use_weighting``: routed experts and these are weighed by the softmax of two logits per token, not added up.
    """

    intermediate_size: int
    gated: bool = False
    scale: float | tuple[float, ...] = 1.0
    weighs_each: bool = False
    num_experts: int = 1
    expert_sizes: Sizes | None = None
    gate_use_softmax: bool = True
    multiply_gate_scores: bool = True
    use_weighting: bool = False

    def scale_of(self, layer: int) -> float:
        """``scale`` of one layer."""
        return self.scale[layer] if isinstance(self.scale, tuple) else self.scale

    def sizes_of(self, layer: int) -> tuple[int, ...]:
        """Widths of the experts of one layer."""
        if self.expert_sizes:
            return self.expert_sizes[layer]
        return (self.intermediate_size // self.num_experts,) * self.num_experts

    def at(self, layer: int) -> SharedExpertSpec:
        """The same of one layer alone, which is then layer 0."""
        sizes = (self.sizes_of(layer),) if self.expert_sizes else None
        return replace(self, scale=self.scale_of(layer), expert_sizes=sizes)

    def collect(self, problems: Problems) -> None:
        """Add every broken rule of this spec to ``problems``."""
        problems.positive("shared_expert_intermediate_size", self.intermediate_size)
        problems.positive("shared_expert_num (num_experts_residual)", self.num_experts)
        if self.weighs_each and self.gated:
            problems.add("use_shared_expert_gating=True", "each shared expert has its own score here: leave it out")
        defaults = {item.name: item.default for item in fields(self)}
        for name, word in RESIDUAL_WORDS.items() if not self.weighs_each else ():
            if getattr(self, name) != defaults[name]:
                said = f"{word}={getattr(self, name)!r} of a shared expert"
                problems.add(f"{said} has no effect", "leave it out: it belongs to LLaMA-MoE's residual experts")


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """How tokens are routed to experts (MindFormers' ``TopkRouterV2``; GShard, Lepikhin et al. 2020, section 3.2).

    ``capacity_factor`` <= 0 means dropless. ``aux_losses`` pairs a kind with its factor; a factor of 0 is off.
    ``expert_group_size`` is MindFormers' word for the NUMBER of expert groups of the "device" loss.
    ``use_gmm`` multiplies sorted tokens by a grouped matrix product instead of giving them slots, and drops none.
    ``norm_single_choice`` extends ``norm_topk_prob`` to one chosen expert, whose gate is then 1, as in Hugging Face's
    Mixtral; MindFormers leaves it its probability, through which the router learns. ``intermediate_size``: width of an
    expert, None where it is the model's. ``gate``: what scores the experts (``core.families.GATES``).

    Of the gates of ``NOISY_GATES`` (LLaMA-MoE, arXiv:2406.16554; Shazeer et al. 2017, arXiv:1701.06538, A): the
    score of a chosen expert is the softmax over the chosen logits, or with ``gate_use_softmax`` off the logit. An
    expert's output is multiplied by its score and ``score_scale_factor`` (one, or one per layer), with
    ``multiply_gate_scores`` off by nothing. ``gate_balance_loss_weight``: of the squared variations of importance and
    load, per layer. ``gate_add_noise``: training adds noise to the logits, of at least ``gate_noise_epsilon``.
    ``load_compat`` "reference" counts the load as the released models did, which compares the noise alone with the
    threshold. ``expert_sizes``: per layer, None where experts are alike; a narrower one is
    held as wide as the widest, with zeros that no gradient reaches. A gate by ``THRESHOLD`` has none of this, which
    ``THRESHOLD_WORDS`` say; a token may pass all experts, so K = E. ``expert_bias``: each expert adds a bias of its own
    to its output, before it is weighed (LLaMA-MoE v2, aligned).

    ``aux_loss_type``: over what the "expert" loss is taken. "layerwise": each layer's tokens; "switch": those of all
    layers together, once, as transformers' Mixtral does (of LLaMA-MoE v2's heads that are experts, once more);
    "legacy_constant": the value E/k (of a layer in balance it is k) that the published LLaMA-MoE v2 had instead, which
    has no gradient (spec of LLaMA-MoE v2, section 6).
    """

    num_local_experts: int
    num_experts_per_tok: int
    capacity_factor: float = 1.1
    enable_sdrop: bool = False
    use_gating_sigmoid: bool = False
    norm_topk_prob: bool = True
    norm_single_choice: bool = False
    routed_scaling_factor: float = 1.0
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    aux_losses: tuple[tuple[str, float], ...] = ()
    expert_group_size: int | None = None
    z_loss_factor: float = 0.0
    aux_loss_reduce: str = "sum"
    balance_via_topk_bias: bool = False
    topk_bias_update_rate: float = 0.0
    router_dtype: str = "float32"
    use_fused_ops_topkrouter: bool = False
    use_gmm: bool = False
    comp_comm_parallel_degree: int = 1
    max_router_load: int = 131072
    intermediate_size: int | None = None
    gate: str = "linear"
    gate_use_softmax: bool = True
    gate_use_balance: bool = True
    gate_balance_loss_weight: float = 1e-2
    gate_add_noise: bool = True
    gate_noise_epsilon: float = 1e-2
    multiply_gate_scores: bool = True
    score_scale_factor: float | tuple[float, ...] = 1.0
    load_compat: str = "correct"
    expert_sizes: Sizes | None = None
    shared_expert: SharedExpertSpec | None = None
    expert_bias: bool = False
    aux_loss_type: str = LAYERWISE

    @property
    def is_noisy(self) -> bool:
        """Whether its gate is one of ``NOISY_GATES``."""
        return self.gate in NOISY_GATES

    @property
    def by_threshold(self) -> bool:
        """Whether a token passes the experts above a threshold, however many."""
        return self.gate == THRESHOLD

    @property
    def draws_noise(self) -> bool:
        """Whether a training step needs noise, one value for every token, layer and expert."""
        return self.is_noisy and self.gate_add_noise

    @property
    def balance_weight(self) -> float:
        """Of a noisy gate's own loss; 0: none."""
        return self.gate_balance_loss_weight if self.gate_use_balance else 0.0

    @property
    def joins_layers(self) -> bool:
        """Whether all layers together have one loss that balances experts."""
        return self.aux_loss_type == SWITCH and any(factor > 0 for _, factor in self.aux_losses)

    def scale_of(self, layer: int) -> float:
        """``score_scale_factor`` of one layer."""
        factor = self.score_scale_factor
        return factor[layer] if isinstance(factor, tuple) else factor

    def collect(self, problems: Problems) -> None:
        """Add every broken rule of this spec to ``problems`` (spec section 1)."""
        experts, chosen = self.num_local_experts, self.num_experts_per_tok
        problems.positive("expert_num (num_local_experts)", experts)
        problems.positive("num_experts_chosen (num_experts_per_tok)", chosen)
        if chosen > experts > 0:
            problems.add(
                f"num_experts_chosen={chosen} exceeds expert_num={experts}", f"choose at most {experts} experts"
            )
        problems.one_of("moe_gate", self.gate, tuple(GATES))
        self._collect_gate(problems)
        if self.intermediate_size is not None:
            problems.positive("moe_intermediate_size", self.intermediate_size)
        if self.shared_expert:
            self.shared_expert.collect(problems)
        problems.one_of("topk_method", self.topk_method, TOPK_METHODS)
        problems.one_of("router_dense_type", self.router_dtype, DTYPE_NAMES)
        problems.one_of("aux_loss_reduce", self.aux_loss_reduce, AUX_LOSS_REDUCTIONS)
        problems.one_of("aux_loss_type", self.aux_loss_type, BALANCES)
        kinds = [kind for kind, factor in self.aux_losses if factor > 0 and kind != AUX_LOSS_TYPES[0]]
        if self.aux_loss_type != LAYERWISE and kinds:
            problems.add(f"aux_loss_type={self.aux_loss_type!r} with losses {kinds}", f"they are {LAYERWISE} alone")
        if self.joins_layers and self.aux_loss_reduce != "mean":
            wanted = "it is one loss for all layers: set aux_loss_reduce: mean"
            problems.add(f"aux_loss_type={SWITCH!r} with aux_loss_reduce={self.aux_loss_reduce!r}", wanted)
        problems.positive("max_router_load", self.max_router_load)
        problems.positive("comp_comm_parallel_degree", self.comp_comm_parallel_degree)
        if not self.capacity_factor == self.capacity_factor or self.capacity_factor > max(experts, 1):
            problems.add(
                f"capacity_factor={self.capacity_factor} is out of range",
                f"use a value up to expert_num ({experts}), typically 1.1 to 4.0; <= 0 means dropless",
            )
        if self.use_gmm and self.capacity_factor > 0:
            problems.add(
                f"use_gmm=True drops no token, but capacity_factor={self.capacity_factor} limits each expert",
                "set capacity_factor: -1 (dropless), or use_gmm: False",
            )
        for kind, factor in self.aux_losses:
            problems.one_of("aux_loss_types", kind, AUX_LOSS_TYPES)
            if not 0.0 <= factor < 1.0:
                problems.add(f"aux loss factor {factor} of '{kind}' is out of range", "use 0 (off) up to below 1")
            if kind == "device" and not self.expert_group_size:
                problems.add(
                    "aux loss 'device' is on but expert_group_size is not set", "set the number of expert groups"
                )
        if len({kind for kind, _ in self.aux_losses}) != len(self.aux_losses):
            problems.add(f"aux_loss_types={[k for k, _ in self.aux_losses]} names a kind twice", "name each kind once")
        if self.expert_group_size and experts % self.expert_group_size:
            problems.divides("expert_num", experts, "expert_group_size", self.expert_group_size)
        if self.z_loss_factor < 0:
            problems.add(f"z_loss_factor={self.z_loss_factor} is negative", "use 0 (off) or a small positive value")
        if not 0 <= self.topk_bias_update_rate < 1:
            problems.add(f"topk_bias_update_rate={self.topk_bias_update_rate} is out of range", "use 0 up to below 1")
        if self.topk_method != "greedy":
            self._collect_groups(problems)

    def _collect_gate(self, problems: Problems) -> None:
        """What belongs to gates of the other kind has no effect on this one."""
        defaults = {item.name: item.default for item in fields(self)}
        for name in _QUIET_WORDS if self.gate in UNBALANCED_GATES else NOISY_WORDS:
            if getattr(self, name) != defaults[name]:
                problems.add(f"{name}={getattr(self, name)!r} has no effect on moe_gate '{self.gate}'", "leave it out")
        if self.by_threshold:
            self._collect_threshold(problems)
        problems.one_of("load_compat", self.load_compat, LOAD_FORMS)
        if not 0 <= self.gate_balance_loss_weight < math.inf:
            problems.add(f"gate_balance_loss_weight={self.gate_balance_loss_weight}", "use 0 (off) or more")
        if not 0 < self.gate_noise_epsilon < math.inf:
            problems.add(f"gate_noise_epsilon={self.gate_noise_epsilon}", "use a small positive value, 0.01")

    def _collect_threshold(self, problems: Problems) -> None:
        beside = f"with moe_gate '{self.gate}'"
        for name, value in THRESHOLD_WORDS.items():
            if getattr(self, name) != value:
                problems.add(f"{name}={getattr(self, name)!r} {beside}", f"set it to {value!r}")
        if self.num_experts_per_tok != self.num_local_experts:
            said = f"num_experts_chosen={self.num_experts_per_tok} (num_selects) {beside}"
            problems.add(said, f"a token may pass all experts: set it to {self.num_local_experts}")
        if self.capacity_factor > 0:
            problems.add(f"capacity_factor={self.capacity_factor} {beside}", "nothing is dropped: set it to -1")

    def _collect_groups(self, problems: Problems) -> None:
        experts, chosen = self.num_local_experts, self.num_experts_per_tok
        if not self.n_group or not self.topk_group:
            problems.add(f"topk_method={self.topk_method} needs n_group and topk_group", "set both")
            return
        problems.divides("expert_num", experts, "n_group", self.n_group)
        if not 1 <= self.topk_group <= self.n_group:
            problems.add(f"topk_group={self.topk_group} is out of range", f"use 1 to n_group ({self.n_group})")
        elif self.n_group and chosen > self.topk_group * (experts // self.n_group):
            problems.add(
                f"num_experts_chosen={chosen} exceeds the {self.topk_group * (experts // self.n_group)} experts "
                f"of topk_group={self.topk_group} groups",
                "raise topk_group or lower num_experts_chosen",
            )
        if self.topk_method == "noaux_tc" and experts // self.n_group < 2:
            problems.add(
                f"noaux_tc scores a group by its two best experts, n_group={self.n_group} leaves one", "lower n_group"
            )


@dataclass(frozen=True)
class LayerSpec:
    """What one layer of a decoder is. Of a mixture ``intermediate_size`` is never None here."""

    attention: AttentionSpec
    feed_forward: DenseSpec | MoESpec

    @property
    def moe(self) -> MoESpec | None:
        """The mixture of a layer that is one."""
        return self.feed_forward if isinstance(self.feed_forward, MoESpec) else None
