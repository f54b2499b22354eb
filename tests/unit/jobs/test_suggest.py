# SPDX-License-Identifier: Apache-2.0
"""``--suggest``: splits, and micro batches with the least recompute, whose YAML gives what the table says."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from mindformers_ext.core.byte_sizes import size_text
from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.dryrun.plan import plan_dry_run
from mindformers_ext.jobs.dryrun.suggest import suggestions
from tests.helpers.pretrain import changed

PC, MC, ME = "parallel_config.", "model.model_config.", "moe_config."
DEVICE = "Atlas 900 A2"
OWN_SPLIT = "the file's own split (data_parallel=8, model_parallel=1, expert_parallel=8, pipeline_stage=2, use_seq"


@cache
def seed(memory: str = "64GB") -> list[str]:
    """Lines for the seed's file on its 16 devices."""
    return suggested({}, memory)


def suggested(
    changes: dict[str, Any], memory: str | None = "64GB", devices: int = 16, device: str = DEVICE
) -> list[str]:
    return suggestions(changed(changes), "job.yaml", devices, memory, device)


def line_with(lines: list[str], words: str) -> str:
    (found,) = [line for line in lines if words in line]
    return found


def table(lines: list[str]) -> list[list[str]]:
    """The cells of the table of micro batches, its head first; a list in it is one cell."""
    start = next(place for place, line in enumerate(lines) if line.split()[:1] == ["batch_size"])
    rows = [line.replace(", ", ",").split("  ") for line in lines[start:] if line.startswith("  ")]
    return [[cell.strip() for cell in row if cell.strip()] for row in rows[: lines[start:].index(end_of(lines))]]


def end_of(lines: list[str]) -> str:
    return next(line for line in lines if line.startswith(("batch_size ", "micro batches above")))


def pasted(lines: list[str]) -> list[dict[str, Any]]:
    """The YAML of each line of the table, with what stands before the first for all."""
    blocks: list[list[str]] = []
    for line in lines[lines.index("in the file's words:") + 1 :]:
        if line.startswith("  #"):
            blocks.append([])
        blocks[-1].append(line)
    read = [yaml.safe_load("\n".join(block)) for block in blocks]
    common = {} if "recompute_config" in read[0] else read.pop(0)
    return [
        {
            f"{section}.{key}": value
            for part in (common, one)
            for section, words in part.items()
            for key, value in words.items()
        }
        for one in read
    ]


def test_a_file_whose_own_split_is_wrong_gets_the_first_one() -> None:
    lines = suggested({PC + "model_parallel": 3})
    assert lines[0] == "job.yaml: 16 devices of 64GB, 128 rows of 4096 tokens per step"
    assert line_with(lines, "order: seconds") and line_with(lines, "under the first split (data_parallel=8")
    verdict = "\n".join(lines).partition("the file's own split (")[2]
    assert verdict.startswith("data_parallel=8, model_parallel=3, expert_parallel=8")
    assert "is refused" in verdict and "8*3*2*1 = 48 is not the device count 16" in verdict


@pytest.mark.parametrize("memory, verdict", [("64GB", "fits: it needs 5"), ("52GB", "does not fit: it needs 5")])
def test_what_the_files_own_split_needs(memory: str, verdict: str) -> None:
    assert verdict in line_with(seed(memory), OWN_SPLIT)


def test_a_memory_is_needed() -> None:
    config = changed({})
    del config["context"]["max_device_memory"]
    with pytest.raises(UserError, match="--memory 64GB"):
        suggestions(config, "job.yaml", 16, None, DEVICE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {PC + "model_parallel": 3},  # another split is pasted with it
        {"recompute_config.select_recompute": ["attention_norm", "ffn_norm"], "recompute_config.recompute": [3, 2]},
    ],
)
def test_what_is_pasted_needs_what_the_table_says(changes: dict[str, Any]) -> None:
    changes |= {MC + "num_layers": 8}
    lines = suggested(changes, "24GB")
    head, *rows = table(lines)
    assert head[:6] == [
        *("batch_size", "recompute", "repeated", "memory GB", "tokens per step", "micro_batch_num for 128 rows")
    ]
    words = pasted(lines)
    assert len(words) == len(rows) > 1
    for row, word in zip(rows, words, strict=True):
        plan = plan_dry_run(changed({**changes, **word}), "job.yaml", 16, "stages", Path("out"), "24GB")
        assert f"{max(stage.total for stage in plan.memory) / 1e9:.1f}" == row[3]
        assert f"{plan.rows * 4096:,}" == row[4] and f"{word['runner_config.batch_size']}" == row[0]
        if row[5] != "-":
            kept = {**changes, **word, PC + "micro_batch_num": int(row[5])}
            assert plan_dry_run(changed(kept), "job.yaml", 16, "stages", Path("out"), "24GB").rows == 128
    larger = {**changes, **words[-1], "runner_config.batch_size": words[-1]["runner_config.batch_size"] + 1}
    batch = larger["runner_config.batch_size"]
    assert end_of(lines) == f"batch_size {batch} does not fit, whatever is computed again."
    for again in (True, False):
        larger |= {"recompute_config.recompute": again, "recompute_config.select_recompute": not again}
        plan = plan_dry_run(changed(larger), "job.yaml", 16, "stages", Path("out"))
        assert max(stage.total for stage in plan.memory) > 24e9


def test_a_file_that_fits_with_recompute_alone() -> None:
    changes = {MC + "num_layers": 8, "recompute_config.recompute": False}
    lines = suggested(changes, "13.5GB")
    assert lines[0].endswith("with recompute: True, without which none fits")
    assert any(word["recompute_config.recompute"] for word in pasted(lines))
    with pytest.raises(UserError, match="no split of 16 devices fits .*: use more devices; a step of 128 rows is kept"):
        suggested(changes, "2GB")


def test_the_estimate_says_what_it_is() -> None:
    lines = seed()
    assert table(lines)[0][-1] == "estimated tokens/s/NPU" and all(row[-1].startswith("~") for row in table(lines)[1:])
    assert line_with(lines, "estimated tokens/s/NPU: from 31.7 % MFU published for Mixtral-8x7B").endswith(
        "not measured."
    )
    assert (
        "31.7 % x 313 TFLOP/s (taken as its 16-bit peak) x (1 - bubble) / (F x (1 + repeated)); bubble = 5.9 %"
        in "\n".join(lines)
    )
    full = next(row for row in table(lines) if row[1] == "full")
    assert full[2] == "32.7%" and full[-1] == f"~{0.317 * 313e12 * 16 / 17 / 79_712_747_520 / 1.32658:.0f}"


@pytest.mark.parametrize(
    "changes, device, reason",
    [
        ({}, "Atlas 800I A3", "nothing published for --device 'Atlas 800I A3' is known here, only for Atlas 900 A2"),
        ({MC + "compute_dtype": "float32"}, DEVICE, "compute_dtype is float32"),
        ({ME + "expert_num": 1}, DEVICE, "of a mixture of experts"),
    ],
)
def test_no_estimate_beyond_what_was_published(changes: dict[str, Any], device: str, reason: str) -> None:
    lines = suggested({**changes, MC + "num_layers": 4}, "400GB", device=device)
    assert reason in line_with(lines, "no estimate of tokens/s: ") and "estimated" not in table(lines)[0][-1]


@pytest.mark.parametrize(
    "changes, devices, message",
    [
        ({}, 0, "^--worker_num 0: give the number of devices"),
        ({}, -1, "^--worker_num -1: give the number of devices"),
        (
            {ME + "max_router_load": 1},
            16,
            "no split of 16 devices keeps the rules .*(?s:.*)split .* is refused: (?s:.*)exceeds max_router_load=1",
        ),
    ],
)
def test_what_cannot_be_split_is_told(changes: dict[str, Any], devices: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        suggested({**changes, MC + "num_layers": 4}, devices=devices)


def test_dropless_experts_where_no_split_compiles() -> None:
    changes = {ME + "capacity_factor": -1, MC + "num_layers": 2}
    with pytest.raises(UserError, match=r"job.yaml: capacity_factor=-1 \(dropless\) .*: set use_gmm: True"):
        suggested(changes, "400GB")
    lines = suggested({**changes, "parallel.parallel_mode": 0}, "400GB")
    assert (
        lines[0].startswith("job.yaml: 16 devices of 400GB, 16 rows of 4096 tokens")
        and "no split is listed" in lines[1]
    )
    assert all(".." in row[3] for row in table(lines)[1:]) and f"{16 * 16 * 4096:,}" == table(lines)[-1][4]


def test_the_load_of_experts() -> None:
    text = "\n".join(seed())
    assert "from equal to worst load the same 997.49 MB" in text and "capacity_factor 1.1 reserves" in text
    alone = {
        "use_parallel": False,
        "parallel.parallel_mode": 0,
        ME + "capacity_factor": -1,
        MC + "num_layers": 2,
        **{PC + name: 1 for name in ("data_parallel", "expert_parallel", "pipeline_stage", "micro_batch_num")},
    }
    lines = suggested(alone, "400GB", devices=1)
    # 2 rows of each of 4096 tokens, or 8, of 3 * 14336 + 4096 numbers, 2 * 4096 exchanged; 3 * 8 floats of a gate
    equal, worst = (rows * 4096 * 2 * (3 * 14336 + 3 * 4096) + 3 * 4 * 8 * 4096 for rows in (2, 8))
    told = f"experts: {size_text(equal)} per layer and sequence at equal load .. {size_text(worst)} at the worst"
    assert line_with(lines, "experts: ").startswith(told)
    assert all(".." in row[3] for row in table(lines)[1:])
    grouped = suggested({**alone, ME + "use_gmm": True}, "400GB", devices=1)
    assert f"the same {size_text(equal)} per layer and sequence: use_gmm multiplies 2 rows" in "\n".join(grouped)
