# SPDX-License-Identifier: Apache-2.0
"""Routing written as plain loops over tokens (numpy only), and logits that try a router's patience."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mindformers_ext.core.layers import MoESpec

# Words of MoESpec, the ways to choose experts; those with groups also want n_group and topk_group.
CHOICES = {
    "best group, softmax": {"topk_method": "group_limited_greedy"},
    "best group, sigmoid, scaled": {
        "topk_method": "group_limited_greedy",
        "use_gating_sigmoid": True,
        "routed_scaling_factor": 2.5,
    },
    "best group, sigmoid, bias": {
        "topk_method": "group_limited_greedy",
        "use_gating_sigmoid": True,
        "balance_via_topk_bias": True,
    },
    "two best, sigmoid, bias, scaled": {
        "topk_method": "noaux_tc",
        "use_gating_sigmoid": True,
        "balance_via_topk_bias": True,
        "routed_scaling_factor": 2.5,
    },
    "two best, softmax, not normalised": {"topk_method": "noaux_tc", "norm_topk_prob": False},
    "greedy, softmax, bias": {"balance_via_topk_bias": True},
    "greedy, sigmoid, not normalised, scaled": {
        "use_gating_sigmoid": True,
        "norm_topk_prob": False,
        "routed_scaling_factor": 0.5,
    },
}


@dataclass(frozen=True)
class Routing:
    """What a router decides; the shapes and meanings are those of ``tests.helpers.router.TopkRouterV2``."""

    dispatch: np.ndarray
    combine: np.ndarray
    coeff: np.ndarray
    assignment: np.ndarray
    load: np.ndarray
    dropped: float

    @property
    def capacity(self) -> int:
        return self.dispatch.shape[2]


def chosen_experts(prob_GNE: np.ndarray, moe: MoESpec, bias_E: np.ndarray | None = None) -> np.ndarray:
    """Experts (G, N, K), best first. Groups outside the limit are out.

    Of equal ones the lower number, while MindSpore's TopK keeps to no rule (on the CPU it depends on the sizes).
    """
    G, N, E = prob_GNE.shape
    index_GNK = np.zeros((G, N, moe.num_experts_per_tok), np.int64)
    for g, n in np.ndindex(G, N):
        score = prob_GNE[g, n] + (np.zeros(E, np.float32) if bias_E is None else bias_E)
        if moe.topk_method != "greedy":
            size, best = E // moe.n_group, 2 if moe.topk_method == "noaux_tc" else 1
            groups = [float(np.sort(score[i : i + size])[-best:].sum(dtype=np.float32)) for i in range(0, E, size)]
            limit = sorted(groups)[-moe.topk_group]
            score = np.where(np.repeat(np.asarray(groups) >= limit, size), score, -np.inf)
        index_GNK[g, n] = np.argsort(-score, kind="stable")[: moe.num_experts_per_tok]
    return index_GNK


def capacity_of(moe: MoESpec, tokens: int, largest_load: int, multiple: int = 1) -> int:
    """The formula of MindFormers, spelled out; dropless takes the largest load."""
    k, experts = moe.num_experts_per_tok, moe.num_local_experts
    wanted = largest_load
    if moe.capacity_factor > 0:
        wanted = min(int(np.ceil(k * tokens * moe.capacity_factor / experts)), tokens)
    while wanted % multiple:
        wanted += 1
    return wanted


def route(prob_GNE: np.ndarray, moe: MoESpec, multiple: int = 1, index_GNK: np.ndarray | None = None) -> Routing:
    """Fill the experts' slots one assignment after the other, in drop order, until each is full.

    ``index_GNK``: the experts chosen, where ties or a bias make ``chosen_experts(prob_GNE, moe)`` not the only answer.
    """
    G, N, E = prob_GNE.shape
    K = moe.num_experts_per_tok
    index_GNK = chosen_experts(prob_GNE, moe) if index_GNK is None else index_GNK
    load_GE = np.stack([np.bincount(index_GNK[g].ravel(), minlength=E) for g in range(G)])
    capacity = capacity_of(moe, N, int(load_GE.max()), multiple)
    gate_GNK = np.take_along_axis(prob_GNE, index_GNK, -1)
    if moe.norm_topk_prob and (K > 1 or moe.norm_single_choice):
        gate_GNK = gate_GNK / (gate_GNK.sum(-1, keepdims=True) + 1e-9)
    gate_GNK = gate_GNK * moe.routed_scaling_factor
    dispatch = np.zeros((G, E, capacity), np.int64)
    assignment = np.zeros((G, E, capacity), np.int64)
    combine, coeff = np.zeros((G, N, K), np.int64), np.zeros((G, N, K), np.float32)
    kept = 0
    for g in range(G):
        filled = [0] * E
        for n, j in drop_order(N, K, moe.enable_sdrop):
            e = index_GNK[g, n, j]
            combine[g, n, j] = e * (capacity + 1)
            if filled[e] < capacity:
                dispatch[g, e, filled[e]] = n + 1
                assignment[g, e, filled[e]] = n * K + j
                filled[e] += 1
                combine[g, n, j] += filled[e]
                coeff[g, n, j] = gate_GNK[g, n, j]
                kept += 1
    return Routing(dispatch, combine, coeff, assignment, load_GE.sum(0), 1 - kept / (G * N * K))


def drop_order(tokens: int, chosen: int, sdrop: bool) -> list[tuple[int, int]]:
    """(token, choice) in the order in which they ask for a slot."""
    if sdrop:
        return [(n, j) for n in range(tokens) for j in range(chosen)]
    return [(n, j) for j in range(chosen) for n in range(tokens)]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, float32."""
    power = np.exp(logits - logits.max(-1, keepdims=True))
    return (power / power.sum(-1, keepdims=True)).astype(np.float32)


HARD = ("random", "skewed", "all to one expert", "all tied", "many ties", "last expert, rest tied")


def hard_logits(tokens: int, experts: int, seed: int = 0) -> np.ndarray:
    """(6, N, E) float32: one group of logits for each name in ``HARD``."""
    generator = np.random.default_rng(seed)
    normal = generator.normal(size=(2, tokens, experts))
    one, last = np.zeros((2, tokens, experts))
    one[:, 0], last[:, -1] = 6.0, 3.0
    one[:, 1:] = generator.normal(size=(tokens, experts - 1))
    tied = generator.integers(0, 2, (tokens, experts))
    skew = np.linspace(2.0, -2.0, experts)
    return np.stack([normal[0], normal[1] + skew, one, np.zeros_like(one), tied, last]).astype(np.float32)
