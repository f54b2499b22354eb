# SPDX-License-Identifier: Apache-2.0
"""Every merge method against its formula in float64, and the identities it must keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mindformers_ext.surgery.merge.names import NAMES, name_fault
from mindformers_ext.surgery.merge.registry import METHODS
from mindformers_ext.surgery.merge.settings import Settings
from mindformers_ext.surgery.merge.stream import stream_of
from tests.helpers import merge_oracle as oracle

DENSITIES = st.floats(0.0, 1.0)
WEIGHTS = st.floats(-1.0, 1.0).filter(lambda w: abs(w) > 0.01)
SHAPES = st.sampled_from([(7,), (1, 1), (5, 3), (6, 8), (2, 3, 4)])


def merged(method, base, inputs, shared=None, each=None, rows=None, seed=0, dtype=torch.float32, mode="l1"):
    """The method's result on numpy arrays, as float64."""
    spec = METHODS[method]
    values = {p.name: p.default for p in spec.parameters if not p.per_input} | (shared or {})
    own = [
        {p.name: p.default for p in spec.parameters if p.per_input} | (each[n] if each else {})
        for n in range(len(inputs))
    ]

    def tensor(array):
        return torch.from_numpy(np.asarray(array)).to(dtype)

    stream = stream_of("w", None if base is None else tensor(base), tuple(map(tensor, inputs)), rows)
    parts = list(spec.run(stream, Settings(values, tuple(own), seed, mode)))
    assert all(part.dtype == dtype for part in parts)
    return torch.cat(parts).double().numpy().reshape(np.asarray(inputs[0]).shape)


def arrays(seed, shape, count, spread=0.1):
    random = np.random.default_rng(seed)
    base = random.standard_normal(shape).astype(np.float32)
    return [base, *((base + spread * random.standard_normal(shape)).astype(np.float32) for _ in range(count))]


def wide(items):
    return [item.astype(np.float64) for item in items]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), shape=SHAPES, rows=st.sampled_from([None, 1, 2]), t=st.floats(-0.5, 1.5))
def test_slerp_and_linear(seed, shape, rows, t):
    base, one, two = arrays(seed, shape, 2, spread=0.8)
    got = merged("slerp", base, [one], {"t": t}, rows=rows)
    np.testing.assert_allclose(got, oracle.slerp(*wide([base, one]), t), rtol=0, atol=3e-5)
    got = merged("linear", None, [one, two], {}, [{"weight": 0.3}, {"weight": 0.5}], rows=rows)
    np.testing.assert_allclose(got, oracle.linear(wide([one, two]), [0.3, 0.5]), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    shape=SHAPES,
    rows=st.sampled_from([None, 1, 3]),
    densities=st.tuples(DENSITIES, DENSITIES),
    weights=st.tuples(WEIGHTS, WEIGHTS),
    normalize=st.booleans(),
    factor=st.floats(0, 2),
)
def test_task_vector_methods(seed, shape, rows, densities, weights, normalize, factor):
    base, *inputs = arrays(seed, shape, 2)
    deltas = [x - base for x in inputs]  # as float32, so that the magnitudes rank alike
    shared = {"normalize": normalize, "lambda": factor}
    each = [{"weight": w, "density": d} for w, d in zip(weights, densities, strict=True)]
    # A sum of weights near 0 divides: float32's rounding of the sum would be all that is compared.
    assume(not normalize or abs(sum(weights)) > 0.05)
    want = oracle.combine(*wide([base]), wide(deltas), weights, elect=False, normalize=normalize, factor=factor)
    own = [{"weight": w} for w in weights]
    np.testing.assert_allclose(merged("task_arithmetic", base, inputs, shared, own, rows), want, rtol=3e-6, atol=2e-5)
    trimmed = [oracle.trim(d, density).astype(np.float64) for d, density in zip(deltas, densities, strict=True)]
    want = oracle.combine(base.astype(np.float64), trimmed, weights, elect=True, normalize=normalize, factor=factor)
    np.testing.assert_allclose(merged("ties", base, inputs, shared, each, rows), want, rtol=3e-6, atol=2e-5)
    banded = [oracle.band(d, density, 0.1).astype(np.float64) for d, density in zip(deltas, densities, strict=True)]
    own = [one | {"gamma": 0.1} for one in each]
    want = oracle.combine(base.astype(np.float64), banded, weights, elect=True, normalize=normalize, factor=factor)
    np.testing.assert_allclose(merged("breadcrumbs_ties", base, inputs, shared, own, rows), want, rtol=3e-6, atol=2e-5)


@pytest.mark.parametrize("rows", [None, 2])
def test_later_methods(rows):
    base, *inputs = arrays(3, (12, 9), 3)
    b, *xs = wide([base, *inputs])
    close = {"rtol": 0, "atol": 2e-6}
    np.testing.assert_allclose(merged("model_stock", base, inputs, rows=rows), oracle.model_stock(b, xs), **close)
    got = merged("model_stock", base, inputs, {"filter_wise": True}, rows=rows)
    np.testing.assert_allclose(got, oracle.model_stock(b, xs, by_row=True), **close)
    got = merged("sce", base, inputs, {"select_topk": 0.4}, rows=rows)
    np.testing.assert_allclose(got, oracle.sce(b, xs, 0.4), **close)
    both = [{"weight": 1.0}, {"weight": 3.0}]
    got = merged("nuslerp", None, inputs[:2], {}, both, rows)
    np.testing.assert_allclose(got, oracle.slerp(xs[0], xs[1], 0.75, parallel=1 - 1e-8), **close)
    got = merged("nuslerp", base, inputs[:2], {}, both, rows)
    np.testing.assert_allclose(got, b + oracle.slerp(xs[0] - b, xs[1] - b, 0.75), **close)
    by_row = np.stack([oracle.slerp(x, y, 0.75, 1 - 1e-8) for x, y in zip(xs[0], xs[1], strict=True)])
    got = merged("nuslerp", None, inputs[:2], {"nuslerp_flatten": False}, both, rows)
    np.testing.assert_allclose(got, by_row, **close)
    by_column = np.stack([oracle.slerp(x, y, 0.75, 1 - 1e-8) for x, y in zip(xs[0].T, xs[1].T, strict=True)]).T
    got = merged("nuslerp", None, inputs[:2], {"nuslerp_flatten": False, "nuslerp_row_wise": True}, both, rows)
    np.testing.assert_allclose(got, by_column, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identities(dtype):
    """End points and zeros give an input back, bit by bit."""
    base, one, two = (x.astype(np.float32) for x in arrays(5, (16, 12), 2))
    b, x = (torch.from_numpy(a).to(dtype).double().numpy() for a in (base, one))

    def run(method, inputs, shared=None, each=None):
        return merged(method, base, inputs, shared, each, dtype=dtype)

    assert np.array_equal(run("slerp", [one], {"t": 0.0}), b)
    assert np.array_equal(run("slerp", [one], {"t": 1.0}), x)
    assert np.array_equal(run("passthrough", [one]), x)
    np.testing.assert_allclose(merged("linear", None, [one], each=[{"weight": 0.4}]), one, rtol=2e-7)
    both = [{"weight": 0.5}, {"weight": 0.3}]
    for method in ("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "della"):
        assert np.array_equal(run(method, [one, two], {"lambda": 0.0}, both), b)
        if method != "task_arithmetic":
            none = [{**weight, "density": 0.0} for weight in both]
            assert np.array_equal(run(method, [one, two], None, none), b)
    assert np.array_equal(run("task_arithmetic", [one, two], None, [{"weight": 0.0}] * 2), b)
    tolerance = {torch.float32: 2e-7, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for inputs in ([one], [one, one]):
        each = [{"weight": 1.0, "density": 1.0}] * len(inputs)
        np.testing.assert_allclose(run("ties", inputs, None, each), x, atol=tolerance)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), t=st.floats(0, 1))
def test_slerp_is_symmetric_and_keeps_norms(seed, t):
    base, one = arrays(seed, (6, 5), 1, spread=1.0)
    one *= np.linalg.norm(base) / np.linalg.norm(one)
    there, back = merged("slerp", base, [one], {"t": t}), merged("slerp", one, [base], {"t": 1 - t})
    np.testing.assert_allclose(there, back, atol=2e-6)
    cosine = (base * one).sum() / np.linalg.norm(base) ** 2
    if abs(cosine) < 0.999:
        assert np.linalg.norm(there) == pytest.approx(np.linalg.norm(base), rel=1e-5)
    np.testing.assert_allclose(merged("slerp", base, [base], {"t": t}), base, rtol=3e-7)


@pytest.mark.parametrize("seed", range(5))
def test_dare_statistics(seed):
    """Kept shares, lengths and slopes over 2 x 10^5 elements; four standard deviations."""
    base, one, two = arrays(seed, (400, 500), 2)
    n, d1, d2 = base.size, 0.53, 0.4
    each = [{"weight": 0.4, "density": d1}, {"weight": 0.3, "density": d2}]
    out = merged("dare_linear", base, [one, two], {"rescale": True}, each, seed=seed) - base
    both = (1 - d1) * (1 - d2)
    zeros = np.mean(out == 0)
    assert abs(zeros - both) < 4 * np.sqrt(both * (1 - both) / n) + 1e-3  # a few sums round to the base
    full = 0.4 * (one - base).astype(float) + 0.3 * (two - base).astype(float)
    assert (out * full).sum() / (full**2).sum() == pytest.approx(1, abs=0.02)
    single = [{"weight": 1.0, "density": d1}]
    kept = merged("dare_linear", base, [one], {"rescale": True}, single, seed=seed) - base
    assert np.abs(kept).sum() == pytest.approx(np.abs(one - base).sum(), rel=1e-3)
    plain = merged("dare_linear", base, [one], {"rescale": False}, single, seed=seed) - base
    delta = (one - base).astype(float)
    assert (plain * delta).sum() / (delta**2).sum() == pytest.approx(d1, abs=0.01)
    paper = merged("dare_linear", base, [one], {"rescale": True}, single, seed=seed, mode="density") - base
    np.testing.assert_allclose(paper, np.where(plain != 0, delta / d1, 0), atol=1e-6)


def test_della_keeps_large_values_more_often():
    base, one = arrays(1, (300, 400), 1)
    out = merged("della_linear", base, [one], {"rescale": False}, [{"weight": 1.0, "density": 0.5, "epsilon": 0.2}])
    kept, size = (out - base) != 0, np.abs(one - base)
    ranks = size.argsort(axis=1).argsort(axis=1)
    for low, high, chance in ((0, 100, 0.35), (150, 250, 0.5), (300, 400, 0.65)):
        part = kept[(ranks >= low) & (ranks < high)]
        assert part.mean() == pytest.approx(chance, abs=4 * 0.5 / np.sqrt(part.size) + 5e-3)


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_masks_depend_on_nothing_but_the_seed(method):
    base, *inputs = arrays(2, (37, 53), 2)
    each = [{"weight": 0.5, "density": 0.6}] * 2
    whole = merged(method, base, inputs, None, each, seed=7)
    for rows in (1, 5, 36):
        assert np.array_equal(whole, merged(method, base, inputs, {}, each, rows, seed=7))
    torch.set_num_threads(1)
    assert np.array_equal(whole, merged(method, base, inputs, None, each, seed=7))
    torch.set_num_threads(2)
    assert not np.array_equal(whole, merged(method, base, inputs, None, each, seed=8))


def test_dare_ties_with_its_own_masks_is_the_formula():
    from mindformers_ext.surgery.merge.random_masks import keep_mask

    base, *inputs = arrays(4, (20, 30), 2)
    weights, density = (0.4, -0.3), 0.5
    masks = [keep_mask(3, "w", n, 0, base.shape, density) for n in range(2)]
    deltas = [((x - base) * mask).astype(np.float64) for x, mask in zip(inputs, masks, strict=True)]
    want = oracle.combine(base.astype(np.float64), deltas, weights, elect=True, normalize=False)
    each = [{"weight": w, "density": density} for w in weights]
    np.testing.assert_allclose(merged("dare_ties", base, inputs, {"rescale": False}, each, seed=3), want, atol=1e-6)


def test_the_names_known_without_torch_are_those_of_the_methods():
    assert tuple(METHODS) == NAMES and all(method.name == name for name, method in METHODS.items())
    found, advice = name_fault("slurp")
    assert "'slurp' is unknown" in found and "did you mean 'slerp'?" in advice and "ramplus_tl" in advice


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_gives_what_the_processor_gives(method):
    """Chunk by chunk on the device; masks are drawn on the processor, so they are the same."""
    spec = METHODS[method]
    base, *inputs = (torch.from_numpy(array) for array in arrays(0, (30, 50), spec.most or 2))
    values = {"density": 0.5, "weight": 0.6, "scale": 0.5, "t": 0.3, "select_topk": 0.5, "nuslerp_flatten": False}
    shared = {p.name: values.get(p.name, p.default) for p in spec.parameters if not p.per_input}
    own = {p.name: values.get(p.name, p.default) for p in spec.parameters if p.per_input}

    def result(device, row_wise):
        extra = {"nuslerp_row_wise": row_wise} if "nuslerp_row_wise" in shared else {}
        there = None if spec.base == "never" else base.to(device)
        stream = stream_of("w", there, tuple(x.to(device) for x in inputs), 7)
        parts = list(spec.run(stream, Settings(shared | extra, (own,) * len(inputs))))
        assert all(part.device.type == device for part in parts)
        return torch.cat(parts).cpu().numpy()

    for row_wise in (False, True):
        np.testing.assert_allclose(result("cuda", row_wise), result("cpu", row_wise), atol=1e-5)
