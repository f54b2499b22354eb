# SPDX-License-Identifier: Apache-2.0
"""A run read from its YAML once: defaults, who carries it out, and what MindFormers gets of what was settled."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from mindformers_ext.core.config.file import parse_yaml
from mindformers_ext.core.config.overrides import apply_overrides
from mindformers_ext.core.config.run import Runner, run_spec_from_yaml, settled_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import DeviceSpec
from tests.helpers.tiny_run import ROOT, YAML

PACKAGE = ROOT / "mindformers_ext"


def read(*options):
    return run_spec_from_yaml(apply_overrides(parse_yaml(YAML, "test"), [tuple(o.split("=", 1)) for o in options]))


def test_what_a_file_leaves_out() -> None:
    run = run_spec_from_yaml({"run_mode": "train"})
    assert run.device == DeviceSpec("Ascend") and (run.engine, run.runner) == ("ms", Runner.MINDFORMERS)
    assert (run.output_dir, run.load, run.resume, run.data, run.seed) == ("./output", None, False, None, 0)
    assert run_spec_from_yaml({"run_mode": "predict"}).save_file == str(Path("output/text_generation_result.txt"))


DENSE, ADAPTERS = "moe_config.expert_num=1", "model.model_config.pet_config={pet_type: lora, target_modules: wq}"
ACCURACY = "metric={type: AccuracyMetric}"


@pytest.mark.parametrize(
    ("options", "runner"),
    [
        (("run_mode=train",), Runner.MINDFORMERS),
        (("run_mode=finetune", "loop=mindformers"), Runner.MINDFORMERS),
        (("run_mode=train", "loop=own"), Runner.OWN_LOOP),
        (("run_mode=train", "engine=pt"), Runner.OWN_LOOP),
        (("run_mode=train", "context.device_target=GPU"), Runner.OWN_LOOP),
        (("run_mode=eval",), Runner.OWN_EVALUATION),
        (("run_mode=eval", "loop=mindformers"), Runner.OWN_EVALUATION),
        (("run_mode=eval", "loop=own", "use_parallel=True"), Runner.OWN_LOOP),
        (("run_mode=predict", "loop=own", "adapter_id=[a]"), Runner.MINDFORMERS),
        (("run_mode=eval", "engine=pt", "use_parallel=True"), Runner.OWN_LOOP),
        (("run_mode=eval", ACCURACY), Runner.MINDFORMERS),
        (("run_mode=eval", ADAPTERS), Runner.MINDFORMERS),
        (("run_mode=predict", "use_parallel=True"), Runner.OWN_PREDICTION),
        (("run_mode=predict", "adapter_id=[a]"), Runner.MINDFORMERS),
        (("run_mode=predict", DENSE), Runner.OWN_PREDICTION),
        (("run_mode=predict", DENSE, "context.device_target=Ascend"), Runner.MINDFORMERS),
        (("run_mode=predict", "model.arch.type=BloomLMHeadModel"), Runner.MINDFORMERS),
    ],
)
def test_who_carries_a_run_out(options, runner) -> None:
    run = read(*options)
    assert run.runner is runner
    assert (run.sampling is not None) == (runner is Runner.OWN_PREDICTION)


def test_alone_a_run_may_be_somebody_else_s() -> None:
    together = read("run_mode=eval", "use_parallel=True")
    assert together.runner is Runner.MINDFORMERS
    assert together.alone() == read("run_mode=eval")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("run_mode=test",), "choose one of train, finetune, eval, predict"),
        (("engine=tf",), "choose one of ms, pt"),
        (("loop=me",), "choose one of own, mindformers"),
        (("context=CPU",), "is not a section"),
        (("seed=[7]", "runner_config.gradient_accumulation_steps=two"), r"2 problems\n.*seed=\[7\].*\n.*steps='two'"),
        (("run_mode=predict", "predict_batch_size=0"), "predict_batch_size=0: give a whole number above 0"),
    ],
)
def test_a_wrong_value_is_named(options, words) -> None:
    config = parse_yaml(YAML, "test") | {"context": "CPU"} if options == ("context=CPU",) else None
    with pytest.raises(UserError, match=words):
        run_spec_from_yaml(config) if config else read(*options)


def test_mindformers_gets_what_was_settled_and_nothing_else_new() -> None:
    config = {"run_mode": "train", "load_checkpoint": "a", "use_parallel": True, "auto_trans_ckpt": True, "seed": None}
    asked = run_spec_from_yaml(config)
    assert settled_yaml(config, asked, asked) == config | {"output_dir": "./output"}
    settled = replace(asked.alone(), load="b", resume="x.ckpt", load_format="safetensors")
    assert settled_yaml(config, asked, settled) == config | {
        "output_dir": "./output",
        "use_parallel": False,
        "load_checkpoint": "b",
        "resume_training": "x.ckpt",
        "load_ckpt_format": "safetensors",
    }


# Who carries a run out, and what judges it: none of them reads the mapping. ``jobs.run.sections`` judges its keys, and
# ``mf.adapt`` changes them for MindFormers.
ROAD = ("cli/run_mindformer.py", "cli/evaluate.py", "cli/predict.py", "jobs/run/checks.py", "jobs/run/dataset.py")
ROAD += ("jobs/run/slices.py", "jobs/run/start.py", "jobs/predict", "jobs/engine", "mf/run.py")


def test_the_mapping_is_read_in_one_place() -> None:
    files = [path for name in ROAD for path in sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / name]]
    reads = {
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Attribute, ast.Subscript)) and ast.unparse(node.value).rpartition(".")[2] == "config"
    }
    assert len(files) > len(ROAD) and not reads
