# SPDX-License-Identifier: Apache-2.0
"""The YAML's ``l0_module``: a training run that prunes its network to a target (words of LLM-Shearing)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mindformers_ext.core.config.train import ParameterGroup, TrainSpec
from mindformers_ext.core.config.values import read_value
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.pruning import (
    LAMBDAS,
    LOGA_LIMITS,
    MASKS,
    ZERO_SHIFT,
    ModelShape,
    PruningSpec,
    resolve_modules,
    shape_of_model,
)
from mindformers_ext.core.spec import ModelSpec

WHERE = "model.model_config.l0_module"
DEFAULT_MODULES = ("head", "intermediate", "layer", "hidden")
READ = (
    "pruning_modules",
    "start_sparsity",
    "target_sparsity",
    "lagrangian_warmup_steps",
    "eval_target_model",
    "target_model",
    "lag_lr",
    "importance",
)
# The seed's words of a target's sizes, and ours.
TARGET_WORDS = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "n_layers": "num_hidden_layers",
    "intermediate_size": "intermediate_size",
}
LEAST_SPARSITY, MOST_SPARSITY = (1.0 / (1.0 + math.exp(at - ZERO_SHIFT)) for at in reversed(LOGA_LIMITS))
# 0.0020177 and 0.9528702, of masks at their highest and at their lowest
STEPS = re.compile(r"(\d+)(ba)?")


def pruning_from_yaml(config: Mapping[str, Any], model: ModelSpec) -> PruningSpec | None:
    """The pruning that a configuration asks for, None without ``l0_module``.

    Raises:
        UserError: lists unknown keys, values out of range, and targets that masks cannot reach.
    """
    words = (config.get("model") or {}).get("model_config") or {}
    given = words.get("l0_module")
    if given is None:
        return None
    if not isinstance(given, Mapping) or not given:
        raise UserError(f"{WHERE}={given!r} is no section: write keys below it, such as target_model")
    problems = Problems(WHERE)
    problems.unknown_keys(WHERE, given, READ)
    _check_run(config, words, model, problems)
    names = given.get("pruning_modules", list(DEFAULT_MODULES))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.add(f"pruning_modules={names!r}", "give a list of names, such as [head, intermediate, layer, hidden]")
        problems.raise_if_any()
    source = shape_of_model(model)
    target = target_shape(given.get("target_model"), source, model.vocab_size, problems)
    modules, whole = resolve_modules(tuple(names), source, target, problems)
    numbers = {
        name: read_value(f"{WHERE}.{name}", given.get(name, default), kind, default, problems)
        for name, kind, default in (
            ("start_sparsity", "float", 0.0),
            ("target_sparsity", "float", 0.5),
            ("lag_lr", "float", 1.0),
            ("eval_target_model", "bool", True),
        )
    }
    spec = PruningSpec(
        source=source,
        modules=modules,
        whole=whole,
        target=target,
        warmup_steps=_steps(given.get("lagrangian_warmup_steps", 0), problems),
        importance=given.get("importance"),
        **numbers,
    )
    _check_numbers(spec, problems)
    problems.raise_if_any()
    return spec


def _check_run(config: Mapping[str, Any], words: Mapping[str, Any], model: ModelSpec, problems: Problems) -> None:
    """What goes together with masks."""
    if model.moe:
        problems.add("masks of a mixture of experts are not built", "prune a dense model")
    if words.get("pet_config"):
        problems.add("l0_module beside pet_config", "prune with all weights trained: leave pet_config out")
    if words.get("return_extra_loss") is False:
        problems.add("return_extra_loss=False", "the target's loss is an extra one: leave it out")


def _steps(value: object, problems: Problems) -> int:
    """``640`` or ``"640ba"``."""
    found = STEPS.fullmatch(str(value)) if not isinstance(value, bool) else None
    if found is None:
        problems.add(f"lagrangian_warmup_steps={value!r}", "give a number of steps, 640 or 640ba")
        return 0
    return int(found.group(1))


def _check_numbers(spec: PruningSpec, problems: Problems) -> None:
    for name in ("start_sparsity", "target_sparsity"):
        value = getattr(spec, name)
        if not 0.0 <= value < 1.0:
            problems.add(f"{name}={value} is out of range", "use 0 up to below 1")
    if not 0.0 < spec.lag_lr < float("inf"):
        problems.add(f"lag_lr={spec.lag_lr} is out of range", "use a value above 0; LLM-Shearing takes 1.0")
    for name in spec.modules if spec.target else ():
        if spec.sparsity(name) > MOST_SPARSITY:
            problems.add(
                f"target_model takes away {spec.sparsity(name):.4f} of {name}",
                f"masks reach {MOST_SPARSITY:.4f}: prune in two runs",
            )
    if spec.importance is not None and not (isinstance(spec.importance, str) and spec.importance):
        problems.add(f"importance={spec.importance!r}", "give the .npz file that 'prune.py shape' has written")
    elif spec.importance is not None and not LEAST_SPARSITY < spec.start_sparsity <= MOST_SPARSITY / 2:
        problems.add(
            f"start_sparsity={spec.start_sparsity} beside importance: masks of such a mean have no order",
            f"give {LEAST_SPARSITY:.4f} to {MOST_SPARSITY / 2:.4f}, 0.1 for example",
        )
    if spec.target and not spec.modules:
        problems.add("target_model has the sizes of the model itself", "give a smaller one")


def target_shape(given: object, source: ModelShape, vocabulary: int, problems: Problems) -> ModelShape | None:
    """The sizes of ``target_model``; those that are left out stay.

    With grouped queries and without ``n_kv_heads`` all key heads stay; ``head_dim`` may only be the source's, and must
    be said where it is not ``d_model / n_heads``.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        problems.add(f"target_model={given!r}", "write d_model, n_heads, n_layers, intermediate_size below it")
        problems.raise_if_any()
        return None
    problems.unknown_keys("target_model", given, (*TARGET_WORDS, "vocab_size"))
    sizes = {ours: given[word] for word, ours in TARGET_WORDS.items() if word in given}
    for word, ours in TARGET_WORDS.items():
        problems.positive(f"target_model.{word}", sizes.get(ours, 1))
    problems.raise_if_any()
    if given.get("vocab_size", vocabulary) != vocabulary:
        problems.add(f"target_model.vocab_size={given['vocab_size']}", f"the vocabulary stays: {vocabulary}")
    heads = sizes.get("num_attention_heads", source.num_attention_heads)
    kept = source.num_key_value_heads if source.heads_per_group > 1 else heads
    target = replace(source, **{"num_key_value_heads": kept, **sizes})
    for word, ours in TARGET_WORDS.items():
        if ours != "head_dim" and getattr(target, ours) > getattr(source, ours):
            problems.add(
                f"target_model.{word}={getattr(target, ours)} is above the model's {getattr(source, ours)}",
                "pruning makes smaller",
            )
    _check_heads(target, source, "head_dim" in given, problems)
    problems.raise_if_any()
    return target


def _check_heads(target: ModelShape, source: ModelShape, said: bool, problems: Problems) -> None:
    hidden, heads, groups = target.hidden_size, target.num_attention_heads, target.num_key_value_heads
    if target.head_dim != source.head_dim:
        problems.add(f"target_model.head_dim={target.head_dim}", f"a head's width stays: {source.head_dim}")
    elif not said and hidden != heads * source.head_dim:
        problems.add(
            f"target_model d_model={hidden} over n_heads={heads} is not the head width {source.head_dim}",
            f"say head_dim: {source.head_dim} where that is meant",
        )
    if heads % groups:
        problems.add(f"target_model.n_heads={heads} is no multiple of n_kv_heads={groups}", "give n_kv_heads too")
    elif source.heads_per_group == 1 and groups != heads:
        problems.add(f"target_model.n_kv_heads={groups}", f"this model has no groups: leave it out, it is {heads}")
    elif target.heads_per_group > source.heads_per_group:
        problems.add(
            f"target_model has {target.heads_per_group} query heads to a key head, the model {source.heads_per_group}",
            "keep more key heads, or fewer query heads",
        )


def pruning_groups(spec: PruningSpec, learning_rate: float, steps: int) -> tuple[ParameterGroup, ...]:
    """Masks descend and multipliers climb with ``lag_lr`` under the schedule of the weights; neither decays.

    Args:
        spec: the masks.
        learning_rate: of the weights, at the top.
        steps: of the run.

    Raises:
        UserError: the target is still rising when the run ends, or the weights have no learning rate.
    """
    if spec.warmup_steps > steps:
        raise UserError(
            f"{WHERE}.lagrangian_warmup_steps={spec.warmup_steps} of a run of {steps} steps: the target would "
            f"not be reached; LLM-Shearing takes a fifth of the steps, here {max(1, steps // 5)}"
        )
    if not learning_rate > 0:
        raise UserError(f"{WHERE}: lr_schedule.learning_rate is {learning_rate}: give one above 0")
    factor = spec.lag_lr / learning_rate
    return (
        ParameterGroup(pattern=re.escape(MASKS) + ".*", lr_factor=factor, decay=False),
        ParameterGroup(pattern=re.escape(LAMBDAS) + ".*", lr_factor=factor, sign=-1, decay=False),
    )


def with_pruning(train: TrainSpec, spec: PruningSpec) -> TrainSpec:
    """``train`` of a network with masks; errors of ``pruning_groups``."""
    groups = pruning_groups(spec, train.schedule.learning_rate, train.steps)
    return replace(train, pruning=spec, groups=(*groups, *train.groups))
