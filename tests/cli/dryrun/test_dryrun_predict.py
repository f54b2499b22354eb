# SPDX-License-Identifier: Apache-2.0
"""``tools/dryrun.py`` for predictions: the graphs that answer on 8 devices compile, hold and send what is counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mindformers_ext.core.cluster.memory import prediction_memory
from mindformers_ext.core.cluster.tensor_parallel import head_parts, parted_parameters
from mindformers_ext.jobs.dryrun.plan import plan_dry_run
from tests.helpers.dryrun import RESEARCH, DryRun, alike, chosen_ranks, dry_run
from tests.helpers.tiny_run import ROOT, environment

FILES = {size: f"mixtral_{size}/predict_mixtral-{size}.yaml" for size in ("8x7b", "8x22b")}
LAYERS, DEVICES = 2, 8
# file and what differs from it: the cache's, long prompts in groups, no cache, fused kernels and grouped experts
JOBS = {
    "8x7b": ("8x7b", {}),
    "8x22b": ("8x22b", {}),
    "batch": (
        "8x7b",
        {
            "model.model_config.batch_size": 5,
            "model.model_config.max_new_tokens": 20,
            "model.model_config.seq_length": 600,
        },
    ),
    "no cache": ("8x7b", {"model.model_config.use_past": False}),
    "kernels": (
        "8x7b",
        {
            "model.model_config.use_flash_attention": True,
            "model.model_config.hidden_size": 128,
            "moe_config.use_gmm": True,
            "moe_config.capacity_factor": -1,
            "model.model_config.softmax_compute_type": "float16",
        },
    ),
}


def asked(name: str, commit: str | None) -> tuple[int, ...]:
    """The ranks that are compiled: of the files as they are, as for training, and one where something differs."""
    return chosen_ranks(DEVICES, 1, commit) if name in FILES else (5,)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.turn("predictions")) for name in JOBS])
def job(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, commit: str | None
) -> tuple[str, DryRun]:
    size, changes = JOBS[request.param]
    ranks = ",".join(map(str, asked(request.param, commit)))
    out = tmp_path_factory.mktemp("predict") / "out"
    return request.param, dry_run(out, FILES[size], DEVICES, ranks, 1, layers=LAYERS, **changes)


@pytest.mark.slow
@pytest.mark.dryrun
def test_every_rank_compiles_as_counted(job: tuple[str, DryRun], commit: str | None) -> None:
    name, run = job
    assert run.code == 0, run.text
    plan = plan_dry_run(run.config(), "job", DEVICES, "all", run.out)
    shape, spec = plan.shape, plan.spec
    assert shape is not None and head_parts(spec, DEVICES) == DEVICES
    memory = prediction_memory(spec, DEVICES, shape.rows, shape.length, shape.positions)
    ranks = run.facts()
    assert [facts.rank for facts in ranks] == list(asked(name, commit))
    group = {"batch": 1}.get(name, shape.rows)  # prompts of 600 tokens are read one by one
    width = spec.model.hidden_size * 2
    for facts in ranks:
        weights = {item.name: (item.whole, item.local) for item in facts.parameters if item.kind == "weight"}
        assert weights == {item.name: (item.whole, item.local) for item in parted_parameters(spec, DEVICES)}
        assert (facts.nbytes("weight"), facts.nbytes("cache")) == (memory.weights, memory.cache)
        counted = [("prompt: logits", 1, group * 512 * 2), ("prompt: sums", 2 * LAYERS, group * shape.length * width)]
        if name != "no cache":
            counted += [("token: logits", 1, shape.rows * 512 * 2), ("token: sums", 2 * LAYERS, shape.rows * width)]
        assert [(row.purpose, row.count, row.payload // row.count) for row in facts.traffic] == counted
        assert all(row.ranks == tuple(range(DEVICES)) for row in facts.traffic)
    assert all(alike(facts) == alike(ranks[0]) for facts in ranks)


@pytest.mark.slow
@pytest.mark.dryrun
def test_the_report_speaks_of_a_prediction(job: tuple[str, DryRun]) -> None:
    name, run = job
    page = (run.out / "report.html").read_text(encoding="utf-8")
    for text in (run.text, page):
        assert "keys and values" in text and "optimizer states" not in text.partition("nothing was computed")[0]
        assert ("5 texts" if name == "batch" else "1 text") + " at a time, prompts of up to" in text
    assert not (run.out / "strategy").exists() and "strategy/" not in run.text
    if name == "kernels":
        operators = run.facts()[0].operators
        assert operators["GroupedMatmul"] == 3 * LAYERS and operators["FlashAttentionScore"] == LAYERS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--worker_num", "4"], "set data_parallel: 1, model_parallel: 4"),
        (["--worker_num", "8", "--suggest"], "--memory says how many are enough"),
        (["--worker_num", "8", "--compare"], "leave it out for a prediction"),
        (["--worker_num", "8", "--memory", "8GB"], "--memory is 8GB: no number of devices up to 8 is enough"),
    ],
)
def test_mistakes_end_the_command_before_it_compiles(words: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "dryrun.py"), "--config", str(RESEARCH / FILES["8x7b"]), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=120, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
