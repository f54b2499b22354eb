# SPDX-License-Identifier: Apache-2.0
"""Training steps on MindSpore without MindFormers, on one device or in data parallel; the step itself is ``ms.step``.

The same cells in the same order as under MindFormers, so that both compute the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.nn.utils import no_init_parameters

from mindformers_ext.core.config.lora import BESIDE_BASE
from mindformers_ext.core.config.train import LossScale, TrainSpec, group_of
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.figures import StepFigures, figures_of, with_preferences
from mindformers_ext.core.log import get_logger
from mindformers_ext.core.philox import noise_keys
from mindformers_ext.core.pruning import BESIDE_MASKS
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.causal_lm import CausalLM, RowLogProbabilities, build_causal_lm
from mindformers_ext.ms.engine import fill
from mindformers_ext.ms.l0 import add_masks
from mindformers_ext.ms.lora import add_lora
from mindformers_ext.ms.ops.select import select_operators
from mindformers_ext.ms.optim import build_optimizer
from mindformers_ext.ms.recompute import recompute_layers
from mindformers_ext.ms.step import LmLoss, LossNetwork, PreferenceNetwork, TrainStepCell, step_state

MOMENTS = ("adam_m.", "adam_v.")


class DataParallel:
    """This process among those of the job: each has the whole network and its share of the rows."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        if size > 1:
            ms.set_auto_parallel_context(parallel_mode=ms.ParallelMode.DATA_PARALLEL, gradients_mean=True)

    def share(self, rows: int) -> slice:
        """This process's rows among those of a step."""
        part = rows // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """float64 values of all processes added up. The exchange has float32: each takes a place of its own in it, with
        the value's head and what that leaves."""
        if self.size == 1:
            return values
        placed = np.zeros((self.size, 2, values.size), np.float32)
        placed[self.rank, 0] = values.reshape(-1)
        placed[self.rank, 1] = values.reshape(-1) - placed[self.rank, 0].astype(np.float64)
        found = ops.AllReduce()(Tensor(placed)).asnumpy().astype(np.float64)
        return np.asarray(found.sum((0, 1)).reshape(values.shape))

    def close(self) -> None:
        """MindSpore's scheduler waits for all processes itself."""


class MindSporeTrainer:
    """A network with its optimizer on MindSpore's current device.

    Args:
        spec: the network; each rank routes its own tokens.
        train: how it is trained.
        ranks: the processes of the job.
        fused: the device has the optimizer's fused kernel.
    """

    def __init__(self, spec: NetworkSpec, train: TrainSpec, ranks: DataParallel, fused: bool = True) -> None:
        self.spec, self.train_spec, self.ranks, self.fused = spec, train, ranks, fused
        self._network: CausalLM | None = None
        self._cell: TrainStepCell | None = None
        self._loss: LmLoss | None = None
        self._rows: RowLogProbabilities | None = None
        ms.set_seed(train.seed)

    def _build(self) -> CausalLM:
        network = build_causal_lm(self.spec)
        if self.train_spec.lora:
            add_lora(network, self.train_spec.lora, self.spec)
        if self.train_spec.pruning:
            add_masks(network, self.train_spec.pruning)
        for parameter in network.trainable_params():
            parameter.requires_grad = group_of(parameter.name, self.train_spec.groups).trained
        recompute = self.train_spec.recomputed
        if recompute is not None and recompute.is_on:
            if select_operators().lazy_inline:
                recompute_layers(network, recompute)
            else:
                get_logger(__name__).info("recompute_config has no effect on this device, which keeps all activations")
        return network

    def fill(self, weights: Iterable[tuple[str, np.ndarray]], partly: bool = False) -> None:
        """Weights by MindFormers' names; adapters, with ``partly`` all, that do not come keep theirs. Errors as
        ``ms.engine.fill``."""
        if self._network is None and partly:
            self._network = self._build()
            self._network.init_parameters_data()
        elif self._network is None:
            with no_init_parameters():
                self._network = self._build()
        fill(self._network, weights, optional=("",) if partly else BESIDE_BASE + BESIDE_MASKS)

    def open(self) -> None:
        """Make the optimizer and the step; what no weight was filled into gets its random start values."""
        if self._network is None:
            self._network = self._build()
        network, train = self._network, self.train_spec
        network.init_parameters_data()
        parameters = network.trainable_params()
        optimizer = build_optimizer(parameters, train.optimizer, train.schedule, train.groups, self.fused)
        self._cell = TrainStepCell(
            LossNetwork(network) if train.dpo_beta is None else PreferenceNetwork(network, train.dpo_beta),
            optimizer,
            _scale_sense(train.loss_scale),
            train.max_grad_norm,
            train.micro_batches,
            signs={item.name: group_of(item.name, train.groups).sign for item in parameters},
        )
        self._cell.set_train(True)

    @property
    def cell(self) -> TrainStepCell:
        """The step of an opened trainer."""
        assert self._cell is not None
        return self._cell

    def step(self, columns: tuple[np.ndarray, ...]) -> StepFigures:
        """One update from this rank's rows: token ids (R, S+1), then, if any, labels and the documents of packed rows;
        R a multiple of micro batches. With ``dpo_beta``: pairs, and the reference's (R, 2) float32."""
        pairs = self.train_spec.dpo_beta is not None
        keys = self._noise_keys(len(columns[0]) * (2 if pairs else 1))
        figures = figures_of(self.cell(*map(_tensor, columns), *keys))
        if pairs:
            figures = with_preferences(figures)
        if self.cell.has_group_lr:  # the step tells the rate of one group
            updates = int(self.cell.optimizer.global_step.asnumpy()[0]) - (not figures.overflow)
            figures = figures._replace(learning_rate=self.train_spec.schedule.rate(updates))
        return figures

    def evaluate(self, columns: tuple[np.ndarray, ...]) -> float:
        """The mean loss over the tokens that count of rows as ``step`` takes them; see ``jobs.engine.protocols``."""
        assert self._network is not None
        if self._loss is None:
            self._loss = LmLoss(self._network)
        self._loss.set_train(False)
        loss = self._loss(*(Tensor(np.ascontiguousarray(column, np.int32)) for column in columns))
        self.cell.set_train(True)
        return float(loss.asnumpy())

    def row_log_probabilities(self, ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Sum (R) of the log-probabilities of the labels that count; see ``jobs.engine.protocols``."""
        assert self._network is not None
        if self._rows is None:
            self._rows = RowLogProbabilities(self._network)
        self._rows.set_train(False)
        found = self._rows(_tensor(ids), _tensor(labels))[0].asnumpy()
        self.cell.set_train(True)
        return np.asarray(found)

    def _noise_keys(self, rows: int) -> tuple[Tensor, ...]:
        """(R, 3) of this rank's rows, where gates add noise."""
        first = self.ranks.rank * rows
        if self.spec.noise_shape is None:
            return ()
        updates = int(self.cell.optimizer.global_step.asnumpy()[0])
        return (Tensor(noise_keys(self.train_spec.seed, updates, range(first, first + rows))),)

    def values(self, ending: str) -> dict[str, np.ndarray]:
        """The network's parameters whose name ends in ``ending``, in its order."""
        assert self._network is not None
        return {item.name: _plain(item) for item in self._network.get_parameters() if item.name.endswith(ending)}

    def set_values(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace parameters by name."""
        assert self._network is not None
        if arrays:
            held = {item.name: item for item in self._network.get_parameters()}
            for name, array in arrays.items():
                held[name].set_data(Tensor(np.asarray(array)).astype(held[name].dtype))

    def state(self, adapters: bool) -> Iterator[tuple[str, np.ndarray]]:
        """Weights (with ``adapters`` those of LoRA alone), moments and counters, by the names of a .ckpt."""
        held = dict(self._held())
        for name, parameter in self.cell.parameters_dict().items():
            if name in held or not adapters or parameter.requires_grad:
                yield name, _plain(parameter)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Moments and counters of ``state`` (the weights come by ``fill``), after ``open``.

        Raises:
            UserError: a moment is missing or has another shape.
        """
        for name, parameter in self._held():
            found = state.get(name)
            if name.startswith(MOMENTS) and (found is None or tuple(found.shape) != tuple(parameter.shape)):
                raise UserError(f"cannot resume: the checkpoint has no {name} of {tuple(parameter.shape)}")
            if found is not None:
                value = np.asarray(found).reshape(parameter.shape)
                parameter.set_data(Tensor(value).astype(parameter.dtype))

    def _held(self) -> Iterator[tuple[str, Parameter]]:
        """Moments, the number of updates, and the step's own counters."""
        for parameter in self.cell.optimizer.get_parameters():
            if parameter.name.startswith(MOMENTS):
                yield parameter.name, parameter
        yield "global_step", self.cell.optimizer.global_step
        yield from step_state(self.cell).items()


def _scale_sense(words: LossScale) -> float | nn.Cell:
    if words.window:
        return nn.DynamicLossScaleUpdateCell(words.value, words.factor, words.window)
    return words.value


def _tensor(column: np.ndarray) -> Tensor:
    """Ids as int32; what the reference told stays float32."""
    kind = np.float32 if column.dtype == np.float32 else np.int32
    return Tensor(np.ascontiguousarray(column, kind))


def _plain(parameter: Parameter) -> np.ndarray:
    """The parameter in numpy; bfloat16 as its bits, in uint16."""
    if parameter.dtype == ms.bfloat16:
        bits = parameter.astype(ms.float32).asnumpy().view(np.uint32)
        return (bits >> 16).astype(np.uint16)
    return np.asarray(parameter.asnumpy())
