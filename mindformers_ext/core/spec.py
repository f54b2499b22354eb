# SPDX-License-Identifier: Apache-2.0
"""The words of the house: frozen descriptions of a model, its experts, its numerics and its cluster.

Field names are Hugging Face's where Hugging Face has a name (``num_local_experts``, ``hidden_size``) and the
field's standard term elsewhere. YAML spellings (``expert_num``, ``num_heads``) live in ``core.config.view`` alone.
A spec holds plain Python values only, so that it can be hashed, compared, printed and sent to any engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from mindformers_ext.core.attention import attention_experts, attention_of, collect_attention_experts
from mindformers_ext.core.errors import Problems
from mindformers_ext.core.families import FAMILIES, Family, end_layers, implied_family
from mindformers_ext.core.layers import DTYPE_NAMES, DenseSpec, LayerSpec, MoESpec, Sizes
from mindformers_ext.core.layers import SharedExpertSpec as SharedExpertSpec
from mindformers_ext.core.rope import Rope, RopeScaling
from mindformers_ext.core.stages import layer_stage

FEATURES = ("qkv_bias", "out_bias", "qk_norm", "mlp_bias")  # what a dense layer may have beyond LLaMA's
# Sizes beyond every model known, which would take minutes or all memory before anything else could refuse them.
LARGEST = {
    "vocab_size": 2**26,
    "hidden_size": 2**24,
    "intermediate_size": 2**26,
    "num_hidden_layers": 2000,
    "num_attention_heads": 2**20,
    "num_key_value_heads": 2**20,
    "head_dim": 2**20,
    "max_position_embeddings": 2**31 - 1,
}
MOST_EXPERTS = 200_000


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Sizes and constants of a LLaMA-shaped decoder; ``moe`` makes its feed-forward layers mixtures of experts.

    A token id of -1 means that the model has no such token. ``more_eos_token_ids`` also end a text (Llama 3).
    ``sliding_window``: tokens that a token sees, but in ``full_attention_layers``, where it sees all before it.
    ``dense_layers``: those that stay dense although ``moe`` is there, in rising order. ``attn_experts``: in mixtures
    the heads are so many experts (0: none), of which a token passes ``top_k_attn``. ``family``: a row of
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
    out_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    moe: MoESpec | None = None
    dense_layers: tuple[int, ...] = ()
    attn_experts: int = 0
    top_k_attn: int = 0
    scale_factor_attn: float = 1.0
    family: str = ""

    @property
    def routing(self) -> MoESpec:
        """``moe`` of a model that has experts; ``ValueError`` for a dense one."""
        if self.moe is None:
            raise ValueError("a dense model has no experts")
        return self.moe

    @property
    def gates(self) -> tuple[MoESpec, ...]:
        """What chooses experts in each mixture: its own, and that of heads where they are experts."""
        if self.moe is None:
            return ()
        return (self.moe, attention_experts(self)) if self.attn_experts else (self.moe,)

    @property
    def family_row(self) -> Family:
        """The row of ``core.families``."""
        return FAMILIES[self.family] if self.family else implied_family(self.moe is not None)

    @property
    def model_type(self) -> str:
        """The family's name: the stem of every file about this model."""
        return self.family_row.name

    @property
    def rope(self) -> Rope:
        """The rotary embedding of every layer."""
        return Rope(self.head_dim, self.rope_theta, self.max_position_embeddings, self.rope_scaling)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that are mixtures."""
        layers = range(self.num_hidden_layers) if self.moe else ()
        return tuple(index for index in layers if index not in self.dense_layers)

    @property
    def routed_width(self) -> int:
        """Width of a layer's routed experts together where all experts are parts of ``intermediate_size``."""
        shared = self.moe.shared_expert if self.moe else None
        return self.intermediate_size - (shared.intermediate_size if shared else 0)

    @property
    def expert_size(self) -> int:
        """Width of a routed expert; of the feed-forward layer in a dense model."""
        if self.moe and self.moe.expert_sizes:
            return max(map(max, self.moe.expert_sizes))
        if self.moe and self.family_row.shares_width:
            return self.routed_width // self.moe.num_local_experts
        return (self.moe.intermediate_size if self.moe else None) or self.intermediate_size

    @property
    def typical_layer(self) -> int:
        """The first mixture, or the first layer of a dense model."""
        return next(iter(self.moe_layers), 0)

    @property
    def cut_widths(self) -> dict[str, int]:
        """What model parallel cuts, by the YAML's word: heads and the width of every kind of feed-forward layer."""
        widths = {"num_heads": self.num_attention_heads, "n_kv_heads": self.num_key_value_heads}
        if len(self.moe_layers) < self.num_hidden_layers or self.expert_size == self.intermediate_size:
            widths["intermediate_size"] = self.intermediate_size
        if self.expert_size != self.intermediate_size:
            widths["moe_intermediate_size"] = self.expert_size
        if self.attn_experts:
            widths["attn_experts"] = self.attn_experts
        if self.moe and self.moe.shared_expert:
            widths["shared_expert_intermediate_size"] = self.moe.shared_expert.intermediate_size
        return widths

    def layer(self, index: int) -> LayerSpec:
        """What layer ``index`` is."""
        attention = attention_of(self, index)
        if self.moe is None or index in self.dense_layers:
            return LayerSpec(attention, DenseSpec(intermediate_size=self.intermediate_size, bias=self.mlp_bias))
        shared = self.moe.shared_expert.at(index) if self.moe.shared_expert else None
        moe = replace(self.moe, intermediate_size=self.expert_size, expert_sizes=None, shared_expert=shared)
        return LayerSpec(attention, replace(moe, score_scale_factor=self.moe.scale_of(index)))

    def collect(self, problems: Problems) -> None:
        """Add every broken rule of this spec, experts included, to ``problems``."""
        for name, most in LARGEST.items():
            problems.positive(name, getattr(self, name), most)
        experts = self.moe.num_local_experts if self.moe else 0
        experts += self.moe.shared_expert.num_experts if self.moe and self.moe.shared_expert else 0
        if self.num_hidden_layers * experts > MOST_EXPERTS:
            problems.add(
                f"{self.num_hidden_layers} layers of {experts} experts (expert_num, shared_expert_num)",
                f"at most {MOST_EXPERTS} experts of all layers together are built",
            )
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
        if self.rope_scaling:
            self.rope_scaling.collect(problems)
        self._collect_window(problems)
        if self.attn_experts:
            collect_attention_experts(self, problems)
        if self.moe:
            self.moe.collect(problems)
            self._collect_factors(self.moe, problems)
        self._collect_family(problems)

    def _collect_window(self, problems: Problems) -> None:
        window, layers = self.sliding_window, self.full_attention_layers
        if window is not None and window < 1:
            problems.add(f"sliding_window={window}", "a token sees itself at least: use 1 or more, or none")
        if window is None and layers:
            problems.add(f"full_attention_layers={list(layers)} without sliding_window", "every layer is full then")
        if layers != tuple(sorted(set(layers))) or any(not 0 <= layer < self.num_hidden_layers for layer in layers):
            problems.add(
                f"full_attention_layers={list(layers)} are not layers of a model of {self.num_hidden_layers}",
                "list each once, rising",
            )

    def _collect_factors(self, moe: MoESpec, problems: Problems) -> None:
        """What is said per layer, and what the widths of experts add up to."""
        shared = moe.shared_expert or SharedExpertSpec(intermediate_size=0)
        for name, value in (
            ("score_scale_factor", moe.score_scale_factor),
            ("shared_expert_scale (score_scale_factor_residual)", shared.scale),
        ):
            if isinstance(value, tuple) and len(value) != self.num_hidden_layers:
                wanted = f"give one, or one per layer ({self.num_hidden_layers})"
                problems.add(f"{name} has {len(value)} values", wanted)
        shares = self.family in FAMILIES and self.family_row.shares_width
        if shares and self.routed_width < 1:
            problems.add(
                f"shared experts of {shared.intermediate_size} neurons (shared_expert_intermediate_size, "
                f"intermediate_size_residual) of a layer of intermediate_size={self.intermediate_size}",
                "they are part of it: leave some to the routed experts",
            )
            return
        beside = " without the shared experts" if moe.shared_expert else ""
        routed = ("num_experts (expert_num)", moe.num_local_experts)
        widths = ("intermediate_size" + beside, self.routed_width if shares else self.intermediate_size)
        if shares or moe.expert_sizes is not None:
            self._collect_sizes("size_experts", moe.expert_sizes, widths, routed, problems)
        if shared.weighs_each:
            widths = ("shared_expert_intermediate_size", shared.intermediate_size)
            always = ("shared_expert_num (num_experts_residual)", shared.num_experts)
            self._collect_sizes("size_experts_residual", shared.expert_sizes, widths, always, problems)

    def _collect_sizes(
        self, word: str, sizes: Sizes | None, widths: tuple[str, int], experts: tuple[str, int], problems: Problems
    ) -> None:
        """Experts that share a width: alike, or of the sizes that a list tells for every layer."""
        layers, (name, width), (_, count) = self.num_hidden_layers, widths, experts
        if sizes is None:
            if count > 0:
                problems.divides(name, width, *experts)
            return
        odd = [layer for layer in sizes if len(layer) != count or min(layer) < 1]
        if odd or len(sizes) != layers or any(sum(layer) != width for layer in sizes):
            problems.add(
                f"{word}={[list(layer) for layer in sizes]}",
                f"give a list per layer ({layers}) of {count} sizes whose sum is {width}",
            )

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
        elif not self.family or self.family in FAMILIES:
            self._collect_features(problems)

    def _collect_features(self, problems: Problems) -> None:
        """What the family cannot hold could be trained, but neither exported nor loaded by anything else."""
        row = self.family_row
        told = {(word.part, name) for word in row.words for name in word.fields}
        found: list[tuple[str, str, Any, Any]] = [
            ("model", name, getattr(self, name), row.model.get(name, False)) for name in FEATURES
        ]
        if not row.attends_by_experts:
            found += [("model", "attn_experts", self.attn_experts, 0)]
        if not row.windowed:
            found += [("model", "sliding_window", self.sliding_window, None)]
        if not row.mixes_windows:
            found += [("model", "full_attention_layers", self.full_attention_layers, ())]
        if self.moe:
            wanted = row.moe.get("gate", "linear"), row.moe.get("intermediate_size")
            for word in row.words:
                if word.means:
                    problems.one_of(word.key, getattr(self.moe, word.field), [ours for _, ours in word.means])
            found += [("moe", "gate", self.moe.gate, wanted[0])]
            found += [("moe", "expert_bias", self.moe.expert_bias, False)]
            found += [("moe", "intermediate_size", self.moe.intermediate_size, wanted[1])]
            found += [("shared", "shared_expert", self.moe.shared_expert is not None, row.shared is not None)]
            each = bool(self.moe.shared_expert and self.moe.shared_expert.weighs_each)
            found += [("shared", "weighs_each", each, bool((row.shared or {}).get("weighs_each")))]
        if row.dense_ends:
            ends = end_layers(len(self.dense_layers) // 2, self.num_hidden_layers)
            found += [("model", "dense_layers", self.dense_layers, ends)]
        elif not row.chooses_layers:
            found += [("model", "dense_layers", self.dense_layers, ())]
        for part, name, value, fixed in found:
            if (part, name) not in told and value != fixed:
                problems.add(f"{name}={value!r} of a {row.name}", f"that family has {fixed!r}")


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
    """All that a network is built from. ``packed``: its rows may be packed of documents (``core.documents``)."""

    model: ModelSpec
    seq_length: int
    batch_size: int = 1
    numerics: NumericsSpec = field(default_factory=NumericsSpec)
    parallel: ParallelSpec = field(default_factory=ParallelSpec)
    kernels: KernelSpec = field(default_factory=KernelSpec)
    return_extra_loss: bool = True
    packed: bool = False

    @property
    def noise_shape(self) -> tuple[int, int, int] | None:
        """(mixtures, S, E): the noise of one row that a training step takes; None: it takes none."""
        moe = self.model.moe
        if moe is None or not moe.draws_noise:
            return None
        return len(self.model.moe_layers), self.seq_length, moe.num_local_experts

    def layer_stage(self, layer: int) -> int:
        """The pipeline stage of a layer."""
        parallel = self.parallel
        return layer_stage(layer, self.model.num_hidden_layers, parallel.pipeline_stage, parallel.pp_interleave_num)
