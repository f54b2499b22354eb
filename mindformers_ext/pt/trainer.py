# SPDX-License-Identifier: Apache-2.0
"""Training steps on PyTorch: forward, backward, overflow check, clipping, update, loss scale; what ``ms.step`` does.

Its state goes by the names of a MindSpore checkpoint (``adam_m.``, ``adam_v.``, ``global_step``, ...), so that either
engine continues what the other began.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mindformers_ext.core.config.lora import BESIDE_BASE
from mindformers_ext.core.config.train import ParameterGroup, TrainSpec, group_of
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.figures import StepFigures, with_preferences
from mindformers_ext.core.philox import noise_keys
from mindformers_ext.core.pruning import BESIDE_MASKS
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt import names
from mindformers_ext.pt.causal_lm import CausalLM, Terms
from mindformers_ext.pt.init import build_empty, draw_weights
from mindformers_ext.pt.l0 import add_masks
from mindformers_ext.pt.lora import add_lora
from mindformers_ext.pt.optim import Adam
from mindformers_ext.pt.ranks import Ranks

MEANS, SQUARES = "adam_m.", "adam_v."
COUNTERS = ("scale_sense", "global_step", "current_iterator_step", "last_overflow_iterator_step")


class TorchTrainer:
    """A network with its optimizer on one device of ``ranks``.

    Args:
        spec: the network; its data-parallel size is the number of routing groups of all ranks together.
        train: how it is trained.
        device: where.
        ranks: the processes of the job.
    """

    def __init__(self, spec: NetworkSpec, train: TrainSpec, device: torch.device, ranks: Ranks | None = None) -> None:
        self.train_spec, self.device, self.ranks = train, device, ranks or Ranks()
        network = build_empty(self.ranks.local(spec), torch.device("cpu"))
        left = draw_weights(network, train.seed)
        self.adapted = add_lora(network, train.lora, left) if train.lora else []
        if train.pruning:
            add_masks(network, train.pruning)
        self._groups = _groups(network, train.groups)
        for name, parameter in network.named_parameters():
            parameter.requires_grad = parameter.requires_grad and self._groups[name].trained
        network.model.recompute = train.recompute
        self.network: CausalLM = network.train()
        self.updates = 0
        scale = train.loss_scale
        self.scale, self._iteration, self._last_overflow = scale.value, 1, 0
        self._optimizer: Adam | None = None

    def open(self) -> None:
        """Cut the network over the ranks and make the optimizer; weights must be loaded before."""
        self.network = self.ranks.cut(self.network, self.device)
        self._named = [(n, p) for n, p in self.network.named_parameters() if p.requires_grad]
        groups = [self._groups[name] for name, _ in self._named]
        self._optimizer = Adam([self.ranks.own(p.detach()) for _, p in self._named], self.train_spec.optimizer, groups)

    @property
    def optimizer(self) -> Adam:
        """The optimizer of an opened trainer."""
        assert self._optimizer is not None
        return self._optimizer

    def fill(self, weights: Iterable[tuple[str, np.ndarray]], partly: bool = False) -> None:
        """Weights by MindFormers' names; adapters, with ``partly`` all, that do not come keep theirs. Errors as
        ``pt.names.fill``."""
        names.fill(self.network, weights, optional=("",) if partly else BESIDE_BASE + BESIDE_MASKS)

    def step(self, columns: tuple[np.ndarray, ...]) -> StepFigures:
        """One update from this rank's rows: token ids (R, S+1), then, if any, labels and the documents of packed rows;
        R a multiple of micro batches. With ``dpo_beta``: pairs, and the reference's (R, 2) float32."""
        torch.manual_seed(self.train_spec.seed + self.updates * self.ranks.size + self.ranks.rank)  # LoRA's dropout
        pairs = self.train_spec.dpo_beta is not None
        tensors = [_tensor(column).to(self.device) for column in columns]
        terms = self._backward(tensors, self._noise_keys(len(columns[0]) * (2 if pairs else 1)))
        gradients = [self.ranks.gradient(name, p.grad) for name, p in self._named if p.grad is not None]
        if len(gradients) != len(self._named):
            missing = [name for name, p in self._named if p.grad is None]
            raise RuntimeError(f"no gradient of {', '.join(missing)}")
        gradients = [g if g.dtype == torch.float32 else g.float() for g in gradients]
        unscale = 1.0 / (self.scale * self.train_spec.micro_batches)
        norm = self.ranks.norm(gradients) * unscale
        loss, lm_loss, aux_loss, load, dropped = self.ranks.average(terms)
        finite = bool(np.isfinite(norm) and np.isfinite(loss))
        rate = self.train_spec.schedule.rate(self.updates)
        if finite:
            self._update(gradients, unscale, norm, rate)
        self.network.zero_grad(set_to_none=True)
        self._next_scale(not finite)
        figures = StepFigures(loss, not finite, self.scale, rate, norm, lm_loss, aux_loss, load, dropped)
        return with_preferences(figures) if pairs else figures

    @torch.no_grad()
    def evaluate(self, columns: tuple[np.ndarray, ...]) -> float:
        """The mean loss over the tokens that count of rows as ``step`` takes them; see ``jobs.engine.protocols``."""
        ids, labels, documents = three(
            [torch.from_numpy(column.astype(np.int64)).to(self.device) for column in columns]
        )
        self.network.eval()
        loss = float(self.network(ids, labels, losses=True, documents=documents).lm_loss)
        self.network.train()
        self.ranks.rest(self.network)
        return loss

    @torch.no_grad()
    def row_log_probabilities(self, ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Sum (R) of the log-probabilities of the labels that count; see ``jobs.engine.protocols``."""
        self.network.eval()
        found = self.network(*(_tensor(column).to(self.device) for column in (ids, labels)), by_row=True)
        self.network.train()
        self.ranks.rest(self.network)
        return found.cpu().numpy()

    def _noise_keys(self, rows: int) -> Tensor | None:
        """(R, 3) of this rank's rows, where gates add noise."""
        first = self.ranks.rank * rows
        if self.network.spec.noise_shape is None:
            return None
        keys = noise_keys(self.train_spec.seed, self.updates, range(first, first + rows))
        return torch.from_numpy(keys).to(self.device)

    def _backward(self, tensors: list[Tensor], keys: Tensor | None) -> list[Terms]:
        """Terms of every micro batch; gradients are summed over them, times the loss scale."""
        count = self.train_spec.micro_batches
        parts_of_keys = keys.chunk(count) if keys is not None else (None,) * count
        parts = [tensor.chunk(self.train_spec.micro_batches) for tensor in tensors]
        found = []
        for index, micro in enumerate(zip(*parts, strict=True)):
            self.ranks.last_micro_batch(self.network, index == len(parts[0]) - 1)
            terms = self._terms(micro, parts_of_keys[index])
            (terms.loss * self.scale).backward()
            found.append(Terms(*(term.detach() for term in terms)))
        return found

    def _terms(self, micro: Sequence[Tensor], keys: Tensor | None) -> Terms:
        """Of one micro batch."""
        if self.train_spec.dpo_beta is not None:
            chosen, chosen_labels, rejected, rejected_labels, reference = micro
            ids, labels = torch.cat((chosen, rejected)), torch.cat((chosen_labels, rejected_labels))
            found = self.network(ids, labels, keys=keys, preference=(reference, self.train_spec.dpo_beta))
        else:
            ids, own_labels, documents = three(micro)
            tokens = self.ranks.counted(ids, own_labels, self.network.spec.model)
            found = self.network(ids, own_labels, losses=True, tokens=tokens, keys=keys, documents=documents)
        assert isinstance(found, Terms)
        return found

    def _update(self, gradients: list[Tensor], unscale: float, norm: float, rate: float) -> None:
        limit = self.train_spec.max_grad_norm
        if limit is not None:  # one pass undoes the loss scale and clips
            unscale *= min(limit / (norm + 1e-6), 1.0)
        with torch.no_grad():
            torch._foreach_mul_(gradients, unscale)
        self.updates += 1
        self.optimizer.step(gradients, rate, self.updates)

    def _next_scale(self, overflow: bool) -> None:
        """MindSpore's ``DynamicLossScaleUpdateCell``, in its order."""
        words = self.train_spec.loss_scale
        if words.window:
            grows = words.window <= self._iteration - self._last_overflow
            if overflow:
                self.scale = max(self.scale / words.factor, 1.0)
            elif grows:
                self.scale *= words.factor
            if overflow or grows:
                self._last_overflow = self._iteration
        self._iteration += 1

    def values(self, ending: str) -> dict[str, np.ndarray]:
        """The network's parameters and buffers whose name ends in ``ending``, in its order."""
        named = [*self.network.named_parameters(), *self.network.named_buffers()]
        return {
            part: array
            for name, tensor in named
            if name.endswith(ending)
            for part, array in self._parts("", name, tensor.detach())
        }

    def set_values(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace buffers and parameters by name, the same on every rank."""
        held = dict(self.network.named_buffers()) if arrays else {}
        parameters = dict(self.network.named_parameters()) if arrays else {}
        for name, array in arrays.items():
            if name in parameters:
                whole, parameter = torch.from_numpy(np.array(array, np.float32)), parameters[name]
                self.ranks.take(self.ranks.own(parameter.detach()), whole, name, parameter)
            else:
                names.set_view(held[name], array)

    def state(self, adapters: bool) -> Iterator[tuple[str, np.ndarray]]:
        """Weights (with ``adapters`` those of LoRA alone), moments and counters; every rank must ask for all of it."""
        wanted = {name for name, _ in self._named}
        for name, tensor in [*self.network.named_parameters(), *self.network.named_buffers()]:
            if not adapters or name in wanted:
                yield from self._parts("", name, tensor.detach())
        yield "scale_sense", np.float32(self.scale).reshape(())
        yield "global_step", np.array([self.updates], np.int32)
        for prefix, moments in ((MEANS, self.optimizer.means), (SQUARES, self.optimizer.squares)):
            for (name, parameter), moment in zip(self._named, moments, strict=True):
                yield from self._parts(prefix, name, self.ranks.like(moment, parameter))
        if self.train_spec.loss_scale.window:
            yield "current_iterator_step", np.array(self._iteration, np.int32)
            yield "last_overflow_iterator_step", np.array(self._last_overflow, np.int32)

    def _parts(self, prefix: str, name: str, tensor: Tensor) -> Iterator[tuple[str, np.ndarray]]:
        for part, view in names.split_experts(name, self.ranks.whole(name, tensor)).items():
            yield prefix + part, names.to_numpy(view)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Moments and counters of ``state`` (the weights come by ``fill``), after ``open``.

        Raises:
            UserError: a moment is missing or has another shape.
        """
        self.updates = int(np.asarray(state["global_step"]).reshape(-1)[0])
        self.scale = float(state["scale_sense"]) if "scale_sense" in state else self.scale
        self._iteration = int(state.get("current_iterator_step", self.updates + 1))
        self._last_overflow = int(state.get("last_overflow_iterator_step", 0))
        for prefix, moments in ((MEANS, self.optimizer.means), (SQUARES, self.optimizer.squares)):
            for (name, parameter), moment in zip(self._named, moments, strict=True):
                whole = self.ranks.blank(name, parameter)
                for part, view in names.split_experts(name, whole).items():
                    found = state.get(prefix + part)
                    if found is None or tuple(found.shape) != tuple(view.shape):
                        raise UserError(f"cannot resume: the checkpoint has no {prefix}{part} of {tuple(view.shape)}")
                    names.set_view(view, found)
                self.ranks.take(moment, whole, name, parameter)


def _tensor(column: np.ndarray) -> Tensor:
    """Ids as int64; what the reference told stays float32."""
    return torch.from_numpy(column if column.dtype == np.float32 else column.astype(np.int64))


def three(columns: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Ids, labels and documents of rows that may lack the last ones."""
    ids, labels, documents = (*columns, None, None)[:3]
    assert ids is not None
    return ids, labels, documents


def _groups(network: nn.Module, groups: tuple[ParameterGroup, ...]) -> dict[str, ParameterGroup]:
    """The group of each parameter by its own name; the experts' w1 and w3 are one parameter here."""
    result = {}
    for name, parameter in network.named_parameters():
        found = {part: group_of(part, groups) for part in names.split_experts(name, parameter.detach())}
        if len(set(found.values())) > 1:
            raise UserError(f"{' and '.join(found)} are one parameter of the PyTorch engine: train them in one group")
        result[name] = next(iter(found.values()))
    return result
