# SPDX-License-Identifier: Apache-2.0
"""What a decoder computes inside, with one layer in memory, on MindSpore; ``pt.probe`` is the twin.

A layer is compiled once for a shape of rows: another layer's weights replace the parameters' data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.nn.utils import no_init_parameters

from mindformers_ext.core.layers import POINTS, LayerSpec
from mindformers_ext.core.parameters import point_widths
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.attention import rotary_tables
from mindformers_ext.ms.engine import fill
from mindformers_ext.ms.layer import Layer
from mindformers_ext.ms.loss import WeightedLosses
from mindformers_ext.ms.norm import RmsNorm
from mindformers_ext.ms.ops.dtypes import mindspore_dtype
from mindformers_ext.ms.ops.select import select_operators

Arrays = dict[str, np.ndarray]
INNER = tuple(POINTS)[1:-1]
OF_MIXTURES = tuple(name for name, width in POINTS.items() if width == "D")
CHUNK = 512  # tokens whose logits are held at once


class LayerPoints(nn.Cell):
    """A dense layer that returns all ``POINTS``. Inputs: x (T, D), the rotary tables."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(auto_prefix=False)
        self.layer: Any = layer  # its feed-forward part is a SwiGlu: the model is dense

    def construct(self, x_TD: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> tuple[Tensor, ...]:
        layer = self.layer
        normed_TD = layer.attention_norm(x_TD)
        context = layer.attention.context(normed_TD, cos_SP, sin_SP)
        mixed_TD = layer.attention.wo(context)
        middle_TD = layer.add(x_TD, mixed_TD)
        input_TD = layer.ffn_norm(middle_TD)
        linear_TF = layer.feed_forward.w1(input_TD)
        gate_TF = ops.silu(linear_TF)
        hidden_TF = gate_TF * layer.feed_forward.w3(input_TD)
        fed_TD = layer.feed_forward.w2(hidden_TF)
        return (
            *(x_TD, normed_TD, context, mixed_TD, input_TD, linear_TF, gate_TF, hidden_TF, fed_TD),
            layer.add(middle_TD, fed_TD),
        )


class MixturePoints(nn.Cell):
    """The same of a mixture: those ``POINTS`` that it has (``OF_MIXTURES``)."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(auto_prefix=False)
        self.layer: Any = layer

    def construct(self, x_TD: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> tuple[Tensor, ...]:
        layer = self.layer
        normed_TD = layer.attention_norm(x_TD)
        mixed_TD = layer.attention(normed_TD, cos_SP, sin_SP)
        if layer.attends_by_experts:
            mixed_TD = mixed_TD[0]
        middle_TD = layer.add(x_TD, mixed_TD)
        input_TD = layer.ffn_norm(middle_TD)
        fed_TD, _, _ = layer.feed_forward(input_TD)
        return x_TD, normed_TD, mixed_TD, input_TD, fed_TD, layer.add(middle_TD, fed_TD)


class ShiftedLayer(nn.Cell):
    """The layer's output with a shift added at its inner points: the gradient at a shift of 0 is that at the point.

    Inputs: x (T, D), the rotary tables, shifts as ``POINTS`` from "attention_input" to "mlp_output".
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(auto_prefix=False)
        self.layer: Any = layer  # its feed-forward part is a SwiGlu: the model is dense

    def construct(
        self,
        x_TD: Tensor,
        cos_SP: Tensor,
        sin_SP: Tensor,
        normed_shift: Tensor,
        context_shift: Tensor,
        mixed_shift: Tensor,
        input_shift: Tensor,
        linear_shift: Tensor,
        gate_shift: Tensor,
        hidden_shift: Tensor,
        fed_shift: Tensor,
    ) -> Tensor:
        layer = self.layer
        normed_TD = layer.attention_norm(x_TD) + normed_shift
        context = layer.attention.context(normed_TD, cos_SP, sin_SP) + context_shift
        middle_TD = layer.add(x_TD, layer.attention.wo(context) + mixed_shift)
        input_TD = layer.ffn_norm(middle_TD) + input_shift
        gate_TF = ops.silu(layer.feed_forward.w1(input_TD) + linear_shift) + gate_shift
        hidden_TF = gate_TF * layer.feed_forward.w3(input_TD) + hidden_shift
        return layer.add(middle_TD, layer.feed_forward.w2(hidden_TF) + fed_shift)


class HeadLoss(nn.Cell):
    """Final norm, head and the sum of cross entropies. Inputs: x (T, D), label (T) int32, weight (T) float32."""

    def __init__(self, norm: RmsNorm, head: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.norm, self.head = norm, head
        self.product = P.MatMul(transpose_b=True)
        self.rows = WeightedLosses()
        self.sum = P.ReduceSum()

    def construct(self, x_TD: Tensor, label_T: Tensor, weight_T: Tensor) -> Tensor:
        logits_TV = self.product(self.norm(x_TD), ops.cast(self.head, x_TD.dtype))
        return self.sum(self.rows(logits_TV, label_T, weight_T))


class _Vjp(nn.Cell):
    """Gradients of a cell's output at all its inputs, from the gradient at the output, which comes last."""

    def __init__(self, cell: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, *given: Tensor) -> tuple[Tensor, ...]:
        return self.gradient(self.cell)(*given)


class MindSporeLayerProbe:
    """See ``jobs.engine.protocols.LayerProbe``."""

    def __init__(self, spec: NetworkSpec) -> None:
        operators = select_operators().for_network(spec)
        self.spec = replace(spec, numerics=operators.numerics(spec.numerics))
        self.operators = operators
        self.dtype = operators.dtype(spec.numerics.compute_dtype)
        rotary = operators.dtype(spec.numerics.rotary_dtype)
        self._tables = rotary_tables(spec.model.rope.tables(spec.seq_length), rotary)
        self._points: Any = None
        self._gradients: Any = None
        self._layer: Layer | None = None
        self._built: LayerSpec | None = None
        self._head: tuple[nn.Cell, nn.Cell] | None = None

    def fill(self, layer: int, weights: Iterable[tuple[str, np.ndarray]]) -> None:
        """The layer in memory is number ``layer`` from now on."""
        self._head = None
        self._build(self.spec.model.layer(layer))
        fill(self._layer, weights)

    def fill_head(self, norm: np.ndarray, blocks: Iterable[np.ndarray]) -> None:
        """The final norm (D) and the head in blocks of rows, (V, D) in all, take the layer's place."""
        self._layer = self._built = None
        cell = RmsNorm(self.spec, self.operators)
        fill(cell, [("weight", norm)])
        model = self.spec.model
        rows = np.empty((model.vocab_size, model.hidden_size), np.float32)
        done = 0
        for block in blocks:
            rows[done : done + len(block)] = block
            done += len(block)
        dtype = mindspore_dtype(self.spec.numerics.param_dtype)
        head = HeadLoss(cell, Parameter(Tensor(rows).astype(dtype), name="head", requires_grad=False))
        self._head = (head, _Vjp(head))

    def forward(self, x: np.ndarray, points: Sequence[str]) -> tuple[np.ndarray, Arrays]:
        """The layer's output (B, S, D) for its input, and (B*S, width) at each of ``points``."""
        names = OF_MIXTURES if self._built and self._built.moe else POINTS
        found = dict(zip(names, self._points(self._rows(self._checked(x)), *self._tables), strict=True))
        return _numpy(found["output"]).reshape(x.shape), {name: _numpy(found[name]) for name in points}

    def backward(
        self, x: np.ndarray, dy: np.ndarray, values: Sequence[str], gradients: Sequence[str]
    ) -> tuple[np.ndarray, Arrays, Arrays]:
        """The gradient at the layer's input from that at its output, both (B, S, D); values and gradients by point."""
        seen = self.forward(x, values)[1] if values else {}
        shifts = self._shifts(x.shape[0] * x.shape[1])
        made = self._gradients(self._rows(self._checked(x)), *self._tables, *shifts, self._rows(dy))
        found = {"input": made[0], "output": self._rows(dy), **dict(zip(INNER, made[3:], strict=True))}
        return _numpy(made[0]).reshape(x.shape), seen, {name: _numpy(found[name]) for name in gradients}

    def loss(self, x: np.ndarray, target: np.ndarray, counted: np.ndarray) -> tuple[float, np.ndarray]:
        """Sum of the cross entropy over counted targets (B, S), and its gradient at ``x``, the last layer's output."""
        head, vjp = self._filled_head()
        dx, total = np.empty((x.shape[0] * x.shape[1], x.shape[2]), np.float32), 0.0
        for start, first, given in self._chunks(x, target, counted):
            total += float(head(*given).asnumpy())
            made = _numpy(vjp(*given, Tensor(1.0, ms.float32))[0])
            dx[start : first + len(made)] = made[start - first :]
        return total, dx.reshape(x.shape)

    def loss_alone(self, x: np.ndarray, target: np.ndarray, counted: np.ndarray) -> float:
        """The same without the gradient."""
        head, _ = self._filled_head()
        return sum(float(head(*given).asnumpy()) for _, _, given in self._chunks(x, target, counted))

    def _filled_head(self) -> tuple[nn.Cell, nn.Cell]:
        if self._head is None:
            raise ValueError("the head is not in memory: fill_head first")
        return self._head

    def _chunks(
        self, x: np.ndarray, target: np.ndarray, counted: np.ndarray
    ) -> Iterator[tuple[int, int, tuple[Tensor, Tensor, Tensor]]]:
        """Where a chunk's new tokens and the chunk itself begin, and its tokens, labels and weights."""
        rows = x.reshape(-1, x.shape[-1])
        chunk = min(CHUNK, len(rows))
        for start in range(0, len(rows), chunk):  # the last one goes back a little, with weight 0: one compiled shape
            first = min(start, len(rows) - chunk)
            weight = counted.reshape(-1)[first : first + chunk].astype(np.float32)
            weight[: start - first] = 0
            label = Tensor(target.reshape(-1)[first : first + chunk].astype(np.int32))
            yield start, first, (Tensor(rows[first : first + chunk], self.dtype), label, Tensor(weight))

    def compile(self, rows: int) -> None:
        """Compile the first layer and the head for so many rows, both ways, without weights: for a dry run."""
        self._build(self.spec.model.layer(0))
        model, tokens = self.spec.model, rows * self.spec.seq_length
        x_TD = ops.zeros((tokens, model.hidden_size), self.dtype)
        self._points.compile(x_TD, *self._tables)
        self._gradients.compile(x_TD, *self._tables, *self._shifts(tokens), x_TD)
        head = HeadLoss(
            RmsNorm(self.spec, self.operators),
            Parameter(ops.zeros((model.vocab_size, model.hidden_size), self.dtype), name="head"),
        )
        given = (x_TD, ops.zeros((tokens,), ms.int32), ops.zeros((tokens,), ms.float32))
        head.compile(*given)
        _Vjp(head).compile(*given, Tensor(1.0, ms.float32))

    def _shifts(self, tokens: int) -> list[Tensor]:
        """Zeros for the inner points."""
        widths = point_widths(self.spec.model)
        return [ops.zeros((tokens, widths[name]), self.dtype) for name in INNER]

    def _build(self, layer: LayerSpec) -> None:
        if self._built == layer:
            return
        self._layer = self._points = self._gradients = None
        with no_init_parameters():
            self._layer = Layer(self.spec, layer, self.operators)
        self._layer.set_train(False)
        self._points = (MixturePoints if layer.moe else LayerPoints)(self._layer)
        self._gradients = None if layer.moe else _Vjp(ShiftedLayer(self._layer))
        self._built = layer

    def _checked(self, x: np.ndarray) -> np.ndarray:
        if x.shape[1] != self.spec.seq_length:
            raise ValueError(f"rows of {x.shape[1]} tokens in a layer built for seq_length={self.spec.seq_length}")
        return x

    def _rows(self, x: np.ndarray) -> Tensor:
        return Tensor(np.ascontiguousarray(x.reshape(-1, x.shape[-1])), self.dtype)


def _numpy(tensor: Tensor) -> np.ndarray:
    return ops.cast(tensor, ms.float32).asnumpy()
