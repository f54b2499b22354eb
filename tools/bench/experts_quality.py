# SPDX-License-Identifier: Apache-2.0
"""What mixtures made of a small dense LLaMA are worth, with the project's own commands, for several seeds.

A LLaMA of 5.3 million parameters (five layers of 256, feed-forward 768) learns the standard library's documentation.
It becomes eight experts of which two are chosen: by clustering and at random, with trained, closed-form (ridge)
 and streamed gates. Held-out documents judge each beside the dense model, a static cut of the same size, the
best choice (oracle) and a random one. Then the mixture is trained on, and so is the dense model for as many steps.

    python tools/bench/experts_quality.py --output output/experts_quality [--seeds 1 2 3] [--epochs 1] [--further 100]

What is there already is not made again; ``quality.json`` holds the figures. About ten minutes a seed on two cores.
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from own_commands import command, once, with_sizes

CONFIG = "configs/tiny/llama_pretrain.yaml"
SIZES = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 768, "num_layers": 5, "n_kv_heads": 4}
LENGTH, BATCH, EXPERTS, CHOSEN = 128, 16, 8, 2
FITTED = 30_000  # tokens that gates are fitted to
JUDGED = 60_000  # of the held-out documents; the first half says what a static cut keeps
FURTHER_RATE = 1e-3
# name -> split, options of select
MIXTURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "clustering, trained": ("clustering", ("--gate", "mlp")),
    "clustering, ridge": ("clustering", ("--gate", "ridge")),
    "clustering, trained, streamed": ("clustering", ("--gate", "mlp", "--stream")),
    "random split, trained": ("random", ("--gate", "mlp")),
    "random split, ridge": ("random", ("--gate", "ridge")),
}
TRAINED_ON = "clustering, ridge"
OneSeed = Callable[[Path, Path, Path, argparse.Namespace, int], dict[str, Any]]  # output, YAML, data, options, seed


def corpus(out: Path, config: Path) -> None:
    """MindRecord and plain text of both parts."""
    command("tools/make_tiny_corpus.py", "--config", config, "--output_dir", out)
    for part in ("train", "eval"):
        command(
            "tools/dataset_preprocess/llama/llama_preprocess.py", "--dataset_type", "jsonl", "--config", config,
            "--input_glob", out / f"{part}.jsonl", "--model_file", out / "tokenizer.model",
            "--output_file", out / f"{part}.mindrecord",
        )  # fmt: skip
        lines = (out / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        text = "\n".join(json.loads(line)["text"] for line in lines)
        (out / f"{part}.txt").write_text(text, encoding="utf-8")


def dense_model(out: Path, config: Path, data: Path, seed: int, epochs: int) -> None:
    """A Hugging Face folder of a LLaMA that saw the data ``epochs`` times: out/dense."""
    start, run = out / "start", out / "dense_run"
    if not start.exists():
        command(
            "tools/make_tiny_model.py", "--config", config, "--tokenizer", data / "tokenizer.model",
            "--output_dir", start, "--seed", seed,
        )  # fmt: skip
    command(
        "run_mindformer.py", "--config", config, "--engine", "pt", "--load_checkpoint", start, "--seed", seed,
        "--train_data", data / "train.mindrecord", "--runner_config.epochs", epochs, "--output_dir", run,
    )  # fmt: skip
    to_folder(run, start, out / "dense")


def to_folder(run: Path, like: Path, folder: Path) -> None:
    """The newest checkpoint of ``run`` as a Hugging Face folder with ``like``'s configuration."""
    newest = max((run / "checkpoint" / "rank_0").glob("*_*.*"), key=lambda path: path.stat().st_mtime)
    command(
        "convert_weight.py", "--reversed", "--input_path", newest, "--output_path", folder, "--config", like,
        "--dtype", "fp32",
    )  # fmt: skip


def trained_on(out: Path, folder: Path, name: str, data: Path, seed: int, steps: int) -> float:
    """The held-out loss of ``folder`` after ``steps`` further steps; 0: as it is."""
    run = out / f"{name}_run_{steps}"
    judged = once(run / "eval" / "eval.json", lambda: _train_and_judge(run, folder, data, seed, steps))
    return float(json.loads(judged.read_text())["PerplexityMetric"]["loss"])


def _train_and_judge(run: Path, folder: Path, data: Path, seed: int, steps: int) -> None:
    if steps:
        command(
            "-m", "mindformers_ext", "train", folder, "--data", data / "train.mindrecord", "--engine", "pt",
            "--batch_size", BATCH, "--num_samples", steps * BATCH, "--seed", seed, "--output_dir", run,
            "--lr_schedule.learning_rate", FURTHER_RATE, "--lr_schedule.lr_end", FURTHER_RATE / 10,
        )  # fmt: skip
    command(
        "-m", "mindformers_ext", "eval", run if steps else folder, "--text", data / "eval.mindrecord",
        "--engine", "pt", "--output_dir", run / "eval",
    )  # fmt: skip


def experts(stage: str, *words: object) -> None:
    """A stage of ``build_experts.py``."""
    command("tools/build_experts.py", stage, "--quiet", *words)


def mixture(out: Path, data: Path, seed: int, name: str) -> dict[str, Any]:
    """Split, gates and report of one of ``MIXTURES``; returns report.json's content."""
    method, gate = MIXTURES[name]
    dense, place = out / "dense", out / name.replace(", ", "_").replace(" ", "_")
    base = ("--model_path", dense, "--seed", seed)
    text = ("--text", data / "train.txt", "--max_tokens", FITTED, "--block_size", LENGTH)
    split = once(
        out / f"dense-{EXPERTS}Expert-Split-{method.capitalize()}",
        lambda: experts("split", *base, "--method", method, "--num_experts", EXPERTS, "--save_path", out),
    )
    read: tuple[object, ...] = text
    if "--stream" not in gate:
        stored = once(out / "dense-Hidden-Features", lambda: experts("features", *base, *text, "--save_path", out))
        read = ("--hidden_features_path", stored)
    chosen = ("--split_file_path", split, "--num_experts", EXPERTS, "--num_selects", CHOSEN)
    gates = once(
        place / f"dense-{EXPERTS}Expert-Select-{'Ridge' if 'ridge' in gate else 'MLP'}",
        lambda: experts("select", *base, *chosen, *gate, *read, "--save_path", place),
    )
    fitted = (*chosen, "--select_file_path", gates)
    report = once(
        place / "report" / "report.json",
        lambda: experts(
            "report", *base, *fitted, "--eval_text", data / "eval.txt", "--eval_tokens", JUDGED,
            "--block_size", LENGTH, "--save_path", place / "report",
        ),
    )  # fmt: skip
    if name == TRAINED_ON:
        once(place / "moe", lambda: experts("convert", "--model_path", dense, *fitted, "--save_path", place / "moe"))
    return dict(json.loads(report.read_text()))


def one_seed(out: Path, config: Path, data: Path, words: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All figures of a seed: losses of every way, recall of the gates, losses after further steps."""
    print(f"seed {seed}", flush=True)
    once(out / "dense", lambda: dense_model(out, config, data, seed, words.epochs))
    result: dict[str, Any] = {}
    for name in MIXTURES:
        report = mixture(out, data, seed, name)
        losses = report["losses"]
        split = MIXTURES[name][0]
        result |= {way: losses[way] for way in ("dense", "static")}
        result |= {f"{split} split, {way}": losses[way] for way in ("oracle", "random")}
        result[f"{name}: gate"] = losses["gate"]
        result[f"{name}: recall"] = statistics.mean(one["recall"] for one in report["gates"].values())
    moe = out / TRAINED_ON.replace(", ", "_").replace(" ", "_") / "moe"
    for count in (0, *words.further):
        result[f"dense, {count} further steps"] = trained_on(out, out / "dense", "dense", data, seed, count)
        result[f"{TRAINED_ON}, {count} further steps"] = trained_on(out, moe, "moe", data, seed, count)
    return result


def base_options(about: str | None) -> argparse.ArgumentParser:
    """The bench's options."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default 1 2 3")
    parser.add_argument(
        "--epochs", type=int, default=1, help="passes of the dense model over the data; default %(default)s"
    )
    parser.add_argument("--further", type=int, nargs="+", default=[100], help="steps of all models; default 100")
    return parser


def run_seeds(words: argparse.Namespace, one_seed: OneSeed, file: str, width: int) -> None:
    """Make what is missing, and print a table: a row for every figure with its mean, a column for every seed. ``file``:
    of the figures."""
    out = words.output.absolute()
    out.mkdir(parents=True, exist_ok=True)
    config = out / "llama.yaml"
    config.write_text(with_sizes(CONFIG, SIZES), encoding="utf-8")
    data = once(out / "data", lambda: corpus(out / "data", config))
    found = {seed: one_seed(out / f"seed_{seed}", config, data, words, seed) for seed in words.seeds}
    (out / file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name in next(iter(found.values())):
        values = [one[name] for one in found.values()]
        print(f"{name:{width}} {statistics.mean(values):7.4f}   " + " ".join(f"{value:7.4f}" for value in values))


if __name__ == "__main__":
    run_seeds(base_options(__doc__).parse_args(), one_seed, "quality.json", 44)
