# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization as TRL's DPOTrainer computes it, in numpy, and pairs that a network can learn."""

from __future__ import annotations

import numpy as np

from tests.helpers.packed import PAD, SEQ, VOCAB


def row_logps(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """TRL's ``get_batch_logps`` without averaging: float64 logits (B, S, V) of the tokens before labels (B, S)."""
    shifted = logits - logits.max(-1, keepdims=True)
    logps = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    mask = labels != -100
    taken = np.take_along_axis(logps, np.where(mask, labels, 0)[..., None], -1)[..., 0]
    return (taken * mask).sum(-1)


def dpo_loss(
    policy_chosen: np.ndarray, policy_rejected: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, beta: float
) -> tuple[float, float, float]:
    """TRL's sigmoid loss, mean over pairs, with its reward accuracies and margins."""
    policy_ratios, reference_ratios = policy_chosen - policy_rejected, chosen - rejected
    logits = policy_ratios - reference_ratios
    losses = np.log1p(np.exp(-beta * logits))
    chosen_rewards, rejected_rewards = beta * (policy_chosen - chosen), beta * (policy_rejected - rejected)
    accuracy = (chosen_rewards > rejected_rewards).mean()
    return float(losses.mean()), float(accuracy), float((chosen_rewards - rejected_rewards).mean())


def pairs(count: int = 16, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Ids and labels of the chosen, then of the rejected (count, SEQ + 1); one counts up, one down."""
    draw = np.random.default_rng(seed)
    found = [np.full((count, SEQ + 1), value, np.int32) for value in (PAD, -100, PAD, -100)]
    for row in range(count):
        prompt = draw.integers(1, VOCAB, draw.integers(3, 8))
        for side, step in ((0, 1), (2, -1)):
            answer = (prompt[-1] + step * np.arange(1, draw.integers(4, 9)) - 1) % (VOCAB - 1) + 1
            whole = np.concatenate((prompt, answer))
            found[side][row, : len(whole)] = whole
            found[side + 1][row, len(prompt) : len(whole)] = answer
    return tuple(found)
