# SPDX-License-Identifier: Apache-2.0
"""The portable operators, values and written gradients, against torch's autograd of the plain formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn, ops

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.rope import Rope
from mindformers_ext.ms.attention import rotary_tables
from mindformers_ext.ms.loss import NextTokenLoss
from mindformers_ext.ms.moe.aux_loss import AuxiliaryLoss
from mindformers_ext.ms.ops import portable, portable_attention
from mindformers_ext.ms.ops.portable_attention import CausalAttentionOp
from mindformers_ext.ms.ops.portable_dropout import SeededDropoutOp
from mindformers_ext.ms.ops.select import select_operators
from tests.helpers.router import TopkRouterV2

# What rounding leaves, relative to the largest value: of inputs and results in the type, sums in float32.
TOLERANCE = {ms.float32: 3e-6, ms.float16: 3e-3}


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


class Projected(nn.Cell):
    """sum(output * weight) in float32, and the output."""

    def __init__(self, operator: nn.Cell) -> None:
        super().__init__()
        self.operator = operator

    def construct(self, weight: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        output = self.operator(*inputs)
        return (ops.cast(output, ms.float32) * weight).sum(), output


def assert_near(found: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    assert np.isfinite(found).all(), what
    error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6)
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


def check(
    operator: nn.Cell,
    plain: Callable[..., torch.Tensor],
    inputs: Sequence[np.ndarray],
    dtype: ms.Type = ms.float32,
    constants: Sequence[Tensor] = (),
) -> None:
    """Output and the gradient of every input, in the input's type; ``constants`` follow the inputs and have none."""
    tensors = [Tensor(each).astype(dtype) for each in inputs]
    leaves = [torch.from_numpy(t.asnumpy().astype(np.float64)).requires_grad_() for t in tensors]
    expected = plain(*leaves)
    weight = normal(*expected.shape, seed=9)
    (expected * torch.from_numpy(weight)).sum().backward()
    places = tuple(range(1, len(tensors) + 1))
    step = ms.value_and_grad(Projected(operator), places, None, has_aux=True)
    (_, output), gradients = step(Tensor(weight), *tensors, *constants)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)  # MindSpore unwraps a tuple of one
    assert output.dtype == dtype
    assert_near(output.asnumpy(), expected.detach().numpy(), TOLERANCE[dtype], "output")
    for i, (gradient, leaf) in enumerate(zip(gradients, leaves, strict=True)):
        assert gradient.dtype == dtype
        assert_near(gradient.asnumpy(), leaf.grad.numpy(), TOLERANCE[dtype], f"gradient of input {i}")


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


DTYPES = pytest.mark.parametrize("dtype", [ms.float32, ms.float16], ids=["float32", "float16"])


@DTYPES
def test_rms_norm(mode: str, dtype: ms.Type) -> None:
    check(portable.RmsNormOp(21, 1e-5), rms_norm, [normal(13, 21, scale=3), 1 + normal(21, seed=1, scale=0.3)], dtype)


def test_rms_norm_of_large_half_precision_rows_does_not_overflow(mode: str) -> None:
    check(portable.RmsNormOp(16, 1e-5), rms_norm, [normal(4, 16, scale=5000), np.ones(16, np.float32)], ms.float16)


@DTYPES
def test_swiglu(mode: str, dtype: ms.Type) -> None:
    check(portable.SwiGluOp(), swiglu, [normal(13, 21, scale=2), normal(13, 21, seed=1)], dtype)


def test_swiglu_far_from_zero() -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    gate = np.asarray([[-300.0, -90.0, -20.0, 0.0, 20.0, 90.0, 300.0]], np.float32)
    for dtype in (ms.float32, ms.float16):
        check(portable.SwiGluOp(), swiglu, [gate, np.ones_like(gate)], dtype)


@DTYPES
def test_rotary_is_transformers_rotate_half(mode: str, dtype: ms.Type) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = rotary_tables(Rope(6, 1e4, 64).tables(11), ms.float32)
    cos_SP, sin_SP = (torch.from_numpy(table.asnumpy()[0, :, 0].astype(np.float64))[None] for table in (cos, sin))

    def plain(x: torch.Tensor) -> torch.Tensor:
        return apply_rotary_pos_emb(x, x, cos_SP, sin_SP, unsqueeze_dim=2)[0]

    check(portable.RotaryOp(), plain, [normal(2, 11, 3, 6)], dtype, constants=(cos, sin))


@pytest.mark.parametrize(("theta", "head_dim"), [(1e4, 6), (1e6, 128)])
def test_rotary_tables_are_transformers(theta: float, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_theta=theta)
    places = torch.arange(4096)[None]
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), places)
    for table, reference in zip(
        rotary_tables(Rope(head_dim, theta, 4096).tables(4096), ms.float32), expected, strict=True
    ):
        assert table.shape == (1, 4096, 1, head_dim)
        # an angle of 4096 has 2.4e-4 between neighbours in float32: the two may sit on either side
        np.testing.assert_allclose(table.asnumpy()[0, :, 0], reference[0].numpy(), rtol=0, atol=5e-4)
        np.testing.assert_allclose(table.asnumpy()[0, :64, 0], reference[0, :64].numpy(), rtol=0, atol=5e-6)


def attention(heads: int, kv_heads: int, head_dim: int, window: int = 1000) -> Callable[..., torch.Tensor]:
    """softmax(q k^T / sqrt(P) + mask) v with repeated key and value heads; a query sees ``window`` keys."""

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        B, S, _ = q.shape
        q, k, v = (x.reshape(B, S, -1, head_dim).transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / head_dim**0.5
        hidden = torch.ones(S, S, dtype=torch.bool).triu(1) | torch.ones(S, S, dtype=torch.bool).tril(-window)
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2).reshape(B, S, -1)

    return plain


def attention_inputs(batch: int, length: int, heads: int, kv_heads: int, head_dim: int) -> list[np.ndarray]:
    return [normal(batch, length, width * head_dim, seed=i) for i, width in enumerate((heads, kv_heads, kv_heads))]


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (4, 1)])
def test_attention(mode: str, dtype: ms.Type, heads: int, kv_heads: int) -> None:
    operator = CausalAttentionOp(heads, kv_heads, 6, 11, ms.float32)
    check(operator, attention(heads, kv_heads, 6), attention_inputs(2, 11, heads, kv_heads, 6), dtype)


@pytest.mark.parametrize(
    ("dtype", "softmax_dtype"), [(ms.float32, ms.float32), (ms.float16, ms.float32), (ms.float16, ms.float16)]
)
def test_attention_in_two_halves(mode: str, dtype: ms.Type, softmax_dtype: ms.Type) -> None:
    operator = CausalAttentionOp(4, 2, 4, 512, softmax_dtype)
    assert operator.halved
    check(operator, attention(4, 2, 4), attention_inputs(1, 512, 4, 2, 4), dtype)


@pytest.mark.parametrize(("length", "window"), [(11, 4), (512, 100), (512, 300)])
def test_attention_within_a_window(length: int, window: int) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    operator = CausalAttentionOp(4, 2, 4, length, ms.float32, window)
    check(operator, attention(4, 2, 4, window), attention_inputs(1, length, 4, 2, 4), ms.float32)


def test_halves_equal_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same inputs through both forms, at a length where either may be chosen."""
    inputs = [Tensor(each) for each in attention_inputs(2, 10, 6, 3, 4)]
    weight = Tensor(normal(2, 10, 24, seed=9))
    found = []
    for threshold in (4, 512):
        monkeypatch.setattr(portable_attention, "_HALVES_FROM", threshold)
        operator = CausalAttentionOp(6, 3, 4, 10, ms.float32)
        assert operator.halved == (threshold == 4)
        (_, output), gradients = ms.value_and_grad(Projected(operator), (1, 2, 3), None, has_aux=True)(weight, *inputs)
        found.append([each.asnumpy() for each in (output, *gradients)])
    for halves, whole in zip(*found, strict=True):
        np.testing.assert_allclose(halves, whole, rtol=0, atol=3e-6)


def test_odd_and_short_lengths_stay_whole() -> None:
    halved = {length: CausalAttentionOp(1, 1, 2, length, ms.float32).halved for length in (1, 510, 511, 512, 513, 514)}
    assert halved == {1: False, 510: False, 511: False, 512: True, 513: False, 514: True}


def test_attention_never_looks_ahead() -> None:
    """Later keys and values, however large, change nothing of the earlier rows; also across the halves."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    q, k, v = attention_inputs(1, 512, 2, 1, 4)
    operator = CausalAttentionOp(2, 1, 4, 512, ms.float32)
    before = operator(Tensor(q), Tensor(k), Tensor(v)).asnumpy()
    for place in (200, 256, 300):
        later_k, later_v = k.copy(), v.copy()
        later_k[:, place:], later_v[:, place:] = 1e3, -1e6
        after = operator(Tensor(q), Tensor(later_k), Tensor(later_v)).asnumpy()
        np.testing.assert_array_equal(after[:, :place], before[:, :place])
        assert np.abs(after[:, place:] - before[:, place:]).max() > 1e3


class Loss(nn.Cell):
    """The loss as a function of logits alone."""

    def __init__(self, label: np.ndarray, weight: np.ndarray) -> None:
        super().__init__()
        self.loss = NextTokenLoss()
        self.label, self.weight = Tensor(label.astype(np.int32)), Tensor(weight.astype(np.float32))

    def construct(self, logits_TV: Tensor) -> Tensor:
        return self.loss(logits_TV, self.label, self.weight)


LABEL, COUNTED = np.asarray([3, -100, 0, 6, 99, 2]), np.asarray([1, 0, 1, 0, 0, 1])


@pytest.mark.parametrize("scale", [1.0, 1e4])
@DTYPES
def test_loss_is_the_mean_over_counted_rows(mode: str, dtype: ms.Type, scale: float) -> None:
    """Labels that do not count may be anything. Logits of 1e4 overflow nothing."""
    logits = normal(6, 7, scale=scale)
    label = torch.from_numpy(np.where(COUNTED, LABEL, -100))
    check_scalar(Loss(LABEL, COUNTED), lambda x: torch.nn.functional.cross_entropy(x, label), logits, dtype)


def check_scalar(cell: nn.Cell, plain: Callable, inputs: np.ndarray, dtype: ms.Type) -> None:
    tensor = Tensor(inputs).astype(dtype)
    leaf = torch.from_numpy(tensor.asnumpy().astype(np.float64)).requires_grad_()
    expected = plain(leaf)
    expected.backward()
    value, gradient = ms.value_and_grad(cell, 0)(tensor)
    assert value.dtype == ms.float32
    np.testing.assert_allclose(value.asnumpy(), expected.item(), rtol=1e-6)
    assert_near(gradient.asnumpy(), leaf.grad.numpy(), TOLERANCE[dtype], "gradient")
    np.testing.assert_array_equal(gradient.asnumpy()[COUNTED == 0], 0.0)


def test_no_counted_row_is_a_loss_of_zero(mode: str) -> None:
    value, gradient = ms.value_and_grad(Loss(LABEL, np.zeros(6)), 0)(Tensor(normal(6, 7)))
    assert value.asnumpy() == 0
    np.testing.assert_array_equal(gradient.asnumpy(), 0.0)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device_target='TPU' is unknown: choose one of CPU, GPU, Ascend"):
        select_operators("TPU")
    assert select_operators("CPU") is select_operators("CPU")
    assert not select_operators("CPU").lazy_inline and select_operators("Ascend").lazy_inline


def test_types_by_device() -> None:
    """bfloat16 where the device multiplies it, else float32; a gate never computes in float16."""
    cpu, ascend = select_operators("CPU"), select_operators("Ascend")
    assert [cpu.dtype(name) for name in ("bfloat16", "float16", "float32")] == [ms.float32, ms.float16, ms.float32]
    assert ascend.dtype("bfloat16") == ascend.router_dtype("bfloat16") == ms.bfloat16
    assert cpu.router_dtype("bfloat16") == cpu.router_dtype("float16") == ascend.router_dtype("float16") == ms.float32


class RouterLosses(nn.Cell):
    """The auxiliary losses of logits."""

    def __init__(self, moe: MoESpec) -> None:
        super().__init__()
        self.router = TopkRouterV2(moe)

    def construct(self, logits_GNE: Tensor) -> Tensor:
        return self.router(logits_GNE)[4]


def test_z_loss_of_huge_logits_stays_finite(mode: str) -> None:
    logits = normal(2, 5, 4, scale=1e4)
    moe = MoESpec(num_local_experts=4, num_experts_per_tok=2, z_loss_factor=1e-3)
    leaf = torch.from_numpy(logits.astype(np.float64)).requires_grad_()
    expected = 1e-3 * torch.logsumexp(leaf, -1).square().mean()
    expected.backward()
    value, gradient = ms.value_and_grad(RouterLosses(moe), 0)(Tensor(logits))
    np.testing.assert_allclose(value.asnumpy(), expected.item(), rtol=1e-6)
    assert_near(gradient.asnumpy(), leaf.grad.numpy(), 1e-5, "gradient")


def test_losses_that_are_off_are_exactly_zero() -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    moe = MoESpec(num_local_experts=4, num_experts_per_tok=2, aux_losses=(("expert", 0.0),))
    logits = Tensor(normal(1, 3, 4, scale=1e30))  # squares overflow: nothing may compute and multiply by 0
    loss = AuxiliaryLoss(moe)
    value, gradient = ms.value_and_grad(loss, 0)(
        logits, Tensor(np.full((1, 3, 4), 0.25, np.float32)), Tensor(np.ones((1, 4), np.float32))
    )
    assert value.asnumpy() == 0
    np.testing.assert_array_equal(gradient.asnumpy(), 0.0)


def test_dropout_follows_from_its_seed() -> None:
    """The share that is kept, in every column and beside each other; the gradient is the mask; no two seeds agree."""
    cell = SeededDropoutOp(0.9)
    ones = Tensor(np.ones((400, 60), np.float32))
    masks = [cell(ones, Tensor(seed, ms.int32)).asnumpy() for seed in (1, 2, -5)]
    np.testing.assert_array_equal(masks[0], cell(ones, Tensor(1, ms.int32)).asnumpy())
    np.testing.assert_array_equal(masks[0], ms.grad(lambda x: cell(x, Tensor(1, ms.int32)).sum())(ones).asnumpy())
    assert set(np.unique(masks[0])) == {np.float32(0), np.float32(1 / 0.9)}
    kept = np.stack([mask > 0 for mask in masks]).astype(float)
    assert abs(kept.mean() - 0.9) < 0.005 and np.abs(kept.mean(1) - 0.9).max() < 0.075  # five deviations
    for left, right in ((kept[0], kept[1]), (kept[:, 1:], kept[:, :-1]), (kept[:, :, 1:], kept[:, :, :-1])):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 0.03
