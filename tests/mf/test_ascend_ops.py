# SPDX-License-Identifier: Apache-2.0
"""Fused Ascend kernels: chosen by the YAML, accepted by MindSpore's Ascend compiler, and used as documented.

No kernel runs here. What is computed on the CPU has the kernel replaced by the formula of its documentation, which
holds our side of the bargain: layouts, masks, halves and drop order.
"""

import json
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindformers_ext.core.config.file import dump_yaml, load_yaml
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.rope import Rope
from mindformers_ext.core.spec import ParallelSpec
from mindformers_ext.ms.attention import rotary_tables
from mindformers_ext.ms.ops import ascend, portable
from mindformers_ext.ms.ops.portable_attention import CausalAttentionOp
from mindformers_ext.ms.ops.select import select_operators
from tests.helpers.router import TopkRouterV2
from tests.helpers.routing import drop_order, hard_logits
from tests.helpers.tiny_run import BATCH, ROOT, SEQ, config_of, environment

MODEL = "model.model_config"
SWITCHES = (
    f"{MODEL}.use_flash_attention",
    f"{MODEL}.fused_rms_norm",
    f"{MODEL}.use_fused_rope",
    f"{MODEL}.use_fused_swiglu",
    "moe_config.use_fused_ops_topkrouter",
)
HALF = tuple(f"{MODEL}.{name}=float16" for name in ("compute_dtype", "softmax_compute_type", "rotary_dtype"))


@pytest.fixture(autouse=True)
def _graph_mode_again():
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def switched(path, on, *more):
    return config_of(path, f"{MODEL}.hidden_size=64", *HALF, *(f"{name}={on}" for name in SWITCHES), *more)


# What the compiler says


@pytest.fixture(scope="module")
def compiled(job):
    """Two compiled jobs by name: all kernels with experts over devices, and grouped experts over devices alone."""
    folder = job.folder / "ascend"
    folder.mkdir()
    sizes = {
        "data_parallel": 2,
        "model_parallel": 2,
        "expert_parallel": 2,
        "pipeline_stage": 1,
        "micro_batch_num": 1,
        "use_seq_parallel": True,
        "vocab_emb_dp": False,
    }
    common = ("use_parallel=True", "parallel.enable_alltoall=True")
    fused = switched(job.yaml, True, *common, *(f"parallel_config.{name}={size}" for name, size in sizes.items()))
    sizes |= {"model_parallel": 1, "use_seq_parallel": False}
    grouped = switched(
        job.yaml,
        False,
        *common,
        "moe_config.use_gmm=True",
        "moe_config.capacity_factor=-1",
        *(f"parallel_config.{name}={size}" for name, size in sizes.items()),
    )
    running = {}
    for name, config, devices in (("fused", fused, 4), ("grouped", grouped, 2)):
        (folder / f"{name}.yaml").write_text(dump_yaml(config), encoding="utf-8")
        command = [
            sys.executable,
            str(ROOT / "tools" / "dryrun.py"),
            "--config",
            str(folder / f"{name}.yaml"),
            "--worker_num",
            str(devices),
            "--ranks",
            "0",
            "--out",
            str(folder / name),
        ]
        running[name] = subprocess.Popen(
            command, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    for name, process in running.items():
        text, _ = process.communicate(timeout=280)
        assert process.returncode == 0, f"{name}: {text[-3000:]}"
    return {name: json.loads((folder / name / "report.json").read_text())["ranks"][0] for name in running}


@pytest.mark.slow
def test_the_compiler_takes_every_kernel_and_its_gradient(compiled):
    operators, layers = compiled["fused"]["operators"], 2
    assert compiled["fused"]["unplanned"] == []
    expected = {
        "FlashAttentionScore": layers,
        "FlashAttentionScoreGrad": layers,
        "RmsNorm": 2 * layers + 1,
        "RmsNormGrad": 2 * layers + 1,
        "RotaryPositionEmbedding": 4 * layers,
        "Swiglu": layers,
        "SwigluGrad": layers,
        "TopKRouter": layers,
    }
    assert {name: operators.get(name, 0) for name in expected} == expected
    for name in ("Rsqrt", "Sigmoid", "Sort", "SearchSorted"):  # of the portable norm, gate and slots
        assert name not in operators
    assert operators["BatchMatMul"] == 3 * 3 * layers  # experts alone, forward and both gradients; none of attention
    # the gate's, forward and backward; the loss has a log-softmax of its own
    assert operators["Softmax"] + operators["SoftmaxBackward"] <= 2 * layers + 1


@pytest.mark.slow
def test_the_compiler_takes_grouped_experts_beside_portable_operators(compiled):
    operators, layers = compiled["grouped"]["operators"], 2
    assert compiled["grouped"]["unplanned"] == []
    assert operators["GroupedMatmul"] == 3 * 3 * layers  # three products, forward and two gradients
    (rows,) = [row for row in compiled["grouped"]["traffic"] if row["kind"] == "AlltoAllV"]
    assert rows["count"] == operators["AlltoAllV"] == 2 * 2 * layers  # to the experts and back, and their gradients
    assert rows["payload"] == rows["count"] * (2 * BATCH * SEQ + 4) * 64 * 2  # K of each token, one for each expert
    assert operators["AlltoAll"] == layers and operators["MoveTo"] == 2 * layers  # how many, known to the host
    for name in ("FlashAttentionScore", "RmsNorm", "RotaryPositionEmbedding", "Swiglu", "TopKRouter"):
        assert name not in operators
    assert operators["Rsqrt"] == 2 * layers + 1 and operators["Sort"] == 2 * layers
    assert operators["BatchMatMul"] == 6 * layers  # attention: two products, forward and both gradients


# What is chosen


def chosen(config):
    cells, notes = ascend.fused_cells(network_spec_from_yaml(config))
    return {field: cell.__name__ for field, cell in cells.items()}, notes


def test_the_yaml_chooses_the_kernels(job):
    everything = {
        "causal_attention": "FlashAttentionOp",
        "packed_attention": "PackedFlashOp",
        "rms_norm": "RmsNormKernel",
        "rotary": "RotaryKernel",
        "swiglu": "SwiGluKernel",
        "slots": "TopKRouterSlots",
    }
    assert chosen(switched(job.yaml, True)) == (everything, [])
    assert chosen(switched(job.yaml, False)) == ({}, [])
    grouped = switched(job.yaml, False, "moe_config.use_gmm=True", "moe_config.capacity_factor=-1")
    assert chosen(grouped) == ({"grouped_product": "GroupedProductKernel"}, [])
    bare = load_yaml(job.yaml)
    del bare["model"]["model_config"]["use_flash_attention"]
    assert chosen(bare)[0] == {"rms_norm": "RmsNormKernel"}  # MindFormers' defaults


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            (f"{MODEL}.compute_dtype=float32",),
            "use_flash_attention: portable operators instead, FlashAttentionScore takes "
            "float16 and bfloat16, compute_dtype is float32",
        ),
        ((f"{MODEL}.head_dim=24",), "a multiple of 16 up to 512, not 24"),
        (("moe_config.capacity_factor=-1",), "use_fused_ops_topkrouter: portable operators instead, TopKRouter needs"),
    ],
)
def test_a_kernel_that_does_not_fit_is_replaced_and_named(job, changes, words):
    _, notes = chosen(switched(job.yaml, True, *changes))
    assert len(notes) == 1 and words in notes[0]


def test_only_ascend_gets_kernels(job):
    spec = network_spec_from_yaml(switched(job.yaml, True))
    assert select_operators("Ascend").for_network(spec).causal_attention is ascend.FlashAttentionOp
    assert select_operators("CPU").for_network(spec).causal_attention is CausalAttentionOp
    assert select_operators("CPU").for_network(spec).slots is None
    assert select_operators("Ascend").for_network().rms_norm is portable.RmsNormOp  # generation's own graphs


# How a kernel is used


class Formula(nn.Cell):
    """A kernel's documented formula in the kernel's place; ``kernel`` holds what it was built with."""

    def __init__(self, formula, kernel):
        super().__init__()
        self.formula, self.kernel = formula, kernel

    def construct(self, *inputs):
        return self.formula(self.kernel, *inputs)


def with_formula(cell, name, formula):
    """``cell`` with its kernel ``name`` replaced."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    kernel = getattr(cell, name)
    delattr(cell, name)
    setattr(cell, name, Formula(formula, kernel))
    return cell


def normal(*shape, seed=0):
    return Tensor(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def flash_attention(kernel, query, key, value, shift, drop, padding, hidden):
    """softmax(scale q k^T, hidden where the mask is 1) v; key head of query head h: h // (N1 / N2)."""
    assert shift is None and drop is None and padding is None and hidden.dtype == ms.uint8
    B, S, width = query.shape
    D = width // kernel.head_num
    heads = [x.asnumpy().reshape(B, S, -1, D).transpose(0, 2, 1, 3) for x in (query, key, value)]
    q, (k, v) = heads[0], (np.repeat(x, kernel.head_num * D // key.shape[2], 1) for x in heads[1:])
    mask = hidden.asnumpy()
    if kernel.sparse_mode == 2:
        np.testing.assert_array_equal(mask, np.triu(np.ones((2048, 2048)), 1))
        mask = np.triu(np.ones((S, S)), 1)
    if kernel.sparse_mode == 4:  # the same triangle stands for a band of pre_tokens before the diagonal
        np.testing.assert_array_equal(mask, np.triu(np.ones((2048, 2048)), 1))
        mask = np.triu(np.ones((S, S)), 1) + np.tril(np.ones((S, S)), -kernel.pre_tokens - 1)
    assert mask.shape == (S, S) and kernel.next_tokens == 0 and kernel.keep_prob == 1.0
    scores = np.where(mask, -np.inf, kernel.scale_value * (q @ k.transpose(0, 1, 3, 2)))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True)) @ v
    return None, None, None, Tensor(mixed.transpose(0, 2, 1, 3).reshape(B, S, -1))


@pytest.mark.parametrize(
    ("length", "window"), [(32, None), (32, 9), (2050, None), (2050, 700)]
)  # all forms of the mask
def test_flash_attention_is_causal_attention(length, window):
    q, k, v = normal(1, length, 64), normal(1, length, 32, seed=1), normal(1, length, 32, seed=2)
    cell = with_formula(ascend.FlashAttentionOp(4, 2, 16, length, ms.float32, window), "attend", flash_attention)
    assert cell.attend.kernel.sparse_mode == (0 if length <= 2048 else 2 if window is None else 4)
    expected = CausalAttentionOp(4, 2, 16, length, ms.float32, window)(q, k, v)
    np.testing.assert_allclose(cell(q, k, v).asnumpy(), expected.asnumpy(), atol=2e-6)


def test_swiglu_gates_the_first_half():
    cell = with_formula(
        ascend.SwiGluKernel(),
        "swiglu",
        lambda kernel, x, dim: ops.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :],
    )
    gate, up = normal(2, 3, 8), normal(2, 3, 8, seed=1)
    np.testing.assert_allclose(cell(gate, up).asnumpy(), portable.SwiGluOp()(gate, up).asnumpy(), atol=1e-6)


def test_rms_norm_returns_first_what_is_wanted():
    def rms_norm(kernel, x, gamma):
        inverse = ops.rsqrt((x * x).mean(-1, keep_dims=True) + kernel.epsilon)
        return x * inverse * gamma, inverse

    cell = with_formula(ascend.RmsNormKernel(16, 1e-2), "norm", rms_norm)
    x, weight = normal(5, 16), normal(16, seed=1)
    np.testing.assert_allclose(cell(x, weight).asnumpy(), portable.RmsNormOp(16, 1e-2)(x, weight).asnumpy(), atol=1e-6)


def test_rotary_turns_halves_forward_and_back():
    def rotary(kernel, x, cos, sin, mode):
        assert mode == 0 and cos.shape == sin.shape == (1, x.shape[1], 1, x.shape[3])
        low, high = x[..., : x.shape[3] // 2], x[..., x.shape[3] // 2 :]
        return x * cos + ops.cat((-high, low), -1) * sin

    cell, plain = with_formula(ascend.RotaryKernel(), "rotary", rotary), portable.RotaryOp()
    x, (cos, sin) = normal(2, 6, 3, 8), rotary_tables(Rope(8, 100.0, 64).tables(6), ms.float32)
    weight = normal(2, 6, 3, 8, seed=1)
    found, expected = (ms.value_and_grad(lambda y, c=c: (c(y, cos, sin) * weight).sum())(x) for c in (cell, plain))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), rtol=1e-5, atol=1e-6)


def topk_router(kernel, index, capacity, experts, drop_type):
    """dispatch: 1 + token per slot, 0 empty; combine: expert * (1 + capacity) + 1 + position, position 0 dropped."""
    choices = index.asnumpy()
    G, N, K = choices.shape
    dispatch = np.zeros((G, experts, capacity), np.int32)
    combine = choices * (capacity + 1)
    for g in range(G):
        filled = [0] * experts
        for n, j in drop_order(N, K, drop_type == 0):
            e = choices[g, n, j]
            if filled[e] < capacity:
                dispatch[g, e, filled[e]] = n + 1
                filled[e] += 1
                combine[g, n, j] += filled[e]
    return Tensor(dispatch), Tensor(combine.astype(np.int32))


@pytest.mark.parametrize("sequence_order", [True, False], ids=["sdrop", "kdrop"])
@pytest.mark.parametrize("bias", [False, True])
def test_topk_router_fills_the_slots_as_sorting_does(sequence_order, bias):
    moe = MoESpec(
        num_local_experts=4,
        num_experts_per_tok=3,
        capacity_factor=0.7,
        enable_sdrop=sequence_order,
        balance_via_topk_bias=bias,
        aux_losses=(("expert", 0.1),),
    )
    logits = Tensor(hard_logits(9, 4))
    parallel = ParallelSpec(data_parallel=len(logits))
    cell, plain = TopkRouterV2(moe, parallel, slots=ascend.TopKRouterSlots), TopkRouterV2(moe, parallel)
    with_formula(cell.slots.kernel, "topkrouter", topk_router)
    offset = Tensor(np.array([0.0, 0.2, 0.0, -0.2], np.float32))
    for one, other in zip(cell.route(logits, offset), plain.route(logits, offset), strict=True):
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy())
    assert float(plain.route(logits, offset)[6].mean().asnumpy()) > 0.1  # tokens were dropped
    cell.slots.keep_all_in_evaluation()
    cell.set_train(False)
    cell.slots.kernel.topkrouter = None  # evaluation drops nothing: its capacity follows the load, tokens are sorted
    assert float(cell.route(logits, offset)[6].max().asnumpy()) == 0.0


def test_grouped_product_multiplies_each_part_by_its_matrix():
    def grouped(kernel, rows, weights, bias, scale, offset, antiquant_scale, antiquant_offset, ends):
        assert (kernel.split_item, kernel.group_type) == (3, 0) and ends.dtype == ms.int64
        parts = np.split(rows[0].asnumpy(), ends.asnumpy()[:-1])
        return [Tensor(np.concatenate([part @ own for part, own in zip(parts, weights[0].asnumpy(), strict=True)]))]

    x, weight, ends = normal(10, 6), normal(4, 5, 6, seed=1), Tensor(np.array([3, 3, 9, 10], np.int64))
    cell = with_formula(ascend.GroupedProductKernel(4), "product", grouped)
    expected = portable.GroupedProductOp(4)(x, weight, ends)
    np.testing.assert_allclose(cell(x, weight, ends).asnumpy(), expected.asnumpy(), atol=1e-5)
