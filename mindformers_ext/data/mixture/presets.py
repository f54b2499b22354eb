# SPDX-License-Identifier: Apache-2.0
"""Names, first proportions and target losses of published mixtures, as data.

Sheared-LLaMA's are those of its code (arXiv:2310.06694): seven domains of RedPajama, losses that a scaling law predicts
for models of that size. LLaMA-MoE's (arXiv:2406.16554): seven domains of SlimPajama, the losses of LLaMA-2-7B.
"""

from __future__ import annotations

from dataclasses import dataclass

SHEARED_NAMES = ("cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4-rp")
SHEARED_START = (0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15)
PRUNED_START = (0.2192, 0.0002, 0.0791, 0.0064, 0.0096, 0.001, 0.6845)  # as 1.3B had them behind pruning
MOE_NAMES = ("en_cc", "en_c4", "github", "en_wikipedia", "en_book", "en_arxiv", "en_stack")
LLAMA_2_7B = (1.6916865, 2.0748811, 0.6984496, 1.5899001, 1.9252481, 1.2408167, 1.4974865)


@dataclass(frozen=True)
class Preset:
    """A published mixture: ``names`` in their order, ``proportions`` at the start, ``targets`` in nats per token."""

    names: tuple[str, ...]
    proportions: tuple[float, ...]
    targets: tuple[float, ...] | None = None


PRESETS: dict[str, Preset] = {
    "sheared_370m": Preset(SHEARED_NAMES, SHEARED_START, (2.1401, 0.8694, 2.3625, 1.7791, 2.0470, 1.6637, 2.3139)),
    "sheared_1.3b": Preset(SHEARED_NAMES, SHEARED_START, (1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251)),
    "sheared_2.7b": Preset(SHEARED_NAMES, SHEARED_START, (1.8712, 0.6883, 2.0325, 1.5353, 1.6297, 1.3560, 2.0328)),
    "sheared_1.3b_pruned": Preset(
        SHEARED_NAMES, PRUNED_START, (1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251)
    ),
}
PRESETS |= dict(
    llama=Preset(MOE_NAMES, (0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02), LLAMA_2_7B),
    sheared_llama=Preset(MOE_NAMES, (0.361, 0.492, 0.008, 0.031, 0.091, 0.007, 0.01), LLAMA_2_7B),
    uniform=Preset(MOE_NAMES, (1 / 7,) * 7, LLAMA_2_7B),
)
