# SPDX-License-Identifier: Apache-2.0
"""Wrong values anywhere in a run's YAML: named before anything is built, on both engines, and nothing else escapes."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest

from mindformers_ext.core.cluster.build import build_spec
from mindformers_ext.core.cluster.cluster_rules import check_network
from mindformers_ext.core.config.file import parse_yaml
from mindformers_ext.core.config.overrides import apply_overrides
from mindformers_ext.core.config.recompute import recompute_from_yaml
from mindformers_ext.core.config.run import run_spec_from_yaml
from mindformers_ext.core.config.train import train_spec_from_yaml
from mindformers_ext.core.config.view import network_spec_from_yaml, yaml_notes
from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.run.sections import check_sections
from tests.helpers.tiny_run import YAML

WRONG: list[Any] = [
    -1,
    0,
    1.5,
    10**9,
    2**63,
    10**70,
    float("inf"),
    float("nan"),
    True,
    "many",
    "",
    "a\0b",
    "\ud800",
    "../../evil",
    [],
    [[1], {}],
    {"a": 1},
    [None] * 3,
]
DATA = {"data_loader": {"type": "MindDataset", "dataset_dir": "x.mindrecord", "shuffle": True}, "batch_size": 4}
MORE = {
    "train_dataset": {**DATA, "input_columns": ["input_ids"], "num_parallel_workers": 2, "drop_remainder": True},
    "recompute_config": {"recompute": False, "select_recompute": False},
    "runner_config": {"epochs": 2, "batch_size": 4, "gradient_accumulation_steps": 1},
}


def judged(config: dict[str, Any], engine: str) -> None:
    """All that is judged by words alone, in the order of ``jobs.run.checks`` and ``jobs.train``."""
    run = run_spec_from_yaml({**config, "engine": engine}, "the file")
    check_sections(config, run.mode)
    spec = network_spec_from_yaml(config)
    yaml_notes(config)
    check_network(spec, run.mode)
    build_spec(spec, config, engine == "ms")
    train_spec_from_yaml(config, spec.parallel, 10, 0.0, engine)
    if engine == "ms":
        recompute_from_yaml(config, spec)


def whole(engine: str) -> dict[str, Any]:
    config = parse_yaml(YAML, "test") | copy.deepcopy(MORE)
    config["callbacks"] = config["callbacks"][:2]
    return config | {
        "loop": "own",
        "engine": engine,
        "parallel": {"parallel_mode": 0},
        "parallel_config": {"data_parallel": 1},
    }


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value, sections too."""
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(item, (*path, key))


def with_value(config: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(config)
    here: Any = result
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    return result


@pytest.mark.parametrize("engine", ["ms", "pt"])
def test_nothing_but_a_users_error_escapes(engine: str) -> None:
    config, rng = whole(engine), random.Random(8)
    judged(config, engine)
    cases = [(path, value) for path in leaves(config) for value in WRONG]
    escaped = []
    for path, value in rng.sample(cases, 600):
        try:
            judged(with_value(config, path, value), engine)
        except UserError:
            continue
        except Exception as error:  # noqa: BLE001 - the point is that none escapes
            escaped.append(f"{path} = {value!r:.60}: {type(error).__name__} {error}")
    assert not escaped, "\n".join(escaped)


NAMED = [
    ("runner_config.epochs", "-1"),
    ("runner_config.epochs", "1.5"),
    ("runner_config.gradient_accumulation_steps", "0"),
    ("runner_config.batch_size", "0"),
    ("seed", "1.5"),
    ("seed", "-1"),
    ("seed", "[1]"),
    ("output_dir", "5"),
    ("model.model_config.num_layers", "1000000000"),
    ("model.model_config.vocab_size", "10000000000"),
    ("moe_config.expert_num", "2000000"),
    ("optimizer.betas", "[0.9]"),
    ("optimizer.betas", "[0.9, x]"),
    ("optimizer.eps", "0"),
    ("optimizer.weight_decay", "-0.1"),
    ("lr_schedule.learning_rate", "fast"),
    ("lr_schedule.learning_rate", ".nan"),
    ("lr_schedule.total_steps", "0"),
    ("lr_schedule.warmup_ratio", "1.1"),
    ("runner_wrapper.max_grad_norm", "0"),
    ("runner_wrapper.scale_sense.scale_window", "0"),
    ("callbacks.0.per_print_times", "0"),
    ("callbacks.1.prefix", "../../evil"),
    ("callbacks.1.prefix", "''"),
    ("callbacks.1.save_checkpoint_steps", "-3"),
    ("callbacks.1.keep_checkpoint_max", "1.5"),
    ("train_dataset.data_loader.num_samples", "all"),
    ("train_dataset.drop_remainder", "5"),
    ("use_parallel", "2"),
]


@pytest.mark.parametrize("engine", ["ms", "pt"])
@pytest.mark.parametrize(("key", "text"), NAMED)
def test_a_value_out_of_range_is_named(key: str, text: str, engine: str) -> None:
    value = parse_yaml(text, "test")
    path = tuple(int(step) if step.isdecimal() else step for step in key.split("."))
    with pytest.raises(UserError, match=key.rpartition(".")[2].replace("num_layers", "num_hidden_layers")):
        judged(with_value(whole(engine), path, value), engine)


def test_what_mindformers_files_hold_is_no_mistake() -> None:
    pairs = [
        ("lr_schedule.total_steps", "-1"),
        ("runner_config.sink_size", "-1"),
        ("train_dataset.data_loader.num_samples", "-1"),
        ("callbacks.1.save_checkpoint_steps", "0"),
        ("lr_schedule.learning_rate", "5.e-5"),
        ("optimizer.weight_decay", "0"),
        ("load_checkpoint", "''"),
        ("seed", "0"),
    ]
    judged(apply_overrides(whole("pt"), pairs), "pt")
