# SPDX-License-Identifier: Apache-2.0
"""Which layers become mixtures, in Megatron-LM's words (``--moe-layer-freq``)."""

from __future__ import annotations

import re

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import LARGEST

MOST = LARGEST["num_hidden_layers"]
LONGEST = 8192  # characters: a list of as many layers, with blanks
ADVICE = "give N (layers 0, N, 2N, ... are mixtures) or a 0 or 1 for each layer: [0,1,1,1], [0]*1+[1]*23, ([0]+[1])*12"
_GROUP = re.compile(r"\(([^()]*)\)(?:\*(\d{1,4}))?")
_TERM = re.compile(r"\[([01](?:,[01])*)\](?:\*(\d{1,4}))?")


def dense_layers(text: str | None, layers: int) -> frozenset[int]:
    """The layers that stay dense; none where ``text`` is None.

    Raises:
        UserError: another form, a list of another length, or no layer left to be a mixture.
    """
    if text is None:
        return frozenset()
    words = re.sub(r"\s+", "", text) if len(text) <= LONGEST else ""
    if re.fullmatch(r"[1-9]\d{0,8}", words):
        flags = [index % int(words) == 0 for index in range(layers)]
    else:
        flags = _flags(words, text)
    if len(flags) != layers:
        raise UserError(f"--moe_layer_freq {text[:60]} is of {len(flags)} layers, the model has {layers}: {ADVICE}")
    if not any(flags):
        raise UserError(f"--moe_layer_freq {text[:60]} leaves no layer to be a mixture: {ADVICE}")
    return frozenset(index for index, is_mixture in enumerate(flags) if not is_mixture)


def _flags(words: str, text: str) -> list[bool]:
    """The list that an expression of lists makes; parentheses once."""
    group = _GROUP.fullmatch(words)
    inner, times = (group[1], int(group[2] or 1)) if group else (words, 1)
    found: list[bool] = []
    for term in inner.split("+"):
        match = _TERM.fullmatch(term)
        if not match:
            raise UserError(f"--moe_layer_freq '{text[:60]}' is not understood: {ADVICE}")
        found += [flag == "1" for flag in match[1].split(",")] * min(int(match[2] or 1), MOST)
        if len(found) * times > MOST:
            raise UserError(f"--moe_layer_freq {text[:60]} is of more than {MOST} layers: {ADVICE}")
    return found * times
