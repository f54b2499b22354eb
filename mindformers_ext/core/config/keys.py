# SPDX-License-Identifier: Apache-2.0
"""The dictionary between MindFormers' YAML words and ours, and every other key a YAML may hold.

Every key of a section that belongs to us stands in exactly one of four tables:

- ``KEYS``: read into a spec field.
- ``PASSED``: meant for somebody else (trainer, generation, MindSpore's context) or dead; no effect on the network.
- ``NOTED``: about speed or layout elsewhere; has no effect here, which is said once in the log when it is set.
- ``UNBUILT``: would change the result and is not built; an error unless it holds its neutral value.

Keys and defaults follow LlamaConfig, MoEConfig, TransformerOpParallelConfig and the configuration template of
MindFormers 1.9.0 (identical to r1.7.0 for these), and the arguments of ``mindspore.set_auto_parallel_context``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODEL = "model.model_config"
TOP = ""
PIPELINE = "parallel.pipeline_config"


@dataclass(frozen=True)
class Key:
    """One YAML word: its section, name, the spec part and field it fills, its kind and its default."""

    section: str
    name: str
    part: str  # model, moe, shared, numerics, kernels, parallel or network
    field: str
    kind: str  # int, float, bool, str, dtype, mode, ids, layers, factors, sizes
    default: Any


def _keys(section: str, part: str, rows: str) -> tuple[Key, ...]:
    """Rows of ``yaml_name field kind default``; ``-`` as default means null."""
    readers: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": float,
        "bool": "True".__eq__,
        "ids": int,
        "factors": float,
    }
    found = []
    for row in rows.strip().splitlines():
        name, field, kind, default = row.split()
        value = None if default == "-" else readers.get(kind, str)(default)
        found.append(Key(section, name, part, field, kind, value))
    return tuple(found)


KEYS: tuple[Key, ...] = (
    *_keys(
        MODEL,
        "model",
        """
        vocab_size               vocab_size               int    32000
        hidden_size              hidden_size              int    4096
        intermediate_size        intermediate_size        int    -
        num_layers               num_hidden_layers        int    32
        num_heads                num_attention_heads      int    32
        n_kv_heads               num_key_value_heads      int    -
        head_dim                 head_dim                 int    -
        max_position_embedding   max_position_embeddings  int    -
        rms_norm_eps             rms_norm_eps             float  1e-5
        theta                    rope_theta               float  10000.0
        tie_word_embeddings      tie_word_embeddings      bool   False
        init_method_std          initializer_range        float  0.01
        bos_token_id             bos_token_id             int    1
        eos_token_id             eos_token_id             ids    2
        pad_token_id             pad_token_id             int    0
        ignore_token_id          ignore_token_id          int    -100
        qkv_has_bias             qkv_bias                 bool   False
        attn_proj_has_bias       out_bias                 bool   False
        mlp_has_bias             mlp_bias                 bool   False
        sliding_window           sliding_window           int    -
        full_attention_layers    full_attention_layers    layers -
        qk_layernorm             qk_norm                  bool   False
        dense_layers             dense_layers             layers -
        attn_experts             attn_experts             int    0
        top_k_attn               top_k_attn               int    0
        scale_factor_attn        scale_factor_attn        float  1.0
    """,
    ),
    *_keys(
        MODEL,
        "numerics",
        """
        compute_dtype            compute_dtype            dtype  float16
        param_init_type          param_dtype              dtype  float16
        layernorm_compute_type   norm_dtype               dtype  float32
        softmax_compute_type     softmax_dtype            dtype  float32
        rotary_dtype             rotary_dtype             dtype  float32
    """,
    ),
    *_keys(
        MODEL,
        "kernels",
        """
        use_flash_attention      flash_attention          bool   False
        fused_rms_norm           rms_norm                 bool   True
        use_fused_rope           rope                     bool   False
        use_fused_swiglu         swiglu                   bool   False
    """,
    ),
    *_keys(
        MODEL,
        "network",
        """
        seq_length               seq_length               int    2048
        return_extra_loss        return_extra_loss        bool   True
    """,
    ),
    *_keys(MODEL, "parallel", "pp_interleave_num pp_interleave_num int 1"),
    *_keys(
        MODEL,
        "moe",
        """
        aux_loss_reduce          aux_loss_reduce          str    sum
        norm_single_choice       norm_single_choice       bool   False
        moe_intermediate_size    intermediate_size        int    -
        moe_gate                 gate                     str    -
        gate_use_softmax         gate_use_softmax         bool   True
        gate_use_balance         gate_use_balance         bool   True
        gate_balance_loss_weight gate_balance_loss_weight float  0.01
        gate_add_noise           gate_add_noise           bool   True
        gate_noise_epsilon       gate_noise_epsilon       float  0.01
        multiply_gate_scores     multiply_gate_scores     bool   True
        score_scale_factor       score_scale_factor       factors 1.0
        load_compat              load_compat              str    correct
        size_experts             expert_sizes             sizes  -
        add_rescale_bias         expert_bias              bool   False
        aux_loss_type            aux_loss_type            str    layerwise
    """,
    ),
    *_keys(
        MODEL,
        "shared",
        """
        size_experts_residual         expert_sizes         sizes -
        gate_use_softmax_residual     gate_use_softmax     bool  True
        multiply_gate_scores_residual multiply_gate_scores bool  True
        use_weighting                 use_weighting        bool  False
    """,
    ),
    *_keys(
        "moe_config",
        "moe",
        """
        expert_num               num_local_experts        int    1
        num_experts_chosen       num_experts_per_tok      int    1
        capacity_factor          capacity_factor          float  1.1
        enable_sdrop             enable_sdrop             bool   False
        use_gating_sigmoid       use_gating_sigmoid       bool   False
        norm_topk_prob           norm_topk_prob           bool   True
        routed_scaling_factor    routed_scaling_factor    float  1.0
        topk_method              topk_method              str    greedy
        n_group                  n_group                  int    -
        topk_group               topk_group               int    -
        expert_group_size        expert_group_size        int    -
        z_loss_factor            z_loss_factor            float  0.0
        balance_via_topk_bias    balance_via_topk_bias    bool   False
        topk_bias_update_rate    topk_bias_update_rate    float  0.0
        router_dense_type        router_dtype             dtype  float32
        use_fused_ops_topkrouter use_fused_ops_topkrouter bool   False
        use_gmm                  use_gmm                  bool   False
        max_router_load          max_router_load          int    131072
    """,
    ),
    *_keys(
        "parallel_config",
        "parallel",
        """
        data_parallel            data_parallel            int    1
        model_parallel           model_parallel           int    1
        pipeline_stage           pipeline_stage           int    1
        expert_parallel          expert_parallel          int    1
        context_parallel         context_parallel         int    1
        micro_batch_num          micro_batch_num          int    1
        use_seq_parallel         use_seq_parallel         bool   False
        vocab_emb_dp             vocab_emb_dp             bool   True
    """,
    ),
    *_keys(
        "parallel",
        "parallel",
        """
        parallel_mode            parallel_mode            mode   1
        full_batch               full_batch               bool   True
        enable_alltoall          enable_alltoall          bool   False
        enable_parallel_optimizer enable_parallel_optimizer bool False
        gradients_mean           gradients_mean           bool   False
    """,
    ),
    *_keys(PIPELINE, "parallel", "pipeline_interleave pipeline_interleave bool False"),
    *_keys(TOP, "parallel", "micro_batch_interleave_num micro_batch_interleave_num int 1"),
)

# Keys that fill more than one field, or a field together with others; read by hand in ``core.config.view``.
COMPOSED: dict[str, frozenset[str]] = {
    MODEL: frozenset(
        {
            "batch_size",
            "multiple_of",
            "ffn_dim_multiplier",
            "moe_config",
            "parallel_config",
            "residual_dtype",
            "embedding_init_type",
            "pet_config",
            "l0_module",
            "shared_expert_intermediate_size",
            "shared_expert_scale",
            "extend_method",
            "scaling_factor",
        }
    ),
    "moe_config": frozenset(
        {
            "routing_policy",
            "aux_loss_factor",
            "aux_loss_types",
            "aux_loss_factors",
            "comp_comm_parallel",
            "comp_comm_parallel_degree",
            "shared_expert_num",
            "use_shared_expert_gating",
        }
    ),
    "runner_config": frozenset({"batch_size", "mini_batch_size"}),
    "parallel": frozenset({"pipeline_config"}),
    TOP: frozenset(
        {
            "use_parallel",
            "run_mode",
            "model",
            "moe_config",
            "parallel_config",
            "parallel",
            "recompute_config",
            "swap_config",
            "runner_config",
        }
    ),
}

MODES: dict[object, str] = {0: "data_parallel", 1: "semi_auto_parallel", 2: "auto_parallel", 3: "hybrid_parallel"}
SHARDED_MODES = ("semi_auto_parallel", "auto_parallel")  # the modes in which MindFormers keeps the parallel sizes

PASSED: dict[str, frozenset[str]] = {
    MODEL: frozenset(
        # the class and where it comes from, what MindFormers adds while it builds, which kernels run (chosen by
        # device here, with the same result), generation, and words of r0.8 to r1.2
        """type auto_register auto_map checkpoint_name_or_path name_or_path pretrained_model_dir mindformers_version
        model_type model_name architectures tokenizer_class is_encoder_decoder is_sample_acceleration _commit_hash
        _name_or_path dataset_config disable_lazy_inline track_max_attention_logit stage_num start_stage
        use_rope_slice is_dynamic use_past block_size num_blocks
        max_decode_length max_new_tokens max_length min_length min_new_tokens repetition_penalty
        encoder_repetition_penalty temperature top_k top_p do_sample num_beams renormalize_logits
        use_past_shard use_kvcache_op is_flexible_shape use_prompt_flash_attention use_paged_attention
        compute_in_2d pretrain_seqlen""".split()
    ),
    "moe_config": frozenset(
        # callbacks' switches, hot experts' numbers (their switch is below), and inference of other models
        """callback_moe_droprate save_token_distribution cur_layer update_step hot_expert_num cold_token_percent
        moe_module_name dispatch_global_max_bs ep_extend_tp npu_nums_per_device""".split()
    ),
    "parallel_config": frozenset(
        "gradient_aggregation_group optimizer_shard mem_coeff recompute swap select_recompute".split()
    ),
    "parallel": frozenset(
        """search_mode strategy_ckpt_save_file strategy_ckpt_load_file strategy_ckpt_config parallel_optimizer_config
        device_num global_rank gradient_fp32_sync loss_repeated_mean auto_parallel_search_mode parameter_broadcast
        all_reduce_fusion_config pipeline_stages pipeline_segments pipeline_result_broadcast comm_fusion
        dataset_strategy group_ckpt_save_file force_fp32_communication communi_parallel_mode
        optimizer_weight_shard_size optimizer_weight_shard_aggregated_save grad_accumulation_step
        sharding_propagation""".split()
    ),
    "recompute_config": frozenset("recompute select_recompute mp_comm_recompute recompute_slice_activation".split()),
    "swap_config": frozenset("swap layer_swap op_swap default_prefetch".split()),
    "runner_config": frozenset(
        """epochs sink_mode sink_size gradient_accumulation_steps stop_step num_classes per_epoch_size
        global_batch_size initial_epoch initial_step origin_epochs step_scale freeze_gate train_gate_only
        dpo_beta""".split()
    ),
    "model": frozenset({"model_config", "arch"}),
    TOP: frozenset(
        """seed engine loop output_dir resume_training print_separate_loss load_checkpoint load_ckpt_format
        auto_trans_ckpt transform_process_num transform_by_rank src_strategy_path_or_dir only_save_strategy
        load_ckpt_async use_legacy_format pretrained_model_dir balanced_load reshard_worker_num remove_redundancy
        checkpoint do_eval eval_step_interval eval_epoch_interval ignore_data_skip data_skip_steps
        profile profile_communication profile_memory init_start_profile profile_start_step profile_stop_step
        profile_rank_ids profile_pipeline profile_level profile_output profiler_level with_stack mstx
        data_simplification layer_scale layer_decay lr_scale lr_scale_factor remote_save_url save_file
        input_data predict_data predict_batch_size adapter_id modal_type
        exclude_cann_cpu train_precision_sync infer_precision_sync postprocess_use_numpy
        trainer context processor metric callbacks eval_callbacks monitor_config tensorboard optimizer
        lr_schedule grouped_lr_schedule runner_wrapper train_dataset train_dataset_task eval_dataset eval_dataset_task
        auto_tune filepath_prefix autotune_per_step generation_config register_path train_data eval_data
        device_num local_rank rank_id data_size npu_num_per_node use_graceful_exit print_expert_load""".split()
    ),
}

NOTED: dict[str, dict[str, tuple[object, ...]]] = {
    MODEL: {
        "use_attn_mask_compression": (False,),
        "rmsnorm_compute_2d": (False,),
        "parallel_optimizer": (False,),
        "fine_grain_interleave": (1, None),
        "offset": (0, None),  # layers moved between pipeline stages; ``core.stages`` spreads them evenly
    },
    "moe_config": {
        "moe_intermediate_size": (1407, None),  # DeepSeek's; LLaMA's experts take model_config.intermediate_size
        "first_k_dense_replace": (True, False, None),
        "group_wise_a2a": (False,),
        "use_allgather_dispatcher": (False,),
        "enable_deredundency": (False,),
        "enable_gmm_safe_tokens": (False,),
        "use_fused_ops_permute": (False,),
        "moe_shared_expert_overlap": (False,),
    },
    "parallel_config": {"context_parallel_algo": ("colossalai_cp", None), "ulysses_degree_in_cp": (1, None)},
    "recompute_config": {  # messages: what is kept then takes memory, the results are the same
        "select_comm_recompute": (False, None, []),
        "select_recompute_exclude": (False, None, []),
        "select_comm_recompute_exclude": (False, None, []),
        "parallel_optimizer_comm_recompute": (False, None),
    },
}

UNBUILT: dict[str, dict[str, tuple[object, ...]]] = {
    MODEL: {
        "qkv_concat": (False, None),
        "use_ring_attention": (False, None),
        "use_eod_attn_mask_compression": (False, None),
        "input_sliced_sig": (False, None),
        "calculate_per_token_loss": (False, None),
        "pipeline_stage": (None,),
        "return_hidden_states": (False, None),
        "chunk_prefill": (False, None),
        "quant": ("", None),
        "quant_config": (None, {}),
        "quantization": ("", None),
        "quantization_config": (None, {}),
        "llm_backend": ("", None),
        "parallel_decoding_params": (None, {}),
        "use_3d_tensor_parallel": (False, None),
        "tp_x": (1, None),
        "tp_y": (1, None),
        "tp_z": (1, None),
    },
    "moe_config": {
        "expert_model_parallel": (None,),
        "enable_cold_hot_expert": (False, None),
    },
    "parallel_config": {"seq_split_num": (1, None)},
    "parallel": {"auto_pipeline": (False, None)},
    PIPELINE: {"pipeline_scheduler": ("1f1b", None)},
    "runner_config": {},
    TOP: {"use_legacy": (True, None), "calculate_per_token_loss": (False, None)},
}

OUR_SECTIONS = (
    TOP,
    "model",
    MODEL,
    "moe_config",
    "parallel_config",
    "parallel",
    PIPELINE,
    "recompute_config",
    "swap_config",
    "runner_config",
)


def known_keys(section: str) -> tuple[str, ...]:
    """Every key that ``section`` may hold, sorted; empty for a section that is not ours."""
    names = {key.name for key in KEYS if key.section == section}
    names |= COMPOSED.get(section, frozenset()) | PASSED.get(section, frozenset())
    names |= set(NOTED.get(section, {})) | set(UNBUILT.get(section, {}))
    return tuple(sorted(names))


def defaults(section: str) -> dict[str, Any]:
    """The default of every key of ``section`` that fills a spec field."""
    return {key.name: key.default for key in KEYS if key.section == section}
