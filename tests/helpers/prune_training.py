# SPDX-License-Identifier: Apache-2.0
"""A tiny pruning run by a trainer and its hook alone, on either engine: the specification's shape convergence."""

from __future__ import annotations

from typing import Any

import numpy as np

from mindformers_ext.core.config.pruning import with_pruning
from mindformers_ext.core.config.schedule import Schedule
from mindformers_ext.core.config.train import OptimizerSpec, TrainSpec
from mindformers_ext.core.pruning import ModelShape, PruningSpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.jobs.prune.masks_file import SavedMasks
from mindformers_ext.jobs.train.pruning_masks import PruningMasks
from mindformers_ext.surgery.prune.hard_concrete import clamped, deterministic, sparsity

VOCAB, LENGTH, ROWS = 64, 16, 4
SOURCE = ModelShape(
    hidden_size=32, num_attention_heads=8, num_key_value_heads=8, head_dim=4, intermediate_size=48, num_hidden_layers=4
)
TARGET = ModelShape(
    hidden_size=16, num_attention_heads=4, num_key_value_heads=4, head_dim=4, intermediate_size=24, num_hidden_layers=3
)


def pruning(source: ModelShape = SOURCE, target: ModelShape = TARGET, **more: Any) -> PruningSpec:
    """All kinds of masks between the two shapes."""
    heads = ("head",) if source.heads_per_group == 1 else ("kv_head", "q_in_group")
    modules = (*heads, "intermediate", "layer", "hidden")
    kept = tuple(name for name in modules if source.units(name) != target.units(name))
    whole = tuple(name for name in modules if name not in kept)
    return PruningSpec(source=source, target=target, modules=kept, whole=whole, **{"warmup_steps": 80, **more})


def network(source: ModelShape = SOURCE) -> NetworkSpec:
    """The network that is pruned."""
    sizes = {name: getattr(source, name) for name in ModelShape.__dataclass_fields__}
    model = ModelSpec(vocab_size=VOCAB, pad_token_id=-1, initializer_range=0.02, **sizes)
    return NetworkSpec(model=model, seq_length=LENGTH, batch_size=ROWS)


def training(spec: PruningSpec, steps: int = 400) -> TrainSpec:
    """The published recipe at a tiny size: warm-up of a tenth, cosine to a tenth, clipping over all groups."""
    schedule = Schedule(
        kind="CosineWithWarmUpLR",
        learning_rate=1e-3,
        lr_end=1e-4,
        warmup_steps=steps // 10,
        total_steps=steps,
        decay_steps=steps,
    )
    optimizer = OptimizerSpec(betas=(0.9, 0.95), eps=1e-8)
    return with_pruning(TrainSpec(optimizer=optimizer, schedule=schedule, steps=steps, max_grad_norm=1.0, seed=5), spec)


def rows(step: int) -> np.ndarray:
    """Token ids of a step."""
    return np.random.default_rng(step).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)


def train(trainer: Any, spec: PruningSpec, steps: range, seed: int = 5) -> list[dict[str, float]]:
    """Steps (from 1) of an opened trainer; the figures of each."""
    hook, found = PruningMasks(spec, seed, trainer), []
    for step in steps:
        trainer.set_values(hook.inputs(step))
        figures = trainer.step((rows(step),))
        assert not figures.overflow
        found.append({"loss": figures.loss, "lm_loss": figures.lm_loss, **hook.measured(step, figures)})
    trainer.set_values(hook.inputs(steps.stop))
    return found


def reached(trainer: Any, spec: PruningSpec) -> SavedMasks:
    """The masks of the trainer, with as many units as are expected: ``eval_target_model`` off."""
    held = {name: clamped(trainer.values(f"masks.{name}.z_loga").popitem()[1]) for name in spec.modules}
    values = {name: deterministic(loga).astype(np.float32) for name, loga in held.items()}
    expected = {name: np.atleast_1d(sparsity(loga)) for name, loga in held.items()}
    return SavedMasks(values, spec.source, spec.target, expected)
