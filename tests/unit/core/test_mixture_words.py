# SPDX-License-Identifier: Apache-2.0
"""The words of a data mixture, and Sheared-LLaMA's names for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.config.mixture_words import MixtureSpec, mixture_from_yaml, steps_of, with_mixture_words
from mindformers_ext.core.config.overrides import apply_overrides
from mindformers_ext.core.config.run import run_spec_from_yaml
from mindformers_ext.core.errors import Problems, UserError

ROOT = Path(__file__).resolve().parents[3]
LOADER = {"type": "MixtureDataset", "dataset_dir": "corpus", "split": "for_prune"}


def config(callbacks: Any = None, loader: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"callbacks": callbacks or [], "train_dataset": {"data_loader": loader or LOADER}, **more}


def spec(**words: Any) -> MixtureSpec:
    problems = Problems("test")
    found = mixture_from_yaml(LOADER | words, "train_dataset.data_loader", problems)
    problems.raise_if_any()
    assert found is not None
    return found


def test_windows_in_steps_and_in_composer_s_batches() -> None:
    assert [steps_of(value) for value in (50, "50ba", "400ba")] == [50, 50, 400]
    assert [steps_of(value) for value in (0, -1, True, 1.5, "50", "50ep", "0ba", "ba", None, 2**31)] == [None] * 10


def test_every_word_has_its_place() -> None:
    found = spec(
        set_names=["a", "b"],
        proportion={"a": 1, "b": 0},
        update_type="sheared",
        target_loss="losses.json",
        eta=2,
        smoothing=0,
        min_weight=0.1,
        max_weight=0.9,
        min_entropy=0.2,
        eval_interval="3ba",
        on_exhausted="error",
        num_samples=7,
    )
    assert (found.folder, found.split, found.names) == (Path("corpus"), "for_prune", ("a", "b"))
    assert (found.proportions, found.rule, found.targets) == ({"a": 1.0, "b": 0.0}, "sheared", Path("losses.json"))
    assert (found.eta, found.smoothing, found.low, found.high, found.entropy) == (2.0, 0.0, 0.1, 0.9, 0.2)
    assert (found.interval, found.on_exhausted, found.samples) == (3, "error", 7)
    assert spec() == MixtureSpec(folder=Path("corpus"), split="for_prune")
    plain = {"type": "MindDataset", "dataset_dir": "x", "num_samples": 5}
    for words, wrong in ((plain, 0), (plain | {"eta": 1, "split": "eval"}, 1), ({"type": "Other", "split": "eval"}, 0)):
        problems = Problems("")
        assert mixture_from_yaml(words, "", problems) is None and len(problems.lines) == wrong


def test_the_seed_s_names_move_to_ours() -> None:
    words = {"dynamic": True, "set_names": ["a", "b"], "proportion": [0.5, 0.5], "target_loss": [1, 2]}
    monitors = {"MFLossMonitor": {"per_print_times": 2}, "CheckpointMonitor": None}
    for callbacks in (
        {**monitors, "data_loading": words},
        [
            {"type": "MFLossMonitor", "per_print_times": 2},
            {"type": "CheckpointMonitor"},
            {"type": "data_loading", **words},
        ],
    ):
        given = config(callbacks, eval_interval="50ba")
        found = with_mixture_words(given)
        assert found["callbacks"] == [{"type": "MFLossMonitor", "per_print_times": 2}, {"type": "CheckpointMonitor"}]
        moved = {name: words[name] for name in ("set_names", "proportion", "target_loss")}
        expected = LOADER | moved | {"eval_interval": "50ba", "update_type": "doremi"}
        assert found["train_dataset"]["data_loader"] == expected and "eval_interval" not in found
        assert with_mixture_words(found) is found and "eval_interval" in given


def test_what_is_not_dynamic_is_constant() -> None:
    for words, rule in (
        ({"dynamic": False, "update_type": "doremi"}, "constant"),
        ({"dynamic": True, "update_type": "constant"}, "constant"),
        ({"proportion": [1.0]}, None),
    ):
        found = with_mixture_words(config({"data_loading": words}))
        assert found["train_dataset"]["data_loader"].get("update_type") == rule
    for dynamic, rule in ((False, "constant"), (True, "sheared_paper")):
        found = with_mixture_words(
            config({"data_loading": {"dynamic": dynamic}}, LOADER | {"update_type": "sheared_paper"})
        )
        assert found["train_dataset"]["data_loader"].get("update_type") == rule


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config({"data_loading": {"dynamik": True}}), "unknown key 'dynamik' .*: did you mean 'dynamic'"),
        (config({"data_loading": {"dynamic": "yes"}}), "dynamic='yes' is not True or False"),
        (config({"data_loading": {"proportion": [1]}}, {"type": "MindDataset"}), "data_loading belongs to a data mix"),
        (config(None, {"type": "MindDataset"}, eval_interval=5), "eval_interval belongs to a data mixture"),
        (
            config(None, LOADER | {"eval_interval": 4}, eval_interval="5ba"),
            "eval_interval=4, elsewhere .* '5ba': say it",
        ),
    ],
)
def test_names_that_fit_nothing_are_errors(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_mixture_words(given)


def test_the_command_line_sets_words_of_a_mixture() -> None:
    path = ROOT / "configs" / "tiny" / "mixture_pretrain.yaml"
    changed = apply_overrides(load_yaml(path), [("train_dataset.data_loader.max_weight", "0.7")])
    data = run_spec_from_yaml(changed).data
    assert data is not None and data.mixture is not None and data.mixture.high == 0.7
    assert data.mixture.names == ("docs", "code") and data.mixture.interval == 10 and data.seed == 1
    words = [("callbacks.data_loading.dynamic", "False"), ("callbacks.data_loading.proportion", "[0.2, 0.8]")]
    found = load_yaml(path)
    for name in ("proportion", "update_type"):
        found["train_dataset"]["data_loader"].pop(name)
    data = run_spec_from_yaml(apply_overrides(found, [*words, ("callbacks.CheckpointMonitor.prefix", "x")])).data
    assert data is not None and data.mixture is not None
    assert (data.mixture.proportions, data.mixture.rule) == ((0.2, 0.8), "constant")
    for wrong, message in (("data_loading.dynamik", "did you mean 'dynamic'"), ("Monitor.prefix", "is a list of 2")):
        with pytest.raises(UserError, match=message):
            apply_overrides(found, [(f"callbacks.{wrong}", "1")])
    with pytest.raises(UserError, match="unknown key 'max_wait'.*did you mean 'max_weight'"):
        apply_overrides(load_yaml(path), [("train_dataset.data_loader.max_wait", "0.7")])
