# SPDX-License-Identifier: Apache-2.0
"""MindSpore as jobs see it (``jobs.engine.protocols``): specs and numpy arrays in, numpy arrays out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.communication import get_group_size, get_rank, init
from mindspore.nn.utils import no_init_parameters

from mindformers_ext.core.cluster.placement import PlacedParameter
from mindformers_ext.core.cluster.tensor_parallel import own_part, parted_parameters
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import DeviceSpec, NetworkSpec
from mindformers_ext.core.weight_fit import check_weights, fitting
from mindformers_ext.ms.causal_lm import build_causal_lm
from mindformers_ext.ms.generate import MindSporeSession
from mindformers_ext.ms.tensor_parallel import build_part


class MindSporeNetwork:
    """A causal language model on MindSpore; with ``parts`` one process's part of it (``core.cluster.tensor_parallel``),
    which generates together with the others: every process makes the same calls and gets the same answers.

    ``parts``: by name each weight's whole shape and that of the part.
    """

    def __init__(
        self, cell: nn.Cell, parts: Mapping[str, PlacedParameter] | None = None, rank: int = 0, count: int = 1
    ) -> None:
        self.cell = cell
        self.rank = rank
        self._parts, self._count = parts or {}, count
        cell.set_train(False)

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Fill the parameters from ``weights``, cast to the parameters' types.

        Raises:
            UserError: lists what is missing, what no parameter wants, and what has another shape.
        """
        parameters = {parameter.name: parameter for parameter in self.cell.get_parameters()}
        check_weights({name: tuple(parameter.shape) for name, parameter in parameters.items()}, weights)
        for name, weight in weights.items():
            _set(parameters[name], weight)

    def fill(self, weights: Iterable[tuple[str, np.ndarray]]) -> None:
        """As ``load``, one tensor at a time; see ``fill``."""
        fill(self.cell, weights, parts=self._parts, rank=self.rank)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 logits of shape (B, S, V) for token ids of shape (B, S); compiled once per shape."""
        return self.cell(Tensor(ids.astype(np.int32))).asnumpy().astype(np.float32)

    def agree(self, digest: bytes) -> bool:
        """Whether all processes that hold the network have the same ``digest`` (an even number of bytes)."""
        if self._count == 1:
            return True
        own = np.frombuffer(digest, np.uint16).astype(np.float32)  # which a CPU can exchange, and every device exactly
        everyone = P.AllGather()(Tensor(own[None])).asnumpy()
        return bool((everyone == own).all())

    def session(self, rows: int, length: int, positions: int, use_cache: bool = True) -> MindSporeSession:
        """Generation for ``rows`` prompts of up to ``length`` tokens, up to ``positions`` with their answers."""
        session = MindSporeSession(self.cell, rows, length, positions, self._count)
        session.compile(use_cache)
        return session


class MindSporeEngine:
    """Builds networks that run on MindSpore's current device, in graph mode unless told otherwise."""

    name = "ms"

    def __init__(self) -> None:
        self.mode = ms.GRAPH_MODE
        self.rank, self.count = 0, 1

    def use(self, device: DeviceSpec) -> None:
        """Run there from now on."""
        self.mode = ms.PYNATIVE_MODE if device.pynative else ms.GRAPH_MODE
        ms.set_context(mode=self.mode)
        try:  # together: which one, MindSpore settles with the processes beside this one
            ms.set_device(device.target, *(() if device.together else (device.number,)))
        except RuntimeError:  # it has computed already; where that was here, nothing changes
            same = (ms.get_context("device_target"), ms.get_context("device_id")) == (device.target, device.number)
            if device.together or not same:
                raise
        if device.max_memory:
            ms.runtime.set_memory(max_size=device.max_memory)
        if device.jit_level:
            ms.set_context(jit_config={"jit_level": device.jit_level})
        if device.together:
            init()
            self.rank, self.count = get_rank(), get_group_size()
        ms.set_recursion_limit(10000)  # layers nest calls while a graph is compiled

    def build(self, spec: NetworkSpec, empty: bool = False) -> MindSporeNetwork:
        """A network with fresh random weights, or with none until they are filled in (``empty``).

        Among several processes it is this one's part, which cannot have random weights: they would not fit together.
        """
        ms.set_context(mode=self.mode)
        if self.count > 1:
            if spec.parallel.model_parallel != self.count:
                raise UserError(
                    f"the job has {self.count} processes, the network is cut for "
                    f"{spec.parallel.model_parallel}: set parallel_config.model_parallel"
                )
            with no_init_parameters():
                cell = build_part(spec, self.count, self.rank)
            parts = {item.name: item for item in parted_parameters(spec, self.count)}
            return MindSporeNetwork(cell, parts, self.rank, self.count)
        if empty:
            with no_init_parameters():
                return MindSporeNetwork(build_causal_lm(spec))
        return MindSporeNetwork(build_causal_lm(spec))


def fill(
    cell: nn.Cell,
    weights: Iterable[tuple[str, np.ndarray]],
    optional: tuple[str, ...] = (),
    parts: Mapping[str, PlacedParameter] | None = None,
    rank: int = 0,
) -> None:
    """Each of ``weights`` replaces its parameter of ``cell`` and is then forgotten by the caller.

    Args:
        cell: the network, built without data or with other data.
        weights: names and arrays.
        optional: endings of names that need not come; router state need not either.
        parts: by name each weight's whole shape and that of process ``rank``'s part.
        rank: see ``parts``.

    Raises:
        UserError: a tensor that no parameter wants, or whose shape differs, where it comes; at the end what is missing.
    """
    parameters = {parameter.name: parameter for parameter in cell.get_parameters()}
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    wanted |= {name: placed.whole for name, placed in (parts or {}).items() if name in wanted}
    for name, weight in fitting(wanted, weights, [name for name in wanted if name.endswith(optional)]):
        placed = (parts or {}).get(name)
        _set(parameters[name], own_part(weight, placed, rank) if placed else weight)
        del weight  # or it lives on while the next one is read


def _set(parameter: Parameter, weight: np.ndarray) -> None:
    """Replace the parameter's data, cast to its type."""
    # through float32: numpy's own types cover neither side's bfloat16
    plain = np.ascontiguousarray(weight, dtype=np.float32)
    parameter.set_data(Tensor(plain).astype(parameter.dtype))
