# SPDX-License-Identifier: Apache-2.0
"""How large the micro batches of a split may be and how little it may compute again, as a table and as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mindformers_ext.core.byte_sizes import size_text
from mindformers_ext.core.cluster.anchors import Anchor
from mindformers_ext.core.cluster.batch_search import MOST, BatchFront, BatchPoint
from mindformers_ext.core.cluster.memory import StepSettings, has_fixed_slots, part_activations, worst_load
from mindformers_ext.core.cluster.split_cost import pipeline_bubble
from mindformers_ext.core.cluster.split_search import step_rows
from mindformers_ext.core.cluster.throughput import anchor_for, estimated_tokens, model_operations
from mindformers_ext.core.config.recompute import WHERE, recompute_words
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec

CUT_WORDS = (
    "data_parallel",
    "model_parallel",
    "expert_parallel",
    "pipeline_stage",
    "micro_batch_num",
    "use_seq_parallel",
    "vocab_emb_dp",
)
COLUMNS = ("batch_size", "recompute", "repeated", "memory GB", "tokens per step")
STEPS = "gradient_accumulation_steps"


@dataclass(frozen=True)
class Cut:
    """A split that micro batches are sought for: its name for people, the effective spec, its step's settings, and
    whether the file has it."""

    name: str
    spec: NetworkSpec
    settings: StepSettings
    is_own: bool


def batch_lines(cut: Cut, front: BatchFront, rows: int, limit: str, device: str) -> list[str]:
    """The table, what its columns mean, and the YAML of every line.

    Args:
        cut: the split.
        front: of its micro batches.
        rows: sequences of a step as the file has it.
        limit: of a device's memory, as given.
        device: its name, for the estimate.
    """
    steps = cut.settings.accumulation_steps
    sizes = ", ".join(f"{name}={getattr(cut.spec.parallel, name)}" for name in CUT_WORDS[:5])
    columns = [*COLUMNS, f"{_counter(cut)} for {rows} rows"]
    body = [_row(point, cut, rows) for point in front.points]
    try:
        anchor = anchor_for(cut.spec, cut.settings, device)
    except UserError as refused:
        estimate = [f"no estimate of tokens/s: {refused}."]
    else:
        estimate = _estimate_lines(cut, anchor)
        columns.append("estimated tokens/s/NPU")
        for cells, point in zip(body, front.points, strict=True):
            cells.append(f"~{estimated_tokens(point.spec, point.settings, point.repeated, anchor):.0f}")
    return [
        f"micro batches and recompute that fit {limit} under {cut.name} ({sizes}, {STEPS}={steps}):",
        *aligned([columns, *body]),
        _end(front),
        "A line is left out where another has a larger micro batch and computes no more again. repeated: how many more "
        "products the busiest stage computes; norms and the gated product (select) are none.",
        "memory: the fullest stage; its activations are estimated, so say a --memory below what a device has.",
        *_load_lines(cut.spec),
        *estimate,
        *_yaml_lines(cut, front),
    ]


def _row(point: BatchPoint, cut: Cut, rows: int) -> list[str]:
    tokens = step_rows(point.spec, point.settings) * point.spec.seq_length
    memory = f"{point.memory.total / 1e9:.1f}"
    if not has_fixed_slots(point.spec):
        memory += f"..{point.worst.total / 1e9:.1f}"
    return [
        f"{point.spec.batch_size}",
        _recompute_text(point),
        f"{100 * point.repeated:.1f}%",
        memory,
        f"{tokens:,}",
        _count_for(point, cut, rows),
    ]


def _recompute_text(point: BatchPoint) -> str:
    words = recompute_words(point.settings.recompute, point.spec)
    if words["recompute"] is True:
        return "full"
    parts = ["select"] if words["select_recompute"] else []
    parts += [f"{words['recompute']} layers"] if words["recompute"] else []
    return " + ".join(parts) or "none"


def _counter(cut: Cut) -> str:
    """What counts the micro batches of a step."""
    return "micro_batch_num" if cut.spec.parallel.pipeline_stage > 1 else STEPS


def _counted(cut: Cut) -> int:
    parallel = cut.spec.parallel
    return parallel.micro_batch_num if parallel.pipeline_stage > 1 else cut.settings.accumulation_steps


def _count_for(point: BatchPoint, cut: Cut, rows: int) -> str:
    """So many micro batches are a step of ``rows``; "-" where none are, or where they would need memory that is not
    counted: gradients accumulated where they are not now."""
    stages, steps = cut.spec.parallel.pipeline_stage, cut.settings.accumulation_steps
    count, rest = divmod(rows * _counted(cut), step_rows(point.spec, point.settings))
    if rest or count < stages or (stages == 1 and steps == 1 and count > 1):
        return "-"
    return f"{count}"


def _end(front: BatchFront) -> str:
    """Why no micro batch is larger."""
    if front.largest >= MOST:
        return f"micro batches above {MOST} are not looked for."
    why = "breaks a rule (max_router_load)" if front.by_rule else "does not fit, whatever is computed again"
    return f"batch_size {front.largest + 1} {why}."


def _load_lines(spec: NetworkSpec) -> list[str]:
    """What the load of experts means for memory."""
    moe = spec.model.moe
    if moe is None:
        return []
    one = replace(spec, batch_size=1)
    equal, worst = (size_text(part_activations(load)["feed_forward"]) for load in (one, worst_load(one)))
    if has_fixed_slots(spec):
        why = (
            f"use_gmm multiplies {moe.num_experts_per_tok} rows of every token on the device that has all experts"
            if moe.use_gmm
            else f"capacity_factor {moe.capacity_factor:g} reserves every expert's slots and drops what exceeds them"
        )
        return [f"experts: from equal to worst load the same {equal} per layer and sequence: {why}."]
    where = (
        "all tokens go to the experts of one device"
        if moe.use_gmm
        else "all tokens of a routing group go to the same experts, for each gets as many slots as the fullest needs"
    )
    return [
        f"experts: {equal} per layer and sequence at equal load .. {worst} at the worst, where {where}. memory: at "
        "equal load, which fits, .. at the worst, which may not. A capacity_factor above 0 (use_gmm: False) bounds it."
    ]


def _estimate_lines(cut: Cut, anchor: Anchor) -> list[str]:
    share, bubble = f"{100 * anchor.mfu:.1f} %", 100 * pipeline_bubble(cut.spec, cut.settings)
    return [
        f"estimated tokens/s/NPU: from {share} MFU published for {anchor.job} on {anchor.device} ({anchor.source}); "
        "not measured.",
        f"  = {share} x {anchor.peak / 1e12:.0f} TFLOP/s (taken as its 16-bit peak) x (1 - bubble) / "
        f"(F x (1 + repeated)); bubble = {bubble:.1f} % with {_counter(cut)}={_counted(cut)};",
        f"  F = {model_operations(cut.spec) / 1e9:.4g} GFLOP per token: 6 per weight that a token passes, and causal "
        "attention.",
        "  That job's own recompute and bubble, which are not told, lower its share already. What a split sends is not "
        "in it: it compares no splits.",
    ]


def _yaml_lines(cut: Cut, front: BatchFront) -> list[str]:
    """Keys to put into the file's sections: those of the split where it is another one, then those of each line."""
    lines = [] if cut.is_own else [f"# {cut.name}", *_section_lines(_cut_words(cut))]
    for point in front.points:
        lines.append(f"# batch_size {point.spec.batch_size}, recompute {_recompute_text(point)}")
        lines += _section_lines(_point_words(point))
    return ["in the file's words:", *(f"  {line}" for line in lines)]


def _cut_words(cut: Cut) -> dict[str, dict[str, Any]]:
    parallel = cut.spec.parallel
    return {
        "parallel_config": {name: getattr(parallel, name) for name in CUT_WORDS},
        "parallel": {"enable_alltoall": parallel.enable_alltoall},
        "runner_config": {STEPS: cut.settings.accumulation_steps},
    }


def _point_words(point: BatchPoint) -> dict[str, dict[str, Any]]:
    return {
        "runner_config": {"batch_size": point.spec.batch_size},
        WHERE: recompute_words(point.settings.recompute, point.spec),
    }


def _section_lines(sections: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for section, words in sections.items():
        lines += [f"{section}:", *(f"  {key}: {_yaml_value(value)}" for key, value in words.items())]
    return lines


def _yaml_value(value: Any) -> str:
    """Names are quoted singly, where a backslash is itself."""
    if isinstance(value, list):
        return "[" + ", ".join(f"'{item}'" if isinstance(item, str) else f"{item}" for item in value) + "]"
    return f"{value}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of figures, columns aligned at their ends."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
