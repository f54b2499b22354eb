# SPDX-License-Identifier: Apache-2.0
"""What a decoder computes inside, with one layer in memory: values and gradients at the named points of a layer.

Points are those of ``core.layers.POINTS``; a mixture, where no token is dropped, has those of width D, and
``MIXTURE_POINTS``. Everything is float32 unless the spec says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mindformers_ext.core.layers import MIXTURE_POINTS, LayerSpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.attention import rotary_tables
from mindformers_ext.pt.layer import Layer
from mindformers_ext.pt.moe.observed import observed
from mindformers_ext.pt.names import fill
from mindformers_ext.pt.norm import RmsNorm
from mindformers_ext.pt.ops.dtypes import torch_dtype

Arrays = dict[str, np.ndarray]
CHUNK = 512  # tokens whose logits are held at once


class TorchLayerProbe:
    """See ``jobs.engine.protocols.LayerProbe``."""

    def __init__(self, spec: NetworkSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.dtype = torch_dtype(spec.numerics.compute_dtype)
        self._layer: Layer | None = None
        self._built: LayerSpec | None = None
        self._norm: RmsNorm | None = None
        self._head: Tensor | None = None
        self._tables: tuple[int, Tensor, Tensor] | None = None

    def fill(self, layer: int, weights: Iterable[tuple[str, np.ndarray]]) -> None:
        """The layer in memory is number ``layer`` from now on."""
        self._norm = self._head = None
        wanted = self.spec.model.layer(layer)
        if self._layer is None or wanted != self._built:
            self._layer = None  # before the next one takes its memory
            with torch.device("meta"):
                self._layer = Layer(self.spec, wanted).requires_grad_(False)
            self._layer.to_empty(device=self.device)
            self._built = wanted
        fill(self._layer, weights)

    def fill_head(self, norm: np.ndarray, blocks: Iterable[np.ndarray]) -> None:
        """The final norm (D) and the head in blocks of rows, (V, D) in all, take the layer's place."""
        self._layer = self._built = None
        model = self.spec.model
        self._norm = RmsNorm(self.spec).requires_grad_(False).to(self.device)
        fill(self._norm, [("weight", norm)])
        self._head = torch.empty(model.vocab_size, model.hidden_size, dtype=self.dtype, device=self.device)
        done = 0
        for block in blocks:
            self._head[done : done + len(block)] = self._tensor(block)
            done += len(block)

    def forward(self, x: np.ndarray, points: Sequence[str]) -> tuple[np.ndarray, Arrays]:
        """The layer's output (B, S, D) for its input, and (B*S, width) at each of ``points``."""
        with torch.no_grad():
            x_TD, mixed = self._rows(x), self._built is not None and self._built.moe
            found = self._of_mixture(x_TD, x.shape[1], points) if mixed else self._run(x_TD, x.shape[1])
            return _numpy(found["output"]).reshape(x.shape), {name: _numpy(found[name]) for name in points}

    def backward(
        self, x: np.ndarray, dy: np.ndarray, values: Sequence[str], gradients: Sequence[str]
    ) -> tuple[np.ndarray, Arrays, Arrays]:
        """The gradient at the layer's input from that at its output, both (B, S, D); values and gradients by point."""
        x_TD = self._rows(x).requires_grad_()
        with torch.enable_grad():
            found = self._run(x_TD, x.shape[1])
            wanted = [x_TD, *(found[name] for name in gradients)]
            made = torch.autograd.grad(found["output"], wanted, self._rows(dy))
        dx, rest = made[0], made[1:]
        return (
            _numpy(dx).reshape(x.shape),
            {name: _numpy(found[name]) for name in values},
            {name: _numpy(one) for name, one in zip(gradients, rest, strict=True)},
        )

    def loss(self, x: np.ndarray, target: np.ndarray, counted: np.ndarray) -> tuple[float, np.ndarray]:
        """Sum of the cross entropy over counted targets (B, S), and its gradient at ``x``, the last layer's output."""
        norm, head_VD = self._filled_head()
        x_TD = self._rows(x).requires_grad_()
        with torch.enable_grad():
            y_TD = norm(x_TD)
        label_T, weight_T = self._labels(target, counted)
        dy_TD, total = torch.empty_like(y_TD, requires_grad=False), 0.0
        with torch.no_grad():
            for at in _chunks(len(y_TD)):
                found, dy_TD[at] = _head_loss(y_TD[at].detach(), head_VD, label_T[at], weight_T[at])
                total += found
        (dx_TD,) = torch.autograd.grad(y_TD, x_TD, dy_TD)
        return total, _numpy(dx_TD).reshape(x.shape)

    def loss_alone(self, x: np.ndarray, target: np.ndarray, counted: np.ndarray) -> float:
        """The same without the gradient."""
        norm, head_VD = self._filled_head()
        label_T, weight_T = self._labels(target, counted)
        total = 0.0
        with torch.no_grad():
            y_TD = norm(self._rows(x))
            for at in _chunks(len(y_TD)):
                loss_T, _, _ = _losses(y_TD[at], head_VD, label_T[at])
                total += float((loss_T * weight_T[at]).sum())
        return total

    def _filled_head(self) -> tuple[RmsNorm, Tensor]:
        if self._norm is None or self._head is None:
            raise ValueError("the head is not in memory: fill_head first")
        return self._norm, self._head

    def _labels(self, target: np.ndarray, counted: np.ndarray) -> tuple[Tensor, Tensor]:
        label_T = torch.from_numpy(target.reshape(-1).astype(np.int64)).to(self.device)
        return label_T, torch.from_numpy(counted.reshape(-1).astype(np.float32)).to(self.device)

    def _run(self, x_TD: Tensor, length: int) -> dict[str, Tensor]:
        """Every point of the layer; as ``pt.layer.Layer``, whose parts it calls one by one."""
        layer = self._layer
        if layer is None:
            raise ValueError("no layer is in memory: fill first")
        cos_SP, sin_SP = self._rotary(length)
        attention: Any = layer.attention
        ffn: Any = layer.feed_forward  # a SwiGlu: the layer is dense
        normed_TD = layer.attention_norm(x_TD)
        context = attention.context(normed_TD, cos_SP, sin_SP)
        mixed_TD = attention.wo(context)
        middle_TD = x_TD + mixed_TD
        input_TD = layer.ffn_norm(middle_TD)
        linear_TF = ffn.w1(input_TD)
        gate_TF = F.silu(linear_TF)
        hidden_TF = gate_TF * ffn.w3(input_TD)
        fed_TD = ffn.w2(hidden_TF)
        return {
            "input": x_TD,
            "attention_input": normed_TD,
            "context": context,
            "attention_output": mixed_TD,
            "mlp_input": input_TD,
            "gate_linear": linear_TF,
            "gate": gate_TF,
            "hidden": hidden_TF,
            "mlp_output": fed_TD,
            "output": middle_TD + fed_TD,
        }

    def _of_mixture(self, x_TD: Tensor, length: int, points: Sequence[str]) -> dict[str, Tensor]:
        """A mixture's points of width D, and those of ``MIXTURE_POINTS`` where ``points`` has any."""
        layer: Any = self._layer
        normed_TD = layer.attention_norm(x_TD)
        mixed_TD = layer.attention(normed_TD, *self._rotary(length))
        middle_TD = x_TD + mixed_TD
        input_TD = layer.ffn_norm(middle_TD)
        fed_TD = layer.feed_forward.dropless(input_TD)
        inner = observed(layer.feed_forward, input_TD) if set(points) & set(MIXTURE_POINTS) else {}
        return inner | {
            "input": x_TD,
            "attention_input": normed_TD,
            "attention_output": mixed_TD,
            "mlp_input": input_TD,
            "mlp_output": fed_TD,
            "output": middle_TD + fed_TD,
        }

    def _rotary(self, length: int) -> tuple[Tensor, Tensor]:
        if self._tables is None or self._tables[0] != length:
            model, dtype = self.spec.model, torch_dtype(self.spec.numerics.rotary_dtype)
            self._tables = (length, *rotary_tables(model.rope.tables(length), dtype, self.device))
        return self._tables[1:]

    def _rows(self, x: np.ndarray) -> Tensor:
        return self._tensor(x.reshape(-1, x.shape[-1]))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, dtype=self.dtype, device=self.device)


def _chunks(tokens: int) -> Iterator[slice]:
    """Tokens whose logits are held at once."""
    return (slice(start, min(start + CHUNK, tokens)) for start in range(0, tokens, CHUNK))


def _losses(y_TD: Tensor, head_VD: Tensor, label_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropies, float32; the logits, and the logarithm of their sum of powers."""
    logits_TV = (y_TD @ head_VD.T).float()
    label_T1 = label_T.clamp(0, logits_TV.shape[1] - 1)[:, None]
    log_sum_T1 = logits_TV.logsumexp(1, keepdim=True)
    return (log_sum_T1 - logits_TV.gather(1, label_T1))[:, 0], logits_TV, log_sum_T1


def _head_loss(y_TD: Tensor, head_VD: Tensor, label_T: Tensor, weight_T: Tensor) -> tuple[float, Tensor]:
    """Sum of weighted cross entropies and its gradient at y: (softmax - one-hot) W, in float32."""
    loss_T, logits_TV, log_sum_T1 = _losses(y_TD, head_VD, label_T)
    label_T1 = label_T.clamp(0, logits_TV.shape[1] - 1)[:, None]
    dlogits_TV = logits_TV.sub_(log_sum_T1).exp_()
    dlogits_TV.scatter_add_(1, label_T1, torch.full_like(label_T1, -1, dtype=torch.float32))
    dlogits_TV.mul_(weight_T[:, None])
    return float((loss_T * weight_T).sum()), dlogits_TV.to(head_VD.dtype) @ head_VD


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
