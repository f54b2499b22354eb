# SPDX-License-Identifier: Apache-2.0
"""The one adapter from MindFormers' callbacks to ``jobs.train.hooks``."""

from __future__ import annotations

from typing import Any

import numpy as np
from mindformers.tools.utils import get_real_rank
from mindspore import Parameter, Tensor, nn
from mindspore.train import Callback

from mindformers_ext.core.config.lora import DROPOUT_SEED
from mindformers_ext.core.figures import StepFigures, figures_of
from mindformers_ext.jobs.train.hooks import AdapterDropout, Arrays, TrainHook, restore_hooks
from mindformers_ext.mf.step import real_model

FIGURES = "step_figures"  # attributes of MindSpore's callback parameters, where callbacks leave things to each other
HOOKS = "train_hooks"


def figures_at(parameters: Any) -> StepFigures:
    """The figures of the step just done, read from the device once for all callbacks."""
    known = parameters.get(FIGURES)
    if known is None or known[0] is not parameters.net_outputs:
        known = parameters.net_outputs, figures_of(parameters.net_outputs)
        parameters[FIGURES] = known
    return known[1]


class HookCallback(Callback):
    """Runs hooks between MindFormers' training steps; one that has ``make`` builds its hook from the network."""

    def __init__(self, *hooks: TrainHook) -> None:
        super().__init__()
        self.hooks = list(hooks)
        self.parameters: dict[str, Parameter] = {}
        self.first = 0  # steps done before this process started; our trainer leaves them at the train step

    def values(self, ending: str) -> dict[str, np.ndarray]:
        """See ``jobs.engine.protocols.NetworkValues``; once training has begun."""
        return {name: held.asnumpy() for name, held in self.parameters.items() if name.endswith(ending)}

    def set_values(self, arrays: Arrays) -> None:
        """The same."""
        for name, array in arrays.items():
            held = self.parameters[name]
            held.set_data(Tensor(np.asarray(array)).astype(held.dtype))

    def make(self, model: nn.Cell) -> list[TrainHook]:
        """Further hooks, for the network that is trained."""
        return []

    def on_train_begin(self, run_context: Any) -> None:
        """Give the hooks their state of a resumed run, and the network what they want in it."""
        parameters = run_context.original_args()
        network = parameters.train_network
        model = real_model(network)
        self.parameters = {item.name: item for item in model.get_parameters()}
        self.hooks += self.make(model)
        known: list[TrainHook] = parameters.setdefault(HOOKS, [])
        restore_hooks(self.hooks, getattr(network, "hook_state", {}), len(known))
        known += self.hooks
        self.first = int(getattr(network, "first_step", 0))
        self._set_inputs(self.first + 1)

    def on_train_step_end(self, run_context: Any) -> None:
        """Tell the hooks of the step just done, and set what they want for the next."""
        parameters = run_context.original_args()
        figures, step = figures_at(parameters), self.first + parameters.cur_step_num
        for hook in self.hooks:
            hook.after_step(step, figures)
        self._set_inputs(step + 1)

    def _set_inputs(self, step: int) -> None:
        for hook in self.hooks:
            self.set_values(hook.inputs(step))


class DropoutSeeds(HookCallback):
    """``AdapterDropout`` between MindFormers' steps, for networks that have such seeds."""

    def __init__(self, seed: int) -> None:
        """``seed``: the run's."""
        super().__init__()
        self.seed = seed

    def make(self, model: nn.Cell) -> list[TrainHook]:
        """The hook, if the network has seeds."""
        if DROPOUT_SEED not in self.parameters:
            return []
        seeds = self.parameters[DROPOUT_SEED].asnumpy()
        return [AdapterDropout(self.seed, get_real_rank(), {DROPOUT_SEED: seeds})]
