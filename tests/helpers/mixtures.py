# SPDX-License-Identifier: Apache-2.0
"""A training job over three small domains: their files, a prepared folder of the same, and a YAML."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.file import dump_yaml
from mindformers_ext.data.domains.manifest import (
    SPLITS,
    DomainCounts,
    DomainFiles,
    Manifest,
    RecordFile,
    TokenizerFacts,
    write_manifest,
)
from mindformers_ext.jobs.run.checks import check_run
from mindformers_ext.jobs.train.train import train
from tests.helpers.tiny_run import SEQ, VOCAB, YAML, config_of, rows_of, token_rows, write_rows

NAMES = ("books", "code", "web")
RANGES = {"books": (5, 190), "code": (100, 390), "web": (5, 20), "docs": (5, 390)}
ROWS, EVAL_ROWS = 30, 5
PROPORTIONS, TARGETS = [0.5, 0.3, 0.2], [5.9, 5.6, 5.7]
INTERVAL = 3
TIMES = ("seconds", "tokens_per_second")


def domain_rows(name: str, width: int = SEQ + 1) -> np.ndarray:
    """Rows of one domain; those that losses are measured on are its last ones."""
    low, high = RANGES[name]
    return token_rows(width, ROWS + EVAL_ROWS, low, high)


def write_domains(folder: Path) -> dict[str, Any]:
    """Two files for each domain; the words of a loader that draws them."""
    files, measured = {}, {}
    for name in NAMES:
        rows = domain_rows(name)
        cut = ROWS // 3
        parts = [
            write_rows(folder / f"{name}-{n}.mindrecord", part) for n, part in enumerate((rows[:cut], rows[cut:ROWS]))
        ]
        files[name] = [str(path) for path in parts]
        measured[name] = str(write_rows(folder / f"{name}_eval.mindrecord", rows[ROWS:]))
    return {
        "type": "MixtureDataset",
        "domains": files,
        "eval_domains": measured,
        "proportion": PROPORTIONS,
        "update_type": "doremi",
        "target_loss": TARGETS,
        "eval_interval": INTERVAL,
        "num_samples": 40,
    }


def mixture_job(folder: Path, **words: Any) -> Path:
    """Data and YAML in ``folder``; ``words`` of the loader are other ones, None: left out."""
    loader = write_domains(folder) | words
    (folder / "plain.yaml").write_text(YAML, encoding="utf-8")
    config = config_of(folder / "plain.yaml", "runner_config.epochs=1", "callbacks.1.keep_checkpoint_max=100")
    config["train_dataset"]["data_loader"] = {name: value for name, value in loader.items() if value is not None}
    path = folder / "job.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    return path


def prepared_folder(folder: Path, names: tuple[str, ...] = NAMES, width: int = SEQ + 1) -> Path:
    """The same rows as a prepared corpus, one file for each domain and split."""
    splits: dict[str, dict[str, DomainFiles]] = {}
    for split in SPLITS:
        splits[split] = {}
        for name in names:
            rows = domain_rows(name, width)
            rows = rows[ROWS:] if split == "eval" else rows[:ROWS]
            path = write_rows(folder / split / f"{name}.mindrecord", rows)
            mark = sha256(path.read_bytes()).hexdigest()
            splits[split][name] = DomainFiles((RecordFile(path.name, len(rows), path.stat().st_size, mark),))
    tokens = {name: sum(splits[split][name].rows for split in SPLITS) * width for name in names}
    counts = {name: DomainCounts(documents=1, tokens=tokens[name]) for name in names}
    tokenizer = TokenizerFacts("0" * 64, VOCAB, 1, 2)
    write_manifest(Manifest(tokenizer, width, 42, names, splits, counts), folder)
    return folder


def mixture_config(job: Path, output: str = "out", *options: str, **loader: Any) -> dict[str, Any]:
    """The job's YAML on PyTorch with a checkpoint at every step; ``loader``: words of its loader, None: left out."""
    words = ("engine=pt", "callbacks.1.save_checkpoint_steps=1", f"output_dir={job.parent / output}")
    found = config_of(job, *words, *options)
    loader = found["train_dataset"]["data_loader"] | loader
    found["train_dataset"]["data_loader"] = {name: value for name, value in loader.items() if value is not None}
    return found


def train_checked(config: dict[str, Any]) -> list[dict]:
    """Check and train in this process; the run's metrics without times."""
    checked = check_run(config, "test")
    train(checked.run, checked.config, checked.build.network, checked.notes)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(Path(checked.run.output_dir))]
