# SPDX-License-Identifier: Apache-2.0
"""The pruning YAMLs of research/: the published shapes, steps and batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.config.mixture_words import with_mixture_words
from mindformers_ext.core.config.pruning import pruning_from_yaml
from mindformers_ext.core.config.run import run_spec_from_yaml
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.pruning import shape_of_model
from mindformers_ext.jobs.run.checks import check_words

SHAPES = {"2_7b": 2537553920, "1_3b": 1214251008, "370m": 308281344}
FILES = (
    *[f"prune_llama2_7b_to_{name}" for name in SHAPES],
    *[f"continue_{name}" for name in SHAPES],
    "prune_llama3_8b_to_1_6b",
)


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_the_published_sizes(name: str, repo_root: Path) -> None:
    path = repo_root / "research" / "sheared_llama" / f"{name}.yaml"
    config = with_mixture_words(load_yaml(path))
    devices = config["parallel_config"]["data_parallel"]
    run = run_spec_from_yaml(config, name)
    _, build, _ = check_words(config, run, devices, name)
    model = network_spec_from_yaml(config, devices).model
    pruning = pruning_from_yaml(config, model)
    loader, runner = config["train_dataset"]["data_loader"], config["runner_config"]
    steps = loader["num_samples"] / (devices * runner["batch_size"])
    assert steps == (3200 if pruning else 48000) and loader["num_samples"] / steps == (32 if pruning else 256)
    assert build.pruning == pruning
    if "llama3" in name:
        assert pruning.source.prunable() == 6979321856
        assert pruning.modules == ("kv_head", "intermediate", "layer", "hidden") and pruning.whole == ("q_in_group",)
        return
    size = SHAPES[name.rpartition("to_")[2].removeprefix("continue_")]
    if pruning is None:
        assert shape_of_model(model).prunable() == size
        return
    assert pruning.source.prunable() == 6476005376 and pruning.target.prunable() == size
    assert pruning.warmup_steps * 5 == steps
