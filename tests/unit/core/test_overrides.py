# SPDX-License-Identifier: Apache-2.0
"""Dotted overrides: values are YAML, absent but known keys are set, a typo is an error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.config.file import parse_yaml
from mindformers_ext.core.config.keys import known_keys
from mindformers_ext.core.config.overrides import apply_overrides, parse_dotted
from mindformers_ext.core.errors import UserError
from tests.helpers.specs import PRETRAIN_YAML

SAMPLE: dict[str, Any] = parse_yaml(PRETRAIN_YAML, "sample")


def refusal(*pairs: tuple[str, str]) -> str:
    with pytest.raises(UserError) as caught:
        apply_overrides(SAMPLE, pairs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("model.model_config.num_layers", "2", 2),
        ("moe_config.capacity_factor", "-1", -1),
        ("moe_config.use_gating_sigmoid", "True", True),  # absent in the file, known
        ("moe_config.aux_loss_types", "[expert, comm]", ["expert", "comm"]),
        ("optimizer.eps", "1e-9", 1e-9),  # YAML 1.1 would read a text
        ("optimizer.weight_decay", "0.1", 0.1),
        ("parallel_config.context_parallel", "1", 1),
        ("swap_config.swap", "False", False),  # a section that the file leaves out
        ("callbacks.1.prefix", "tiny", "tiny"),
        ("context.max_device_memory", "58", "58"),  # was a text, stays one
        ("output_dir", "null", None),
        ("runner_wrapper.scale_sense", "1.0", 1.0),
        ("train_dataset.data_loader.dataset_dir", "C:\\data", "C:\\data"),
        ("model.model_config.compute_dtype", "'float32'", "float32"),
    ],
)
def test_a_value_is_set(path: str, text: str, value: object) -> None:
    here: Any = apply_overrides(SAMPLE, [(path, text)])
    for step in path.split("."):
        here = here[int(step)] if isinstance(here, list) else here[step]
    assert here == value and type(here) is type(value)


def test_the_given_config_is_left_alone_and_later_pairs_win() -> None:
    before = copy.deepcopy(SAMPLE)
    result = apply_overrides(SAMPLE, [("seed", "1"), ("seed", "2"), ("moe_config.expert_num", "4")])
    assert SAMPLE == before
    assert (result["seed"], result["moe_config"]["expert_num"]) == (2, 4)


def test_a_section_shared_by_an_anchor_stays_shared() -> None:
    result = apply_overrides(SAMPLE, [("train_dataset.data_loader.dataset_dir", "/data")])
    assert result["train_dataset_task"]["dataset_config"]["data_loader"]["dataset_dir"] == "/data"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("moe_config.capcity_factor", ["unknown key 'capcity_factor' in 'moe_config'", "'capacity_factor'"]),
        ("moe_confg.expert_num", ["unknown key 'moe_confg'", "'moe_config'"]),
        ("model.model_config.num_hidden_layers", ["write 'model.model_config.num_layers'"]),
        ("optimizer.learning_rat", ["unknown key 'learning_rat' in 'optimizer'", "'learning_rate'"]),
        ("callbacks.7.prefix", ["'callbacks' is a list of 3", "below 3"]),
        ("callbacks.x", ["'callbacks' is a list of 3"]),
        ("callbacks.1.prefx", ["unknown key 'prefx' in 'callbacks.1'", "'prefix'"]),
        ("seed.value", ["'seed' is the value 0, not a section"]),
        ("moe_config", ["would replace a whole section", "expert_num"]),
    ],
)
def test_a_typo_is_an_error(path: str, words: list[str]) -> None:
    text = refusal((path, "1"))
    for word in words:
        assert word in text


def test_all_mistakes_at_once() -> None:
    text = refusal(("a.b", "1"), ("moe_config.x_y", "1"), ("seed", "[1"))
    assert "3 problems" in text and "--seed is not valid YAML" in text


@settings(max_examples=150, deadline=None)
@given(st.text(min_size=1, max_size=12) | st.sampled_from(known_keys("moe_config")), st.text(max_size=8))
def test_no_path_makes_an_unknown_key(name: str, text: str) -> None:
    try:
        result = apply_overrides(SAMPLE, [(f"moe_config.{name}", text)])
    except UserError:
        return
    assert name in known_keys("moe_config")
    assert set(result["moe_config"]) == {*SAMPLE["moe_config"], name}


def test_arguments_become_pairs() -> None:
    words = ["--a.b", "1", "--c.d=x=y", "--e.f", "-1", "--g.h="]
    assert parse_dotted(words) == [("a.b", "1"), ("c.d", "x=y"), ("e.f", "-1"), ("g.h", "")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epoch", "3"], "unknown option --epoch"),
        (["--a.b"], "--a.b has no value"),
        (["--a.b", "--c.d", "1"], "--a.b has no value"),
        (["stray"], "'stray' belongs to no option"),
        (["--"], "'--' belongs to no option"),
    ],
)
def test_broken_arguments(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_dotted(words)
