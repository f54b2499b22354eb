# SPDX-License-Identifier: Apache-2.0
"""The words of the house: frozen descriptions of a model, its experts, its numerics and its cluster.

Field names are Hugging Face's where Hugging Face has a name (``num_local_experts``, ``hidden_size``) and the
field's standard term elsewhere. YAML spellings (``expert_num``, ``num_heads``) live in ``core.config.view`` alone.
A spec holds plain Python values only, so that it can be hashed, compared, printed and sent to any engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mindformers_ext.core.errors import Problems
from mindformers_ext.core.stages import layer_stage

DTYPE_NAMES = ("float32", "float16", "bfloat16")
AUX_LOSS_TYPES = ("expert", "device", "comm")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
AUX_LOSS_REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """How tokens are routed to experts (MindFormers' ``TopkRouterV2``; GShard, Lepikhin et al. 2020, section 3.2).

    ``capacity_factor`` <= 0 means dropless. ``aux_losses`` pairs a kind with its factor; a factor of 0 is off.
    ``expert_group_size`` is MindFormers' word for the NUMBER of expert groups of the "device" loss.
    ``use_gmm`` multiplies sorted tokens by a grouped matrix product instead of giving them slots, and drops none.
    ``norm_single_choice`` extends ``norm_topk_prob`` to one chosen expert, whose gate is then 1, as in Hugging Face's
    Mixtral; MindFormers leaves it its probability, through which the router learns.
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

    def collect(self, problems: Problems) -> None:
        """Add every broken rule of this spec to ``problems`` (spec section 1)."""
        experts, chosen = self.num_local_experts, self.num_experts_per_tok
        problems.positive("expert_num (num_local_experts)", experts)
        problems.positive("num_experts_chosen (num_experts_per_tok)", chosen)
        if chosen > experts > 0:
            problems.add(
                f"num_experts_chosen={chosen} exceeds expert_num={experts}", f"choose at most {experts} experts"
            )
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


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Sizes and constants of a LLaMA-shaped decoder; ``moe`` makes its feed-forward layers Mixtral's experts.

    A token id of -1 means that the model has no such token. ``more_eos_token_ids`` also end a text (Llama 3).
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
    moe: MoESpec | None = None

    @property
    def experts(self) -> MoESpec:
        """``moe`` of a model that has experts; ``ValueError`` for a dense one."""
        if self.moe is None:
            raise ValueError("a dense model has no experts")
        return self.moe

    @property
    def model_type(self) -> str:
        """``mixtral`` with experts, ``llama`` without: the stem of every file about this model."""
        return "mixtral" if self.moe else "llama"

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
