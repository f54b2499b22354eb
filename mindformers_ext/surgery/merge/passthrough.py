# SPDX-License-Identifier: Apache-2.0
"""passthrough: the tensor of the one model of the slice, as it is or times ``scale``. Stacks layers of models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mindformers_ext.surgery.merge.settings import Method, Parameter, Settings

if TYPE_CHECKING:
    import torch

    from mindformers_ext.surgery.merge.stream import Stream


def passthrough(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks of the input, scaled in its own type."""
    scale = settings.each("scale")[0]
    for chunk in stream.chunks():
        yield chunk.inputs[0] if scale == 1.0 else chunk.inputs[0] * scale


PASSTHROUGH = Method("passthrough", passthrough, (Parameter("scale", 1.0, per_input=True),), base="never", most=1)
