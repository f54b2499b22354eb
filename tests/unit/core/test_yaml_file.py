# SPDX-License-Identifier: Apache-2.0
"""YAML files: numbers, anchors, and every file that is refused with a reason."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mindformers_ext.core.config.file import SIZE_LIMIT, dump_yaml, load_yaml, parse_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.log import get_logger, set_up_logging
from tests.helpers.specs import PRETRAIN_YAML

BILLION = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


def test_a_real_file(tmp_path: Path) -> None:
    path = tmp_path / "pretrain.yaml"
    path.write_text(PRETRAIN_YAML + "# 当前不支持\n", encoding="utf-8")
    config = load_yaml(path)
    assert config["moe_config"]["expert_num"] == 8
    assert config["train_dataset_task"]["dataset_config"] is config["train_dataset"]  # the anchor


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.e-8", 1e-8),
        ("3e4", 3e4),
        ("-2.5E+3", -2500.0),
        ("e5", "e5"),
        ("1e", "1e"),
        ("12", 12),
        ("None", "None"),
        ("null", None),
        ("", None),
        ("a: b", {"a": "b"}),
        ("yes", True),
    ],
)
def test_values(text: str, value: object) -> None:
    assert parse_yaml(text, "value") == value


def test_merged_keys_may_be_overridden() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", "text")["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "key 'c' stands twice, in line 3 and line 4"),
        ("{a: 1, a: 2}", "key 'a' stands twice"),
        ("a: [1", "is not valid YAML"),
        ("a: \x1f", "special characters are not allowed"),
        ("a: !!python/name:os.system", "line 1, column 4: the tag !!python/name:os.system is refused"),
        ("a: !!int abc", "the tag !!int is refused"),
        ("a: !!bool maybe", "the tag !!bool is refused"),
        ("a: !own 1", "the tag !own is refused"),
        ("a:\n  - 2001-13-45", "line 2, column 5: '2001-13-45' looks like a value of the kind timestamp and is none"),
        ("a: " + "9" * 5000, "and 4960 characters more looks like a value of the kind int"),
        ("a: 0x" + "f" * 400, "of the kind int and is none"),
        ("? [a]\n: 1", "unhashable"),
        ("a: [" + "1, " * 50_000 + "1]", "more than 50000 values"),
        ("- a\n- b", "holds a list"),
        ("", "is empty"),
        ("1: a", r"the keys \[1\] are not text"),
        ("a: &a [*a]", "nested deeper"),
        (BILLION, "once aliases are followed"),
        ("[" * 100_000, "nested deeper"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        load_yaml(path)
    assert str(path) in str(caught.value)


NOT_TEXT = [
    "1e-5",
    "1.e5",
    "-.5E3",
    "+1",
    "1_000",
    "0x1F",
    "0o17",
    "017",
    "0b1",
    "1:30",
    "1:30.5",
    ".inf",
    "-.INF",
    ".nan",
]
NOT_TEXT += [
    "2024-01-01",
    "2024-01-01 10:00:00",
    "2024-01-01T10:00:00Z",
    "yes",
    "No",
    "ON",
    "true",
    "y",
    "~",
    "null",
    "Null",
    "None",
    "",
]
NOT_TEXT += [
    "=",
    "<<",
    "&a",
    "*a",
    "!!int 1",
    "- a",
    "? a",
    "a: b",
    "# a",
    "%a",
    "@a",
    "`a",
    "---",
    "...",
    "{",
    "]",
    "\ufeffa",
    "\x85",
    "a\nb ",
]
TEXTS = st.text("ae1.-+_: #'\"N") | st.text(max_size=5) | st.sampled_from(NOT_TEXT)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abe1."), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text("abe1."), PLAIN, max_size=4))
@example(dict(enumerate(NOT_TEXT)) | {text: text for text in NOT_TEXT})
@example({"name": "1e-5", "lr": 1e-5, "small": 1e-300, "large": -float("inf"), "whole": 10**30})
def test_what_is_written_is_read_back(config: dict[str, Any]) -> None:
    text = dump_yaml(config)
    for read in (parse_yaml(text, "text"), yaml.safe_load(text)):  # MindFormers reads with PyYAML's own rules
        assert read == config
        assert kinds(read) == kinds(config)  # 1 == 1.0 == True


def kinds(value: Any) -> Any:
    """The types of a nested value."""
    if isinstance(value, dict):
        return {(type(key), key): kinds(item) for key, item in value.items()}
    return [kinds(item) for item in value] if isinstance(value, list) else type(value)


def test_a_section_used_twice_is_written_twice() -> None:
    shared = {"path": "a"}
    assert dump_yaml({"a": shared, "b": [shared]}) == "a:\n  path: a\nb:\n- path: a\n"
    shared["path"] = shared  # type: ignore[assignment]
    with pytest.raises(UserError, match="holds itself"):
        dump_yaml(shared)


def test_only_plain_values_are_written() -> None:
    with pytest.raises(UserError, match="not a plain YAML value"):
        dump_yaml({"a": Path("b")})


def test_what_is_no_yaml_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_yaml(tmp_path / "latin.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * (SIZE_LIMIT + 1))
    with pytest.raises(UserError, match="more than"):
        load_yaml(tmp_path / "big.yaml")


def test_logging_is_set_up_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = logging.getLogger("mindformers_ext")
    before = (list(package.handlers), package.level, package.propagate)
    try:
        set_up_logging()
        set_up_logging(file=tmp_path / "log" / "run.log")
        get_logger("mindformers_ext.core.cluster.cluster_rules").info("hello")
        get_logger("other").info("there")
        assert capsys.readouterr().err.count("hello") == 1
        written = (tmp_path / "log" / "run.log").read_text(encoding="utf-8")
        assert "INFO mindformers_ext.core.cluster.cluster_rules: hello" in written
        assert "mindformers_ext.other: there" in written
    finally:
        for handler in package.handlers:
            if handler not in before[0]:
                handler.close()
        package.handlers, package.level, package.propagate = before
