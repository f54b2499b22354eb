# SPDX-License-Identifier: Apache-2.0
"""Specs: valid ones have no problems, each broken rule is named, and all of them in one message."""

from dataclasses import replace

import pytest
from hypothesis import given, settings

from mindformers_ext.core.errors import Problems, UserError, nearest
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec, NumericsSpec, ParallelSpec
from tests.helpers.specs import model_specs

MOE = MoESpec(num_local_experts=8, num_experts_per_tok=2)
MODEL = ModelSpec(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    moe=MOE,
)


def broken(spec: MoESpec | ModelSpec | NumericsSpec) -> list[str]:
    problems = Problems("spec")
    spec.collect(problems)
    return problems.lines


@settings(max_examples=60, deadline=None)
@given(model_specs())
def test_valid_specs_have_no_problems(spec: ModelSpec) -> None:
    assert broken(spec) == []
    assert hash(spec) == hash(replace(spec))
    assert spec.model_type == ("mixtral" if spec.moe else "llama")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_chosen=9 exceeds expert_num=8"),
        ({"num_local_experts": 0}, "expert_num (num_local_experts)=0"),
        ({"router_dtype": "fp32"}, "router_dense_type='fp32'"),
        ({"topk_method": "best"}, "topk_method='best'"),
        ({"capacity_factor": 9.0}, "capacity_factor=9.0"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan"),
        ({"aux_losses": (("expert", 1.0),)}, "aux loss factor 1.0 of 'expert'"),
        ({"aux_losses": (("device", 0.1),)}, "expert_group_size is not set"),
        ({"aux_losses": (("comm", 0.1), ("comm", 0.1))}, "names a kind twice"),
        ({"aux_losses": (("load", 0.1),)}, "aux_loss_types='load'"),
        ({"expert_group_size": 3}, "expert_num=8 is not a multiple of expert_group_size=3"),
        ({"z_loss_factor": -0.1}, "z_loss_factor=-0.1"),
        ({"topk_bias_update_rate": 1.0}, "topk_bias_update_rate=1.0"),
        ({"topk_method": "noaux_tc"}, "needs n_group and topk_group"),
        ({"topk_method": "noaux_tc", "n_group": 8, "topk_group": 4}, "leaves one"),
        ({"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 5}, "topk_group=5"),
        ({"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 1}, "exceeds the 1 experts"),
        ({"aux_loss_reduce": "max"}, "aux_loss_reduce='max'"),
        ({"aux_loss_type": "global"}, "aux_loss_type='global'"),
        ({"aux_loss_type": "switch", "aux_losses": (("comm", 0.1),)}, "they are layerwise alone"),
        ({"aux_loss_type": "switch", "aux_losses": (("expert", 0.1),)}, "set aux_loss_reduce: mean"),
    ],
)
def test_broken_routing_is_named(change: dict, words: str) -> None:
    assert any(words in line for line in broken(replace(MOE, **change)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads=5 is not a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head width 7 is odd"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
        ({"eos_token_id": 64}, "eos_token_id=64 is outside the vocabulary of 64"),
        ({"more_eos_token_ids": (3, 99)}, "eos_token_id=99 is outside the vocabulary of 64"),
    ],
)
def test_broken_model_is_named(change: dict, words: str) -> None:
    assert any(words in line for line in broken(replace(MODEL, **change)))


def test_unknown_types_are_named() -> None:
    assert "compute_dtype='fp16' is unknown" in broken(NumericsSpec(compute_dtype="fp16"))[0]


def test_every_problem_stands_in_one_message() -> None:
    problems = Problems("a.yaml")
    replace(MODEL, vocab_size=-1, head_dim=3, moe=replace(MOE, num_experts_per_tok=9)).collect(problems)
    with pytest.raises(UserError) as caught:
        problems.raise_if_any()
    text = str(caught.value)
    assert text.startswith("a.yaml: 3 problems\n  - ")
    assert "vocab_size=-1" in text and "head width 3" in text and "num_experts_chosen=9" in text


def test_no_problem_raises_nothing() -> None:
    Problems("nothing").raise_if_any()


def test_the_nearest_word() -> None:
    assert nearest("capcity_factor", ["capacity_factor", "expert_num"]) == "did you mean 'capacity_factor'?"
    assert nearest("xyz", ["capacity_factor"]) == "known: capacity_factor"
    assert nearest("qqqq", [f"word_{i}" for i in range(40)]).startswith("the nearest known are word_")


def test_routing_groups_follow_sequence_parallel() -> None:
    cut = ParallelSpec(data_parallel=2, model_parallel=4, use_seq_parallel=True)
    whole = replace(cut, use_seq_parallel=False)
    assert (cut.groups, cut.router_model_parallel) == (8, 1)
    assert (whole.groups, whole.router_model_parallel) == (2, 4)


def test_so_many_problems_that_nobody_reads_them_are_raised_at_once() -> None:
    problems = Problems("the file")
    with pytest.raises(UserError) as caught:
        problems.unknown_keys("x", (f"key{number}" for number in range(10**9)), ["name"])  # would take weeks
    assert len(str(caught.value).splitlines()) == 202 and "reading stopped after 200" in str(caught.value)
