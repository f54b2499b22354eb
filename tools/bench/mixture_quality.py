# SPDX-License-Identifier: Apache-2.0
"""What ways to mix three real domains are worth, with the project's own commands, at equal tokens, for several seeds.

The standard library's code, its documentation, and WikiText (``--wiki``) train a LLaMA of 5.7 million parameters: with
constant proportions, one third each (stratified), and by the two moving rules (sheared, sheared_paper) from the same
start, within the same limits. Targets are the losses of a run with one third each and another seed, so of a model that
needs no favour. Losses are those of eval rows that no run has trained on.

    python tools/bench/mixture_quality.py --output output/mixture --wiki wiki.valid.tokens [--seeds 1 2 3] [--steps 100]

What is there already is not made again; ``quality.json`` holds the figures. A minute or two a run on two cores;
there are twelve, and one for the targets.
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

from own_commands import command, once, with_sizes

from mindformers_ext.data.corpus import library_files, standard_library_text
from mindformers_ext.data.tokenizers import train_sentencepiece
from mindformers_ext.jobs.mixing.runs import read_curves

CONFIG = "configs/tiny/llama_pretrain.yaml"
SIZES = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 768, "num_layers": 5, "n_kv_heads": 4}
LENGTH, BATCH, WINDOW = 128, 16, 20
BYTES = {"code": 3_000_000, "docs": 2_000_000}
EVAL_ROWS = 48  # of each domain
START = {"code": 0.6, "docs": 0.3, "wiki": 0.1}
LIMITS = {"min_weight": 0.05, "max_weight": 0.7}
RULES = ("constant", "stratified", "sheared", "sheared_paper")


def documents(name: str, wiki: Path) -> Iterator[str]:
    """Texts of one domain."""
    if name == "docs":
        yield from standard_library_text(BYTES[name])
    elif name == "wiki":
        yield from re.split(r"\n(?= = [^=])", wiki.read_text(encoding="utf-8"))
    else:
        left = BYTES[name]
        for path in library_files():
            text = path.read_text(encoding="utf-8", errors="ignore")
            left -= len(text)
            if left < 0:
                return
            yield text


def corpus(out: Path, wiki: Path) -> None:
    """JSON lines by domain, a tokenizer of all, and the prepared folder."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {name: [text for text in documents(name, wiki) if text.strip()] for name in START}
    for name, held in texts.items():
        (out / "text" / name).mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in held)
        (out / "text" / name / "all.jsonl").write_text(lines, encoding="utf-8")
    train_sentencepiece(
        (text for held in texts.values() for text in held), out / "tokenizer.model", SIZES["vocab_size"]
    )
    command(
        "tools/dataset_preprocess/llama/llama_preprocess.py", "--dataset_type", "domains", "--input_glob", out / "text",
        "--model_file", out / "tokenizer.model", "--seq_length", LENGTH + 1, "--eval_seq", EVAL_ROWS,
        "--output_file", out / "prepared",
    )  # fmt: skip


def run_yaml(data: Path, rule: str, steps: int, targets: Path | None) -> str:
    """The YAML of a run: the tiny LLaMA's with ``SIZES``, on the mixture."""
    text = with_sizes(CONFIG, SIZES)
    words = {
        "type": "MixtureDataset", "dataset_dir": str(data / "prepared"), "split": "for_ft", "set_names": [*START],
        "update_type": rule, "eval_interval": WINDOW, "num_samples": steps * BATCH, **LIMITS,
    }  # fmt: skip
    if rule != "stratified":
        words["proportion"] = [*START.values()]
    if targets is not None:
        words["target_loss"] = str(targets)
    loader = "".join(f"    {name}: {json.dumps(value)}\n" for name, value in words.items())
    return re.sub(
        r"(train_dataset: &train_dataset\n  data_loader:\n)(?:    .*\n)+",
        lambda found: found[1] + loader,
        text,
        count=1,
    )


def trained(out: Path, data: Path, rule: str, seed: int, steps: int, targets: Path | None) -> dict[str, float]:
    """Losses by domain behind a run, and the last proportions."""
    config = out.with_suffix(".yaml")
    config.write_text(run_yaml(data, rule, steps, targets), encoding="utf-8")
    last = out / "metrics" / "rank_0.jsonl"
    once(last, lambda: command("run_mindformer.py", "--config", config, "--engine", "pt", "--seed", seed,
                               "--output_dir", out))  # fmt: skip
    curves = read_curves(out)
    command("tools/mix.py", "show", out)
    if curves.step[-1] != steps or curves.evaluated[-1] != steps:
        raise SystemExit(f"{out} ended at step {curves.step[-1]:.0f} of {steps}: remove it, and run this again")
    inside = (curves.proportions >= LIMITS["min_weight"] - 1e-9) & (curves.proportions <= LIMITS["max_weight"] + 1e-9)
    if not inside.all():
        raise SystemExit(f"{out}: proportions left their limits")
    losses = dict(zip(curves.names, curves.losses[-1].tolist(), strict=True))
    drawn = curves.rows[-1] / curves.rows[-1].sum()
    return {**losses, "mean": statistics.mean(losses.values())} | {
        f"share {name}": share for name, share in zip(curves.names, drawn.tolist(), strict=True)
    }


def main() -> None:
    """Make what is missing, and print a row for every rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for everything")
    parser.add_argument("--wiki", type=Path, required=True, help="a text of WikiText")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default 1 2 3")
    parser.add_argument("--steps", type=int, default=100, help="of each run; default %(default)s")
    words = parser.parse_args()
    out = words.output.absolute()
    once(out / "data" / "prepared" / "manifest.json", lambda: corpus(out / "data", words.wiki))
    reference = trained(out / "reference", out / "data", "stratified", 100, words.steps, None)
    targets = out / "target_loss.json"
    targets.write_text(json.dumps({name: reference[name] for name in START}), encoding="utf-8")
    found = {
        rule: [
            trained(out / f"{rule}_{seed}", out / "data", rule, seed, words.steps,
                    targets if rule.startswith("sheared") else None)
            for seed in words.seeds
        ]
        for rule in RULES
    }  # fmt: skip
    (out / "quality.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for rule, runs in found.items():
        cells = []
        for name in runs[0]:
            values = [run[name] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{name} {statistics.mean(values):.4f} +- {spread:.4f}")
        print(f"{rule:14} {'  '.join(cells)}")


if __name__ == "__main__":
    main()
