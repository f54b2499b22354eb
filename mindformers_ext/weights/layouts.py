# SPDX-License-Identifier: Apache-2.0
"""How a MindSpore checkpoint arranges its weights, and how to tell.

- experts "dense": w1, w3 (E, F, D), w2 (E, D, F), for training; "gmm": last two axes swapped, for the grouped matmul of
  MindFormers' predict with ``use_past``;
- ``qkv_concat``: q, k, v in ``attention.w_qkv.weight``; in a dense model gate and up in ``w_gate_hidden`` too.

Names tell ``qkv_concat``; shapes tell the experts' side unless F = D; the description that we write tells both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.parameters import ROUTED
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.tensors import TensorInfo

MOST_MATRICES = 10**6  # layers times experts
DENSE, GMM = "dense", "gmm"
_LAYER = "model.layers.{}."
_QKV = _LAYER + "attention.w_qkv.weight"


@dataclass(frozen=True)
class Layout:
    """One arrangement."""

    experts: str = DENSE
    qkv_concat: bool = False

    def __str__(self) -> str:
        """As messages name it."""
        return self.experts + (" with qkv_concat" if self.qkv_concat else "")


@dataclass(frozen=True)
class Seen:
    """What names and shapes tell; ``experts`` is None where they tell nothing (F = D, or no experts)."""

    experts: str | None
    qkv_concat: bool


def check_count(spec: ModelSpec) -> None:
    """A damaged configuration must not fill the memory with names: ``UserError`` beyond any known model."""
    experts = spec.moe.num_local_experts if spec.moe else 1
    if spec.num_hidden_layers * experts > MOST_MATRICES:
        raise UserError(f"{spec.num_hidden_layers} layers of {experts} experts: no such model; correct config.json")


def see_layout(infos: Mapping[str, TensorInfo], spec: ModelSpec) -> Seen:
    """Look at every layer; layers that differ among themselves are a ``UserError``."""
    check_count(spec)
    layers = range(spec.num_hidden_layers)
    concat = {_QKV.format(layer) in infos for layer in layers}
    if len(concat) > 1:
        raise UserError("some layers hold attention.w_qkv.weight and others do not: they come from different files")
    return Seen(_see_experts(infos, spec), concat.pop() if concat else False)


def resolve_layout(
    infos: Mapping[str, TensorInfo], spec: ModelSpec, described: Layout | None, told: str | None = None
) -> Layout:
    """The layout of a checkpoint from its tensors, its description and what the user told (``--input_layout``).

    Raises:
        UserError: they contradict each other, or nothing tells how the experts lie.
    """
    seen = see_layout(infos, spec)
    words = {
        "its tensors": seen.experts,
        "its description": described.experts if described else None,
        "--input_layout": told,
    }
    given = {who: experts for who, experts in words.items() if experts}
    if spec.moe and len(set(given.values())) > 1:
        listed = ", ".join(f"{who} says {what}" for who, what in given.items())
        raise UserError(
            f"the checkpoint's layout is contradictory: {listed}. A description belongs to one file only; correct "
            "--input_layout, or remove a description that was copied beside another file"
        )
    if described and described.qkv_concat != seen.qkv_concat:
        raise UserError(
            f"the checkpoint's description says qkv_concat {described.qkv_concat}, its tensors {seen.qkv_concat}: the "
            "description belongs to another file; remove it and pass --config"
        )
    if spec.moe and not given:
        raise UserError(
            f"nothing tells whether the experts lie dense or transposed (gmm): hidden and expert width are both "
            f"{spec.hidden_size} and the checkpoint has no description; pass --input_layout dense or --input_layout gmm"
        )
    return Layout(next(iter(given.values())) if spec.moe else DENSE, seen.qkv_concat)


def _see_experts(infos: Mapping[str, TensorInfo], spec: ModelSpec) -> str | None:
    if not spec.moe or spec.hidden_size == spec.expert_size:
        return None
    template = _LAYER + "feed_forward." + (ROUTED if spec.moe.shared_expert else "") + "ffn.w1.weight"
    shapes = {infos[name].shape[1:] for layer in spec.moe_layers if (name := template.format(layer)) in infos}
    dense, turned = (spec.expert_size, spec.hidden_size), (spec.hidden_size, spec.expert_size)
    if {dense, turned} <= shapes:
        raise UserError("some layers' experts are dense, others transposed (gmm): they come from different files")
    if shapes == {turned}:
        return GMM
    return DENSE if shapes == {dense} else None
