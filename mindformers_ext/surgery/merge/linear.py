# SPDX-License-Identifier: Apache-2.0
"""linear: the weighted mean, out = sum_m w_m x_m [/ sum_m w_m when normalize].

Source: model soups, Wortsman et al. 2022, arXiv 2203.05482. Sums in float32 whatever the merge's type, one rounding at
the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mindformers_ext.surgery.merge.settings import Method, Parameter, Settings
from mindformers_ext.surgery.merge.stream import Stream

TINY = 1e-8  # weights that cancel out are not divided by


def linear(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks of the weighted mean, in the type of the inputs."""
    weights = settings.each("weight")
    total = sum(weights) if settings.on("normalize") else 1.0
    for chunk in stream.chunks():
        sums = torch.zeros_like(chunk.inputs[0], dtype=torch.float32)
        for weight, tensor in zip(weights, chunk.inputs, strict=True):
            sums.add_(tensor.to(torch.float32), alpha=weight)  # one rounding for product and sum, as in mergekit
        if total != 1.0 and abs(total) > TINY:
            sums.div_(total)
        yield sums.to(chunk.inputs[0].dtype)


LINEAR = Method("linear", linear, (Parameter("weight", per_input=True), Parameter("normalize", True)), base="never")
