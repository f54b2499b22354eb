# SPDX-License-Identifier: Apache-2.0
"""LLaMA-MoE in closed form: gate, scores, losses of balance, routed and residual output.

float64 numpy, loops where they are the definition. Imports nothing of what it judges.

Letters: T tokens, H width, E experts, K chosen, R residual experts, F an expert's width. Noise is an input (z, standard
normal), so that a network's own can be given. Sources: arXiv 2406.16554; Shazeer et al., arXiv 1701.06538, appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Expert = tuple[np.ndarray, np.ndarray, np.ndarray]  # gate (F, H), up (F, H), down (H, F)
erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True)
class GateForm:
    """How a gate decides. ``released``: the counting of load as the published code does it, faults and all."""

    chosen: int
    softmax: bool = True
    epsilon: float = 1e-2  # least noise
    weight: float = 1e-2  # of the loss of balance; 0: none
    released: bool = False


@dataclass(frozen=True)
class Gate:
    """Weights: one matrix (E, H), or two (E, H), (E, E) with tanh between; the noise's (E, H)."""

    layers: tuple[np.ndarray, ...]
    noise: np.ndarray


@dataclass(frozen=True)
class Routing:
    """What a gate decided: experts (T, K), best first, their scores (T, K), sums per expert (E,), the loss."""

    index: np.ndarray
    scores: np.ndarray
    importance: np.ndarray
    load: np.ndarray
    balance: float


def double(value: np.ndarray) -> np.ndarray:
    """As float64."""
    return np.asarray(value, np.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    power = np.exp(x - x.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    """x times its sigmoid."""
    return x * 0.5 * (1 + np.tanh(0.5 * x))


def normal_cdf(x: np.ndarray) -> np.ndarray:
    """Share of a standard normal below x."""
    return 0.5 * (1 + erf(x / math.sqrt(2)))


def normal_pdf(x: np.ndarray) -> np.ndarray:
    """Density of a standard normal."""
    return np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def gate_logits(x_TH: np.ndarray, gate: Gate) -> np.ndarray:
    """(T, E) without noise."""
    out = double(x_TH) @ double(gate.layers[0]).T
    return np.tanh(out) @ double(gate.layers[1]).T if len(gate.layers) == 2 else out


def noise_sigma(x_TH: np.ndarray, gate: Gate, epsilon: float) -> np.ndarray:
    """(T, E): softplus(Wn x) + epsilon."""
    return np.logaddexp(0, double(x_TH) @ double(gate.noise).T) + epsilon


def choose(h_TE: np.ndarray, chosen: int) -> np.ndarray:
    """(T, chosen): largest first; of equal ones the lower number."""
    return np.argsort(-h_TE, axis=-1, kind="stable")[:, :chosen]


def chosen_scores(h_TE: np.ndarray, index_TK: np.ndarray, use_softmax: bool) -> np.ndarray:
    """(T, K): softmax over the chosen logits alone, or the logits."""
    kept = np.take_along_axis(h_TE, index_TK, -1)
    return softmax(kept) if use_softmax else kept


def scattered(value_TK: np.ndarray, index_TK: np.ndarray, experts: int) -> np.ndarray:
    """(T, E): a value at its expert, 0 elsewhere."""
    out = np.zeros((len(index_TK), experts))
    np.put_along_axis(out, index_TK, value_TK, -1)
    return out


def thresholds(h_TE: np.ndarray, z_sigma_TE: np.ndarray, form: GateForm) -> np.ndarray:
    """(T, E): place, in the order of h, of the logit that an expert has to exceed to be chosen: K (the first that is
    not chosen) for one that is in, K - 1 (the last that is) for one that is out. Released: noise alone is compared."""
    order = choose(h_TE, form.chosen + 1)
    first_out = np.take_along_axis(h_TE, order[:, form.chosen :], -1)
    inside = (z_sigma_TE if form.released else h_TE) > first_out
    return np.where(inside, order[:, form.chosen :], order[:, form.chosen - 1 : form.chosen])


def load_shares(g_TE: np.ndarray, sigma_TE: np.ndarray, z_TE: np.ndarray, form: GateForm) -> np.ndarray:
    """(T, E): chance that an expert would be chosen if its own noise were drawn again."""
    h_TE = g_TE + z_TE * sigma_TE
    theta = np.take_along_axis(h_TE, thresholds(h_TE, z_TE * sigma_TE, form), -1)
    return normal_cdf((g_TE - theta) / sigma_TE)


def cv2(value_E: np.ndarray) -> float:
    """Squared coefficient of variation, variance over n - 1; 0 for one expert."""
    if len(value_E) == 1:
        return 0.0
    return float(np.var(value_E, ddof=1) / (np.mean(value_E) ** 2 + 1e-10))


def route(
    x_TH: np.ndarray,
    gate: Gate,
    form: GateForm,
    z_TE: np.ndarray | None = None,
    real_T: np.ndarray | None = None,
) -> Routing:
    """What the gate decides. ``z_TE``: the noise of a training step, or none; ``real_T``: False for padding, which is
    routed but not counted."""
    g_TE = gate_logits(x_TH, gate)
    experts = g_TE.shape[1]
    real = np.ones(len(g_TE), bool) if real_T is None else np.asarray(real_T, bool)
    h_TE = g_TE if z_TE is None else g_TE + double(z_TE) * noise_sigma(x_TH, gate, form.epsilon)
    index = choose(h_TE, form.chosen)
    scores = chosen_scores(h_TE, index, form.softmax)
    share = scattered(scores, index, experts)
    if z_TE is not None and form.chosen < experts:
        load = load_shares(g_TE, noise_sigma(x_TH, gate, form.epsilon), double(z_TE), form)
    elif form.released:
        load = (share > 0).astype(np.float64)
    else:
        load = scattered(np.ones_like(scores), index, experts)
    importance_E, load_E = share[real].sum(0), load[real].sum(0)
    balance = form.weight * (cv2(importance_E) + cv2(load_E)) if form.weight else 0.0
    return Routing(index, scores, importance_E, load_E, balance)


# --------------------------------------------------------------------------- gradients of the loss of balance


def cv2_gradient(value_E: np.ndarray) -> np.ndarray:
    """(E,)."""
    n, mean = len(value_E), value_E.mean()
    if n == 1:
        return np.zeros(1)
    var, square = np.var(value_E, ddof=1), mean**2 + 1e-10
    return 2 * (value_E - mean) / ((n - 1) * square) - 2 * var * mean / (n * square**2)


def logits_gradient(
    x_TH: np.ndarray, gate: Gate, form: GateForm, z_TE: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Of the loss of balance by the logits g and by sigma, each (T, E)."""
    g_TE, routing = gate_logits(x_TH, gate), route(x_TH, gate, form, z_TE)
    experts = g_TE.shape[1]
    by_score = np.broadcast_to(form.weight * cv2_gradient(routing.importance), g_TE.shape)
    by_kept = np.take_along_axis(by_score, routing.index, -1)
    if form.softmax:
        by_kept = routing.scores * (by_kept - (routing.scores * by_kept).sum(-1, keepdims=True))
    by_h = scattered(by_kept, routing.index, experts)
    by_g, by_sigma = np.zeros_like(g_TE), np.zeros_like(g_TE)
    if z_TE is None:
        return by_h, by_sigma
    z_TE, sigma = double(z_TE), noise_sigma(x_TH, gate, form.epsilon)
    if form.chosen < experts:
        place = thresholds(g_TE + z_TE * sigma, z_TE * sigma, form)
        u = (g_TE - np.take_along_axis(g_TE + z_TE * sigma, place, -1)) / sigma
        by_u = form.weight * cv2_gradient(routing.load) * normal_pdf(u) / sigma
        by_g += by_u
        by_sigma -= by_u * u
        for t, e in np.ndindex(place.shape):  # a threshold is a logit of another expert
            by_h[t, place[t, e]] -= by_u[t, e]
    return by_g + by_h, by_sigma + z_TE * by_h


def balance_gradients(
    x_TH: np.ndarray, gate: Gate, form: GateForm, z_TE: np.ndarray | None = None
) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
    """Of the loss of balance by the gate's layers, by the noise's weight (E, H), and by x (T, H)."""
    x_TH, noise = double(x_TH), double(gate.noise)
    by_g, by_sigma = logits_gradient(x_TH, gate, form, z_TE)
    by_pre = by_sigma * (1 - np.exp(-(noise_sigma(x_TH, gate, 0.0))))  # softplus' = 1 - exp(-softplus)
    by_x = by_pre @ noise
    first = double(gate.layers[0])
    if len(gate.layers) == 1:
        return (by_g.T @ x_TH,), by_pre.T @ x_TH, by_x + by_g @ first
    middle = np.tanh(x_TH @ first.T)
    by_middle = by_g @ double(gate.layers[1]) * (1 - middle**2)
    return (by_middle.T @ x_TH, by_g.T @ middle), by_pre.T @ x_TH, by_x + by_middle @ first


# --------------------------------------------------------------------------- outputs


def expert_output(x_TH: np.ndarray, expert: Expert) -> np.ndarray:
    """(T, H): down( silu(gate x) * (up x) )."""
    gate, up, down = (double(weight) for weight in expert)
    return (silu(double(x_TH) @ gate.T) * (double(x_TH) @ up.T)) @ down.T


def capacity(tokens: int, experts: int, factor: float, chosen: int = 1) -> int:
    """Tokens an expert takes at most: int(factor * chosen * tokens / experts)."""
    return int(factor * chosen * tokens / experts)


def kept(index_TK: np.ndarray, experts: int, limit: int, order_T: Sequence[int]) -> np.ndarray:
    """(T, K): False where an expert was full; tokens come in the given order, their better choice first."""
    taken, keep = [0] * experts, np.zeros(index_TK.shape, bool)
    for t in order_T:
        for place, e in enumerate(index_TK[t]):
            keep[t, place] = taken[e] < limit
            taken[e] += 1
    return keep


def routed_output(
    x_TH: np.ndarray,
    routing: Routing,
    experts: Sequence[Expert],
    *,
    multiply: bool = True,
    factor: float = 1.0,
    keep_TK: np.ndarray | None = None,
    padding: str = "zero",
) -> np.ndarray:
    """(T, H): y_t = factor * sum of s_te * expert_e(x_t); without ``multiply`` the plain sum, without s and factor.

    A dropped assignment gives nothing, or with ``padding="input"`` the token itself, unweighted.
    """
    x_TH = double(x_TH)
    out = np.zeros_like(x_TH)
    for t, place in np.ndindex(routing.index.shape):
        if keep_TK is not None and not keep_TK[t, place]:
            out[t] += x_TH[t] if padding == "input" else 0.0
            continue
        y = expert_output(x_TH[t : t + 1], experts[routing.index[t, place]])[0]
        out[t] += factor * routing.scores[t, place] * y if multiply else y
    return out


def residual_output(
    x_TH: np.ndarray,
    gate_RH: np.ndarray,
    experts: Sequence[Expert],
    *,
    use_softmax: bool = True,
    multiply: bool = True,
    factor: float = 1.0,
) -> np.ndarray:
    """(T, H): all R residual experts, weighed by softmax(W x) (or W x); without ``multiply`` their plain sum."""
    scores = double(x_TH) @ double(gate_RH).T
    scores = softmax(scores) if use_softmax else scores
    outs = np.stack([expert_output(x_TH, expert) for expert in experts], 1)
    return (outs * (factor * scores[..., None] if multiply else 1.0)).sum(1)


def with_residual(
    x_TH: np.ndarray, routed_TH: np.ndarray, residual_TH: np.ndarray, weighting_2H: np.ndarray | None = None
) -> np.ndarray:
    """(T, H): the sum of both parts, or with a weighting network their mean by softmax(W x), routed part first."""
    if weighting_2H is None:
        return routed_TH + residual_TH
    share = softmax(double(x_TH) @ double(weighting_2H).T)
    return share[:, :1] * routed_TH + share[:, 1:] * residual_TH
