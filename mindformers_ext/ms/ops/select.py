# SPDX-License-Identifier: Apache-2.0
"""The one place that chooses portable or Ascend operators, once per process and device, with a logged reason."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, replace

import mindspore as ms
from mindspore import nn

from mindformers_ext.core.spec import NetworkSpec, NumericsSpec
from mindformers_ext.ms.ops import ascend, portable, portable_attention, portable_documents, portable_dropout
from mindformers_ext.ms.ops.dtypes import mindspore_dtype

_log = logging.getLogger("mindformers_ext")


def _construct(cell: Callable[..., nn.Cell], *arguments: object) -> nn.Cell:
    return cell(*arguments)


@dataclass(frozen=True)
class Operators:
    """Constructors of the operators that have more than one implementation.

    ``bfloat16`` says whether the device computes in it; ``lazy_inline`` whether identical layers may share one
    compiled graph (MindSpore 2.9 refuses that on CPU). ``build(cell, *arguments)`` makes a cell without parameters.
    """

    name: str
    reason: str
    bfloat16: bool
    lazy_inline: bool
    build: Callable[..., nn.Cell] = _construct
    square_sum: Callable[[], nn.Cell] = portable.SquareSumOp
    rms_norm: Callable[..., nn.Cell] = portable.RmsNormOp
    swiglu: Callable[..., nn.Cell] = portable.SwiGluOp
    rotary: Callable[..., nn.Cell] = portable.RotaryOp
    causal_attention: Callable[..., nn.Cell] = portable_attention.CausalAttentionOp
    packed_attention: Callable[..., nn.Cell] = portable_documents.PackedAttentionOp
    grouped_product: Callable[..., nn.Cell] = portable.GroupedProductOp
    dropout: Callable[..., nn.Cell] | None = portable_dropout.SeededDropoutOp  # None: MindSpore's own, which is fused
    slots: Callable[..., nn.Cell] | None = None  # a kernel that fills experts' slots; None: the router sorts
    fused: Callable[[NetworkSpec], tuple[dict[str, type[nn.Cell]], list[str]]] | None = None

    def for_network(self, spec: NetworkSpec | None = None) -> Operators:
        """These operators for one network: the fused ones its spec asks for, and equal parameterless cells one object.

        MindSpore parses every cell object anew; sharing takes two fifths off the compilation of a deep network.
        Where layers share a compiled graph already it would gain nothing. Without ``spec`` all operators are portable.
        """
        chosen = self
        if spec is not None and self.fused is not None:
            cells, notes = self.fused(spec)
            chosen = replace(self, **cells)  # type: ignore[arg-type]
            _log.info("fused kernels: %s", ", ".join(cell.__name__ for cell in cells.values()) or "none")
            for note in notes:
                _log.warning("%s", note)
        return chosen if chosen.lazy_inline else replace(chosen, build=functools.cache(_construct))

    def reuse(self, cell: nn.Cell) -> nn.Cell:
        """``cell``, compiled once for all cells of its class in the network, where the device allows it.

        They must differ in their parameters only. This is what MindSpore's decorator ``lazy_inline`` does, which
        cannot look at the device.
        """
        if self.lazy_inline:
            cell.cell_init_args = f"lazy_inline_{type(cell).__name__}"
        return cell

    def dtype(self, name: str) -> ms.Type:
        """The type to compute in: bfloat16 becomes float32 where the device cannot multiply it."""
        if name == "bfloat16" and not self.bfloat16:
            return ms.float32
        return mindspore_dtype(name)

    def numerics(self, asked: NumericsSpec) -> NumericsSpec:
        """The types to store and compute in: without bfloat16 kernels the parameters are float32 as well.

        MindSpore cannot even look up rows of a bfloat16 table there.
        """
        if self.bfloat16 or "bfloat16" not in astuple(asked):
            return asked
        _log.warning("this device does not compute in bfloat16: parameters and arithmetic are float32 instead")
        return NumericsSpec(**{name: "float32" if kind == "bfloat16" else kind for name, kind in asdict(asked).items()})

    def router_dtype(self, name: str) -> ms.Type:
        """The gate's type; float16 means float32, as in MindFormers, because a gate in float16 loses choices."""
        return ms.float32 if name == "float16" else self.dtype(name)


_CHOICES = {
    "CPU": Operators("portable", "MindSpore has no fused kernels on CPU", bfloat16=False, lazy_inline=False),
    "GPU": Operators("portable", "MindSpore has no fused kernels on GPU", bfloat16=False, lazy_inline=False),
    "Ascend": Operators(
        "portable and fused",
        "the configuration chooses the kernels",
        bfloat16=True,
        lazy_inline=True,
        square_sum=portable.ReducedSquareSumOp,
        dropout=None,
        fused=ascend.fused_cells,
    ),
}


@functools.cache
def _announce(device: str) -> None:
    choice = _CHOICES[device]
    _log.info("operators on %s: %s (%s)", device, choice.name, choice.reason)


def select_operators(device_target: str | None = None) -> Operators:
    """The operators of ``device_target`` (default: the running context's)."""
    device = device_target or ms.get_context("device_target")
    if device not in _CHOICES:
        raise ValueError(f"device_target={device!r} is unknown: choose one of {', '.join(_CHOICES)}")
    _announce(device)
    return _CHOICES[device]
