# SPDX-License-Identifier: Apache-2.0
"""Dry runs of research/'s files at small width, each of which many assertions share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mindformers_ext.core.cluster.cluster_rules import effective_spec
from mindformers_ext.core.cluster.memory import StepSettings
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.dryrun.facts import RankFacts, rank_facts_from_json
from mindformers_ext.jobs.dryrun.memory import step_settings
from tests.helpers.tiny_run import ROOT, environment

RESEARCH = ROOT / "research" / "mixtral"
# Small widths that every split here divides; the optimizer's cut starts at 1 KB, so that it is seen.
TINY = {
    "model.model_config.hidden_size": 64,
    "model.model_config.intermediate_size": 128,
    "model.model_config.num_heads": 8,
    "model.model_config.n_kv_heads": 8,
    "model.model_config.vocab_size": 512,
    "model.model_config.seq_length": 64,
    "parallel.parallel_optimizer_config.parallel_optimizer_threshold": 1,
}
# What ranks of one stage may differ in; what a group's members are is checked by itself: they are arithmetic.
OWN = {
    "rank": 0,
    "start_seconds": 0.0,
    "build_seconds": 0.0,
    "compile_seconds": 0.0,
    "peak_rss": 0,
    "strategy_file": "",
}
PIPELINE = ("Send", "Receive")
TOP = ("micro_batch_interleave_num", "recompute_config")  # have no option on the command line, or no simple value


@dataclass(frozen=True)
class DryRun:
    """What a dry run left behind."""

    out: Path
    devices: int
    code: int
    text: str

    def facts(self, folder: str = "ranks") -> list[RankFacts]:
        """The ranks' results, by rank."""
        found = [rank_facts_from_json(path) for path in (self.out / folder).glob("rank_*/result.json")]
        return sorted(found, key=lambda facts: facts.rank)

    def config(self) -> dict[str, Any]:
        """The configuration that was compiled."""
        (request, *_) = (self.out / "ranks").glob("rank_*/request.json")
        return json.loads(request.read_text(encoding="utf-8"))["config"]

    def spec(self) -> NetworkSpec:
        """The network as the arithmetic of core/ sees it."""
        return effective_spec(network_spec_from_yaml(self.config(), self.devices))[0]

    def settings(self) -> StepSettings:
        """What else decides about memory and traffic."""
        return step_settings(self.config(), self.spec())

    def report(self) -> dict[str, Any]:
        """``report.json``."""
        return json.loads((self.out / "report.json").read_text(encoding="utf-8"))


def chosen_ranks(devices: int, stages: int, commit: str | None) -> tuple[int, ...]:
    """First and last rank of the first stage, of the last and of one between, and one more; every rank for None.

    ``commit`` (hexadecimal) names the stage and the last one: each commit compiles others, so that in time all are; the
    same commit compiles the same ones again.
    """
    if commit is None:
        return tuple(range(devices))
    number, inside = int(commit, 16), devices // stages
    compiled = {0, stages - 1, *([1 + number % (stages - 2)] if stages > 2 else [])}
    fixed = {rank for stage in compiled for rank in (stage * inside, (stage + 1) * inside - 1)}
    others = [rank for rank in range(devices) if rank not in fixed]
    return tuple(sorted(fixed | {others[number // stages % len(others)]} if others else fixed))


def passes_of(run: DryRun, facts: RankFacts) -> tuple[int, int]:
    """How often a step passes a layer's experts on this rank: forward alone, and with backward and repeated ones."""
    spec, again = run.spec(), run.settings().recompute
    here = [layer for layer in range(spec.model.num_hidden_layers) if spec.layer_stage(layer) == facts.stage]
    batches = spec.parallel.micro_batch_num * spec.parallel.micro_batch_interleave_num
    passes = sum(3 if layer in again.layers or "feed_forward" in again.parts_of(layer) else 2 for layer in here)
    return batches * len(here), batches * passes


def small(stages: int, layers: int = 1) -> dict[str, object]:
    """Options that make a file's job small: ``layers`` of each stage, as few micro batches as it bears."""
    return {**TINY, "model.model_config.num_layers": layers * stages, "parallel_config.micro_batch_num": stages}


def members(rank: int, size: int, stride: int) -> tuple[int, ...]:
    """Who is in a group of ``size`` ranks ``stride`` apart with ``rank``.

    Ranks number a box of devices whose longest step is the stage; a group is a row of that box along one side.
    """
    least = rank - rank // stride % size * stride
    return tuple(range(least, least + size * stride, stride))


def alike(facts: RankFacts) -> RankFacts:
    """What the ranks of one stage share: everything but their number, seconds, memory, and who is in their groups.

    A group becomes its size and how far its members are apart, sender and receiver become their distance.
    """
    rows = []
    for row in facts.traffic:
        least, second = sorted(row.ranks)[:2]
        group = (max(row.ranks) - facts.rank or least - facts.rank,) if row.kind in PIPELINE else (len(row.ranks),)
        rows.append(replace(row, ranks=(*group, second - least)))
    return replace(facts, **OWN, traffic=tuple(sorted(rows, key=astuple)))


def dry_run(
    out: Path, name: str, devices: int, ranks: str, stages: int, *more: object, layers: int = 1, **changes: object
) -> DryRun:
    """``tools/dryrun.py`` for research/mixtral/NAME with as few micro batches as it bears.

    ``layers``: of each of the ``stages``. ``changes``: keys of parallel_config, of ``TOP``, or with dots.
    """
    settings = small(stages, layers)
    file = RESEARCH / name
    if any(key in TOP for key in changes):
        words = yaml.safe_load(file.read_text(encoding="utf-8"))
        words |= {key: changes.pop(key) for key in TOP if key in changes}
        file = out.parent / file.name
        file.write_text(yaml.safe_dump(words), encoding="utf-8")
    settings |= {key if "." in key else f"parallel_config.{key}": value for key, value in changes.items()}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [
        sys.executable,
        str(ROOT / "tools" / "dryrun.py"),
        "--config",
        str(file),
        "--worker_num",
        str(devices),
        "--ranks",
        ranks,
        "--out",
        str(out),
        "--jobs",
        str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))),
        *map(str, more),
        *words,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=out.parent, env=environment(), timeout=1500, check=False
    )
    return DryRun(out, devices, done.returncode, done.stdout + done.stderr)
