# SPDX-License-Identifier: Apache-2.0
"""The model families: one row each, read by checks, conversion, both engines, MindFormers' registry and command lines.

Networks are built from what a ``ModelSpec`` says of each layer, never from a family's name. A row holds what only a
name can tell: how Hugging Face and MindFormers call the family, which words its ``config.json`` has, and what these
leave implicit. A new family is a row here (``register_family``) and its table of weight names (``weights.tables``); a
new way to choose experts is a row of ``GATES`` and a cell in ``ms.moe.gate`` and ``pt.moe.gate``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mindformers_ext.core.family import ConfigWord as ConfigWord
from mindformers_ext.core.family import Family as Family
from mindformers_ext.core.family import end_layers as end_layers

_LLAMA_TOKENS, _QWEN_TOKENS = "LlamaTokenizer", "Qwen2Tokenizer"
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_MISTRAL: dict[str, Any] = {
    **_LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
_QWEN_MOE: dict[str, Any] = {
    **_LLAMA,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
_QWEN: dict[str, Any] = {
    **_LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
_QWEN_WINDOWS: dict[str, Any] = {"windowed": True, "window": 4096, "window_switch": "use_sliding_window"}
_ATTENTION_BIAS = ConfigWord("attention_bias", "model", "qkv_bias out_bias", "bool", False)
_NORM_CHOSEN = ConfigWord("norm_topk_prob", "moe", "norm_topk_prob", "bool", False)

LLAMA = Family(
    name="llama",
    hf_class="LlamaForCausalLM",
    yaml_names=(("PortableLlamaConfig", "PortableLlamaForCausalLM"),),
    implied=True,
    defaults=_LLAMA,
    words=(_ATTENTION_BIAS, ConfigWord("mlp_bias", "model", "mlp_bias", "bool", False)),
    tokenizer=_LLAMA_TOKENS,
)
# without a sliding window a llama in every tensor and formula
MISTRAL = Family(
    name="mistral",
    hf_class="MistralForCausalLM",
    yaml_names=(("MistralConfig", "MistralForCausalLM"),),
    reads_as=LLAMA.name,
    defaults=_MISTRAL,
    windowed=True,
    window=4096,
    tokenizer=_LLAMA_TOKENS,
)
QWEN2 = Family(
    name="qwen2",
    hf_class="Qwen2ForCausalLM",
    yaml_names=(("Qwen2Config", "Qwen2ForCausalLM"),),
    defaults=_QWEN,
    model={"qkv_bias": True},
    **_QWEN_WINDOWS,
    mixes_windows=True,
    tokenizer=_QWEN_TOKENS,
)
QWEN3 = Family(
    name="qwen3",
    hf_class="Qwen3ForCausalLM",
    yaml_names=(("Qwen3Config", "Qwen3ForCausalLM"),),
    defaults={**_QWEN, "head_dim": 128},
    words=(_ATTENTION_BIAS,),
    model={"qk_norm": True},
    **_QWEN_WINDOWS,
    mixes_windows=True,
    tokenizer=_QWEN_TOKENS,
)
MIXTRAL = Family(
    name="mixtral",
    hf_class="MixtralForCausalLM",
    yaml_names=(("MixtralConfig", "MixtralForCausalLM"),),
    has_experts=True,
    implied=True,
    defaults={**_MISTRAL, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    words=(
        ConfigWord("num_local_experts", "moe", "num_local_experts", "int", 8),
        ConfigWord("num_experts_per_tok", "moe", "num_experts_per_tok", "int", 2),
    ),
    moe={"norm_topk_prob": True},
    windowed=True,
    tokenizer=_LLAMA_TOKENS,
)
QWEN2_MOE = Family(
    name="qwen2_moe",
    hf_class="Qwen2MoeForCausalLM",
    yaml_names=(("Qwen2MoeConfig", "Qwen2MoeForCausalLM"),),
    has_experts=True,
    defaults={**_QWEN_MOE, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16},
    words=(
        ConfigWord("num_experts", "moe", "num_local_experts", "int", 60),
        ConfigWord("num_experts_per_tok", "moe", "num_experts_per_tok", "int", 4),
        ConfigWord("moe_intermediate_size", "moe", "intermediate_size", "int", 1408),
        ConfigWord("shared_expert_intermediate_size", "shared", "intermediate_size", "int", 5632),
        ConfigWord("qkv_bias", "model", "qkv_bias", "bool", True),
        _NORM_CHOSEN,
    ),
    shared={"gated": True},
    chooses_layers=True,
    window_switch="use_sliding_window",
    tokenizer=_QWEN_TOKENS,
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    yaml_names=(("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),),
    has_experts=True,
    defaults={**_QWEN_MOE, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4},
    words=(
        ConfigWord("num_experts", "moe", "num_local_experts", "int", 128),
        ConfigWord("num_experts_per_tok", "moe", "num_experts_per_tok", "int", 8),
        ConfigWord("moe_intermediate_size", "moe", "intermediate_size", "int", 768),
        _ATTENTION_BIAS,
        _NORM_CHOSEN,
    ),
    model={"qk_norm": True},
    chooses_layers=True,
    **_QWEN_WINDOWS,
    tokenizer=_QWEN_TOKENS,
)
# the feed-forward of a LLaMA cut into experts (Zhu et al. 2024, arXiv:2406.16554)
_CUT: dict[str, Any] = {
    "has_experts": True,
    "defaults": {**_LLAMA, "pad_token_id": 0},
    "moe": {"norm_topk_prob": False},  # the gate's own softmax is over the chosen alone
    "weighs_loss": False,
    "shares_width": True,
    "tokenizer": _LLAMA_TOKENS,
}
_GATE_NETWORKS = (("mlp", "mlp_noisy"), ("linear", "linear_noisy"), ("threshold", "threshold"))
_CUT_SAYS = {
    "gate_type": "TopKBalancedNoisyGate",
    "calculator_type": "UniversalCalculator",
    "add_weight_norm": False,
}
LLAMA_MOE = Family(
    name="llama_moe",
    hf_class="LlamaMoEForCausalLM",
    yaml_names=(("LlamaMoEConfig", "LlamaMoEForCausalLM"),),
    words=(
        ConfigWord("num_experts", "moe", "num_local_experts", "int", 16),
        ConfigWord("num_selects", "moe", "num_experts_per_tok", "int", 4),
        ConfigWord("gate_network", "moe", "gate", "str", "mlp", _GATE_NETWORKS),
        ConfigWord("gate_use_softmax", "moe", "gate_use_softmax", "bool", True),
        ConfigWord("gate_use_balance", "moe", "gate_use_balance", "bool", True),
        ConfigWord("gate_balance_loss_weight", "moe", "gate_balance_loss_weight", "float", 1e-2),
        ConfigWord("gate_add_noise", "moe", "gate_add_noise", "bool", True),
        ConfigWord("gate_noise_epsilon", "moe", "gate_noise_epsilon", "float", 1e-2),
        ConfigWord("load_compat", "moe", "load_compat", "str", "correct"),
        ConfigWord("multiply_gate_scores", "moe", "multiply_gate_scores", "bool", True),
        ConfigWord("score_scale_factor", "moe", "score_scale_factor", "factors", 1.0),
        ConfigWord("size_experts", "moe", "expert_sizes", "sizes", None),
    ),
    says={**_CUT_SAYS, "num_experts_residual": 0},
    **_CUT,
)
_RESIDUAL = (
    ConfigWord("num_experts_residual", "shared", "num_experts", "int", 2),
    ConfigWord("intermediate_size_residual", "shared", "intermediate_size", "int", None),
    ConfigWord("size_experts_residual", "shared", "expert_sizes", "sizes", None),
    ConfigWord("gate_use_softmax_residual", "shared", "gate_use_softmax", "bool", True),
    ConfigWord("multiply_gate_scores_residual", "shared", "multiply_gate_scores", "bool", True),
    ConfigWord("score_scale_factor_residual", "shared", "scale", "factors", 1.0),
    ConfigWord("use_weighting", "shared", "use_weighting", "bool", False),
)
_SIZES = {"num_experts": 14, "num_selects": 2}
# the same with some of the experts passed by every token
LLAMA_MOE_RESIDUAL = Family(
    name="llama_moe_residual",
    hf_class="LlamaMoEResidualForCausalLM",
    yaml_names=(("LlamaMoEResidualConfig", "LlamaMoEResidualForCausalLM"),),
    variant_of=LLAMA_MOE.name,
    variant_key=_RESIDUAL[0].key,
    words=(*(replace(word, default=_SIZES.get(word.key, word.default)) for word in LLAMA_MOE.words), *_RESIDUAL),
    says=_CUT_SAYS,
    shared={"weighs_each": True},
    **_CUT,
)
# experts cut from a dense model under Mixtral's name, whose sum is scaled (LLaMA-MoE v2, Qu et al. 2024,
# arXiv:2411.15708); layers at both ends may stay dense
_V2: dict[str, Any] = {
    "has_experts": True,
    "variant_of": MIXTRAL.name,
    "defaults": MIXTRAL.defaults,
    "words": (
        *MIXTRAL.words,
        ConfigWord("intermediate_size", "moe", "intermediate_size", "int", 14336),
        ConfigWord("scale_factor", "moe", "routed_scaling_factor", "float", None),
        ConfigWord("add_rescale_bias", "moe", "expert_bias", "bool", False),
        ConfigWord("aux_loss_type", "moe", "aux_loss_type", "str", "layerwise"),
        _ATTENTION_BIAS,
    ),
    "says": {"moe_type": "modulelist"},
    "moe": MIXTRAL.moe,
    "dense_ends": "num_moe_contract_layers",
    "dense_width": "intermediate_size_dense",
    "attends_by_experts": True,
    "windowed": True,
    "tokenizer": _LLAMA_TOKENS,
}
LLAMA_MOE_V2 = Family(
    name="llama_moe_v2",
    hf_class="LlamaMoEV2ForCausalLM",
    yaml_names=(("LlamaMoEV2Config", "LlamaMoEV2ForCausalLM"),),
    variant_key="scale_factor num_moe_contract_layers moe_type use_attn_moe",
    **_V2,
)
_ALWAYS = ConfigWord("intermediate_size_residual", "shared", "intermediate_size", "int", None)
# the same beside a feed-forward part that every token passes
LLAMA_MOE_V2_RESIDUAL = Family(
    name="llama_moe_v2_residual",
    hf_class="LlamaMoEV2ResidualForCausalLM",
    yaml_names=(("LlamaMoEV2ResidualConfig", "LlamaMoEV2ResidualForCausalLM"),),
    variant_key=_ALWAYS.key,
    **{**_V2, "words": (*_V2["words"], _ALWAYS)},
    shared={"gated": False},
)

_ROWS = (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, LLAMA_MOE, LLAMA_MOE_RESIDUAL)
# of variants the one that more keys tell comes first
FAMILIES: dict[str, Family] = {row.name: row for row in (*_ROWS, LLAMA_MOE_V2_RESIDUAL, LLAMA_MOE_V2)}

# MindFormers' name for any LLaMA-shaped network: with experts, or where MindFormers' own does not run, it means ours.
GENERIC_NAMES = ("LlamaConfig", "LlamaForCausalLM")
GENERIC_DEVICE = "Ascend"  # where MindFormers' own dense LLaMA runs


@dataclass(frozen=True)
class GateWeight:
    """A weight of a gate, below ``router.``: name, dimensions in the letters of ``core.parameters``, initial values."""

    name: str
    dims: str
    init: str = "normal"


# What a gate holds, by the name in ``MoESpec.gate``; always float32 and whole on every device.
_NOISE = GateWeight("noise.weight", "E D", "zeros")
GATES: dict[str, tuple[GateWeight, ...]] = {
    "linear": (GateWeight("dense.weight", "E D"),),
    "mlp_noisy": (GateWeight("dense.weight", "E D"), GateWeight("out.weight", "E E"), _NOISE),
    "linear_noisy": (GateWeight("dense.weight", "E D", "zeros"), _NOISE),
    "threshold": (GateWeight("dense.weight", "E D"), GateWeight("dense.bias", "E", "zeros")),
}
# Those that keep the logits of the best K alone, have a balance loss of their own and are trained with noise.
NOISY_GATES = ("mlp_noisy", "linear_noisy")
# That whose experts are those with a score W x + b of 0 or more, of a token none or all, each added up as it is.
THRESHOLD = "threshold"
UNBALANCED_GATES = (*NOISY_GATES, THRESHOLD)  # MindFormers' losses of balance do not weigh on them

# What weighs shared experts, one row each; and routed experts beside shared ones.
SHARED_GATE, RESIDUAL_GATE = GateWeight("weight", "R D"), GateWeight("weight", "R D", "zeros")
WEIGHTING = GateWeight("weight", "2 D")


def register_family(family: Family) -> None:
    """Add a row; ``ValueError`` where the name is taken."""
    if family.name in FAMILIES:
        raise ValueError(f"a family is called '{family.name}' already")
    FAMILIES[family.name] = family


def implied_family(has_experts: bool) -> Family:
    """The family of a network whose family nothing names."""
    return next(row for row in FAMILIES.values() if row.implied and row.has_experts == has_experts)


def family_of_features(features: Mapping[str, bool], has_window: bool, mixes: bool) -> Family:
    """The dense family that can have these of ``core.spec.FEATURES``, a window, layers with and without one.

    MindFormers calls every LLaMA-shaped network a ``LlamaConfig``, a Qwen2 too. The implied one where none fits.
    """
    for row in FAMILIES.values():
        words = [word.fields for word in row.words if word.part == "model"]
        told = {name for names in words for name in names}
        fits = all(features[name] == row.model.get(name, False) for name in features if name not in told)
        fits = fits and all(len({features[name] for name in names}) == 1 for names in words)
        if not row.has_experts and fits and row.windowed >= has_window and row.mixes_windows >= mixes:
            return row
    return implied_family(False)


def defaults_of(model_type: str) -> Mapping[str, Any]:
    """Defaults of transformers' configuration class, a LLaMA's where the type is unknown."""
    return FAMILIES.get(model_type, implied_family(False)).defaults


def own_families() -> tuple[str, ...]:
    """Names of the families that weights are converted to and networks built of."""
    return tuple(FAMILIES)


def named_family(config_type: object, architecture: object) -> Family | None:
    """The family that ``model_config.type`` and ``arch.type`` name as a pair."""
    return next((row for row in FAMILIES.values() if (config_type, architecture) in row.yaml_names), None)


def family_of_yaml(config: Mapping[str, Any], device_target: str) -> Family | None:
    """The family of ours that a configuration means where it runs; None for a network of MindFormers' own.

    Values of a wrong kind mean nothing here: they are named where the network is read (``core.config.view``).
    """
    model = _section(config, "model")
    words, arch = _section(model, "model_config"), _section(model, "arch")
    names = words.get("type"), arch.get("type")
    if names != GENERIC_NAMES:
        return named_family(*names)
    moe = _section(config, "moe_config") or _section(words, "moe_config")
    experts = moe.get("expert_num")
    has_experts = isinstance(experts, int) and experts > 1
    ours = has_experts or bool(words.get("l0_module")) or device_target != GENERIC_DEVICE  # MindFormers' has no masks
    return implied_family(has_experts) if ours else None


def _section(parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = parent.get(name)
    return found if isinstance(found, Mapping) else {}
