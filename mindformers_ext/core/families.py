# SPDX-License-Identifier: Apache-2.0
"""The model families: one row each, read by checks, conversion, both engines, MindFormers' registry and command lines.

Networks are built from what a ``ModelSpec`` says of each layer, never from a family's name. A row holds what only a
name can tell: how Hugging Face and MindFormers call the family, which words its ``config.json`` has, and what these
leave implicit. A new family is a row here (``register_family``) and its table of weight names (``weights.tables``); a
new way to choose experts is a row of ``GATES`` and a cell in ``ms.moe.gate`` and ``pt.moe.gate``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class ConfigWord:
    """One key of a ``config.json`` beyond those that all families share.

    ``part``: model (``ModelSpec``), moe (``MoESpec``) or shared (``SharedExpertSpec``), whose ``field`` it fills; of
    several, with blanks between, all. ``means``: where the file's values are called otherwise here, each pair of them.
    """

    key: str
    part: str
    field: str
    kind: str
    default: Any
    means: tuple[tuple[Any, Any], ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that it fills."""
        return tuple(self.field.split())


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row.

    name: Hugging Face's ``model_type`` and the stem of every file about the family.
    hf_class: transformers' class.
    yaml_names: pairs of ``model_config.type`` and ``arch.type`` that mean it in a YAML, the one to write first.
    has_experts: whether some layers are mixtures.
    implied: whether experts, or their absence, mean this family where nothing is named.
    variant_of: a family whose ``model_type`` and class its ``config.json`` is written with, and ``variant_key`` the key
        that tells it there by a number. Its own ``name`` and ``hf_class`` are read too.
    reads_as: a family of the same tensors and formulas under which it is known here without a window; "" for itself.
    defaults: of transformers' configuration class, by ``ModelSpec`` field (= key); None: derived from other keys.
    words: further keys.
    says: keys that change the function, each with the one value that is built; written, and read where it stands.
    model, moe, shared: what the family's name fixes of each spec, by field.
    weighs_loss: whether ``router_aux_loss_coef`` weighs a loss of its routing.
    shares_width: whether its experts, the shared ones too, are parts of one layer as wide as ``intermediate_size``.
    chooses_layers: whether ``decoder_sparse_step`` and ``mlp_only_layers`` make layers dense.
    windowed: whether it has ``sliding_window``: in all layers, or where ``mixes_windows`` in those that ``layer_types``
        or ``max_window_layers`` name. ``window``: its default; ``window_switch`` a key without which it has no effect.
    tokenizer: transformers' class where the tokenizer's own files name none.
    """

    name: str
    hf_class: str
    yaml_names: tuple[tuple[str, str], ...] = ()
    has_experts: bool = False
    implied: bool = False
    reads_as: str = ""
    variant_of: str = ""
    variant_key: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[ConfigWord, ...] = ()
    says: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    moe: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] | None = None
    weighs_loss: bool = True
    shares_width: bool = False
    chooses_layers: bool = False
    windowed: bool = False
    mixes_windows: bool = False
    window: int | None = None
    window_switch: str = ""
    tokenizer: str = ""

    @property
    def gate(self) -> str:
        """The gate of its mixtures where none is named (of ``GATES``)."""
        kinds = [ours for word in self.words if word.field == "gate" for _, ours in word.means]
        return kinds[0] if kinds else str(self.moe.get("gate", "linear"))


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
        ConfigWord("gate_network", "moe", "gate", "str", "mlp", (("mlp", "mlp_noisy"), ("linear", "linear_noisy"))),
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

FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, LLAMA_MOE, LLAMA_MOE_RESIDUAL)
}

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
}
# Those that keep the logits of the best K alone, have a balance loss of their own and are trained with noise.
NOISY_GATES = ("mlp_noisy", "linear_noisy")


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
    return implied_family(has_experts) if has_experts or device_target != GENERIC_DEVICE else None


def _section(parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = parent.get(name)
    return found if isinstance(found, Mapping) else {}
