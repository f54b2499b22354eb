# SPDX-License-Identifier: Apache-2.0
"""Masks between training steps: their noise, their target, their limits, and what has become of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mindformers_ext.core.figures import StepFigures
from mindformers_ext.core.pruning import MASKS, NOISE, TARGETS, VALUES, Z_LOGA, PruningSpec
from mindformers_ext.jobs.engine.protocols import NetworkValues
from mindformers_ext.jobs.train.hooks import Arrays, QuietHook
from mindformers_ext.surgery.prune.hard_concrete import clamped, deterministic, noise, sparsity
from mindformers_ext.surgery.prune.lagrangian import overall_sparsity


class PruningMasks(QuietHook):
    """Everything that a step of pruning needs follows from the seed and the step's number, so a resumed run repeats it.

    Args:
        spec: the masks.
        seed: the run's.
        network: that has them.
        every: steps between evaluations, which see masks without noise; 0: there are none.
    """

    def __init__(self, spec: PruningSpec, seed: int, network: NetworkValues, every: int = 0) -> None:
        self.spec, self.seed, self.network, self.every = spec, seed, network, every
        self.sizes = [spec.source.mask_shape(name) for name in spec.modules]

    def inputs(self, step: int) -> Arrays:
        """Noise and target of ``step``, and parameters of masks back inside their limits."""
        drawn = noise(self.seed, step - 1, self.sizes)
        found = {f"{MASKS}{name}.{NOISE}": value for name, value in zip(self.spec.modules, drawn, strict=True)}
        found[TARGETS] = np.array(self.spec.targets(step - 1), np.float32)
        for name, loga in self._parameters().items():
            inside = clamped(loga)
            if not np.array_equal(inside, loga):
                found[f"{MASKS}{name}.{Z_LOGA}"] = inside
        return found

    def measured(self, step: int, figures: StepFigures) -> Mapping[str, float]:
        """The penalty of ``step``, and sparsities behind it: expected and wanted, by module and of all weights."""
        spec = self.spec
        logas = {name: clamped(loga) for name, loga in self._parameters().items()}
        if self.every and step % self.every == 0:
            self.network.set_values(self._values(logas))
        result = {"lagrangian_loss": figures.aux_loss, "expected_sparsity": overall_sparsity(logas, spec)}
        result |= {f"expected_{name}_sparsity": float(sparsity(loga).mean()) for name, loga in logas.items()}
        for pair, target in zip(spec.pairs, spec.targets(step - 1), strict=True):
            result[f"target_{pair}_sparsity" if pair else "target_sparsity"] = target
        return result

    def _parameters(self) -> dict[str, np.ndarray]:
        held = self.network.values("." + Z_LOGA)
        return {name: np.asarray(held[f"{MASKS}{name}.{Z_LOGA}"]) for name in self.spec.modules}

    def _values(self, logas: Arrays) -> dict[str, np.ndarray]:
        """Masks without noise, as evaluation takes them."""
        target = self.spec.target if self.spec.eval_target_model else None
        return {
            f"{MASKS}{name}.{VALUES}": deterministic(loga, target.units(name) if target else None).astype(np.float32)
            for name, loga in logas.items()
        }
