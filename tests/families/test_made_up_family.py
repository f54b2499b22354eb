# SPDX-License-Identifier: Apache-2.0
"""A family made outside the package (``tests.helpers.tinymoe``) goes every way that ours go."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mindformers_ext.cli import convert, dryrun, run_mindformer
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.families import FAMILIES
from mindformers_ext.jobs.checkpoint.tiny_model import TinyModelRequest, make_tiny_model
from tests.helpers.tiny_run import ROOT, config_of, make_job, rows_of

pytestmark = pytest.mark.slow
WORDS = "type: TinyMoeConfig, dense_layers: [0, 3], moe_intermediate_size: 24, shared_expert_intermediate_size: 20"
STEPS = 20


@pytest.fixture(scope="module")
def tinymoe():
    """The module that registers the family; afterwards this process knows the family no more."""
    from mindformers_ext.core.families import GATES
    from mindformers_ext.weights.tables import TABLES
    from tests.helpers import tinymoe

    tinymoe.register_mindspore_gate()
    tinymoe.register_torch_gate()
    yield tinymoe
    del FAMILIES[tinymoe.NAME], TABLES[tinymoe.NAME], GATES["offset"]


@pytest.fixture(scope="module")
def job(tinymoe, tmp_path_factory):
    """The YAML of a network of four layers, both ends dense, and a model folder with its weights."""
    folder = tmp_path_factory.mktemp("tinymoe")
    path = make_job(folder)
    text = path.read_text(encoding="utf-8").replace("type: LlamaConfig", WORDS)
    text = text.replace("num_layers: 2", "num_layers: 4").replace("use_past: False", "use_past: True")
    path.write_text(text.replace("type: LlamaForCausalLM", f"type: {tinymoe.CLASS}"), encoding="utf-8")
    spec = network_spec_from_yaml(config_of(path)).model
    make_tiny_model(TinyModelRequest(output_dir=folder / "hf", spec=spec, seed=3))
    return path


def command(main, *words) -> None:
    assert main([str(word) for word in words]) == 0


def test_the_package_has_never_heard_of_it(tinymoe) -> None:
    assert FAMILIES[tinymoe.NAME].yaml_names[0][1] == tinymoe.CLASS
    sources = [*(ROOT / "mindformers_ext").rglob("*.py")]
    assert not [path for path in sources if "tinymoe" in path.read_text(encoding="utf-8").lower()]
    assert len(Path(tinymoe.__file__).read_text(encoding="utf-8").splitlines()) <= 80


def test_its_weights_go_to_mindspore_and_back(job: Path, tmp_path: Path) -> None:
    hf = job.parent / "hf"
    assert json.loads((hf / "config.json").read_text(encoding="utf-8"))["mlp_only_layers"] == [0, 3]
    command(convert.main, "--input_path", hf, "--output_path", tmp_path / "whole.ckpt")
    command(convert.main, "--reversed", "--input_path", tmp_path / "whole.ckpt", "--output_path", tmp_path / "back")
    before, after = load_file(hf / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys() and "model.layers.1.mlp.gate.offset" in before
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def trained(job):
    """The same weights trained by both engines; by engine the folder of the run."""
    found = {}
    for engine in ("ms", "pt"):
        found[engine] = job.parent / engine
        words = ["--config", job, "--trainer", "own", "--engine", engine, "--output_dir", found[engine]]
        command(run_mindformer.main, *words, "--load_checkpoint", job.parent / "hf")
    return found


def test_both_engines_train_it_alike(trained) -> None:
    losses = {engine: [row["lm_loss"] for row in rows_of(folder)] for engine, folder in trained.items()}
    assert len(losses["ms"]) == STEPS
    assert losses["ms"][-1] < losses["ms"][0] - 0.2
    np.testing.assert_allclose(losses["ms"], losses["pt"], rtol=1e-4)


def test_both_engines_predict_the_same_with_a_cache(job: Path, trained, tmp_path: Path) -> None:
    answers = {}
    for engine in ("ms", "pt"):
        answers[engine] = tmp_path / engine / "text_generation_result.txt"
        words = ["--config", job, "--run_mode", "predict", "--engine", engine, "--predict_data", "the word of"]
        words += ["--load_checkpoint", trained["ms"] / "checkpoint"]
        command(run_mindformer.main, *words, "--output_dir", tmp_path / engine)
    texts = [path.read_text(encoding="utf-8") for path in answers.values()]
    assert texts[0] == texts[1] and len(texts[0]) > len("the word of")


RANK = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from mindformers_ext.cli import dryrun_rank
from tests.helpers import tinymoe
inner = dryrun_rank.compile_request
def compile_request(request, tell):
    tinymoe.register_mindspore_gate()
    inner(request, tell)
dryrun_rank.compile_request = compile_request
raise SystemExit(dryrun_rank.main())
"""


@pytest.mark.turn("jobs")
def test_a_cluster_compiles_it(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, model, expert and pipeline parallel, for Ascend."""
    monkeypatch.setattr(dryrun, "RANK_COMMAND", (sys.executable, "-c", RANK, str(ROOT)))
    sizes = ["data_parallel=2", "model_parallel=2", "expert_parallel=2", "pipeline_stage=2", "micro_batch_num=2"]
    split = [
        *(f"parallel_config.{size}" for size in (*sizes, "use_seq_parallel=True")),
        "parallel.enable_alltoall=True",
    ]
    words = ["--config", job, "--worker_num", 8, "--ranks", "stages", "--out", tmp_path / "dry", "--device_target"]
    words += ["Ascend", "--use_parallel", "True", "--options", *split]
    command(dryrun.main, *words)
    report = json.loads((tmp_path / "dry" / "report.json").read_text(encoding="utf-8"))
    assert [rank["stage"] for rank in report["ranks"]] == [0, 1]
    assert not [rank["unplanned"] for rank in report["ranks"] if rank["unplanned"]]  # each operator has its strategy
