# SPDX-License-Identifier: Apache-2.0
"""Jobs over three small domains whose proportions move: a dense model that is pruned, and what is left trained on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from mindformers_ext.cli.prune import main as prune
from mindformers_ext.core.config.file import dump_yaml, load_yaml
from tests.helpers.mixtures import mixture_job, train_checked

L0 = {
    "pruning_modules": ["head", "intermediate", "layer", "hidden"],
    "lagrangian_warmup_steps": "4ba",
    "eval_target_model": False,
    "target_model": {"d_model": 16, "n_heads": 2, "n_layers": 1, "intermediate_size": 24},
}


def prune_job(folder: Path) -> Path:
    """The YAML of ten steps of four rows that prune."""
    path = mixture_job(folder)
    words: dict[str, Any] = load_yaml(path)
    del words["moe_config"]
    words["model"]["model_config"] |= {"l0_module": copy.deepcopy(L0), "tie_word_embeddings": False}
    path.write_text(dump_yaml(words), encoding="utf-8")
    return path


def continue_job(folder: Path) -> Path:
    """The YAML of as many steps of what such a run has left, which ``prune.py cut`` writes."""
    path = prune_job(folder)
    output, pruned = folder / "before", folder / "pruned"
    train_checked(load_yaml(path) | {"engine": "pt", "output_dir": str(output)})
    path.unlink()
    words = ["cut", str(output), "--output", str(pruned), "--next_yaml", str(path), "--force", "--quiet"]
    if prune(words):
        raise RuntimeError(words)
    return path
