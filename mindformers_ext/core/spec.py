# SPDX-License-Identifier: Apache-2.0
"""The words of the house: frozen descriptions of a model, its experts, its numerics and its cluster.

Field names are Hugging Face's where Hugging Face has a name (``num_local_experts``, ``hidden_size``) and the
field's standard term elsewhere. YAML spellings (``expert_num``, ``num_heads``) live in ``core.config.view`` alone.
A spec holds plain Python values only, so that it can be hashed, compared, printed and sent to any engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mindformers_ext.core.errors import Problems
from mindformers_ext.core.families import FAMILIES, GATES, Family, implied_family
from mindformers_ext.core.stages import layer_stage

DTYPE_NAMES = ("float32", "float16", "bfloat16")
AUX_LOSS_TYPES = ("expert", "device", "comm")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
AUX_LOSS_REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Grouped-query attention. ``qkv_bias``: q, k and v have a bias (Qwen2); ``qk_norm``: q and k of every head are
    normalised before they are turned (Qwen3; Henry et al. 2020, arXiv:2010.04245)."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class DenseSpec:
    """A SwiGLU feed-forward layer that every token passes."""

    intermediate_size: int


@dataclass(frozen=True, kw_only=True)
class SharedExpertSpec:
    """An expert beside the routed ones that every token passes (DeepSeekMoE, arXiv:2401.06066, section 3.2).

    Its output is multiplied by ``scale`` and, where ``gated``, by the sigmoid of one logit per token (Qwen2-MoE).
    """

    intermediate_size: int
    gated: bool = False
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """How tokens are routed to experts (MindFormers' ``TopkRouterV2``; GShard, Lepikhin et al. 2020, section 3.2).

    ``capacity_factor`` <= 0 means dropless. ``aux_losses`` pairs a kind with its factor; a factor of 0 is off.
    ``expert_group_size`` is MindFormers' word for the NUMBER of expert groups of the "device" loss.
    ``use_gmm`` multiplies sorted tokens by a grouped matrix product instead of giving them slots, and drops none.
    ``norm_single_choice`` extends ``norm_topk_prob`` to one chosen expert, whose gate is then 1, as in Hugging Face's
    Mixtral; MindFormers leaves it its probability, through which the router learns. ``intermediate_size``: width of an
    expert, None where it is the model's. ``gate``: what scores the experts (``core.families.GATES``).
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
    shared_expert: SharedExpertSpec | None = None

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
        if self.intermediate_size is not None:
            problems.positive("moe_intermediate_size", self.intermediate_size)
        if self.shared_expert:
            problems.positive("shared_expert_intermediate_size", self.shared_expert.intermediate_size)
        problems.one_of("topk_method", self.topk_method, TOPK_METHODS)
        problems.one_of("router_dense_type", self.router_dtype, DTYPE_NAMES)
        problems.one_of("aux_loss_reduce", self.aux_loss_reduce, AUX_LOSS_REDUCTIONS)
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


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Sizes and constants of a LLaMA-shaped decoder; ``moe`` makes its feed-forward layers mixtures of experts.

    A token id of -1 means that the model has no such token. ``more_eos_token_ids`` also end a text (Llama 3).
    ``dense_layers``: those that stay dense although ``moe`` is there, in rising order. ``family``: a row of
    ``core.families``, "" where experts or their absence tell it; ``layer`` is what a network is built from.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    ignore_token_id: int = -100
    more_eos_token_ids: tuple[int, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    moe: MoESpec | None = None
    dense_layers: tuple[int, ...] = ()
    family: str = ""

    @property
    def routing(self) -> MoESpec:
        """``moe`` of a model that has experts; ``ValueError`` for a dense one."""
        if self.moe is None:
            raise ValueError("a dense model has no experts")
        return self.moe

    @property
    def family_row(self) -> Family:
        """The row of ``core.families``."""
        return FAMILIES[self.family] if self.family else implied_family(self.moe is not None)

    @property
    def model_type(self) -> str:
        """The family's name: the stem of every file about this model."""
        return self.family_row.name

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that are mixtures."""
        layers = range(self.num_hidden_layers) if self.moe else ()
        return tuple(index for index in layers if index not in self.dense_layers)

    @property
    def expert_size(self) -> int:
        """Width of a routed expert; of the feed-forward layer in a dense model."""
        return (self.moe.intermediate_size if self.moe else None) or self.intermediate_size

    def layer(self, index: int) -> LayerSpec:
        """What layer ``index`` is."""
        attention = AttentionSpec(
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
        )
        if self.moe is None or index in self.dense_layers:
            return LayerSpec(attention, DenseSpec(intermediate_size=self.intermediate_size))
        return LayerSpec(attention, replace(self.moe, intermediate_size=self.expert_size))

    def collect(self, problems: Problems) -> None:
        """Add every broken rule of this spec, experts included, to ``problems``."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            problems.positive(name, getattr(self, name))
        problems.divides(
            "num_attention_heads",
            self.num_attention_heads,
            "num_key_value_heads (n_kv_heads)",
            self.num_key_value_heads,
        )
        if self.head_dim % 2:
            problems.add(f"head width {self.head_dim} is odd", "rotary embedding turns pairs: use an even head_dim")
        if self.rms_norm_eps <= 0 or self.rope_theta <= 0:
            problems.add(f"rms_norm_eps={self.rms_norm_eps}, rope_theta={self.rope_theta}", "both must be positive")
        special = [(name, getattr(self, name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
        for name, token in special + [("eos_token_id", token) for token in self.more_eos_token_ids]:
            if token >= self.vocab_size > 0:
                problems.add(
                    f"{name}={token} is outside the vocabulary of {self.vocab_size}", "correct the id or vocab_size"
                )
        if self.moe:
            self.moe.collect(problems)
        self._collect_family(problems)

    def _collect_family(self, problems: Problems) -> None:
        if self.family:
            problems.one_of("family", self.family, tuple(FAMILIES))
        layers, dense = self.num_hidden_layers, self.dense_layers
        if dense and (dense != tuple(sorted(set(dense))) or dense[0] < 0 or dense[-1] >= layers > 0):
            problems.add(f"dense_layers={list(dense)} are not layers of a model of {layers}", "list each once, rising")
        elif dense and (self.moe is None or len(dense) >= layers):
            problems.add(f"dense_layers={list(dense)} of {layers} layers leave no mixture", "leave a layer its experts")
        if self.family in FAMILIES and FAMILIES[self.family].has_experts != (self.moe is not None):
            wanted = "has experts" if FAMILIES[self.family].has_experts else "is dense"
            problems.add(f"family '{self.family}' {wanted}, this model is not so", "correct the experts or the family")


@dataclass(frozen=True, kw_only=True)
class NumericsSpec:
    """In which types the network stores and computes (names: float32, float16, bfloat16)."""

    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    norm_dtype: str = "float32"
    softmax_dtype: str = "float32"
    rotary_dtype: str = "float32"

    def collect(self, problems: Problems) -> None:
        """Add every unknown type to ``problems``."""
        for name in ("compute_dtype", "param_dtype", "norm_dtype", "softmax_dtype", "rotary_dtype"):
            problems.one_of(name, getattr(self, name), DTYPE_NAMES)


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """Which fused kernels to take where the device has them (Ascend); what is computed is the same without."""

    flash_attention: bool = False
    rms_norm: bool = True
    rope: bool = False
    swiglu: bool = False


@dataclass(frozen=True, kw_only=True)
class ParallelSpec:
    """How the job is cut over ``device_num`` devices (MindFormers' ``parallel_config`` and ``parallel``)."""

    data_parallel: int = 1
    model_parallel: int = 1
    pipeline_stage: int = 1
    expert_parallel: int = 1
    context_parallel: int = 1
    micro_batch_num: int = 1
    micro_batch_interleave_num: int = 1
    pp_interleave_num: int = 1
    pipeline_interleave: bool = False
    use_seq_parallel: bool = False
    vocab_emb_dp: bool = True
    enable_alltoall: bool = False
    enable_parallel_optimizer: bool = False
    gradients_mean: bool = False
    full_batch: bool = True
    parallel_mode: str = "semi_auto_parallel"
    device_num: int = 1

    @property
    def groups(self) -> int:
        """Routing groups G: one per data-parallel slice, per (dp, mp) slice under sequence parallel."""
        return self.data_parallel * self.context_parallel * (self.model_parallel if self.use_seq_parallel else 1)

    @property
    def router_model_parallel(self) -> int:
        """The mp that capacity is rounded up to: 1 under sequence parallel (spec section 2.4)."""
        return 1 if self.use_seq_parallel else self.model_parallel


@dataclass(frozen=True)
class DeviceSpec:
    """The device that a process runs on (the YAML's ``context``).

    ``together``: with the other processes of the job, each on a device of its own, instead of on ``number``.
    ``max_memory`` ("59GB") and ``jit_level`` (O0, O1, O2) are Ascend's; None leaves them to MindSpore. ``pynative``
    runs operator by operator, for debugging.
    """

    target: str
    number: int = 0
    pynative: bool = False
    together: bool = False
    max_memory: str | None = None
    jit_level: str | None = None


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """All that a network is built from."""

    model: ModelSpec
    seq_length: int
    batch_size: int = 1
    numerics: NumericsSpec = field(default_factory=NumericsSpec)
    parallel: ParallelSpec = field(default_factory=ParallelSpec)
    kernels: KernelSpec = field(default_factory=KernelSpec)
    return_extra_loss: bool = True

    def layer_stage(self, layer: int) -> int:
        """The pipeline stage of a layer."""
        parallel = self.parallel
        return layer_stage(layer, self.model.num_hidden_layers, parallel.pipeline_stage, parallel.pp_interleave_num)
