# SPDX-License-Identifier: Apache-2.0
"""The MoE layer against a ten-line loop, and the traps of grouped products: memory that nobody wrote, experts without
tokens, no tokens at all, gradients that are views, runs that must be equal to the last bit."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec, NumericsSpec, ParallelSpec
from mindformers_ext.pt.moe.layer import MoE
from mindformers_ext.pt.ops import select
from mindformers_ext.pt.ops.grouped import BACKENDS, Backend, fits_gmm, grouped_product
from mindformers_ext.pt.ops.rows import combine, dispatch, sort_by_expert
from mindformers_ext.pt.ops.select import FORCE, select_backend
from mindformers_ext.pt.ops.swiglu import swiglu

NAMES = sorted(BACKENDS)
PRODUCTS = [name for name in NAMES if not BACKENDS[name].gathers]


def spec_of(
    experts: int = 8,
    chosen: int = 2,
    factor: float = -1.0,
    hidden: int = 16,
    ffn: int = 24,
    groups: int = 1,
    **more: object,
) -> NetworkSpec:
    moe = MoESpec(num_local_experts=experts, num_experts_per_tok=chosen, capacity_factor=factor, **more)
    model = ModelSpec(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        moe=moe,
    )
    return NetworkSpec(model=model, seq_length=8, parallel=ParallelSpec(data_parallel=groups))


def layer_of(spec: NetworkSpec, backend: str) -> MoE:
    torch.manual_seed(1)
    layer = MoE(spec, spec.model.routing)
    layer.ffn.backend = BACKENDS[backend]
    return layer


def plain(layer: MoE, x_TD: Tensor) -> Tensor:
    """The same by a loop over tokens and choices."""
    routing = layer.route(x_TD)
    experts, weights = routing.expert_GNK.flatten(0, 1), routing.weight_GNK.flatten(0, 1)
    rows = []
    for t, x in enumerate(x_TD):
        total = torch.zeros_like(x)
        for e, w in zip(experts[t].tolist(), weights[t], strict=True):
            gate, up = (layer.ffn.gate_up[e] @ x).chunk(2)
            total = total + w * (layer.ffn.down[e] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def gradients(out: Tensor, layer: MoE, x: Tensor, dout: Tensor) -> list[Tensor]:
    wanted = [x, layer.ffn.gate_up, layer.ffn.down, layer.router.dense.weight]
    return list(torch.autograd.grad((out * dout).sum(), wanted, retain_graph=True))


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(("factor", "groups", "sdrop"), [(-1.0, 1, False), (0.6, 2, True), (0.6, 1, False)])
def test_equals_a_plain_loop(backend: str, factor: float, groups: int, sdrop: bool) -> None:
    layer = layer_of(spec_of(factor=factor, groups=groups, enable_sdrop=sdrop), backend)
    x, dout = torch.randn(12, 16, requires_grad=True), torch.randn(12, 16)
    out, aux_loss_G, report_GE = layer(x)
    assert aux_loss_G.shape == (groups,) and report_GE.shape == (groups, 9)
    assert (float(report_GE[0, -1]) > 0) == (factor > 0)
    expected = plain(layer, x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(out, layer, x, dout), gradients(expected, layer, x, dout), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def poisoned(inner: Backend) -> Backend:
    """``inner`` whose results hold NaN wherever no expert's row is, as recycled memory may."""

    def spoil(product):  # noqa: ANN001, ANN202
        def run(a: Tensor, b: Tensor, offs_E: Tensor) -> Tensor:
            out = product(a, b, offs_E)
            out[int(offs_E[-1]) :] = float("nan")
            return out

        return run

    def to_weight(dy: Tensor, x: Tensor, offs_E: Tensor) -> Tensor:
        dy, x = dy.clone(), x.clone()
        dy[int(offs_E[-1]) :], x[int(offs_E[-1]) :] = float("nan"), float("nan")
        return inner.to_weight(dy, x, offs_E)

    return Backend("poisoned", spoil(inner.forward), spoil(inner.to_input), to_weight)


@pytest.mark.parametrize("backend", PRODUCTS)
def test_rows_behind_the_last_offset_may_hold_anything(backend: str) -> None:
    layer, x = layer_of(spec_of(factor=0.5), backend), torch.randn(16, 16, requires_grad=True)
    dout = torch.randn(16, 16)
    out = layer(x)[0]
    expected = gradients(out, layer, x, dout)
    layer.ffn.backend = poisoned(BACKENDS[backend])
    spoilt = layer(x)[0]
    assert torch.equal(out, spoilt)
    for ours, theirs in zip(gradients(spoilt, layer, x, dout), expected, strict=True):
        assert torch.equal(ours, theirs) and torch.isfinite(ours).all()


@pytest.mark.parametrize("backend", NAMES)
def test_experts_without_tokens_have_gradients_of_exactly_zero(backend: str) -> None:
    layer, x = layer_of(spec_of(chosen=1), backend), torch.randn(6, 16).abs().requires_grad_()
    with torch.no_grad():
        layer.router.dense.weight.fill_(-1.0)
        layer.router.dense.weight[3] = 1.0  # all tokens choose expert 3
    out, _, report_GE = layer(x)
    assert report_GE[0, :8].tolist() == [0, 0, 0, 6, 0, 0, 0, 0]
    out.sum().backward()  # an expanded gradient, of stride 0
    for weight in (layer.ffn.gate_up, layer.ffn.down):
        rest = [e for e in range(8) if e != 3]
        assert torch.all(weight.grad[rest] == 0) and weight.grad[3].abs().max() > 0


@pytest.mark.parametrize("backend", NAMES)
def test_no_tokens_at_all(backend: str) -> None:
    layer, x = layer_of(spec_of(factor=1.0), backend), torch.zeros(0, 16, requires_grad=True)
    out = layer.computed(x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), None)
    out.sum().backward()
    assert out.shape == (0, 16) and torch.all(layer.ffn.gate_up.grad == 0) and torch.all(layer.ffn.down.grad == 0)


@pytest.mark.parametrize("backend", PRODUCTS)
def test_strided_gradients(backend: str) -> None:
    x, w = torch.randn(12, 16, requires_grad=True), torch.randn(4, 8, 16, requires_grad=True)
    offs, dy = torch.tensor([3, 3, 9, 12], dtype=torch.int32), torch.randn(8, 12)
    out = grouped_product(x, w, offs, BACKENDS[backend])
    out.backward(dy.t())  # columns first
    found = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    starts = [0, 3, 3, 9]
    torch.cat([x[s:e] @ w[i].t() for i, (s, e) in enumerate(zip(starts, offs.tolist(), strict=True))]).backward(dy.t())
    torch.testing.assert_close(found[0], x.grad)
    torch.testing.assert_close(found[1], w.grad)


@pytest.mark.parametrize("backend", NAMES)
def test_two_runs_are_equal_to_the_last_bit(backend: str) -> None:
    layer, x = layer_of(spec_of(factor=0.8), backend), torch.randn(64, 16, requires_grad=True)
    dout, runs = torch.randn(64, 16), []
    for _ in range(2):
        out = layer(x)[0]
        runs.append([out, *gradients(out, layer, x, dout)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_dispatch_and_combine_have_true_gradients() -> None:
    expert, kept = torch.tensor([[0, 2], [1, 2], [2, 0]]), torch.tensor([[True, True], [False, True], [True, False]])
    place = sort_by_expert(expert, kept, 3)
    assert place.offs_E.tolist() == [1, 1, 4] and place.token[:4].tolist() == [0, 0, 1, 2]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def moved(x: Tensor) -> Tensor:
        return dispatch(x, place)[:4]  # what stands behind belongs to nobody

    assert torch.autograd.gradcheck(moved, (x,))
    assert torch.autograd.gradcheck(lambda r, w: combine(r, w, place), (rows, weight), atol=1e-4, eps=1e-6)
    assert torch.autograd.gradcheck(swiglu, (torch.randn(4, 6, dtype=torch.float64, requires_grad=True),))


def test_half_precision_is_as_good_as_the_loop() -> None:
    """Indices fixed: a bfloat16 router would flip some, and one flip hides every other error."""
    spec = replace(spec_of(hidden=32, ffn=48), numerics=NumericsSpec(compute_dtype="bfloat16"))
    layer, x = layer_of(spec, "gmm").requires_grad_(False), torch.randn(64, 32)
    routing = layer.route(x)
    fixed = routing.expert_GNK[0], routing.weight_GNK[0], None
    exact = layer.computed(x, *fixed)
    errors = {}
    for name in NAMES:
        layer.ffn.backend = BACKENDS[name]
        errors[name] = float((layer.computed(x.bfloat16(), *fixed).float() - exact).norm() / exact.norm())
    assert max(errors.values()) < 1e-2 and max(errors.values()) < 1.5 * errors["loop"]


def test_tokens_that_lost_all_their_experts_may_hold_anything() -> None:
    """``triton`` reads tokens in place: those of dropped assignments are not touched, forward and backward."""
    layer, x = layer_of(spec_of(), "triton"), torch.randn(6, 16)
    expert, kept = torch.tensor([[0, 1]]).repeat(6, 1), torch.ones(6, 2, dtype=torch.bool)
    kept[4] = False
    dout, runs = torch.randn(6, 16), []
    for value in (0.0, float("nan")):
        x[4] = value
        rows, weight = x.clone().requires_grad_(), torch.full((6, 2), 0.5, requires_grad=True)
        out = layer.computed(rows, expert, weight, kept)
        runs.append([out, *torch.autograd.grad(out, (rows, weight, layer.ffn.gate_up, layer.ffn.down), dout)])
    assert torch.all(runs[0][0][4] == 0) and torch.all(runs[0][1][4] == 0)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_one_token_reads_its_own_experts_alone(bias: bool) -> None:
    spec = spec_of(expert_bias=bias)
    torch.manual_seed(1)
    layer, x = MoE(spec, spec.model.routing).requires_grad_(False), torch.randn(5, 16)
    if layer.ffn.bias is not None:
        layer.ffn.bias.normal_()
    together = layer.dropless(x)  # by a grouped product
    for token in range(len(x)):
        chosen = layer.router.choose(x[None, token : token + 1])[1].flatten()
        others = torch.ones(8, dtype=torch.bool).index_fill_(0, chosen, False)
        spoilt = copy.deepcopy(layer)
        for weights in spoilt.ffn.parameters():
            weights[others] = float("nan")
        alone = spoilt.dropless(x[token : token + 1])
        torch.testing.assert_close(alone[0], together[token], rtol=1e-5, atol=1e-6)


def test_the_choice_of_the_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert select_backend(cpu, torch.float32, 64, 128).name == "gmm"
    assert select_backend(cpu, torch.float32, 64, 128, 1).name == "loop"
    assert not fits_gmm(torch.float32, 30) and select_backend(cpu, torch.float32, 30, 7).name == "loop"
    assert select_backend(cpu, torch.float64, 64, 128).name == "loop"
    assert select_backend(torch.device("cuda"), torch.float32, 64, 128).name == "loop"
    monkeypatch.setenv(FORCE, "triton")
    with pytest.raises(ValueError, match="MFEXT_MOE_BACKEND=triton runs on a GPU .* here is cpu: choose loop or gmm"):
        select_backend(cpu, torch.float32, 64, 128, 1)
    monkeypatch.setenv(FORCE, "loop")
    assert select_backend(cpu, torch.float32, 64, 128).name == "loop"
    monkeypatch.setenv(FORCE, "fastest")
    with pytest.raises(ValueError, match="MFEXT_MOE_BACKEND=fastest is unknown: choose one of"):
        select_backend(cpu, torch.float32, 64, 128)


@pytest.mark.parametrize("here", [True, False])
def test_few_tokens_on_a_gpu_take_the_kernels(
    here: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The table alone: nothing runs on a GPU here."""
    monkeypatch.setattr(select, "kernels_wanted", lambda: here)
    monkeypatch.setattr(select, "_told", set())
    monkeypatch.setattr(logging.getLogger(select.__name__), "propagate", True)
    cuda, few = torch.device("cuda"), {32: "triton" if here else "gmm", 33: "gmm"}
    with caplog.at_level(logging.INFO):
        for tokens, name in few.items():
            assert select_backend(cuda, torch.bfloat16, 64, 128, tokens).name == name
    assert ("back end triton (not measured here" in caplog.text) == here and "back end gmm" in caplog.text
    assert select_backend(cuda, torch.float32, 30, 7, 1).capturable == here
    if here:
        monkeypatch.setenv(FORCE, "triton")
        assert select_backend(cuda, torch.bfloat16, 64, 128, 4096).name == "triton"
        assert select_backend(cuda, torch.bfloat16, 64, 128).name == "gmm"  # rows of other ranks come sorted
