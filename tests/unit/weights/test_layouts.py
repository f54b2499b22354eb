# SPDX-License-Identifier: Apache-2.0
"""Layouts: values written out by hand, exact inverses, every pair, and contradictions that are refused."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.tensors import MappingReader
from mindformers_ext.weights import views
from mindformers_ext.weights.convert import (
    plan_relayout,
    plan_to_hf,
    plan_to_mindspore,
    rule_set,
)
from mindformers_ext.weights.layouts import Layout, Seen, resolve_layout, see_layout
from mindformers_ext.weights.model_sizes import sizes_from_shapes
from mindformers_ext.weights.transforms import GroupedQkv, Identity, InterleavedRows, SplitHalves, Stack, Transposed
from tests.unit.weights.test_rules_weights import assert_same, hf_weights, spec_of

LAYOUTS = [Layout(experts, qkv) for experts in ("dense", "gmm") for qkv in (False, True)]
MIXTRAL, LLAMA = spec_of(experts=3), spec_of(experts=0)


def converted(weights, spec, layout, dtype=None):
    return dict(plan_to_mindspore(MappingReader(weights), spec, dtype, layout).run(MappingReader(weights)))


def relaid(ms, spec, source, target, dtype=None):
    return dict(plan_relayout(MappingReader(ms), spec, source, target, dtype).run(MappingReader(ms)))


def test_gmm_swaps_the_experts_and_nothing_else():
    weights = hf_weights(MIXTRAL)
    dense, gmm = converted(weights, MIXTRAL, Layout()), converted(weights, MIXTRAL, Layout("gmm"))
    assert dense.keys() == gmm.keys()
    for name, array in dense.items():
        wanted = array.transpose(0, 2, 1) if ".ffn." in name else array
        np.testing.assert_array_equal(gmm[name], wanted)
        assert gmm[name].flags.c_contiguous


def test_qkv_lies_group_by_group():
    """6 heads, 3 kv heads, width 2: each group is 4 rows of q, 2 of k, 2 of v."""
    weights = hf_weights(MIXTRAL)
    ms = converted(weights, MIXTRAL, Layout("dense", True))
    q, k, v = (weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    wanted = np.concatenate([q[0:4], k[0:2], v[0:2], q[4:8], k[2:4], v[2:4], q[8:12], k[4:6], v[4:6]])
    np.testing.assert_array_equal(ms["model.layers.1.attention.w_qkv.weight"], wanted)
    assert "model.layers.1.attention.wq.weight" not in ms and "model.layers.1.feed_forward.ffn.w1.weight" in ms


def test_gate_and_up_of_a_dense_model_alternate():
    weights = hf_weights(LLAMA)
    ms = converted(weights, LLAMA, Layout("dense", True))
    both = ms["model.layers.0.feed_forward.w_gate_hidden.weight"]
    np.testing.assert_array_equal(both[0::2], weights["model.layers.0.mlp.gate_proj.weight"])
    np.testing.assert_array_equal(both[1::2], weights["model.layers.0.mlp.up_proj.weight"])
    assert not any(".w1." in name or ".w3." in name for name in ms)


@pytest.mark.parametrize("style", ["per_expert", "fused", "fused_block_sparse"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip_through_every_layout(style, layout, dtype):
    weights = hf_weights(MIXTRAL, style, dtype)
    ms = MappingReader(converted(weights, MIXTRAL, layout))
    assert_same(dict(plan_to_hf(ms, MIXTRAL, style, layout=layout).run(ms)), weights)


@pytest.mark.parametrize("spec, layouts", [(MIXTRAL, LAYOUTS), (LLAMA, [Layout(), Layout("dense", True)])])
def test_every_pair_of_layouts(spec, layouts):
    weights = hf_weights(spec)
    by_layout = {layout: converted(weights, spec, layout) for layout in layouts}
    for source, target in itertools.product(layouts, layouts):
        assert_same(relaid(by_layout[source], spec, source, target), by_layout[target])


def test_a_relayout_reads_each_tensor_as_it_lies():
    """Taking apart and putting together again leaves nothing behind in the plan."""
    gmm = MappingReader(converted(hf_weights(MIXTRAL), MIXTRAL, Layout("gmm", True)))
    plan = plan_relayout(gmm, MIXTRAL, Layout("gmm", True), Layout("gmm", True))
    assert all(step.view == views.whole(step.target.name, step.target.shape) for step in plan.steps)
    turned = plan_relayout(gmm, MIXTRAL, Layout("gmm", True), Layout())
    (w1,) = [step for step in turned.steps if step.target.name == "model.layers.0.feed_forward.ffn.w1.weight"]
    assert isinstance(w1.view, views.Slab) and w1.view.swapped and str(w1).endswith("ffn.w1.weight, transposed")


def test_router_state_stays_in_a_relayout_and_training_state_does_not():
    ms = converted(hf_weights(MIXTRAL), MIXTRAL, Layout())
    bias = "model.layers.0.feed_forward.router.router.topk_bias"
    state = {bias: np.float32([1, 2, 1e9]), "adam_m.lm_head.weight": ms["lm_head.weight"], "global_step": np.int32([3])}
    made = relaid(ms | state, MIXTRAL, Layout(), Layout("gmm"), dtype="fp16")
    assert made.keys() == ms.keys() | {bias}
    np.testing.assert_array_equal(made[bias], state[bias])


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["identity", "stack", "halves", "qkv", "rows"]),
    swap=st.booleans(),
    n=st.integers(1, 4),
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    rep=st.integers(1, 3),
    block=st.integers(1, 40),
    strip=st.integers(1, 40),
    rows=st.integers(1, 9),
)
def test_transforms_have_exact_inverses_in_any_blocks(kind, swap, n, sizes, rep, block, strip, rows):
    a, b, c = sizes
    transform, shapes = {
        "identity": (Identity(), [(a, b, c)]),
        "stack": (Stack(), [(a, b)] * n),
        "halves": (SplitHalves(), [(a, 2 * b, c)]),
        "rows": (InterleavedRows(), [(a, b)] * 2),
        "qkv": (GroupedQkv(n), [(n * rep * a, b), (n * a, b), (n * a, b)]),
    }[kind]
    if swap and kind in ("identity", "stack", "halves"):
        transform = Transposed(transform)
    rng = np.random.default_rng(0)
    hf = {f"hf{i}": rng.normal(size=shape).astype(ml_dtypes.bfloat16) for i, shape in enumerate(shapes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "BLOCK", block)
        patch.setattr(views, "STRIP", strip)
        patch.setattr(views, "ROWS", rows)
        made = transform.to_ms([views.whole(name, array.shape) for name, array in hf.items()])
        ms = {f"ms{i}": flat(view, hf).reshape(view.shape) for i, view in enumerate(made)}
        back = transform.to_hf([views.whole(name, array.shape) for name, array in ms.items()], shapes)
        for (name, array), view in zip(hf.items(), back, strict=True):
            assert view.shape == array.shape and flat(view, ms).tobytes() == array.tobytes(), name
        if kind == "halves" and swap:  # no conversion composes it: the Hugging Face side between is per expert
            return
        # and composed, without a stored tensor between
        again = transform.to_ms(transform.to_hf([views.whole(n, x.shape) for n, x in ms.items()], shapes))
        for (name, array), view in zip(ms.items(), again, strict=True):
            assert flat(view, ms).tobytes() == array.tobytes(), name


def flat(view, arrays):
    class Reads:
        def read(self, name, index):
            return MappingReader(arrays).read(name, index)

        def finish(self, name, block):
            return block

    blocks = list(views.stream(view, Reads()))
    return np.concatenate([np.ascontiguousarray(block).reshape(-1) for block in blocks])


def infos(ms):
    return MappingReader(ms).infos


SQUARE = spec_of(experts=3, intermediate_size=12)


def test_what_tensors_tell():
    for layout in LAYOUTS:
        made = infos(converted(hf_weights(MIXTRAL), MIXTRAL, layout))
        assert see_layout(made, MIXTRAL) == Seen(layout.experts, layout.qkv_concat)
        assert resolve_layout(made, MIXTRAL, None) == layout
    assert see_layout(infos(converted(hf_weights(SQUARE), SQUARE, Layout("gmm"))), SQUARE) == Seen(None, False)
    assert resolve_layout(infos(converted(hf_weights(LLAMA), LLAMA, Layout())), LLAMA, None) == Layout()


def test_what_contradicts_is_refused():
    gmm = infos(converted(hf_weights(MIXTRAL), MIXTRAL, Layout("gmm")))
    with pytest.raises(UserError, match="its tensors says gmm, its description says dense"):
        resolve_layout(gmm, MIXTRAL, Layout("dense"))
    with pytest.raises(UserError, match="its tensors says gmm, --input_layout says dense"):
        resolve_layout(gmm, MIXTRAL, None, "dense")
    with pytest.raises(UserError, match="description says qkv_concat True, its tensors False"):
        resolve_layout(gmm, MIXTRAL, Layout("gmm", True))
    square = infos(converted(hf_weights(SQUARE), SQUARE, Layout("gmm")))
    with pytest.raises(UserError, match="both 12 .*--input_layout gmm"):
        resolve_layout(square, SQUARE, None)
    assert resolve_layout(square, SQUARE, Layout("gmm")) == Layout("gmm")
    assert resolve_layout(square, SQUARE, None, "gmm") == Layout("gmm")
    with pytest.raises(UserError, match="contradictory"):
        resolve_layout(square, SQUARE, Layout("gmm"), "dense")


def test_layers_of_different_layouts_are_refused():
    dense, gmm = (converted(hf_weights(MIXTRAL), MIXTRAL, Layout(experts)) for experts in ("dense", "gmm"))
    mixed = {name: gmm[name] if ".layers.1." in name else array for name, array in dense.items()}
    with pytest.raises(UserError, match="some layers' experts"):
        resolve_layout(infos(mixed), MIXTRAL, None)
    concat = converted(hf_weights(MIXTRAL), MIXTRAL, Layout("dense", True))
    half = {name: array for name, array in (dense | concat).items() if "layers.1.attention.w_qkv" not in name}
    with pytest.raises(UserError, match="w_qkv"):
        resolve_layout(infos(half), MIXTRAL, None)


def test_a_dense_model_has_no_gmm():
    with pytest.raises(UserError, match="leave --use_gmm out"):
        rule_set(LLAMA, layout=Layout("gmm"))


@pytest.mark.parametrize("spec", [MIXTRAL, LLAMA])
@pytest.mark.parametrize("experts", ["dense", "gmm"])
def test_sizes_from_shapes_move_experts(spec, experts):
    if spec.moe is None and experts == "gmm":
        return
    ms = converted(hf_weights(spec), spec, Layout(experts))
    guessed = sizes_from_shapes(infos(ms))
    target = Layout("gmm" if experts == "dense" and spec.moe else "dense")
    assert resolve_layout(infos(ms), guessed, None).experts == experts
    assert_same(relaid(ms, guessed, Layout(experts), target), converted(hf_weights(spec), spec, target))
    for part in ("wq", "lm_head"):  # a file cut before its head must not pass for a tied one
        with pytest.raises(UserError, match="--config"):
            sizes_from_shapes({name: info for name, info in infos(ms).items() if part not in name})


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(3, 70, 41), (2, 64, 33)])
def test_matrices_of_any_type_turn_in_bands_and_strips(kind, shape, monkeypatch):
    monkeypatch.setattr(views, "BLOCK", 1024)
    monkeypatch.setattr(views, "STRIP", 64 * 20)
    stored = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(kind).itemsize), np.uint8).view(kind)[..., 0]
    made = flat(views.swap(views.whole("a", shape)), {"a": stored})
    assert made.tobytes() == np.ascontiguousarray(stored.swapaxes(1, 2)).tobytes()
