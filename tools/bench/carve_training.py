# SPDX-License-Identifier: Apache-2.0
"""What a carved mixture is worth once it is trained, beside a static cut of its active size and LLaMA-MoE v2's residual
split, with the project's own commands and the same tokens for each.

Half of a real model's neurons stay active in all three: two of eight groups shared and two chosen; the half that FLAP
keeps, with the same refit; two parts of eight always on beside two chosen of six. Each is judged on held-out text as it
is, and after ``--steps`` of training gates alone, adapters in its attention (LoRA), all but its gates, or everything.

    python tools/bench/carve_training.py MODEL --calibration text.txt --held_out other.txt --output output/training

Training reads the calibration text. A carved mixture's gates are small (their scale sets the error of its weights), so
gates that learn alone do so at ``--gate_rate`` times the root of their mean square. What is there already is not made
again; ``training.json`` holds the figures. SmolLM2: five to ten minutes for each of the ten trainings on one core.
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from own_commands import command, once

from mindformers_ext.core.config.file import dump_yaml
from mindformers_ext.core.config.from_model import FirstTry, yaml_from_model
from mindformers_ext.core.config.run import PYTORCH
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.formats.safetensors_dir import SafetensorsDir
from mindformers_ext.jobs.run.from_folder import describe

TEXT, MODEL, FILES, KEPT = "{text}", "{model}", "{files}", "{kept}"  # the calibration's options, and paths
MEASURED = ("--max_tokens", "{tokens}", "--block_size", "512")
# what is made of the dense model, in this order: path below the output, and the command's words
STAGES: Mapping[str, tuple[str, ...]] = {
    "mixture": (
        *("tools/build_experts.py", "carve", MODEL, f"{FILES}/mixture", "--experts", "8", "--shared", "2"),
        *("--active", "2", "--calibration", TEXT, "--tokens", "{tokens}", "--block_size", "512", "--quiet"),
        *("--held_out", "{held}", "--held_out_tokens", "2048"),
    ),
    "static": (
        *("tools/prune.py", "shape", MODEL, f"{FILES}/static", "--method", "flap", "--refit", "least_squares"),
        *("--target", f"intermediate_size={KEPT}", "--calibration", TEXT, "--tokens", "{tokens}"),
        *("--block_size", "512", "--quiet", "--held_out", "{held}", "--held_out_tokens", "2048"),
    ),
    "v2/gate_weights.pt": (
        *("tools/build_experts.py", "gates", "--num_experts", "6", "--balance_jitter_factor", "0.4", "--quiet"),
        *("--model_path", MODEL, "--save_path", f"{FILES}/v2", "--text", TEXT, *MEASURED),
    ),
    "v2/importance_scores.pt": (
        *("tools/build_experts.py", "grads", "--gate_weights_file", f"{FILES}/v2/gate_weights.pt", "--quiet"),
        *("--model_path", MODEL, "--save_path", f"{FILES}/v2", "--text", TEXT, *MEASURED),
    ),
    "v2/neuron_indices.pt": (
        *("tools/build_experts.py", "split", "--method", "gradient", "--num_experts_residual", "2", "--quiet"),
        *("--score_file_path", f"{FILES}/v2/importance_scores.pt", "--num_experts", "6"),
        *("--model_path", MODEL, "--save_path", f"{FILES}/v2"),
    ),
    "residual": (
        *("tools/build_experts.py", "convert", "--style", "mixtral-residual", "--top_k", "2", "--quiet"),
        *("--gate_weights_file", f"{FILES}/v2/gate_weights.pt"),
        *("--neuron_indices_file", f"{FILES}/v2/neuron_indices.pt"),
        *("--model_path", MODEL, "--save_path", f"{FILES}/residual"),
    ),
}
MODELS = ("mixture", "static", "residual")
LORA = {
    "pet_type": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": ".*wq|.*wk|.*wv|.*wo"
}  # fmt: skip
RATE = 1e-4


@dataclass(frozen=True)
class Training:
    """What learns. ``rate`` None: by the gates' size; ``gates``: it says something of gates, which the model must have;
    ``runner`` goes into the YAML's runner_config."""

    rate: float | None = RATE
    gates: bool = False
    adapters: bool = False
    runner: Mapping[str, bool] = field(default_factory=dict)


TRAININGS = {
    "everything": Training(),
    "gates alone": Training(None, gates=True, runner={"train_gate_only": True}),
    "LoRA": Training(10 * RATE, adapters=True),
    "all but gates": Training(gates=True, runner={"freeze_gate": True}),
}
ROWS, LENGTH = 2, 128  # of a step
ROWS_OF_TEXT = (
    *("tools/dataset_preprocess/llama/llama_preprocess.py", "--dataset_type", "text", "--input_glob", TEXT),
    *("--model_file", MODEL, "--seq_length", str(LENGTH), "--output_file", f"{FILES}/rows.mindrecord"),
)


def gates_size(folder: Path) -> float:
    """The root of the mean square of all gates' weights; 0 without gates."""
    with closing(SafetensorsDir(folder)) as source:
        gates = [np.asarray(source.read(name), np.float64).ravel() for name in source.infos if is_gate(name)]
    return float(np.sqrt(np.mean(np.concatenate(gates) ** 2))) if gates else 0.0


def is_gate(name: str) -> bool:
    """Whether a weight of a Hugging Face folder scores experts."""
    return name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight"))


def filled(stage: Sequence[str], words: argparse.Namespace) -> list[str]:
    """A command with what stands for paths and numbers put in."""
    size = json.loads((words.model / "config.json").read_text())["intermediate_size"]
    known = {TEXT: words.calibration, MODEL: words.model, FILES: words.output, KEPT: size // 2}
    known |= {"{held}": words.held_out, "{tokens}": words.tokens}
    for name, value in known.items():
        stage = [word.replace(name, str(value)) for word in stage]
    return list(stage)


def made(words: argparse.Namespace) -> dict[str, Path]:
    """The folder of every model."""
    for place, stage in STAGES.items():
        once(words.output / place, partial(command, *filled(stage, words)))
    return {"dense": words.model, **{name: words.output / name for name in MODELS}}


def judged(run: Path, model: Path, words: argparse.Namespace, *more: object) -> float:
    """The held-out loss of a folder, or of what a run has trained; ``more``: options of eval."""

    def judge() -> None:
        command(
            "-m", "mindformers_ext", "eval", model, "--text", words.output / "judge.txt", "--engine", "pt",
            "--output_dir", run / "eval", *more,
        )  # fmt: skip

    found = json.loads(once(run / "eval" / "eval.json", judge).read_text(encoding="utf-8"))
    return float(found["PerplexityMetric"]["loss"])


def trained(run: Path, model: Path, training: Training, rate: float, words: argparse.Namespace) -> float:
    """The held-out loss of ``model`` behind a training."""

    def train() -> None:
        run.parent.mkdir(parents=True, exist_ok=True)
        path, rows = run.with_suffix(".yaml"), words.output / "rows.mindrecord"
        found = describe(model)
        asked = FirstTry(
            job="train", load=str(found.load), tokenizer=str(found.tokenizer), engine=PYTORCH, data=str(rows),
            rows=ROWS, seq_length=LENGTH,
        )  # fmt: skip
        config = yaml_from_model(found.model, asked)
        if training.adapters:
            config["model"]["model_config"]["pet_config"] = LORA
        config["runner_config"] |= training.runner
        path.write_text(dump_yaml(config), encoding="utf-8")
        command(
            "run_mindformer.py", "--config", path, "--batch_size", ROWS, "--num_samples", words.steps * ROWS,
            "--seed", words.seed, "--output_dir", run, "--lr_schedule.learning_rate", rate,
            "--lr_schedule.lr_end", rate / 10,
        )  # fmt: skip

    once(run / "checkpoint", train)
    if not training.adapters:
        return judged(run, run, words)
    base, merged = run / "base.ckpt", run / "merged.safetensors"
    once(base, lambda: command("convert_weight.py", "--input_path", model, "--output_path", base))
    adapters = ("--base", base, "--adapter", run / "checkpoint", "--output", merged)
    once(merged, lambda: command("tools/merge_lora.py", *adapters))
    return judged(run, merged, words, "--processor.tokenizer.vocab_file", model / "tokenizer.json")


def options() -> argparse.ArgumentParser:
    """The bench's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path)
    add("--calibration", type=Path, required=True, help="text that is measured and trained on")
    add("--held_out", type=Path, required=True, help="text that judges")
    add("--output", type=Path, required=True)
    add("--tokens", type=int, default=8192, help="that are measured; default %(default)s")
    add("--characters", type=int, default=40_000, help="of the held-out text that judge; default %(default)s")
    add("--steps", type=int, default=200, help=f"of {ROWS} rows of {LENGTH} tokens; default %(default)s")
    add("--gate_rate", type=float, default=0.01, help="learning rate of gates alone, by their size; default 0.01")
    add("--seed", type=int, default=1)
    add("--models", nargs="+", default=MODELS, choices=MODELS)
    add("--trainings", nargs="+", default=[*TRAININGS], choices=[*TRAININGS], metavar="NAME")
    return parser


def main() -> None:
    """Print a row for each model and training."""
    words = options().parse_args()
    for name in ("model", "calibration", "held_out", "output"):
        setattr(words, name, getattr(words, name).absolute())
    words.output.mkdir(parents=True, exist_ok=True)
    text = words.held_out.read_text(encoding="utf-8")[: words.characters]
    once(words.output / "judge.txt", lambda: write_text(words.output / "judge.txt", text))
    once(words.output / "rows.mindrecord", partial(command, *filled(ROWS_OF_TEXT, words)))
    models = made(words)
    found = {"dense": {"as it is": judged(words.output / "runs" / "dense", models["dense"], words)}}
    for name in words.models:
        runs, size = words.output / "runs", gates_size(models[name])
        row = found[name] = {"as it is": judged(runs / name, models[name], words)}
        for training in words.trainings:
            way = TRAININGS[training]
            if way.gates and not size:
                continue
            run = runs / f"{name}_{training.replace(' ', '_')}"
            row[training] = trained(run, models[name], way, way.rate or words.gate_rate * size, words)
            print(f"{name}, {training}: {row[training]:.4f}", flush=True)
    write_text(words.output / "training.json", json.dumps({"steps": words.steps, "losses": found}, indent=1) + "\n")
    for name, row in found.items():
        print(f"{name:10} " + "  ".join(f"{training} {loss:.4f}" for training, loss in row.items()))


if __name__ == "__main__":
    main()
