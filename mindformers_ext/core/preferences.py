# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290): its data's columns and its words.

Of a pair of answers to one prompt, with log p the sum over an answer's tokens::

    margin = beta ((log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)))
    loss = -log sigmoid(margin)

The reference is the network as it stands before the first step: its log-probabilities are measured once and kept.
"""

from __future__ import annotations

from collections.abc import Sequence

# MindFormers' names: the conversation with the preferred answer, and with the other one
PAIR_COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
BETA = 0.1
DPO_BETA = "runner_config.dpo_beta"


def holds_pairs(columns: Sequence[str]) -> bool:
    """Whether rows are pairs of answers."""
    return tuple(columns) == PAIR_COLUMNS
