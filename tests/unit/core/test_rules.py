# SPDX-License-Identifier: Apache-2.0
"""The rules of a network, its cluster and the job: what is refused, what is suggested, what is only warned about."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.cluster.cluster_rules import (
    JUDGED_MODES,
    TOGETHER,
    check_network,
    effective_spec,
    nearest_sizes,
    router_tokens,
)
from mindformers_ext.core.cluster.judged import judge_network, read_network
from mindformers_ext.core.config.run import run_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec, ParallelSpec
from tests.helpers.pretrain import changed
from tests.helpers.specs import network_specs

MODEL = ModelSpec(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    moe=MoESpec(num_local_experts=8, num_experts_per_tok=2),
)
SEED = NetworkSpec(
    model=MODEL,
    seq_length=4096,
    parallel=ParallelSpec(
        data_parallel=8,
        expert_parallel=8,
        pipeline_stage=2,
        micro_batch_num=16,
        enable_alltoall=True,
        vocab_emb_dp=False,
        device_num=16,
    ),
)


CONSTANT = {"aux_loss_type": "legacy_constant", "aux_losses": (("expert", 0.1),)}
BALANCED = MoESpec(num_local_experts=8, num_experts_per_tok=2, balance_via_topk_bias=True)


def with_sizes(**changes: Any) -> NetworkSpec:
    return replace(SEED, parallel=replace(SEED.parallel, **changes))


def refusal(spec: NetworkSpec, run_mode: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        check_network(spec, run_mode)
    return str(caught.value)


def test_the_seed_fits() -> None:
    assert check_network(SEED) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"device_num": 8},
            ["8*1*2*1 = 16 is not the device count 8", "data_parallel=8, model_parallel=1, pipeline_stage=1"],
        ),
        (
            {"device_num": 1},  # a cluster's file in one process
            ["= 16 is not the device count 1", "start 16 processes", "dryrun.py --config FILE --worker_num 16"],
        ),
        ({"data_parallel": 3}, ["3*1*2*1 = 6", "data_parallel=8, model_parallel=1, pipeline_stage=2"]),
        ({"expert_parallel": 16}, ["expert_parallel=16 exceeds data_parallel=8", "expert_parallel that fits is 8"]),
        (
            {"expert_parallel": 3},
            [
                "data_parallel=8 is not a multiple of expert_parallel=3",
                "fits is 2",
                "expert_num=8 is not a multiple of expert_parallel=3",
            ],
        ),
        ({"context_parallel": 2}, ["context_parallel=2", "set context_parallel: 1"]),
        (
            {
                "model_parallel": 16,
                "data_parallel": 1,
                "pipeline_stage": 1,
                "expert_parallel": 1,
                "use_seq_parallel": True,
            },
            ["n_kv_heads=8 is not a multiple of model_parallel=16", "divides every width is 8"],
        ),
        ({"micro_batch_num": 1}, ["micro_batch_num=1 is below pipeline_stage=2", "at least 2"]),
        ({"data_parallel": 0}, ["data_parallel=0"]),
        ({"micro_batch_num": True}, ["micro_batch_num=True"]),
    ],
)
def test_broken_sizes_are_named(changes: dict[str, Any], words: list[str]) -> None:
    text = refusal(with_sizes(**changes))
    for word in words:
        assert word in text


def test_a_bias_needs_the_load_of_all_layers() -> None:
    text = refusal(replace(SEED, model=replace(MODEL, moe=BALANCED)))
    assert "balance_via_topk_bias=True with pipeline_stage=2" in text and "aux_loss_factor instead" in text


def test_a_tied_table_does_not_stand_on_two_stages() -> None:
    tied = replace(SEED, model=replace(SEED.model, tie_word_embeddings=True))
    assert "tie_word_embeddings=True with pipeline_stage=2" in refusal(tied)
    parallel = replace(tied.parallel, pipeline_stage=1, device_num=8)
    assert check_network(replace(tied, parallel=parallel)) is not None


def test_more_stages_than_layers() -> None:
    small = replace(SEED, model=replace(MODEL, num_hidden_layers=1))
    assert "pipeline_stage=2 exceeds num_layers=1" in refusal(small)


def test_router_load() -> None:
    assert check_network(replace(SEED, batch_size=16)) == []  # 2 * 65536 is exactly the limit
    text = refusal(replace(SEED, batch_size=17))
    assert "2*69632 = 139264 exceeds max_router_load=131072" in text and "at most 65536 tokens" in text


@pytest.mark.parametrize(("run_mode", "tokens"), [("train", 4096), ("predict", 1024), ("eval", 1024)])
def test_tokens_of_a_group(run_mode: str, tokens: int) -> None:
    spec = replace(SEED, batch_size=2, parallel=ParallelSpec(data_parallel=4, model_parallel=2, use_seq_parallel=True))
    assert router_tokens(spec, run_mode) == tokens


def test_lengths() -> None:
    assert "seq_length=8192 exceeds max_position_embedding=4096" in refusal(replace(SEED, seq_length=8192))
    cut = with_sizes(data_parallel=1, expert_parallel=1, model_parallel=8, use_seq_parallel=True)
    assert "seq_length=4095 is not a multiple of model_parallel" in refusal(replace(cut, seq_length=4095))


def test_rules_of_run_modes() -> None:
    assert "pipeline_stage=2 in eval" in refusal(replace(SEED, batch_size=8), "eval")
    assert "model_config.batch_size=1 is not a multiple of data_parallel=8" in refusal(SEED, "predict")
    assert "run_mode='trian'" in refusal(SEED, "trian")
    predict = with_sizes(data_parallel=1, expert_parallel=1, model_parallel=8, pipeline_stage=1, device_num=8)
    assert check_network(predict, TOGETHER) == []
    for mode in ("predict", "eval", "finetune"):
        assert any("without sequence parallel" in line for line in check_network(predict, mode))


def test_experts_on_several_devices_need_their_exchange() -> None:
    spec = with_sizes(enable_alltoall=False)
    assert "set parallel.enable_alltoall: True" in refusal(spec)
    assert any(
        "enable_alltoall=False" in line
        for line in check_network(
            replace(
                spec, parallel=replace(spec.parallel, pipeline_stage=1, data_parallel=8, device_num=8), batch_size=8
            ),
            "predict",
        )
    )


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (with_sizes(vocab_emb_dp=True), "vocab_emb_dp becomes False"),
        (with_sizes(pipeline_stage=1, device_num=8), "micro_batch_num=16 has no effect"),
        (
            with_sizes(data_parallel=3, expert_parallel=1, enable_parallel_optimizer=True, device_num=6),
            "vocab_size=32000",
        ),
        (with_sizes(pipeline_stage=1, device_num=8, pp_interleave_num=2), "pp_interleave_num=2 has no effect"),
        (with_sizes(pipeline_interleave=True), "no stage has several parts"),
        (with_sizes(parallel_mode="data_parallel"), "gradients_mean=False has no effect"),
        (with_sizes(parallel_mode="data_parallel"), "data_parallel=8, pipeline_stage=2, expert_parallel=8"),
        (replace(SEED, model=replace(MODEL, moe=None)), "expert_parallel=8 has no effect"),
        (replace(with_sizes(pipeline_stage=1, device_num=8), model=replace(MODEL, moe=BALANCED)), "never moves"),
        (
            replace(SEED, return_extra_loss=False, model=replace(MODEL, moe=replace(MODEL.moe, z_loss_factor=0.1))),
            "return_extra_loss=False",
        ),
        (replace(SEED, model=replace(MODEL, moe=replace(MODEL.moe, **CONSTANT))), "balances nothing"),
    ],
)
def test_warnings(spec: NetworkSpec, word: str) -> None:
    assert any(word in line for line in check_network(spec))


def test_an_uneven_vocabulary_is_only_warned_about() -> None:
    spec = with_sizes(data_parallel=1, expert_parallel=1, model_parallel=8, use_seq_parallel=True)
    spec = replace(spec, model=replace(MODEL, vocab_size=32001))
    assert any("the output layer" in line for line in check_network(spec))


def test_outside_semi_auto_every_size_is_one() -> None:
    kept, warnings = effective_spec(with_sizes(parallel_mode="stand_alone", model_parallel=4, use_seq_parallel=True))
    sizes = kept.parallel
    assert (sizes.data_parallel, sizes.model_parallel, sizes.pipeline_stage, sizes.expert_parallel) == (1, 1, 1, 1)
    assert (sizes.use_seq_parallel, sizes.full_batch, sizes.groups) == (False, False, 1)
    assert len(warnings) == 1 and "use_seq_parallel=True" in warnings[0]
    assert effective_spec(kept) == (kept, [])


@settings(max_examples=300, deadline=None)
@given(network_specs(), st.sampled_from(JUDGED_MODES))
def test_what_is_accepted_keeps_every_product(spec: NetworkSpec, run_mode: str) -> None:
    try:
        check_network(spec, run_mode)
    except UserError:
        return
    kept, _ = effective_spec(spec)
    model, sizes = kept.model, kept.parallel
    dp, mp, pp, ep = sizes.data_parallel, sizes.model_parallel, sizes.pipeline_stage, sizes.expert_parallel
    if sizes.parallel_mode == "semi_auto_parallel":
        assert dp * mp * pp == sizes.device_num
    assert sizes.context_parallel == 1
    widths = (model.num_attention_heads, model.num_key_value_heads, model.intermediate_size, model.hidden_size)
    assert all(width % mp == 0 for width in widths)
    assert model.num_hidden_layers >= pp * sizes.pp_interleave_num
    assert sizes.pp_interleave_num == 1 or sizes.pipeline_interleave
    if model.moe:
        assert ep <= dp and dp % ep == 0 and model.moe.num_local_experts % ep == 0
        assert router_tokens(kept, run_mode) * model.moe.num_experts_per_tok <= model.moe.max_router_load
    if run_mode in ("train", "finetune"):
        assert pp == 1 or sizes.micro_batch_num >= pp
    if run_mode == "eval":
        assert pp == 1


POWERS = st.sampled_from([1, 2, 4, 8, 16])


@settings(max_examples=300, deadline=None)
@given(dp=POWERS, mp=POWERS, pp=POWERS, ep=POWERS, micro=POWERS, devices=st.just(0) | POWERS, cut=st.booleans())
def test_accepted_means_exactly_the_rules(
    dp: int, mp: int, pp: int, ep: int, micro: int, devices: int, cut: bool
) -> None:
    devices = devices or dp * mp * pp
    sizes = ParallelSpec(
        data_parallel=dp,
        model_parallel=mp,
        pipeline_stage=pp,
        expert_parallel=ep,
        micro_batch_num=micro,
        use_seq_parallel=cut,
        enable_alltoall=True,
        device_num=devices,
    )
    fits = (
        dp * mp * pp == devices
        and mp <= 8  # key-value heads
        and ep <= min(dp, 8)  # all are powers of two, so the smaller divides the larger; 8 experts
        and (pp == 1 or micro >= pp)
    )
    try:
        check_network(replace(SEED, parallel=sizes))
        accepted = True
    except UserError:
        accepted = False
    assert accepted == fits


@settings(max_examples=100, deadline=None)
@given(network_specs())
def test_the_suggested_sizes_fit(spec: NetworkSpec) -> None:
    dp, mp, pp = nearest_sizes(spec.parallel, spec.model)
    assert dp * mp * pp == spec.parallel.device_num
    sizes = ParallelSpec(
        data_parallel=dp,
        model_parallel=mp,
        pipeline_stage=pp,
        micro_batch_num=pp,
        use_seq_parallel=True,
        device_num=spec.parallel.device_num,
    )
    try:
        check_network(replace(spec, parallel=sizes))
    except UserError as error:  # only rules that no choice of sizes can mend
        assert all("seq_length" in line for line in str(error).splitlines()[1:]), error


def test_data_parallel_always_fits() -> None:
    model = replace(MODEL, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=1)
    assert nearest_sizes(ParallelSpec(model_parallel=7, device_num=7), model) == (7, 1, 1)


@pytest.mark.parametrize(
    "changes, engine, refused",
    [
        ({}, "ms", True),
        ({}, "pt", False),
        ({"moe_config.capacity_factor": 1.1}, "ms", False),
        ({"moe_config.use_gmm": True}, "ms", False),
        ({"parallel.parallel_mode": 0}, "ms", False),
    ],
)
def test_dropless_slots_do_not_stand_in_a_cut_graph(changes: dict[str, Any], engine: str, refused: bool) -> None:
    config = changed({"moe_config.capacity_factor": -1, "engine": engine, "context.device_target": "CPU", **changes})
    run = run_spec_from_yaml(config)
    spec, _ = read_network(config, run, 16)
    with pytest.raises(UserError, match="set use_gmm: True") if refused else nullcontext():
        judge_network(spec, run, "train")
