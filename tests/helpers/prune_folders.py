# SPDX-License-Identifier: Apache-2.0
"""Model folders and mask files of ``prune_cases``, and logits of a folder by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mindformers_ext.core.config.hf import hf_config_from_spec
from mindformers_ext.core.pruning import ModelShape
from mindformers_ext.jobs.prune.masks_file import SavedMasks, write_masks
from tests.helpers.prune_cases import Case


def write_folder(case: Case, folder: Path) -> Path:
    """The dense model of ``case`` as Hugging Face has it."""
    from safetensors.numpy import save_file

    folder.mkdir()
    save_file(case.weights(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config_from_spec(case.model())), encoding="utf-8")
    return folder


def write_case_masks(case: Case, path: Path, target: ModelShape | None = None, off: float = 0.0) -> Path:
    """Its masks; ``off``: how far the expected sizes are from the target's."""
    expected = None
    if target:
        expected = {name: np.full(3, 1 - target.units(name) / case.shape.units(name) + off) for name in case.keep}
    write_masks(path, SavedMasks(case.values(), case.shape, target, expected))
    return path


def transformers_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """(S, V) by the stock model; every tensor of it must be in the folder, and no other."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, torch_dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()
