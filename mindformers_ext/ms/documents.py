# SPDX-License-Identifier: Apache-2.0
"""What packed rows (``core.documents``) say of tokens, and the shapes that MindSpore's cut graph asks for."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops


class CountedTokens(nn.Cell):
    """(B*S) float32: 1, or 0 where a token of the documents (B, S) is padding."""

    def construct(self, documents_BS: Tensor) -> Tensor:
        return ops.cast(ops.reshape(documents_BS, (-1,)) > 0, ms.float32)


def counted_shape(documents: list) -> list:
    """The shape that ``CountedTokens`` gives."""
    return [documents[0] * documents[1]]


def counted_type(documents: ms.Type) -> ms.Type:
    """Its type."""
    return ms.TensorType(ms.float32)


def table_shapes(documents: list, cos: list, sin: list) -> tuple:
    """The shapes that ``DocumentTables`` gives."""
    whole = [*documents, 1, cos[3]]
    return whole, whole


def table_types(documents: ms.Type, cos: ms.Type, sin: ms.Type) -> tuple:
    """Their types."""
    return cos, sin
