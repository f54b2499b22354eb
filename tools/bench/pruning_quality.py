# SPDX-License-Identifier: Apache-2.0
"""What pruning a small LLaMA is worth, with the project's own commands, at equal size and tokens, for several seeds.

The three domains of mixture_quality.py train a LLaMA of 4.8 million parameters, the source. It comes to 2.2 million by
trained masks (L0: ``--prune`` steps, cut, ``--further`` steps) and by every one-shot cut that tools/prune.py has, which
then trains ``--prune`` + ``--further`` steps; so does a model of that size from random weights. All of them draw
domains by the same moving rule, whose targets are the source's losses by domain. Losses are those of eval rows that no
run has trained on, by our engine; transformers takes them, too, of the same folders, and may differ by 1e-4.

    python tools/bench/pruning_quality.py --output output/pruning --wiki wiki.valid.tokens [--seeds 1 2 3]
        [--source 300] [--prune 200] [--further 200] [--only L0 scratch minitron]

What is there already is not made again; ``quality.json`` holds the figures. About half an hour a seed on two cores.
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse
import json
import math
import shutil
import statistics
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from experts_quality import to_folder
from mixture_quality import BATCH, LENGTH, LIMITS, START, corpus
from own_commands import ROOT, command, once

from mindformers_ext.core.config.file import dump_yaml, load_yaml
from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.parameters import model_weights
from mindformers_ext.data.tokenizers import open_tokenizer
from mindformers_ext.formats.mindrecord_file import MindRecordFile
from mindformers_ext.jobs.mixing.runs import read_curves
from mindformers_ext.jobs.prune.next_stage import SIZES

CONFIG = "configs/tiny/llama_prune.yaml"
SOURCE = {"hidden_size": 256, "intermediate_size": 768, "num_layers": 5, "num_heads": 4, "n_kv_heads": 4}
TARGET = {"hidden_size": 192, "intermediate_size": 512, "num_layers": 4, "num_heads": 3, "n_kv_heads": 3}
FIXED = {"vocab_size": 1024, "seq_length": LENGTH}
L0_TARGET = {"d_model": 192, "intermediate_size": 512, "n_layers": 4, "n_heads": 3}
MEASURED, SHOWN = "calibration.txt", "shown.txt"
CALIBRATED = 100  # rows of each domain that one-shot cuts measure on
FLAP_TARGET = {"intermediate_size": 360, "num_layers": 4, "num_heads": 2, "n_kv_heads": 2}  # as many weights: it has
# no score for the width of the stream
L0, SCRATCH, WHOLE = "L0", "scratch", "source"
DEPTH = ("--keep", 2)  # layers of the source: 2.2 million weights, too


def shape(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The options of ``tools/prune.py shape``."""
    return ("--target", *(f"{SIZES[name]}={size}" for name, size in sizes.items()))


ONE_SHOT: dict[str, tuple[str, tuple[object, ...]]] = {  # name -> subcommand of tools/prune.py, its options
    **{name: ("shape", ("--method", name, *shape(TARGET))) for name in ("magnitude", "minitron", "taylor")},
    "flap": ("shape", ("--method", "flap", *shape(FLAP_TARGET))),
    **{f"depth {name}": ("depth", ("--method", name, *DEPTH)) for name in ("bi", "ppl")},
}
WAYS = (L0, SCRATCH, *ONE_SHOT)
AGREED = 1e-4  # between our loss and transformers'


class Bench:
    """One seed's models, in ``out``; ``data``: what ``corpus`` has made."""

    def __init__(self, out: Path, data: Path, seed: int, words: argparse.Namespace) -> None:
        self.out, self.data, self.seed, self.words = out, data, seed, words
        out.mkdir(parents=True, exist_ok=True)

    def config(self, sizes: Mapping[str, int], steps: int, rule: str, **more: Any) -> dict[str, Any]:
        """A run's YAML on the mixture, ``more``: keys of its top."""
        config = load_yaml(ROOT / CONFIG)
        model = config["model"]["model_config"]
        model.pop("l0_module")
        model.update({**FIXED, **sizes})
        loader = {
            "type": "MixtureDataset", "dataset_dir": str(self.data / "prepared"), "split": "for_ft",
            "set_names": [*START], "update_type": rule, "eval_interval": self.words.window,
            "num_samples": steps * BATCH, **LIMITS,
        }  # fmt: skip
        if rule != "stratified":
            loader |= {"proportion": [*START.values()], "target_loss": self.targets}
        config["train_dataset"]["data_loader"] = loader
        config["train_dataset_task"]["dataset_config"] = config["train_dataset"]
        config["processor"]["tokenizer"]["vocab_file"] = str(self.data / "tokenizer.model")
        return config | more

    @property
    def targets(self) -> dict[str, float]:
        """The source's losses by domain, as its run measured them last."""
        curves = read_curves(self.out / f"{WHOLE}_run")
        return dict(zip(curves.names, curves.losses[-1].tolist(), strict=True))

    def run(self, name: str, config: Mapping[str, Any], more: int = 0) -> Path:
        """The output of a training run, from its beginning; ``more`` keeps stages of one seed from the same rows."""
        run, path = self.out / f"{name}_run", self.out / f"{name}.yaml"
        shutil.rmtree(run, ignore_errors=True)  # of a killed measurement
        path.write_text(dump_yaml({**config, "output_dir": str(run)}), encoding="utf-8")
        command("run_mindformer.py", "--config", path, "--engine", "pt", "--seed", self.seed + 1000 * more)
        return run

    def start(self, name: str, sizes: Mapping[str, int]) -> Path:
        """Random weights, as a folder."""
        path, folder = self.out / f"{name}_start.yaml", self.out / f"{name}_start"
        path.write_text(dump_yaml(self.config(sizes, self.words.window, "stratified")), encoding="utf-8")
        tokenizer = ("--tokenizer", self.data / "tokenizer.model")
        command("tools/make_tiny_model.py", "--config", path, *tokenizer, "--output_dir", folder, "--seed", self.seed,
                "--overwrite")  # fmt: skip
        return folder

    def source(self) -> Path:
        """The model that is pruned."""

        def make() -> None:
            start = self.start(WHOLE, SOURCE)
            config = self.config(SOURCE, self.words.source, "stratified", load_checkpoint=str(start))
            to_folder(self.run(WHOLE, config), start, self.out / WHOLE)

        return once(self.out / WHOLE, make)

    def way(self, name: str) -> tuple[Path | None, Path]:
        """A model of the small size: behind the cut, and trained on."""
        if name == SCRATCH:
            return None, once(self.out / name, self._scratch)
        place = name.replace(" ", "_")
        if name == L0:
            cut = once(self.out / f"{place}_cut", lambda: self._masks(self.out / f"{place}_cut"))
            config = load_yaml(self.out / "L0_next.yaml")
            config["train_dataset"]["data_loader"]["num_samples"] = self.words.further * BATCH
            config["train_dataset_task"]["dataset_config"] = config["train_dataset"]
        else:
            cut = once(self.out / f"{place}_cut", lambda: self._one_shot(name, self.out / f"{place}_cut"))
            spec = model_spec_from_hf(json.loads((cut / "config.json").read_text()))
            sizes = {word: getattr(spec, field) for word, field in SIZES.items()}
            sizes |= {word: getattr(spec, word) for word in ("mlp_bias",) if getattr(spec, word)}
            config = self.config(sizes, self.words.prune + self.words.further, "doremi", load_checkpoint=str(cut))
        final = self.out / place
        return cut, once(final, lambda: to_folder(self.run(place, config, 2), cut, final))

    def _scratch(self) -> None:
        start = self.start(SCRATCH, TARGET)
        steps = self.words.prune + self.words.further
        config = self.config(TARGET, steps, "doremi", load_checkpoint=str(start))
        to_folder(self.run(SCRATCH, config, 2), start, self.out / SCRATCH)

    def _masks(self, cut: Path) -> None:
        source, steps = self.source(), self.words.prune
        config = self.config(SOURCE, steps, "doremi", load_checkpoint=str(source))
        config["model"]["model_config"]["l0_module"] = {
            "pruning_modules": ["head", "intermediate", "layer", "hidden"], "target_model": L0_TARGET,
            "lagrangian_warmup_steps": f"{max(steps // 5, 1)}ba", "eval_target_model": False, "lag_lr": 1.0,
        }  # fmt: skip
        run = self.run("masks", config, 1)
        force = ("--force",) if self.words.force else ()
        command("tools/prune.py", "cut", run, "--output", cut, "--base", source, "--next_yaml",
                self.out / "L0_next.yaml", "--overwrite", *force)  # fmt: skip

    def _one_shot(self, name: str, cut: Path) -> None:
        kind, options = ONE_SHOT[name]
        text = once(self.data / MEASURED, lambda: texts(self.data))
        tokens = int(0.9 * len(START) * CALIBRATED * LENGTH)  # text that is encoded again has a few more or fewer
        command("tools/prune.py", kind, self.source(), cut, *options, "--calibration", text, "--tokens", tokens,
                "--held_out", self.data / SHOWN, "--block_size", LENGTH, "--seed", self.seed, "--quiet")  # fmt: skip

    def judged(self, folder: Path, name: str) -> dict[str, float]:
        """The loss on the eval rows of all domains, of each of which there are as many, and the number of weights;
        ``SystemExit`` where transformers finds another loss. ``name``: of a run with this model's YAML."""
        place = self.out / "eval" / folder.name
        rows = ("--eval_data", self.data / "prepared" / "eval", "--hf", folder, "--output_dir", place)
        once(
            place / "eval.json",
            lambda: command(
                "run_mindformer.py", "--config", self.out / f"{name}.yaml", "--run_mode", "eval", "--engine", "pt",
                "--load_checkpoint", folder, *rows,
            ),
        )  # fmt: skip
        result = json.loads((place / "eval.json").read_text())
        if not abs(result["loss"] - result["transformers"]["loss"]) <= AGREED:
            raise SystemExit(f"{folder}: loss {result['loss']}, transformers' {result['transformers']['loss']}")
        return {"loss": result["loss"], "parameters": weights_of(folder)}

    def row(self, name: str) -> dict[str, Any]:
        """All figures of one way, or of the source."""
        if name == WHOLE:
            return self.judged(self.source(), WHOLE)
        cut, final = self.way(name)
        return self.judged(final, final.name) | ({"cut": self.judged(cut, final.name)["loss"]} if cut else {})


def weights_of(folder: Path) -> int:
    """How many a model has."""
    spec = model_spec_from_hf(json.loads((folder / "config.json").read_text()))
    return sum(math.prod(weight.shape) for weight in model_weights(spec))


def texts(data: Path) -> None:
    """Plain texts of rows that are trained on, none of which judges the ways: one to measure on, one for the figure
    that a one-shot cut prints."""
    tokenizer, found = open_tokenizer(data / "tokenizer.model"), {name: list[str]() for name in (MEASURED, SHOWN)}
    for name in START:
        with closing(MindRecordFile(data / "prepared" / "for_ft" / f"{name}.mindrecord")) as file:
            for row in range(min(CALIBRATED + CALIBRATED // 3, len(file))):
                (ids,) = file.read(row, ("input_ids",))
                found[MEASURED if row < CALIBRATED else SHOWN].append(tokenizer.decode([int(one) for one in ids]))
    for name, rows in reversed(found.items()):  # the one that is looked for comes last
        (data / name).write_text("\n".join(rows), encoding="utf-8")


def table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for every way: mean loss over the seeds, each seed's, and that behind the cut alone."""
    lines = []
    for name in found[next(iter(found))]:
        runs = [one[name] for one in found.values()]
        values = [run["loss"] for run in runs]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
        cuts = [run["cut"] for run in runs if "cut" in run]
        behind = f"  behind the cut {statistics.mean(cuts):.4f}" if cuts else ""
        each = " ".join(f"{value:.4f}" for value in values)
        lines.append(
            f"{name:12} {runs[0]['parameters'] / 1e6:5.2f} M  loss {statistics.mean(values):.4f} +- {spread} "
            f"({each}){behind}"
        )
    return lines


def main() -> None:
    """Make what is missing, and print a row for every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for everything")
    add("--wiki", type=Path, required=True, help="a text of WikiText")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default 1 2 3")
    add("--source", type=int, default=300, help="steps of the source; default %(default)s")
    add("--prune", type=int, default=200, help="steps with masks; default %(default)s")
    add("--further", type=int, default=200, help="steps behind the cut; default %(default)s")
    add("--window", type=int, default=20, help="steps between measurements by domain; default %(default)s")
    add("--only", nargs="+", default=WAYS, choices=WAYS, metavar="NAME", help=f"of {', '.join(WAYS)}; default all")
    add("--force", action="store_true", help="cut masks that have not come to the target, to try few steps")
    words = parser.parse_args()
    if words.source % words.window:
        parser.error(
            f"--source {words.source}: give a multiple of --window {words.window}, so that its end is measured"
        )
    out = words.output.absolute()
    once(out / "data" / "prepared" / "manifest.json", lambda: corpus(out / "data", words.wiki))
    found: dict[str, dict[str, Any]] = {}
    for seed in words.seeds:
        bench = Bench(out / f"seed_{seed}", out / "data", seed, words)
        found[str(seed)] = {name: bench.row(name) for name in (WHOLE, *words.only)}
    asked = {name: getattr(words, name) for name in ("source", "prune", "further", "window")}
    (out / "quality.json").write_text(json.dumps({"steps": asked, "found": found}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
