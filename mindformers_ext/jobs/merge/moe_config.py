# SPDX-License-Identifier: Apache-2.0
"""The YAML of a mixture made of dense models, as mergekit-moe's users have it, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.errors import Problems
from mindformers_ext.core.layers import dtype_name
from mindformers_ext.formats.dtypes import FLOATS
from mindformers_ext.jobs.merge.moe_outputs import DOWN, MIXTRAL, OUTPUTS, QWEN2_MOE, Output
from mindformers_ext.jobs.merge.references import parse_reference

KEYS = (
    "base_model",
    "experts",
    "gate_mode",
    "dtype",
    "experts_per_token",
    "shared_experts",
    "architecture",
    "segments",
)
EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
RANDOM, UNIFORM, CHEAP, HIDDEN, LAST, AVERAGE = (
    "random",
    "uniform_random",
    "cheap_embed",
    "hidden",
    "hidden_last",
    "hidden_avg",
)
GATE_MODES = (HIDDEN, LAST, AVERAGE, CHEAP, RANDOM, UNIFORM)
WITHOUT_PROMPTS = (RANDOM, UNIFORM)
NOT_BUILT = ("deepseek",)


@dataclass(frozen=True)
class Expert:
    """One expert: the model that gives its feed-forward part, and what it is to be chosen for."""

    model: str
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    noise_scale: float | None = None
    residual_scale: float | None = None


@dataclass(frozen=True)
class Shuffle:
    """Neurons of each expert in an order of its own, ``ratio`` of them drawn anew: of its three matrices the ``same``,
    or each others."""

    ratio: float
    same: bool = False


@dataclass(frozen=True)
class MoEConfig:
    """A whole assembly. ``segments``: experts made of each model, narrower by that factor.

    ``output_said``: the file names its output; otherwise the models decide. ``factors``: of the routed experts'
    matrices, by which weights of 1 / chosen become the whole; ``shuffle``: of their neurons; ``dense``: layers that
    stay dense; ``normalised``: the weights of the chosen experts sum to 1 (a Mixtral's always do).
    """

    base_model: str
    experts: tuple[Expert, ...]
    gate_mode: str
    dtype: str | None
    experts_per_token: int
    text: str
    output: Output = MIXTRAL
    shared: tuple[Expert, ...] = ()
    segments: int = 1
    output_said: bool = False
    factors: Mapping[str, float] | None = None
    shuffle: Shuffle | None = None
    dense: frozenset[int] = frozenset()
    normalised: bool = True

    @property
    def routed_factors(self) -> Mapping[str, float]:
        """``factors``; where nobody says, each of m segments, weighing 1/m of the whole, counts m times."""
        return {DOWN: float(self.segments)} if self.factors is None else self.factors

    def models(self) -> list[str]:
        """Every model named, the base first."""
        return list(dict.fromkeys([self.base_model, *(expert.model for expert in (*self.experts, *self.shared))]))


def read_moe_config(path: Path, untrained_is_fine: bool) -> MoEConfig:
    """The assembly that the file describes; everything wrong is listed in one ``UserError``.

    ``untrained_is_fine``: experts may all be the same model.
    """
    raw = load_yaml(path)
    problems = Problems(str(path))
    problems.unknown_keys("the file", raw, KEYS)
    base = parse_reference(raw.get("base_model"), "base_model", problems)
    mode = raw.get("gate_mode", HIDDEN)
    problems.one_of("gate_mode", mode, GATE_MODES)
    experts = _experts(raw.get("experts"), "experts", problems)
    if isinstance(raw.get("experts"), list) and len(experts) < 2:
        problems.add(f"experts lists {len(experts)} models", "a mixture has at least two experts")
    segments = raw.get("segments", 1)
    problems.positive("segments", segments)
    segments = segments if type(segments) is int else 1
    chosen = raw.get("experts_per_token", 2 * segments)
    problems.positive("experts_per_token", chosen)
    if type(chosen) is int and experts and chosen > len(experts) * segments:
        problems.add(
            f"experts_per_token is {chosen} with {len(experts) * segments} experts",
            "choose at most as many as there are",
        )
    shared = _experts(raw.get("shared_experts") or [], "shared_experts", problems)
    output, said = _output(raw, len(shared), problems)
    dtype = raw.get("dtype")
    if dtype is not None:
        dtype = dtype_name(dtype) or str(dtype).removeprefix("torch.")
        problems.one_of("dtype", dtype, tuple(FLOATS))
    if len(experts) > 1:
        _check_experts(experts, shared, str(mode), untrained_is_fine, problems)
    problems.raise_if_any()
    text = path.read_text(encoding="utf-8")
    return MoEConfig(base, experts, str(mode), dtype, int(chosen), text, output, shared, segments, said)


def _experts(raw: Any, where: str, problems: Problems) -> tuple[Expert, ...]:
    if not isinstance(raw, list) or not all(isinstance(item, Mapping) for item in raw):
        problems.add(f"{where} is {raw!r}", "write a list of {source_model, positive_prompts}")
        return ()
    return tuple(_expert(item, f"{where}[{place}]", problems) for place, item in enumerate(raw))


def _expert(raw: Mapping[Any, Any], where: str, problems: Problems) -> Expert:
    problems.unknown_keys(where, map(str, raw), EXPERT_KEYS)
    return Expert(
        parse_reference(raw.get("source_model"), f"{where}.source_model", problems),
        _prompts(raw.get("positive_prompts"), f"{where}.positive_prompts", problems),
        _prompts(raw.get("negative_prompts"), f"{where}.negative_prompts", problems),
        _number(raw.get("noise_scale"), f"{where}.noise_scale", problems, low=0.0),
        _number(raw.get("residual_scale"), f"{where}.residual_scale", problems),
    )


def _output(raw: Mapping[str, Any], shared: int, problems: Problems) -> tuple[Output, bool]:
    """What is written, and whether the file names it; other outputs of mergekit are refused by name."""
    wanted = str(raw.get("architecture") or "").lower()
    kinds = [output.kind for output in OUTPUTS]
    advice = f"choose {', '.join(kinds)}, or leave the key out"
    found = next((output for output in OUTPUTS if any(word.startswith(wanted) for word in output.words)), None)
    if wanted.startswith(NOT_BUILT):
        problems.add(f"architecture '{raw['architecture']}' is not built", advice)
    elif found is None:
        problems.add(f"architecture '{raw['architecture']}' is unknown", advice)
    if shared > QWEN2_MOE.shared:
        problems.add(f"shared_experts lists {shared} models", "a Qwen2-MoE has one shared expert, the others none")
    if not wanted or found is None:
        return (QWEN2_MOE if shared else MIXTRAL), False
    if shared and not found.shared:
        problems.add(
            f"shared_experts are given with architecture {found.kind}",
            f"a {found.kind} has no shared expert: leave the architecture out to write a Qwen2-MoE, or list it among "
            "the experts",
        )
    if found.shared and not shared:
        problems.add(f"architecture '{raw['architecture']}' without shared_experts", f"a {found.kind} needs one")
    return found, True


def _check_experts(
    experts: tuple[Expert, ...], shared: tuple[Expert, ...], mode: str, untrained_is_fine: bool, problems: Problems
) -> None:
    if len({expert.model for expert in experts}) == 1 and not untrained_is_fine:
        problems.add(
            "all experts are the same model",
            "such a mixture is the dense model until it is trained; pass "
            "--i-understand-this-is-not-useful-without-training to make it all the same",
        )
    if mode in WITHOUT_PROMPTS:
        return
    named = [
        (f"{where}[{place}]", expert)
        for where, group in (("experts", experts), ("shared_experts", shared))
        for place, expert in enumerate(group)
    ]
    for where, expert in named:
        if not expert.positive:
            problems.add(
                f"{where} has no positive_prompts",
                f"gate_mode {mode} needs some of every expert; gate_mode random needs none",
            )
    if all(expert.positive for expert in experts) and len({(e.positive, e.negative) for e in experts}) == 1:
        problems.add(
            "all experts have the same prompts",
            "the router could not tell them apart: write prompts that fit one expert each",
        )


def _prompts(raw: Any, where: str, problems: Problems) -> tuple[str, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list) or not all(isinstance(item, str) for item in raw):
        problems.add(f"{where} is {raw!r}", "write a list of texts")
        return ()
    return tuple(raw)


def _number(raw: Any, where: str, problems: Problems, low: float | None = None) -> float | None:
    if raw is None:
        return None
    try:
        value = float(raw) if not isinstance(raw, bool) else float("nan")
    except (TypeError, ValueError):
        value = float("nan")
    if not abs(value) < float("inf") or (low is not None and value < low):
        problems.add(f"{where} is {raw!r}", "write a number" + (" not below 0" if low is not None else ""))
        return None
    return value
