# SPDX-License-Identifier: Apache-2.0
"""``use_gmm`` on clusters: rows travel to their experts as the load wants, and what they send is what is counted.

Of rows that go on from where the load has taken them (under sequence parallel to the devices of ``mp``) a graph tells
no number: there the exchanges are counted and not their bytes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mindformers_ext.core.cluster.split_cost import expert_exchange
from mindformers_ext.core.config.recompute import WHOLE
from mindformers_ext.jobs.dryrun.facts import RankFacts, TrafficFact
from tests.cli.dryrun.test_dryrun import (
    ALIKE,
    R17,
    SEED,
    grouped_as_counted,
    held_as_counted,
    others_as_counted,
)
from tests.helpers.dryrun import DryRun, alike, chosen_ranks, dry_run, passes_of

GMM = {"moe_config.use_gmm": True, "moe_config.capacity_factor": -1}
COUNT = 4  # bytes of a number of rows


def by_list(facts: RankFacts) -> list[TrafficFact]:
    """The exchanges whose sizes are known when they run."""
    return [row for row in facts.traffic if row.kind == "AlltoAllV"]


def sent_as_counted(run: DryRun, facts: RankFacts) -> None:
    """To the experts and back, K rows of every token and one for each expert; once in a forward pass how many."""
    spec, (forward, passes) = run.spec(), passes_of(run, facts)
    parallel, experts = spec.parallel, spec.model.routing.num_local_experts
    ep, mp = parallel.expert_parallel, parallel.model_parallel
    expected, each = [], expert_exchange(spec)
    if ep > 1:
        expected += [
            ("AlltoAllV", ep, 2 * passes, 2 * passes * each),
            ("AlltoAll", ep, forward, forward * experts * COUNT),
        ]
    if parallel.use_seq_parallel:  # on to all devices of mp, and how many
        known = 0 if ep > 1 else 2 * passes * mp * each  # without ep a device has its own rows, whatever the load
        expected += [("AlltoAllV", mp, 2 * passes, known), ("AllGather", mp, forward, forward * mp * experts * COUNT)]
    found = [row for row in facts.traffic if row.purpose == "experts"]
    assert sorted((row.kind, len(row.ranks), row.count, row.payload) for row in found) == sorted(expected)
    others_as_counted(run, facts, ("attention",) if parallel.use_seq_parallel else WHOLE)


@pytest.mark.slow
@pytest.mark.dryrun
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="dp8 ep8 pp2", marks=pytest.mark.turn("jobs")),
        pytest.param(ALIKE, id="dp2 mp4 ep2 pp2", marks=pytest.mark.turn("jobs")),
        pytest.param(R17, id="dp2 mp4 ep2 pp2 with sequence parallel", marks=pytest.mark.turn("jobs")),
        pytest.param(
            {"data_parallel": 4, "model_parallel": 2, "expert_parallel": 1, "use_seq_parallel": True},
            id="dp4 mp2 pp2 with sequence parallel",
            marks=pytest.mark.turn("jobs"),
        ),
    ],
)
def test_grouped_experts_compile_as_counted(changes: dict, tmp_path: Path, commit: str | None) -> None:
    ranks = chosen_ranks(16, 2, commit)
    run = dry_run(tmp_path / "out", SEED, 16, ",".join(map(str, ranks)), 2, **changes, **GMM)
    assert run.code == 0, run.text
    assert tuple(facts.rank for facts in run.facts()) == ranks
    for facts in run.facts():
        assert facts.unplanned == ()
        held_as_counted(run, facts)
        sent_as_counted(run, facts)
        grouped_as_counted(run, facts)
        assert facts.operators["GroupedMatmul"] == 12 * passes_of(run, facts)[0]  # forward, again, and two gradients
    for stage in (0, 1):
        first, *others = [alike(facts) for facts in run.facts() if facts.stage == stage]
        assert all(other == first for other in others)


@pytest.mark.long("tests/mf/test_ascend_ops.py compiles ours alone, and counts its exchanges")
@pytest.mark.dryrun
def test_no_more_collectives_than_mindformers_grouped_experts(tmp_path: Path) -> None:
    """Its own also sends every row's expert beside the row, and asks for counts again in the backward pass."""
    run = dry_run(tmp_path / "out", SEED, 16, "0,8", 2, "--compare", **GMM)
    assert run.code == 0, run.text
    for ours, theirs in zip(run.facts(), run.facts("native"), strict=True):
        assert theirs.compiles
        for kind in ("AlltoAll", "AlltoAllV"):
            counts = [sum(row.count for row in facts.traffic if row.kind == kind) for facts in (ours, theirs)]
            assert 0 < counts[0] < counts[1]
        spec = run.spec()
        rows = spec.model.routing.num_experts_per_tok * spec.seq_length
        exchanges = 2 * passes_of(run, ours)[1]
        found = sum(row.payload for row in by_list(theirs))
        ids = (sum(row.count for row in by_list(theirs)) - exchanges) * rows * COUNT
        assert found == exchanges * rows * spec.model.hidden_size * 2 + ids
