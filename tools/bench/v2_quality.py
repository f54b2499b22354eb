# SPDX-License-Identifier: Apache-2.0
"""What mixtures of LLaMA-MoE v2 made of a small dense LLaMA are worth, with the project's own commands, for some seeds.

The LLaMA of 5.3 million parameters of experts_quality.py, trained on the same texts, becomes: eight experts of which
two are chosen, neurons in their order, with random gates or gates by k-means; seven of which one is chosen beside a
residual part, by Gradient Split Plus; and experts of heads, three of four chosen. Held-out documents judge each as
converted, after ``align``, and both after some steps of continued training, beside the dense model after as many.

    python tools/bench/v2_quality.py --output output/v2_quality [--seeds 1 2 3] [--epochs 1] [--further 100]

What is there already is not made again (the folder of experts_quality.py serves, too); ``v2_quality.json`` holds the
figures.
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experts_quality import LENGTH, base_options, dense_model, experts, run_seeds, trained_on
from own_commands import once

TOKENS = 30_000  # that gates, scores and distributions are made of
TEXTS, FILES, SEED = "{texts}", "{files}", "{seed}"  # stand for options of texts, the folder of what is made, a seed
RANDOM = ("--seed", SEED)  # of gates that no file gives
# what is made of the dense model, in this order: file, and the words of its stage
STAGES: Mapping[str, tuple[str, ...]] = {
    "gates_8/gate_weights.pt": ("gates", "--num_experts", "8", "--balance_jitter_factor", "0.4", TEXTS),
    "gates_7/gate_weights.pt": ("gates", "--num_experts", "7", "--balance_jitter_factor", "0.4", TEXTS),
    "grads/importance_scores.pt": ("grads", "--gate_weights_file", f"{FILES}/gates_7/gate_weights.pt", TEXTS),
    "split/neuron_indices.pt": (
        *("split", "--method", "gradient", "--score_file_path", f"{FILES}/grads/importance_scores.pt"),
        *("--num_experts_residual", "1"),
    ),
    "dense/distribution.pt": ("distribution", TEXTS),
}
PLAIN = ("--style", "mixtral", "--num_experts", "8", "--top_k", "2")
# mixtures by name: options of convert
MIXTURES: Mapping[str, tuple[str, ...]] = {
    "vanilla, sequential": (*PLAIN, *RANDOM),
    "vanilla, k-means gates": (*PLAIN, "--gate_weights_file", f"{FILES}/gates_8/gate_weights.pt"),
    "residual, Gradient Split Plus": (
        *("--style", "mixtral-residual", "--top_k", "1", "--num_moe_contract_layers", "1"),
        *("--gate_weights_file", f"{FILES}/gates_7/gate_weights.pt"),
        *("--neuron_indices_file", f"{FILES}/split/neuron_indices.pt"),
    ),
    "attention MoE": ("--style", "attention", "--top_k_attn", "3", *RANDOM),
}


def made(out: Path, data: Path, seed: int, tokens: int) -> dict[str, Path]:
    """The folder of every model by name, aligned ones behind the others."""
    files, dense = out / "v2", ("--model_path", out / "dense")
    texts = ("--text", data / "train.txt", "--max_tokens", tokens, "--block_size", LENGTH)

    def make(stage: str, words: Sequence[str], *more: object) -> Callable[[], None]:
        found = [
            item
            for word in words
            for item in (texts if word == TEXTS else (word.replace(FILES, str(files)).replace(SEED, str(seed)),))
        ]
        return lambda: experts(stage, *found, *more)

    for file, (stage, *words) in STAGES.items():
        path = files / file
        once(path, make(stage, words, *dense, "--save_path", path.parent))
    found = {"dense": out / "dense"}
    for name, options in MIXTURES.items():
        folder = files / name.replace(", ", "_").replace(" ", "_")
        found[name] = once(folder, make("convert", options, *dense, "--save_path", folder))
        aligned = folder.with_name(f"{folder.name}_aligned")
        align = (TEXTS, "--distribution_file", f"{FILES}/dense/distribution.pt")
        found[f"{name}, aligned"] = once(aligned, make("align", align, "--model_path", folder, "--save_path", aligned))
    return found


def one_seed(out: Path, config: Path, data: Path, words: argparse.Namespace, seed: int) -> dict[str, float]:
    """Held-out losses of a seed: every model as it is, and after further steps."""
    print(f"seed {seed}", flush=True)
    once(out / "dense", lambda: dense_model(out, config, data, seed, words.epochs))
    models = made(out, data, seed, words.tokens)
    result = {}
    for name, folder in models.items():
        for steps in (0, *words.further):
            result[f"{name}; {steps} further steps"] = trained_on(out, folder, folder.name, data, seed, steps)
    return result


if __name__ == "__main__":
    parser = base_options(__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="for gates, scores, alignment; default %(default)s")
    run_seeds(parser.parse_args(), one_seed, "v2_quality.json", 60)
