# SPDX-License-Identifier: Apache-2.0
"""Options that count only beside others, as a table: given where they have no effect, they are refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mindformers_ext.core.errors import UserError


@dataclass(frozen=True)
class Effect:
    """When an option counts, and how that is asked for."""

    when: Callable[[argparse.Namespace], bool]
    text: str


def _texts(words: argparse.Namespace) -> bool:
    other = words.text or getattr(words, "conversations", None)
    return other is None and bool(getattr(words, "stream", True))


STREAM = Effect(lambda words: words.stream, "--stream")
STORED = Effect(lambda words: not words.stream, "--hidden_features_path")
TRAINED = Effect(lambda words: words.gate != "ridge", "--gate mlp or linear")
RIDGE = Effect(lambda words: words.gate == "ridge", "--gate ridge")
DAMPED = Effect(lambda words: "ridge" in (words.gate, words.mlp_init_criterion), "--gate or --mlp_init_criterion ridge")
DOMAINS = Effect(_texts, "--train_data_path")
SHARE = Effect(lambda words: words.text is None, "--train_data_path or --hidden_features_path")
JUDGED = Effect(lambda words: words.eval_text is not None, "--eval_text")
DRAWN = Effect(
    lambda words: (
        words.use_random_gate
        or getattr(words, "gate_weights_file", None) is None
        and words.select_file_path is None
        or words.eval_text is not None
    ),
    "random gates or --eval_text",
)
NUMBERED = Effect(lambda words: words.device_target != "CPU", "--device_target GPU or Ascend")

CALIBRATION: Mapping[str, Effect] = {
    "train_data_cache_path": DOMAINS,
    "domain_weights": DOMAINS,
    "data_use_percent": DOMAINS,
    "device_id": NUMBERED,
}
SELECT: Mapping[str, Effect] = {
    **dict.fromkeys(("hidden_features_path", "workers"), STORED),
    **dict.fromkeys(("reservoir", "train_data_path", "text", "block_size", "batch_size"), STREAM),
    **dict.fromkeys(("engine", "device_target", "device_id"), STREAM),
    **dict.fromkeys(("mlp_init_criterion", "use_softmax", "lr", "epochs", "patience"), TRAINED),
    **dict.fromkeys(("gate_batch_size", "balance_loss_lambda", "add_noise"), TRAINED),
    **dict.fromkeys(("train_data_cache_path", "domain_weights"), DOMAINS),
    "data_use_percent": SHARE,
    "ridge_lambda": DAMPED,
    "ridge_target": RIDGE,
}


# what a page without a loss does not tell of
REPORT: Mapping[str, Effect] = {
    **dict.fromkeys(("eval_tokens", "block_size", "seed", "preset", "gate_type", "use_softmax"), JUDGED),
    **dict.fromkeys(("multiply_gate_scores", "score_scale_factor", "score_scale_factor_file_path"), JUDGED),
}
V2 = Effect(lambda words: words.style is not None, "--style")
V1 = Effect(lambda words: words.style is None, "no --style")
HEADS = Effect(lambda words: words.style == "attention", "--style attention")
CUT = Effect(lambda words: words.style not in (None, "attention"), "another --style")
SPLIT = Effect(lambda words: words.style != "attention", "another --style")
CONVERT: Mapping[str, Effect] = {
    **{"eval_tokens": JUDGED, "block_size": JUDGED, "seed": DRAWN},
    **dict.fromkeys(("num_moe_contract_layers", "gate_weights_file"), V2),
    **dict.fromkeys(("top_k_attn", "scale_factor_attn", "attn_experts"), HEADS),
    **dict.fromkeys(("top_k", "scale_factor", "neuron_indices_file", "share_neurons", "truncate_gates"), CUT),
    **{"pad_intermediate": CUT, "fold_scale": CUT, "num_experts": SPLIT},
    **dict.fromkeys(("split_file_path", "select_file_path", "num_selects", "preset", "gate_type"), V1),
    **dict.fromkeys(("use_random_gate", "use_softmax", "multiply_gate_scores", "score_scale_factor"), V1),
    **dict.fromkeys(("score_scale_factor_file_path", "allow_pickle", "eval_text", "templates"), V1),
}


def without_effect(words: argparse.Namespace, stage: Any) -> list[str]:
    """The options in the table ``EFFECTS`` of a stage's module that are given and do not count."""
    parser = argparse.ArgumentParser(add_help=False)
    stage.configure(parser)
    return [
        name
        for name, effect in getattr(stage, "EFFECTS", {}).items()
        if getattr(words, name) != parser.get_default(name) and not effect.when(words)
    ]


def check_effects(words: argparse.Namespace, stage: Any) -> None:
    """``UserError`` lists the options that do not count."""
    found = [f"--{name} (counts with {stage.EFFECTS[name].text})" for name in without_effect(words, stage)]
    if found:
        raise UserError(f"{', '.join(found)} would have no effect here: leave it out, or give what it counts with")
