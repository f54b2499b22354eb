# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for valid specs, and a MindFormers YAML with the keys that users' files have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from mindformers_ext.core.families import FAMILIES, THRESHOLD, Family, end_layers
from mindformers_ext.core.layers import DTYPE_NAMES, LOAD_FORMS, THRESHOLD_WORDS, MoESpec, SharedExpertSpec
from mindformers_ext.core.rope import RopeScaling
from mindformers_ext.core.spec import FEATURES, KernelSpec, ModelSpec, NetworkSpec, NumericsSpec, ParallelSpec

# The sections of the r1.3 to r1.7 files that a network is read from, with the dead keys and the anchor they carry.
PRETRAIN_YAML = """
seed: 0
output_dir: './output'
load_checkpoint: ""
auto_trans_ckpt: False
run_mode: 'train'
trainer: {type: CausalLanguageModelingTrainer, model_name: 'mixtral-8x7b'}
do_eval: false
runner_config: {epochs: 10, batch_size: 1, sink_mode: True, sink_size: 1}
optimizer: {type: AdamW, betas: [0.9, 0.95], eps: 1.e-8}
moe_config:
  expert_num: 8
  capacity_factor: 1.1
  aux_loss_factor: 0.05
  num_experts_chosen: 2
  routing_policy: "TopkRouterV2"
  enable_sdrop: True
  router_dense_type: "float32"
  use_fused_ops_topkrouter: False
  balance_via_topk_bias: False
  topk_bias_update_rate: 0.001
lr_schedule: {type: CosineWithWarmUpLR, learning_rate: 1.e-5, lr_end: 1.e-6, warmup_ratio: 0.03, total_steps: -1}
train_dataset: &train_dataset
  data_loader: {type: MindDataset, dataset_dir: "", shuffle: True}
  input_columns: ["input_ids"]
  batch_size: 4
train_dataset_task: {type: CausalLanguageModelDataset, dataset_config: *train_dataset}
use_parallel: True
parallel:
  parallel_mode: 1
  gradients_mean: False
  enable_alltoall: True
  full_batch: True
  search_mode: "sharding_propagation"
  enable_parallel_optimizer: True
  strategy_ckpt_save_file: "./ckpt_strategy.ckpt"
  parallel_optimizer_config: {gradient_accumulation_shard: False, parallel_optimizer_threshold: 64}
parallel_config:
  data_parallel: 8
  model_parallel: 1
  expert_parallel: 8
  pipeline_stage: 2
  use_seq_parallel: False
  micro_batch_num: 16
  vocab_emb_dp: True
  gradient_aggregation_group: 4
micro_batch_interleave_num: 1
recompute_config:
  recompute: True
  select_recompute: False
  parallel_optimizer_comm_recompute: False
  mp_comm_recompute: True
  recompute_slice_activation: True
callbacks:
  - type: MFLossMonitor
  - type: CheckpointMonitor
    prefix: "mixtral-8x7b"
  - type: ObsMonitor
context: {mode: 0, device_target: "Ascend", max_device_memory: "58GB", jit_config: {jit_level: "O1"}}
model:
  model_config:
    type: LlamaConfig
    batch_size: 1
    seq_length: 4096
    hidden_size: 4096
    intermediate_size: 14336
    theta: 1000000
    num_layers: 32
    num_heads: 32
    vocab_size: 32000
    multiple_of: 256
    n_kv_heads: 8
    rms_norm_eps: 1.0e-5
    bos_token_id: 1
    eos_token_id: 2
    pad_token_id: 0
    ignore_token_id: -100
    compute_dtype: "float16"
    layernorm_compute_type: "float32"
    softmax_compute_type: "float16"
    rotary_dtype: "float16"
    param_init_type: "float32"
    use_past: False
    extend_method: "None"
    use_flash_attention: True
    offset: 0
    checkpoint_name_or_path: ""
    repetition_penalty: 1
    max_decode_length: 512
    top_k: 3
    top_p: 1
    do_sample: False
  arch:
    type: LlamaForCausalLM
runner_wrapper:
  type: MFTrainOneStepCell
  scale_sense: {type: DynamicLossScaleUpdateCell, loss_scale_value: 65535, scale_factor: 2, scale_window: 1000}
  use_clip_grad: True
eval_callbacks:
  - type: ObsMonitor
auto_tune: False
filepath_prefix: './autotune'
autotune_per_step: 10
profile: False
layer_scale: False
layer_decay: 0.65
lr_scale_factor: 256
remote_save_url: "Please input obs url on AICC platform."
"""

# semi_auto_parallel, which most rules are about, in half of the draws
MODES = ["semi_auto_parallel"] * 4 + ["auto_parallel", "data_parallel", "hybrid_parallel", "stand_alone"]

_factors = st.integers(0, 999).map(lambda value: value / 1000)
_dtypes = st.sampled_from(DTYPE_NAMES)


@st.composite
def moe_specs(draw: st.DrawFn) -> MoESpec:
    """Valid routing of 2 to 16 experts."""
    groups = draw(st.sampled_from([1, 2, 4]))
    experts = groups * draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups))
    method = draw(st.sampled_from(["greedy", "group_limited_greedy", "noaux_tc"]))
    limit = experts if method == "greedy" else kept * (experts // groups)
    factor = draw(st.sampled_from([-1.0, 0.0, 0.5, 1.1, 2.0]))
    kinds = draw(st.lists(st.sampled_from(["expert", "device", "comm"]), unique=True))
    return MoESpec(
        num_local_experts=experts,
        num_experts_per_tok=draw(st.integers(1, limit)),
        capacity_factor=factor,
        enable_sdrop=draw(st.booleans()),
        use_gating_sigmoid=draw(st.booleans()),
        norm_topk_prob=draw(st.booleans()),
        norm_single_choice=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        topk_method=method,
        n_group=groups if method != "greedy" else draw(st.sampled_from([None, groups])),
        topk_group=kept if method != "greedy" else None,
        aux_losses=tuple((kind, draw(_factors)) for kind in kinds),
        expert_group_size=groups if "device" in kinds else None,
        z_loss_factor=draw(_factors),
        aux_loss_reduce=draw(st.sampled_from(["sum", "mean"])),
        balance_via_topk_bias=draw(st.booleans()),
        topk_bias_update_rate=draw(_factors),
        router_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        use_fused_ops_topkrouter=draw(st.booleans()),
        use_gmm=factor <= 0 and draw(st.booleans()),
        comp_comm_parallel_degree=draw(st.integers(1, 3)),
        max_router_load=draw(st.sampled_from([131072, 262144])),
    )


@st.composite
def rope_scalings(draw: st.DrawFn) -> RopeScaling:
    """Valid ways to turn positions beyond the trained ones; what a method does not read has its default."""
    kind = draw(st.sampled_from(["linear", "dynamic", "llama3", "yarn"]))
    more: dict[str, object] = {}
    if kind == "llama3":
        low = draw(st.sampled_from([0.5, 1.0, 2.0]))
        more = {
            "low_freq_factor": low,
            "high_freq_factor": low + draw(st.sampled_from([0.5, 3.0])),
            "original_max_position_embeddings": draw(st.sampled_from([16, 40])),
        }
    if kind == "yarn":
        scales = draw(st.sampled_from([(None, None), (1.0, 0.5), (0.7, 0.7)]))
        more = {
            "original_max_position_embeddings": draw(st.sampled_from([None, 16, 40])),
            "beta_fast": draw(st.sampled_from([32.0, 8.0])),
            "beta_slow": draw(st.sampled_from([1.0, 2.0])),
            "attention_factor": draw(st.sampled_from([None, 1.25])),
            "mscale": scales[0],
            "mscale_all_dim": scales[1],
            "truncate": draw(st.booleans()),
        }
    return RopeScaling(rope_type=kind, factor=draw(st.sampled_from([1.0, 2.0, 7.5])), **more)


@st.composite
def model_specs(draw: st.DrawFn) -> ModelSpec:
    """Valid models, dense or with experts, odd widths included."""
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 3))
    vocab = draw(st.integers(8, 500))
    ids = st.integers(-1, 7)
    moe = draw(st.none() | moe_specs())
    bias = moe is None and draw(st.booleans())
    return ModelSpec(
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=moe is None and draw(st.booleans()),
        rope_scaling=draw(st.none() | rope_scalings()),
        sliding_window=draw(st.none() | st.integers(1, 63)) if moe else None,
        vocab_size=vocab,
        hidden_size=draw(st.integers(1, 200)),
        intermediate_size=draw(st.integers(1, 200)),
        num_hidden_layers=draw(st.integers(1, 8)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 16)),
        max_position_embeddings=draw(st.integers(64, 4096)),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        rope_theta=draw(st.sampled_from([1e4, 5e5, 1e6])),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=draw(st.sampled_from([0.01, 0.02])),
        bos_token_id=draw(ids),
        eos_token_id=draw(ids),
        pad_token_id=draw(ids),
        ignore_token_id=draw(st.sampled_from([-100, -1])),
        more_eos_token_ids=tuple(draw(st.lists(st.integers(0, 7), max_size=2))),
        moe=moe,
    )


@st.composite
def parallel_specs(draw: st.DrawFn) -> ParallelSpec:
    """Any sizes; their product is the device count in about half of the draws."""
    sizes = st.sampled_from([1, 1, 1, 2, 3, 4])
    dp, mp, pp = draw(sizes), draw(sizes), draw(sizes)
    return ParallelSpec(
        data_parallel=dp,
        model_parallel=mp,
        pipeline_stage=pp,
        expert_parallel=draw(sizes),
        context_parallel=draw(st.sampled_from([1, 1, 1, 2])),
        micro_batch_num=draw(sizes),
        micro_batch_interleave_num=draw(st.integers(1, 2)),
        pp_interleave_num=draw(st.integers(1, 2)),
        pipeline_interleave=draw(st.booleans()),
        use_seq_parallel=draw(st.booleans()),
        vocab_emb_dp=draw(st.booleans()),
        enable_alltoall=draw(st.booleans()),
        enable_parallel_optimizer=draw(st.booleans()),
        gradients_mean=draw(st.booleans()),
        full_batch=draw(st.booleans()),
        parallel_mode=draw(st.sampled_from(MODES)),
        device_num=draw(st.just(dp * mp * pp) | st.sampled_from([1, 2, 4, 6, 8, 16, 24])),
    )


@st.composite
def network_specs(draw: st.DrawFn) -> NetworkSpec:
    """Valid models with any sizes of the cluster."""
    return NetworkSpec(
        model=draw(model_specs()),
        seq_length=draw(st.integers(1, 64)),
        batch_size=draw(st.integers(1, 8)),
        numerics=NumericsSpec(
            compute_dtype=draw(_dtypes),
            param_dtype=draw(_dtypes),
            norm_dtype=draw(_dtypes),
            softmax_dtype=draw(_dtypes),
            rotary_dtype=draw(_dtypes),
        ),
        parallel=draw(parallel_specs()),
        kernels=KernelSpec(
            flash_attention=draw(st.booleans()),
            rms_norm=draw(st.booleans()),
            rope=draw(st.booleans()),
            swiglu=draw(st.booleans()),
        ),
        return_extra_loss=draw(st.booleans()),
    )


@st.composite
def noisy_words(draw: st.DrawFn, row: Family, layers: int) -> dict[str, Any]:
    """The gate of a family that has several, and what it is told; nothing for others."""
    kinds = [ours for word in row.words for _, ours in word.means]
    if not kinds:
        return {}
    number, gate = st.sampled_from([0.25, 1.0, 4.0]), draw(st.sampled_from(kinds))
    fixed = THRESHOLD_WORDS if gate == THRESHOLD else {}
    return {
        "gate": gate,
        **{name: draw(st.booleans()) for name in ("gate_use_softmax", "gate_use_balance", "gate_add_noise")},
        "multiply_gate_scores": draw(st.booleans()),
        "gate_noise_epsilon": draw(number),
        "load_compat": draw(st.sampled_from(LOAD_FORMS)),
        "gate_balance_loss_weight": draw(number),
        "score_scale_factor": draw(number | st.tuples(*(number for _ in range(layers)))),
        **fixed,
    }


@st.composite
def shared_experts(draw: st.DrawFn, row: Family, layers: int) -> SharedExpertSpec:
    """A family's; of residual ones every word, alike or of sizes of their own."""
    fixed = row.shared or {}
    if not fixed.get("weighs_each"):
        return SharedExpertSpec(intermediate_size=draw(st.integers(1, 20)), **fixed)
    count, number = draw(st.integers(1, 4)), st.integers(1, 80).map(lambda value: value / 8)
    width, sizes = count * draw(st.integers(1, 5)), None
    if draw(st.booleans()):
        ends = [sorted(draw(st.permutations(range(1, width)))[: count - 1]) for _ in range(layers)]
        sizes = tuple(tuple(b - a for a, b in zip((0, *row_), (*row_, width), strict=True)) for row_ in ends)
        sizes = None if {size * count for layer in sizes for size in layer} == {width} else sizes
    return SharedExpertSpec(
        **fixed,
        intermediate_size=width,
        num_experts=count,
        expert_sizes=sizes,
        scale=draw(number | st.tuples(*(number for _ in range(layers)))),
        **{name: draw(st.booleans()) for name in ("gate_use_softmax", "multiply_gate_scores", "use_weighting")},
    )


def dense_layers(row: Family, layers: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Those of a family that may have some beside its mixtures."""
    if row.dense_ends:
        return st.integers(0, (layers - 1) // 2).map(lambda count: end_layers(count, layers))
    most = layers - 1 if row.chooses_layers else 0
    return st.sets(st.integers(0, layers - 1), max_size=most).map(sorted).map(tuple)


@st.composite
def family_specs(draw: st.DrawFn, family: str) -> ModelSpec:
    """Small models of one family that its ``config.json`` can describe, at odd sizes."""
    row = FAMILIES[family]
    kv_heads, layers, hidden = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(4, 24))
    told = {name for word in row.words for name in word.fields}
    width, moe, dense = draw(st.integers(1, 20)), None, ()
    if row.has_experts:
        experts = draw(st.integers(2, 5))
        chosen = draw(st.integers(1, experts))
        normed = draw(st.booleans()) if "norm_topk_prob" in told else row.moe.get("norm_topk_prob", True)
        factor = draw(st.integers(0, 100)) / 1000 * chosen
        own_width = draw(st.integers(1, 20)) if "intermediate_size" in told else width
        shared = draw(shared_experts(row, layers)) if row.shared is not None else None
        if row.shares_width:
            own_width = experts * draw(st.integers(1, 6))
            width = own_width + (shared.intermediate_size if shared else 0)
        moe = MoESpec(
            num_local_experts=experts,
            num_experts_per_tok=chosen,
            norm_topk_prob=normed,
            norm_single_choice=normed and chosen == 1,
            capacity_factor=0.0,
            aux_losses=(("expert", float(f"{factor:.12g}")),) if factor and row.weighs_loss else (),
            aux_loss_reduce="mean" if row.weighs_loss else "sum",
            intermediate_size=None if row.shares_width or own_width == width else own_width,
            shared_expert=shared,
            **({"routed_scaling_factor": draw(st.integers(1, 40)) / 8} if "routed_scaling_factor" in told else {}),
            **{key: value for key, value in row.moe.items() if key != "norm_topk_prob"},
            **draw(noisy_words(row, layers)),
        )
        moe = replace(moe, num_experts_per_tok=experts) if moe.by_threshold else moe
        dense = draw(dense_layers(row, layers))
    window, full = None, ()
    if row.windowed:
        windows = st.integers(1, 63)
        window = draw(windows if row.reads_as else st.none() | windows)
    if window and row.mixes_windows:
        full = tuple(sorted(draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1))))
    features = {name: row.model.get(name, False) for name in FEATURES}
    for word in row.words:
        if word.part == "model":
            features |= dict.fromkeys(word.fields, draw(st.booleans()))
    return ModelSpec(
        vocab_size=draw(st.integers(8, 40)),
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 4)),
        tie_word_embeddings=draw(st.booleans()),
        pad_token_id=-1,
        rope_scaling=draw(st.none() | rope_scalings()),
        sliding_window=window,
        full_attention_layers=full,
        moe=moe,
        **features,
        dense_layers=dense,
        family="" if row.implied else family,
    )
