# SPDX-License-Identifier: Apache-2.0
"""The commands that ``tests.helpers.kills`` kills: merges, conversions, preprocess, and training with resumption."""

from __future__ import annotations

import importlib
import json
import random
import signal
from pathlib import Path

import numpy as np

from tests.helpers.kills import Ended, Found, Job, Moment, contents, forked

TORCH = ("torch", "mindformers_ext.jobs.merge.dense", "mindformers_ext.jobs.merge.moe", "mindformers_ext.surgery.merge")


def models(folder: Path) -> None:
    """Dense models, and the merges of two of them with two weights; mixtures of them with two seeds."""
    from tests.helpers.merge_models import family

    family(folder, count=2, dtype="float32")
    for which, weight in (("old", 0.25), ("new", 0.5)):
        parts = [{"model": str(folder / name), "parameters": {"weight": weight}} for name in ("ft1", "ft2")]
        recipe = {"merge_method": "linear", "models": parts, "dtype": "float32"}
        (folder / f"{which}.yaml").write_text(json.dumps(recipe))
        experts = [{"source_model": str(folder / name)} for name in ("ft1", "ft2")]
        mixture = {"base_model": str(folder / "base"), "gate_mode": "uniform_random", "experts": experts}
        mixture["experts"] = experts[:: 1 if which == "new" else -1]
        (folder / f"{which}_moe.yaml").write_text(json.dumps(mixture))


def merged(folder: Path, place: Path, which: str) -> list[str]:
    """A merge into several shards."""
    words = [
        str(folder / f"{which}.yaml"),
        str(place / "out"),
        "--copy-tokenizer",
        "--out-shard-size",
        "40K",
        "--quiet",
    ]
    return ["yaml", *words]


def mixed(folder: Path, place: Path, which: str) -> list[str]:
    """A mixture as a folder and as a checkpoint."""
    words = [str(folder / f"{which}_moe.yaml"), str(place / "out"), "--to-mindspore", str(place / "m.ckpt"), "--quiet"]
    return ["moe", *words, "--random-seed", "3"]


def weights(folder: Path) -> None:
    """Two states of a mixture, as folders of several shards and as checkpoints."""
    from mindformers_ext.cli.convert import main
    from mindformers_ext.formats.safetensors_dir import SafetensorsDir
    from tests.helpers.merge_models import make_model, write_model

    make_model(folder / "new", kind="mixtral", hidden=128, ffn=192, dtype="float32", shard=200_000)
    reader = SafetensorsDir(folder / "new")
    halves = {name: reader.read(name) / 2 for name in reader.infos}
    reader.close()
    write_model(folder / "old", halves, json.loads((folder / "new" / "config.json").read_text()), 200_000)
    for which in ("old", "new"):
        words = ["--input_path", str(folder / which), "--output_path", str(folder / f"{which}.ckpt"), "--use_gmm"]
        if main(words):
            raise RuntimeError(words)


def converted(folder: Path, place: Path, which: str) -> list[str]:
    """A folder as a checkpoint."""
    return ["--use_gmm", "--input_path", str(folder / which), "--output_path", str(place / "m.ckpt")]


def reversed_(folder: Path, place: Path, which: str) -> list[str]:
    """A checkpoint as a folder."""
    return ["--reversed", "--input_path", str(folder / f"{which}.ckpt"), "--output_path", str(place / "hf")]


def ranks(folder: Path) -> None:
    """A checkpoint of four ranks, of which two values exist, and the strategy of another split."""
    from mindformers_ext.formats.strategy import read_strategy
    from tests.helpers.sliced import cut, write_ranks, write_strategy

    rows = {f"model.layers.{n}.w": dict(matrix=[2, 2], tensor_map=[-1, 0], step=2, size=2) for n in range(4)}
    write_strategy(folder / "strategy" / "s.ckpt", rows)
    write_strategy(folder / "other.ckpt", {name: dict(matrix=[2, 2], tensor_map=[0, 1]) for name in rows})
    for which, seed in (("old", 0), ("new", 1)):
        rng = np.random.default_rng(seed)
        arrays = {name: rng.integers(0, 255, (512, 256), np.int32) for name in rows}
        write_ranks(folder / which, cut(read_strategy(folder / "strategy"), arrays))


def moved(folder: Path, place: Path, which: str) -> list[str]:
    """Four ranks to four others."""
    words = ["--src_ckpt_strategy", folder / "strategy", "--src_ckpt_dir", folder / which, "--dst_ckpt_dir", place]
    return [str(word) for word in (*words, "--dst_ckpt_strategy", folder / "other.ckpt")]


def texts(folder: Path) -> None:
    """A tokenizer and two texts."""
    from mindformers_ext.data.corpus import standard_library_text
    from mindformers_ext.data.tokenizers import train_sentencepiece

    found = list(standard_library_text(300_000))
    train_sentencepiece(found[:100], folder / "tokenizer.model", 500)
    for which, some in (("old", found[::2]), ("new", found[1::2])):
        (folder / f"{which}.txt").write_text("\n\n".join(some), encoding="utf-8")


def rows(folder: Path, place: Path, which: str) -> list[str]:
    """A text as rows."""
    words = ["--dataset_type", "text", "--document", "paragraph", "--model_file", folder / "tokenizer.model"]
    words += ["--input_glob", folder / f"{which}.txt", "--output_file", place / "x.mindrecord", "--seq_length", "32"]
    return [str(word) for word in words]


def corpora(folder: Path) -> None:
    """Two corpora of two domains, several files each, and a tokenizer."""
    from mindformers_ext.data.corpus import standard_library_text
    from mindformers_ext.data.tokenizers import train_sentencepiece

    found = list(standard_library_text(200_000))
    train_sentencepiece(found[:60], folder / "tokenizer.model", 500)
    for number, text in enumerate(found):
        place = folder / ("old", "new")[number % 2] / ("docs", "code")[number // 2 % 2] / f"{number // 4 % 3}.jsonl"
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"text": text}) + "\n")


def prepared(folder: Path, place: Path, which: str) -> list[str]:
    """A corpus by domain."""
    words = ["--dataset_type", "domains", "--model_file", folder / "tokenizer.model", "--input_glob", folder / which]
    words += ["--output_file", place / "x", "--seq_length", "32", "--for_prune", "0.000005"]
    return [str(word) for word in words]


JOBS = {
    "merge": Job("merge", TORCH, models, merged),
    "mixture": Job("merge", TORCH, models, mixed),
    "convert": Job("convert", ("mindformers_ext.jobs.checkpoint.convert",), weights, converted),
    "convert back": Job("convert", ("mindformers_ext.jobs.checkpoint.convert",), weights, reversed_),
    "transform": Job("transform_ckpt", ("mindformers_ext.jobs.checkpoint.transform",), ranks, moved),
    "domains": Job("preprocess", ("mindformers_ext.jobs.preprocess.domains.prepare",), corpora, prepared),
    "preprocess": Job("preprocess", ("mindformers_ext.jobs.preprocess.preprocess",), texts, rows),
}
ENGINES = {"pt": ("torch", "mindformers_ext.pt.trainer"), "ms": ("mindspore",)}
TIMES = ("seconds", "tokens_per_second")


def train(what: str, folder: Path, kills: int) -> Found:
    """Training killed and resumed until there were ``kills``: after each every checkpoint is one of the undisturbed
    run's, and whenever the end is reached the metrics and the last checkpoint are its as well. ``what``: the engine,
    and behind it "mixture" for data whose proportions move, "prune" for a dense model on such data, "cut" for what its
    masks leave."""
    from tests.helpers.mixtures import mixture_job
    from tests.helpers.prune_jobs import continue_job, prune_job
    from tests.helpers.tiny_run import make_job, rows_of

    engine, _, kind = what.partition(" ")
    make_job = {"": make_job, "mixture": mixture_job, "prune": prune_job, "cut": continue_job}[kind]
    found, rng, job = Found(), random.Random(what), folder / "job.yaml"
    main = importlib.import_module("mindformers_ext.cli.run_mindformer").main
    for name in (*ENGINES[engine], "mindformers_ext.jobs.train.train", "mindformers_ext.jobs.run.checks"):
        importlib.import_module(name)
    forked(lambda: 0 * len(str(make_job(folder))), folder, folder / "log.txt")  # this process starts no threads

    def run(output: str, *words: str, moment: Moment | None = None) -> Ended:
        options = ["--config", str(job), "--output_dir", str(folder / output), "--engine", engine, "--trainer", "own"]
        options += ["--callbacks.1.save_checkpoint_steps", "2", *words]
        return forked(lambda: main(options), folder / output, folder / "log.txt", moment)

    whole = run("whole", "--callbacks.1.keep_checkpoint_max", "100")
    found.check(whole.code == 0, (folder / "log.txt").read_text()[-2000:])
    expected, rows = checkpoints(folder / "whole"), timeless(rows_of(folder / "whole"))
    attempt, left, last = 0, 0, list(expected)[-1]
    while found.kills < kills and not found.wrong:
        output = f"killed {attempt}"
        by_time = rng.random() < 0.3
        change = rng.randrange(1, 1 + max(40, 3 * whole.changes // kills))
        moment = Moment(seconds=whole.seconds * rng.uniform(0.2, 0.9)) if by_time else Moment(change=change)
        resumes = ("--resume_training", "True") if checkpoints(folder / output) else ()
        ended = run(output, *resumes, moment=moment)
        found.kills += ended.code == -signal.SIGKILL
        found.held["resumed" if resumes else "from the start"] += 1
        found.check(ended.code in (0, -signal.SIGKILL), (folder / "log.txt").read_text()[-2000:])
        wrong = [name for name, mark in checkpoints(folder / output).items() if expected.get(name) != mark]
        found.check(not wrong, f"kill {found.kills} ({moment}): {wrong} are not those of the undisturbed run")
        if ended.code == 0 or found.kills == kills:
            if ended.code:
                resumes = ("--resume_training", "True") if checkpoints(folder / output) else ()
                ended = run(output, *resumes)
                found.check(ended.code == 0, (folder / "log.txt").read_text()[-2000:])
            found.check(timeless(rows_of(folder / output)) == rows, f"{output}: other metrics")
            found.check(checkpoints(folder / output).get(last) == expected[last], f"{output}: another last checkpoint")
            left += len([name for name in contents(folder / output) if name.endswith(".partial")])
            attempt += 1
    found.check(not left, f"{left} files of killed runs were left")
    found.held["runs to the end"] = attempt
    return found


def checkpoints(output: Path) -> dict[str, str]:
    """Every checkpoint that a resumed run would look at, by the order of its steps, with a hash of its bytes."""
    from mindformers_ext.jobs.checkpoint.saved import saved_in

    folder = output / "checkpoint" / "rank_0"
    marks = contents(folder) if folder.is_dir() else {}
    return {saved.path.name: marks[saved.path.name] for saved in saved_in(folder)}


def timeless(rows: list[dict]) -> list[dict]:
    """Metrics without what depends on the machine's speed."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
