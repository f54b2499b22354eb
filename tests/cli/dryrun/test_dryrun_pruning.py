# SPDX-License-Identifier: Apache-2.0
"""research/sheared_llama's files compiled for Ascend at small width: masks on a network cut over devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mindformers_ext.core.cluster.memory import stage_memory
from mindformers_ext.core.cluster.placement import placed_parameters
from mindformers_ext.core.pruning import ROOT
from tests.cli.dryrun.test_dryrun import grouped_as_counted
from tests.helpers.dryrun import DryRun, chosen_ranks, dry_run

L0 = "model.model_config.l0_module."
SMALL: dict[str, Any] = {
    "model.model_config.head_dim": 8,
    "parallel.enable_parallel_optimizer": True,
    f"{L0}target_model.d_model": 32,
    f"{L0}target_model.n_heads": 4,
    f"{L0}target_model.n_layers": 1,
    f"{L0}target_model.intermediate_size": 64,
    f"{L0}target_model.vocab_size": 512,
}
SPLITS: dict[str, dict[str, Any]] = {
    "data": {"data_parallel": 4},
    "model": {"data_parallel": 2, "model_parallel": 2},
    "sequence": {"data_parallel": 2, "model_parallel": 2, "use_seq_parallel": True},
}
GROUPED = {
    "model.model_config.n_kv_heads": 4,
    f"{L0}target_model.n_kv_heads": 2,
    "model.model_config.bos_token_id": 1,
    "model.model_config.eos_token_id": 2,
}
# file, split, and what differs
JOBS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "7b to 2.7b": ("prune_llama2_7b_to_2_7b", "data", {f"{L0}target_model.n_layers": 2}),
    "7b to 1.3b": ("prune_llama2_7b_to_1_3b", "model", {}),
    "7b to 370m": ("prune_llama2_7b_to_370m", "sequence", {}),
    "8b, groups": ("prune_llama3_8b_to_1_6b", "sequence", GROUPED),
    "tied": ("prune_llama2_7b_to_1_3b", "sequence", {"model.model_config.tie_word_embeddings": True}),
    "to a share of all": ("prune_llama2_7b_to_1_3b", "model", {f"{L0}target_model": "null"}),
}
DEVICES = 4


def compiled(folder: Path, job: str, commit: str | None) -> DryRun:
    name, split, changes = JOBS[job]
    settings = {**SMALL, **SPLITS[split], **changes}
    if f"{L0}target_model" in changes:
        settings = {key: value for key, value in settings.items() if not key.startswith(f"{L0}target_model.")}
    ranks = ",".join(map(str, chosen_ranks(DEVICES, 1, commit) if commit is None else (int(commit, 16) % DEVICES,)))
    file = f"../sheared_llama/{name}.yaml"
    run = dry_run(folder / "out", file, DEVICES, ranks, 1, "--keep_graphs", layers=2, **settings)
    assert run.code == 0, run.text
    return run


@pytest.mark.slow
@pytest.mark.dryrun
@pytest.mark.parametrize("name", [pytest.param(job, marks=pytest.mark.turn("jobs")) for job in JOBS])
def test_a_file_compiles_with_its_masks_as_counted(name: str, tmp_path: Path, commit: str | None) -> None:
    run = compiled(tmp_path, name, commit)
    spec, settings = run.spec(), run.settings()
    assert settings.pruning is not None
    (memory,) = stage_memory(spec, settings)
    placed = placed_parameters(spec, settings.threshold, pruning=settings.pruning)
    masks = {item.name for item in placed if item.name.startswith(ROOT)}
    assert len(masks) == 2 * len(settings.pruning.modules) + 2 * len(settings.pruning.pairs) + 1
    for facts in run.facts():
        assert facts.unplanned == ()
        weights = [item for item in facts.parameters if item.kind == "weight" or item.name in masks]
        assert {item.name: (item.whole, item.local) for item in weights} == {
            item.name: (item.whole, item.local) for item in placed
        }
        assert sum(item.nbytes for item in weights) == memory.weights
        assert facts.nbytes("optimizer") == memory.optimizer
        grouped_as_counted(run, facts)
        purposes = {row.purpose for row in facts.traffic}
        assert purposes <= {"layout", "partial sums", "weights", "gradients", "norm", "embedding"}
        (graph,) = (run.out / "ranks" / f"rank_{facts.rank}").rglob("step_parallel_end_*.ir")
        text = graph.read_text(encoding="utf-8", errors="replace")
        assert "_MirrorOperator(" in text and "_VirtualDiv(" not in text  # so ``mf.step`` divides by the devices itself


@pytest.mark.slow
@pytest.mark.dryrun
@pytest.mark.turn("jobs")
@pytest.mark.parametrize("name", ["continue_2_7b", "continue_1_3b", "continue_370m"])
def test_what_continues_compiles(name: str, tmp_path: Path) -> None:
    ours = {"model.model_config.type": "PortableLlamaConfig", "model.arch.type": "PortableLlamaForCausalLM"}
    split = {**SPLITS["sequence"], **ours, "model.model_config.head_dim": 8}
    run = dry_run(tmp_path / "out", f"../sheared_llama/{name}.yaml", DEVICES, "1", 1, **split)
    assert run.code == 0, run.text
    assert not any(item.name.startswith(ROOT) for facts in run.facts() for item in facts.parameters)


def test_a_pipeline_with_masks_is_refused(tmp_path: Path) -> None:
    split = {**SMALL, "data_parallel": 2, "pipeline_stage": 2}
    run = dry_run(tmp_path / "out", "../sheared_llama/prune_llama2_7b_to_2_7b.yaml", DEVICES, "all", 2, **split)
    assert run.code == 2 and "masks of the whole network are not sent between pipeline stages" in run.text
