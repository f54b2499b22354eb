# SPDX-License-Identifier: Apache-2.0
"""Weight tables: total, exact both ways, and loud about every tensor that does not fit."""

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.tensors import MappingReader
from mindformers_ext.weights.convert import (
    detect_style,
    iter_to_hf,
    iter_to_mindspore,
    plan_to_hf,
    plan_to_mindspore,
    rule_set,
    to_hf,
    to_mindspore,
)
from mindformers_ext.weights.mixtral import STYLES
from mindformers_ext.weights.rules import Rule, RuleSet, bind
from mindformers_ext.weights.transforms import SplitHalves


def spec_of(experts=4, layers=2, tied=False, **sizes):
    base = dict(
        vocab_size=11,
        hidden_size=12,
        intermediate_size=5,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=2,
        tie_word_embeddings=tied,
    )
    moe = MoESpec(num_local_experts=experts, num_experts_per_tok=1) if experts else None
    return ModelSpec(**(base | sizes), moe=moe)


def hf_weights(spec, style="per_expert", dtype=np.float32, seed=0):
    """Random tensors under the names and shapes written out by hand here, not taken from the tables."""
    rng = np.random.default_rng(seed)
    V, D, F, P = spec.vocab_size, spec.hidden_size, spec.intermediate_size, spec.head_dim
    q, kv = spec.num_attention_heads * P, spec.num_key_value_heads * P
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    for i in range(spec.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (D,),
            layer + "post_attention_layernorm.weight": (D,),
            layer + "self_attn.q_proj.weight": (q, D),
            layer + "self_attn.k_proj.weight": (kv, D),
            layer + "self_attn.v_proj.weight": (kv, D),
            layer + "self_attn.o_proj.weight": (D, q),
        }
        if spec.moe is None:
            shapes |= {
                layer + f"mlp.{n}_proj.weight": s for n, s in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F)))
            }
            continue
        experts = spec.moe.num_local_experts
        prefix = layer + ("mlp." if style == "fused" else "block_sparse_moe.")
        shapes[prefix + "gate.weight"] = (experts, D)
        if style == "per_expert":
            for e in range(experts):
                shapes |= {
                    prefix + f"experts.{e}.{w}.weight": (D, F) if w == "w2" else (F, D) for w in ("w1", "w2", "w3")
                }
        else:
            shapes |= {
                prefix + "experts.gate_up_proj": (experts, 2 * F, D),
                prefix + "experts.down_proj": (experts, D, F),
            }
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype and array.shape == right[name].shape, name
        assert array.tobytes() == right[name].tobytes(), name


@pytest.mark.parametrize("experts", [0, 2, 4, 8, 12])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip_is_bit_exact(experts, style, dtype):
    spec = spec_of(experts)
    weights = hf_weights(spec, style, dtype)
    assert_same(to_hf(to_mindspore(weights, spec), spec, style), weights)


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(1, 13),
    layers=st.integers(1, 12),
    heads=st.sampled_from([(4, 2), (6, 3), (4, 1), (5, 5)]),
    head_dim=st.sampled_from([2, 6]),
    hidden=st.integers(1, 9),
    ffn=st.integers(1, 7),
    vocab=st.integers(3, 20),
    tied=st.booleans(),
    style=st.sampled_from(sorted(STYLES)),
    seed=st.integers(0, 99),
)
def test_round_trip_at_any_size(experts, layers, heads, head_dim, hidden, ffn, vocab, tied, style, seed):
    spec = spec_of(
        experts,
        layers,
        tied,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head_dim,
        hidden_size=hidden,
        intermediate_size=ffn,
        vocab_size=vocab,
    )
    weights = hf_weights(spec, style, seed=seed)
    assert detect_style(weights, spec) == style
    assert_same(to_hf(to_mindspore(weights, spec), spec, style), weights)


def test_names_shapes_and_values_of_mixtral():
    spec = spec_of(experts=12, layers=11)
    weights = hf_weights(spec)
    ms = to_mindspore(weights, spec)
    assert ms["model.tok_embeddings.embedding_weight"].shape == (11, 12)
    for layer in (0, 2, 10):
        theirs, ours = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.feed_forward."
        np.testing.assert_array_equal(ms[ours + "router.dense.weight"], weights[theirs + "gate.weight"])
        for name in ("w1", "w2", "w3"):
            stacked = ms[ours + f"ffn.{name}.weight"]
            assert stacked.shape == ((12, 12, 5) if name == "w2" else (12, 5, 12))
            for e in range(12):  # experts.10 is the eleventh expert, not the third
                np.testing.assert_array_equal(stacked[e], weights[theirs + f"experts.{e}.{name}.weight"])
        for name, attention in (("q", "wq"), ("k", "wk"), ("v", "wv"), ("o", "wo")):
            np.testing.assert_array_equal(
                ms[f"model.layers.{layer}.attention.{attention}.weight"],
                weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"],
            )
    assert len(ms) == 3 + 11 * 10


def test_names_of_llama():
    spec = spec_of(experts=0, layers=1)
    weights, ours = hf_weights(spec), "model.layers.0.feed_forward."
    ms = to_mindspore(weights, spec)
    for name, theirs in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        np.testing.assert_array_equal(ms[ours + f"{name}.weight"], weights[f"model.layers.0.mlp.{theirs}_proj.weight"])


def test_fused_and_per_expert_make_the_same_model():
    spec = spec_of(experts=8)
    weights = hf_weights(spec, "fused")
    ms = to_mindspore(weights, spec)
    gate_up = weights["model.layers.1.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(ms["model.layers.1.feed_forward.ffn.w1.weight"], gate_up[:, :5])
    np.testing.assert_array_equal(ms["model.layers.1.feed_forward.ffn.w3.weight"], gate_up[:, 5:])
    assert_same(to_mindspore(to_hf(ms, spec), spec), ms)
    assert_same(to_hf(ms, spec, "fused"), weights)


def test_results_do_not_alias_the_source():
    spec = spec_of(experts=0)
    weights = hf_weights(spec)
    ms = to_mindspore(weights, spec)
    before = weights["model.norm.weight"].copy()
    ms["model.norm_out.weight"] += 1
    np.testing.assert_array_equal(weights["model.norm.weight"], before)


@pytest.mark.parametrize("side", ["hf", "ms"])
@pytest.mark.parametrize("fault", ["delete", "rename", "duplicate", "reshape", "integer"])
def test_every_single_fault_is_named(side, fault):
    spec = spec_of(experts=2, layers=1)
    source = hf_weights(spec) if side == "hf" else to_mindspore(hf_weights(spec), spec)
    plan = plan_to_mindspore if side == "hf" else plan_to_hf
    for name, array in source.items():
        broken = dict(source)
        named = [name]
        if fault in ("delete", "rename"):
            del broken[name]
        if fault in ("rename", "duplicate"):
            broken[name + ".x"] = array
            named = [name, name + ".x"] if fault == "rename" else [name + ".x"]
        if fault == "reshape":
            broken[name] = array[:-1]
        if fault == "integer":
            broken[name] = array.astype(np.int8)
        with pytest.raises(UserError) as error:
            plan(MappingReader(broken), spec)
        assert all(f"'{part}'" in str(error.value) for part in named)
        assert len(re.findall("^  - ", str(error.value), re.MULTILINE)) == len(named)


def test_all_faults_come_in_one_message_and_long_lists_are_counted():
    spec = spec_of(experts=12, layers=4)
    weights = {name: array for name, array in hf_weights(spec).items() if ".w3." not in name}
    weights["model.extra"] = np.zeros(1, np.float32)
    weights["model.norm.weight"] = np.zeros(3, np.float32)
    with pytest.raises(UserError, match="28 more tensors are missing: 48 in all") as error:
        to_mindspore(weights, spec)
    for text in ("'model.extra' is unexpected", "'model.norm.weight' has shape (3,): the model's sizes ask for (12,)"):
        assert text in str(error.value)


def test_more_experts_in_the_file_than_in_the_config():
    weights = hf_weights(spec_of(experts=8))
    with pytest.raises(UserError, match=r"experts\.4\.w1\.weight' is unexpected"):
        to_mindspore(weights, spec_of(experts=4))
    with pytest.raises(UserError, match=r"experts\.8\.w1\.weight' \(5, 12\) is missing"):
        to_mindspore(weights, spec_of(experts=9))


def test_training_state_stays_behind_by_rule():
    spec = spec_of(experts=2, layers=1)
    weights = hf_weights(spec)
    ms = to_mindspore(weights, spec)
    state = {f"{prefix}.{name}": array for prefix in ("adam_m", "adam_v") for name, array in ms.items()}
    for name in ("global_step", "epoch_num", "step_num", "scale_sense", "loss_scale"):
        state[name] = np.ones(1, np.int32)
    for name in ("topk_bias", "expert_load"):
        state[f"model.layers.0.feed_forward.router.router.{name}"] = np.ones(2, np.float32)
    plan = plan_to_hf(MappingReader(ms | state), spec)
    assert {name for name, _ in plan.ignored} == state.keys()
    assert_same(to_hf(ms | state, spec), weights)
    with pytest.raises(UserError, match="'adam_m.typo' is unexpected"):
        to_hf(ms | {"adam_m.typo": np.ones(1)}, spec)


@pytest.mark.parametrize("experts", [0, 4])
def test_tied_head(experts):
    spec = spec_of(experts, tied=True)
    weights = hf_weights(spec)
    ms = to_mindspore(weights, spec)
    assert "lm_head.weight" not in ms
    assert_same(to_hf(ms, spec), weights)
    twin = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}
    assert_same(to_mindspore(twin, spec), ms)
    twin["lm_head.weight"] = twin["lm_head.weight"] + 1
    with pytest.raises(UserError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        to_mindspore(twin, spec)
    assert_same(to_hf(ms | {"lm_head.weight": ms["model.tok_embeddings.embedding_weight"]}, spec), weights)


def test_untied_head_must_be_there():
    spec = spec_of()
    weights = hf_weights(spec)
    del weights["lm_head.weight"]
    with pytest.raises(UserError, match=r"'lm_head.weight' \(11, 12\) is missing"):
        to_mindspore(weights, spec)


def test_rotary_constants_are_ignored():
    spec = spec_of(layers=1)
    weights = hf_weights(spec)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, np.float32)}
    assert_same(to_mindspore(weights | extra, spec), to_mindspore(weights, spec))


@pytest.mark.parametrize("dtype, kind", [("fp32", np.float32), ("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_cast(dtype, kind):
    spec = spec_of()
    weights = hf_weights(spec)
    ms = to_mindspore(weights, spec, dtype=dtype)
    assert {array.dtype for array in ms.values()} == {np.dtype(kind)}
    assert_same(to_hf(ms, spec), {name: array.astype(kind) for name, array in weights.items()})
    plan = plan_to_mindspore(MappingReader(weights), spec, dtype)
    assert {target.name: (target.shape, target.dtype) for target in plan.targets} == {
        name: (array.shape, array.dtype) for name, array in ms.items()
    }


def test_overflow_is_counted_and_refused_unless_allowed():
    spec = spec_of(experts=2, layers=1)
    weights = hf_weights(spec)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    weights[name][0, :2] = 65504.0, -70000.0
    weights[name][1, :2] = np.inf, np.nan  # these were lost before
    with pytest.raises(UserError, match=re.escape(f"'{name}': 1 of 60 values do not fit float16")):
        to_mindspore(weights, spec, dtype="fp16")
    made = dict(iter_to_mindspore(MappingReader(weights), spec, dtype="fp16", allow_overflow=True))
    row = made["model.layers.0.feed_forward.ffn.w2.weight"][1, 0]
    assert row[0] == 65504.0 and np.isneginf(row[1])
    to_mindspore(weights, spec, dtype="bf16")  # bfloat16 reaches as far as float32


@pytest.mark.parametrize("name", ["int8", "float64", ""])
def test_unknown_dtype(name):
    with pytest.raises(UserError, match="choose one of float32, float16, bfloat16"):
        to_mindspore({}, spec_of(), dtype=name or "none")


def test_unknown_style():
    with pytest.raises(UserError, match="per_expert, fused, fused_block_sparse"):
        rule_set(spec_of(), "stacked")


def test_experts_of_different_types_need_a_dtype():
    spec = spec_of(experts=2, layers=1)
    weights = hf_weights(spec)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    weights[name] = weights[name].astype(np.float16)
    with pytest.raises(UserError, match="choose its type with --dtype"):
        to_mindspore(weights, spec)
    assert to_mindspore(weights, spec, dtype="fp32")["model.layers.0.feed_forward.ffn.w1.weight"].dtype == np.float32


def test_iterators_check_before_the_first_tensor_and_read_one_target_at_a_time():
    spec = spec_of(experts=4)

    class Counting(MappingReader):
        reads = 0

        def read(self, name, index=()):
            type(self).reads += 1
            return super().read(name, index)

    weights = hf_weights(spec)
    with pytest.raises(UserError):
        iter_to_mindspore(Counting(weights | {"x": np.zeros(1)}), spec)
    assert Counting.reads == 0
    stream = iter_to_mindspore(Counting(weights), spec)
    name, _ = next(stream)
    assert name == "model.tok_embeddings.embedding_weight" and Counting.reads == 1
    rest = [name for name, _ in stream]
    assert rest[0].startswith("model.layers.0.") and rest[-1] == "lm_head.weight"
    assert Counting.reads == len(weights)
    ms = to_mindspore(weights, spec)
    assert [n for n, _ in iter_to_hf(MappingReader(ms), spec)][-1] == "lm_head.weight"


def test_a_table_with_two_rules_for_one_name_fails_to_build():
    one = Rule("a.{layer}.weight", ("b.{layer}.weight",), "D")
    RuleSet((one,), spec_of())
    for other in (Rule("c.{layer}.weight", one.ms, "D"), Rule(one.hf, ("c.{layer}.weight",), "D")):
        with pytest.raises(ValueError, match="two rules for the .* a.0.weight|two rules for the .* b.0.weight"):
            RuleSet((one, other), spec_of())
    with pytest.raises(ValueError, match="one name to two tensors"):
        RuleSet((Rule("a", ("b", "b"), "E 2F D", SplitHalves()),), spec_of())
    with pytest.raises(ValueError, match="makes 2 tensors"):
        bind(Rule("a", ("b",), "E 2F D", SplitHalves()), 0, {"E": 2, "2": 2, "F": 3, "D": 4})
