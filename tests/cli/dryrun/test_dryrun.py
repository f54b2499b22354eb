# SPDX-License-Identifier: Apache-2.0
"""``tools/dryrun.py``: research/'s files compile for their clusters, and hold and send what the arithmetic says.

One or two layers per pipeline stage; the seed's file on every run, of the others those whose turn it is. Compiled are
the first and last rank of the outer stages and of one between and one more, or with ``--all`` every rank of every
file's cluster: each compiles its own graph, with its own groups, slices and neighbours. Those of one stage agree in
everything but who is in their groups, and that is arithmetic: every run compares those it compiles; once all 16 of
"r17" (model parallel) were, and ranks 0 to 9, 12, 15 of "interleave". Stages between the outer ones agree but for their
layers' numbers: once the first ranks of all 8 of "8x22b" were compared.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindformers_ext.cli.transform_ckpt import main as transform
from mindformers_ext.core.cluster.memory import stage_memory
from mindformers_ext.core.cluster.placement import WIDTH, placed_parameters
from mindformers_ext.core.cluster.split_cost import expert_exchange, layer_sent
from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.config.lora import LORA_A, LORA_B
from mindformers_ext.core.config.overrides import apply_overrides
from mindformers_ext.core.config.recompute import WHOLE
from mindformers_ext.core.stages import stage_messages
from mindformers_ext.formats.ms_file import open_checkpoint
from mindformers_ext.jobs.dryrun.facts import RankFacts
from mindformers_ext.jobs.dryrun.ranks import GRAPHS
from tests.conftest import whose_turn
from tests.helpers.dryrun import PIPELINE, RESEARCH, DryRun, alike, chosen_ranks, dry_run, members, passes_of, small
from tests.helpers.sliced import same, write_file
from tests.helpers.tiny_run import ROOT, environment

SEED = "mixtral_8x7b/pretrain_mixtral-8x7b.yaml"
LLAMA_MOE = "../llama_moe/continue_llama_moe_3_5b_2_8.yaml"  # a gate of several products, and its noise; a data mixture
R17 = {"data_parallel": 2, "model_parallel": 4, "expert_parallel": 2, "use_seq_parallel": True}
# every rank of model parallel routes the same tokens, as MindFormers' 32k files of r1.2 to r1.6 ask for
ALIKE = {
    **R17,
    "use_seq_parallel": False,
    "recompute_config.recompute_slice_activation": False,  # its gathers have a purpose of their own
}
# two parts of the network on each stage, and two half batches in turn
INTERLEAVED = {
    "layers": 2,
    "model.model_config.pp_interleave_num": 2,
    "parallel.pipeline_config.pipeline_interleave": True,
    "micro_batch_interleave_num": 2,
    "data_parallel": 4,
    "model_parallel": 2,
    "expert_parallel": 4,
    "use_seq_parallel": True,
}
# the same with residual experts, whose scores are spread over the neurons of each
RESIDUAL = {
    **R17,
    "model.model_config.type": "LlamaMoEResidualConfig",
    "model.arch.type": "LlamaMoEResidualForCausalLM",
    "model.model_config.intermediate_size": 160,
    "model.model_config.shared_expert_intermediate_size": 32,
    "moe_config.shared_expert_num": 2,
}
# name: file, devices, stages, and what of parallel_config differs from the file
JOBS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "seed": (SEED, 16, 2, {}),
    "r17": (SEED, 16, 2, R17),
    "alike": (SEED, 16, 2, ALIKE),
    "32k": ("mixtral_8x7b/pretrain_mixtral-8x7b_32k.yaml", 16, 2, {}),
    "finetune": ("mixtral_8x7b/finetune_mixtral-8x7b.yaml", 16, 2, {}),
    "lora": ("mixtral_8x7b/finetune_lora_mixtral-8x7b.yaml", 16, 2, {}),
    "interleave": (SEED, 16, 2, INTERLEAVED),
    "llama_moe": (LLAMA_MOE, 16, 2, R17),
    "8x22b": ("mixtral_8x22b/pretrain_mixtral-8x22b.yaml", 64, 8, {}),
    "8x22b 32k": ("mixtral_8x22b/pretrain_mixtral-8x22b_32k.yaml", 64, 8, {}),
    "8x22b finetune": ("mixtral_8x22b/finetune_mixtral-8x22b.yaml", 64, 8, {}),
    "8x22b lora": ("mixtral_8x22b/finetune_lora_mixtral-8x22b.yaml", 16, 2, {}),
}
TWINS = {"8x22b 32k": "32k", "8x22b finetune": "finetune", "8x22b lora": "lora"}  # as small as here but one job


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> DryRun:
    """The seed's split on 16 devices, beside MindFormers' own network."""
    return dry_run(tmp_path_factory.mktemp("seed") / "out", SEED, 16, "0,8", 2, "--compare", layers=2)


# The seed's own split is compiled on every run, by TestSeed; of these one takes its turn.
@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.turn("jobs")) for name in JOBS])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, commit: str | None) -> DryRun:
    """The other files and splits, one after the other."""
    name, devices, stages, changes = JOBS[request.param]
    ranks = chosen_ranks(devices, stages, commit)
    asked = ",".join(map(str, ranks))
    run = dry_run(tmp_path_factory.mktemp("job") / "out", name, devices, asked, stages, **changes)
    assert tuple(facts.rank for facts in run.facts()) == ranks, run.text
    return run


def held_as_counted(run: DryRun, facts: RankFacts) -> None:
    """Weights, gradients and optimizer states of a rank are those of core/, name by name."""
    spec, settings = run.spec(), run.settings()
    here = [item for item in placed_parameters(spec, settings.threshold, settings.lora) if item.stage == facts.stage]
    weights = {item.name: (item.whole, item.local) for item in facts.parameters if item.kind == "weight"}
    for name in [name for name in weights if name.endswith((LORA_A, LORA_B))]:
        assert name in {item.name for item in here}
    assert weights == {item.name: (item.whole, item.local) for item in here}
    memory = stage_memory(spec, settings)[facts.stage]
    assert [facts.nbytes(kind) for kind in ("weight", "gradient", "optimizer")] == [
        memory.weights,
        memory.gradients,
        memory.optimizer,
    ]


def grouped_as_counted(run: DryRun, facts: RankFacts) -> None:
    """Who is in a rank's groups follows from their size and stride; neighbours have the same place in other stages."""
    inside = run.devices // run.spec().parallel.pipeline_stage
    for row in facts.traffic:
        first, second = sorted(row.ranks)[:2]
        if row.kind in PIPELINE:
            assert facts.rank in row.ranks and (second - first) % inside == 0
        else:
            assert row.ranks == members(facts.rank, len(row.ranks), second - first)


def sent_as_counted(run: DryRun, facts: RankFacts) -> None:
    """Exchanges between experts, gathered weights and messages between stages, in number and bytes."""
    spec, rows = run.spec(), [row for row in facts.traffic if row.purpose == "experts"]
    exchanges = 2 * passes_of(run, facts)[1] if spec.parallel.expert_parallel > 1 else 0  # to the experts and back
    assert sum(row.count for row in rows) == exchanges
    assert sum(row.payload for row in rows) == exchanges * expert_exchange(spec)
    assert {row.kind for row in rows} <= {"AlltoAll"}
    others_as_counted(run, facts)


def others_as_counted(run: DryRun, facts: RankFacts, summed: Collection[str] = WHOLE) -> None:
    """What else a rank sends. ``summed``: the parts of a layer whose sums over model parallel are counted here."""
    spec, settings, passes = run.spec(), run.settings(), passes_of(run, facts)[1]
    parallel, placed = spec.parallel, placed_parameters(spec, settings.threshold, settings.lora)
    cut = [item for item in placed if item.stage == facts.stage and item.local != item.gathered]
    if parallel.expert_parallel == parallel.data_parallel:  # no expert's weight is gathered
        assert not any(".ffn.w" in item.name for item in cut)
    gathers = [row for row in facts.traffic if row.purpose == "weights"]
    width = WIDTH[spec.numerics.compute_dtype]
    as_stored = "embedding_weight"  # gathered in its own type, the others in the one that computes
    assert sum(row.count for row in gathers) == len(cut)
    assert sum(row.payload for row in gathers) == sum(
        math.prod(item.gathered) * (WIDTH[item.numbers] if item.name.endswith(as_stored) else width) for item in cut
    )

    assert all(len(row.ranks) > 1 for row in facts.traffic)
    assert not [row for row in facts.traffic if row.purpose == "other"]  # the norm tells whether any rank overflowed
    inside = [row for row in facts.traffic if row.purpose in ("layout", "partial sums")]
    if parallel.model_parallel == 1:  # nothing is moved because two operators disagree; the loss is summed
        assert {row.kind for row in inside} <= {"AllReduce"} and all(row.payload <= 8 * row.count for row in inside)
    elif facts.stage == 0:
        assert sum(row.sent for row in inside) == passes * layer_sent(spec, summed)["model parallel"]
    sends = [row for row in facts.traffic if row.kind == "Send"]
    messages = stage_messages(facts.stage, parallel.pipeline_stage, parallel.pp_interleave_num)
    batches = parallel.micro_batch_num * parallel.micro_batch_interleave_num
    assert sum(row.count for row in sends) == 2 * batches * messages  # rows and loss


@pytest.mark.slow
@pytest.mark.dryrun
class TestSeed:
    """dp8 ep8 pp2."""

    def test_it_compiles(self, seed: DryRun) -> None:
        assert seed.code == 0, seed.text
        assert [facts.rank for facts in seed.facts()] == [0, 8]

    def test_every_operator_has_a_strategy(self, seed: DryRun) -> None:
        assert [facts.unplanned for facts in seed.facts()] == [(), ()]

    @pytest.mark.parametrize("place", [0, 1])
    def test_it_holds_and_sends_what_is_counted(self, seed: DryRun, place: int) -> None:
        held_as_counted(seed, seed.facts()[place])
        sent_as_counted(seed, seed.facts()[place])

    def test_no_more_collectives_than_mindformers(self, seed: DryRun) -> None:
        """Though ours sends the auxiliary loss from stage to stage, which MindFormers' network throws away."""
        for ours, theirs in zip(seed.facts(), seed.facts("native"), strict=True):
            assert theirs.compiles
            counts = [sum(row.count for row in facts.traffic) for facts in (ours, theirs)]
            print(f"rank {ours.rank}: {_by_kind(ours)} against MindFormers' {_by_kind(theirs)}")
            assert counts[0] <= counts[1]
        assert "MindFormers' own network for the same file" in seed.text

    def test_report(self, seed: DryRun) -> None:
        report, page = seed.report(), (seed.out / "report.html").read_text(encoding="utf-8")
        assert report["compiles"] and report["devices"] == 16
        assert len(report["ranks"]) == len(report["native_ranks"]) == 2
        assert report["ranks"][0]["bytes"]["weight"] == seed.facts()[0].nbytes("weight")
        for text in (seed.text, page):
            assert "nothing was computed" in text and "estimated by arithmetic" in text and "pipeline" in text

    def test_a_whole_checkpoint_is_cut_for_16_ranks_and_merged(self, seed: DryRun, tmp_path: Path) -> None:
        spec, settings = seed.spec(), seed.settings()
        placed = placed_parameters(spec, settings.threshold)
        rng = np.random.default_rng(0)
        whole = {item.name: rng.normal(size=item.whole).astype(np.float32) for item in placed}
        write_file(tmp_path / "whole" / "rank_0" / "tiny.ckpt", whole)
        strategy = str(seed.out / "strategy")
        cut = [
            "--src_ckpt_dir",
            str(tmp_path / "whole"),
            "--dst_ckpt_strategy",
            strategy,
            "--dst_ckpt_dir",
            str(tmp_path / "ranks"),
            "--prefix",
            "tiny_",
        ]
        assert transform(cut) == 0
        for rank in range(16):
            (path,) = (tmp_path / "ranks" / f"rank_{rank}").glob("*.ckpt")
            infos = open_checkpoint(path).infos
            assert {name: tuple(info.shape) for name, info in infos.items()} == {
                item.name: item.local for item in placed if item.stage == rank // 8
            }
        merge = [
            "--src_ckpt_strategy",
            strategy,
            "--src_ckpt_dir",
            str(tmp_path / "ranks"),
            "--dst_ckpt_dir",
            str(tmp_path / "merged"),
        ]
        assert transform(merge) == 0
        (path,) = (tmp_path / "merged").rglob("*.ckpt")
        merged = open_checkpoint(path)
        assert set(merged.infos) == set(whole)
        assert all(same(merged.read(name), array) for name, array in whole.items())


def _by_kind(facts: RankFacts) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for row in facts.traffic:
        counts[row.kind] += row.count
    return dict(sorted(counts.items()))


@pytest.mark.slow
@pytest.mark.dryrun
def test_every_file_compiles_as_counted(job: DryRun) -> None:
    assert job.code == 0, job.text
    for facts in job.facts():
        assert facts.unplanned == ()
        held_as_counted(job, facts)
        sent_as_counted(job, facts)
        grouped_as_counted(job, facts)
    stages = defaultdict(list)
    for facts in job.facts():
        stages[facts.stage].append(alike(facts))
    for first, *others in stages.values():
        assert all(other == first for other in others)


def test_the_commit_chooses_ranks_and_turns() -> None:
    assert chosen_ranks(16, 2, "0") == (0, 1, 7, 8, 15) and chosen_ranks(16, 2, "2") == (0, 2, 7, 8, 15)
    assert chosen_ranks(4, 2, "5") == (0, 1, 2, 3) and chosen_ranks(4, 2, None) == (0, 1, 2, 3)
    assert chosen_ranks(64, 8, "0") == (0, 1, 7, 8, 15, 56, 63)
    commits = [f"{n:x}" for n in range(512)]  # in time every rank and every test is chosen
    assert {rank for commit in commits for rank in chosen_ranks(64, 8, commit)} == set(range(64))
    groups = {"a": ["x", "y", "z"], "b": ["u"]}
    assert whose_turn(groups, "4") == {"y", "u"}
    assert set().union(*(whose_turn(groups, commit) for commit in commits)) == {"x", "y", "z", "u"}


def test_groups_of_one_size_and_stride_share_out_a_stage() -> None:
    for first, size, stride in [(0, 8, 1), (8, 2, 4), (8, 4, 2), (0, 2, 1), (24, 2, 2)]:
        groups = {members(rank, size, stride) for rank in range(first, first + 8)}
        assert sorted(rank for group in groups for rank in group) == list(range(first, first + 8))
        assert all(len(group) == size for group in groups)


@pytest.mark.parametrize(("twin", "other"), TWINS.items())
def test_small_the_larger_model_s_file_is_the_smaller_one_s_job(twin: str, other: str) -> None:
    """But for its name and its number of stages, so that not every run has to compile it."""
    jobs = []
    for name in (twin, other):
        options = [(key, str(value)) for key, value in small(2).items()]
        words = apply_overrides(
            load_yaml(RESEARCH / JOBS[name][0]), [*options, ("parallel_config.pipeline_stage", "2")]
        )
        words["trainer"]["model_name"] = words["callbacks"][1]["prefix"] = ""
        jobs.append(words)
    assert jobs[0] == jobs[1]


@pytest.mark.slow
@pytest.mark.dryrun
@pytest.mark.turn("jobs")
def test_parts_of_layers_are_computed_again(tmp_path: Path) -> None:
    """``select_recompute``: the first stage's layer repeats attention and experts, the second's norms and product."""
    parts = {"attention": [1, 0], "feed_forward": [1, 0], r".*\.norm": [0, 1], r"feed_forward\.mul": [0, 1]}
    again = {"recompute": False, "select_recompute": parts}
    run = dry_run(tmp_path / "out", SEED, 16, "0,8", 2, "--keep_graphs", recompute_config=again)
    assert run.code == 0, run.text
    for facts in run.facts():
        held_as_counted(run, facts)
        sent_as_counted(run, facts)  # the experts' exchanges too, where feed_forward is computed again
    counts = [_operators(run, rank, "Softmax", "SiLU", "RmsNorm") for rank in (0, 8)]
    # once forward: of attention, router and loss; in the experts; two norms of the layer and the last one
    assert counts == [(2 + 2, 1 + 1, 2), (3, 1 + 1, 3 + 2)]


def _operators(run: DryRun, rank: int, *kinds: str) -> tuple[int, ...]:
    """How often each kind stands in a rank's last graph, where the layer's micro batches share one."""
    (path,) = (run.out / "ranks" / f"rank_{rank}" / GRAPHS).rglob("*_validate_*.ir")
    text = path.read_text(encoding="utf-8", errors="replace")
    return tuple(len(re.findall(rf"= (?:PrimFunc_)?{kind}\(", text)) for kind in kinds)


@pytest.mark.slow
@pytest.mark.dryrun
@pytest.mark.turn("jobs")
def test_residual_experts_are_cut_like_a_feed_forward_part(tmp_path: Path) -> None:
    """And each device's scores are spread over its own neurons: the first's are of one expert, the last's of the
    other."""
    run = dry_run(tmp_path / "out", LLAMA_MOE, 16, "0,3", 2, "--keep_graphs", **RESIDUAL)
    assert run.code == 0, run.text
    for facts, row in zip(run.facts(), ("1 0", "0 1"), strict=True):
        assert facts.unplanned == ()
        held_as_counted(run, facts)
        grouped_as_counted(run, facts)
        (path,) = (run.out / "ranks" / f"rank_{facts.rank}" / GRAPHS).rglob("*_validate_*.ir")
        constants = re.findall(
            r"Tensor\(shape=\[8, 2\], dtype=BFloat16, value=\s*\[\[([01 ]+)\]",
            path.read_text(encoding="utf-8", errors="replace"),
        )
        assert set(constants) == {row}


@pytest.mark.slow
@pytest.mark.dryrun
@pytest.mark.turn("jobs")
def test_a_rank_that_fails_leaves_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "ranks" / "rank_8"
    folder.mkdir(parents=True)
    (folder / GRAPHS).write_text("a file where its graphs' folder goes", encoding="utf-8")
    run = dry_run(tmp_path / "out", SEED, 16, "0,8", 2)
    assert run.code == 1 and [facts.rank for facts in run.facts()] == [0]
    assert "rank 0: compiles" in run.text and "rank 8: FAILS" in run.text
    assert "MindSpore wrote no graph below" in run.text and "rank_8/log.txt" in run.text
    held_as_counted(run, run.facts()[0])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--worker_num", "12"], "is not the device count 12: the nearest choice is"),
        (["--worker_num", "16", "--memory", "8GB"], "no split of 16 devices fits"),
        (["--worker_num", "16", "--parallel_config.expert_parallel", "16"], "exceeds data_parallel=8"),
        (["--worker_num", "16", "--ranks", "99"], "the ranks 0 to 15"),
        (["--worker_num", "16", "--device", "Atlas 900 A2"], "--device belongs to --suggest"),
        ([], "--worker_num is missing"),
    ],
)
def test_mistakes_end_the_command_before_it_compiles(words: list[str], message: str, tmp_path: Path) -> None:
    done = command(tmp_path, *words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_suggest(tmp_path: Path) -> None:
    done = command(tmp_path, "--suggest", "--memory", "64GB")
    assert done.returncode == 0, done.stderr
    assert "16 devices of 64GB, 128 rows of 4096 tokens per step" in done.stdout
    assert "data_parallel=8, model_parallel=1, expert_parallel=8, pipeline_stage=2" in done.stdout
    for name in ("README.md", "README_CN.md"):  # show what this prints
        text = (ROOT / "research" / "mixtral" / name).read_text(encoding="utf-8")
        assert text.partition("```text\n  batch_size")[2].partition("```")[0].splitlines()[1:] == [
            line for line in done.stdout.splitlines() if line.startswith("  ") and "~" in line
        ]
    assert not list(tmp_path.iterdir())


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "dryrun.py"), "--config", str(RESEARCH / SEED), *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(),
        timeout=120,
        check=False,
    )
