# SPDX-License-Identifier: Apache-2.0
"""One-shot cuts by the command on the small LLaMA of ``one_shot``, and their losses by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mindformers_ext.cli.prune import main
from mindformers_ext.jobs.prune.texts import Texts, ready
from tests.helpers.one_shot import BLOCK, JUDGED, TOKENS, make_model, write_text

KINDS = ("forward", "taylor")


def texts(path: Path, engine: str = "pt") -> Texts:
    return Texts(
        calibration=(path,), tokens=TOKENS, held_out_tokens=JUDGED, block_size=BLOCK, engine=engine, quiet=True
    )


def words(place: Path, out: Path, command: str = "shape", model: str = "model") -> list[str]:
    text = ["--calibration", str(place / "text.txt"), "--tokens", str(TOKENS), "--held_out_tokens", str(JUDGED)]
    return [command, str(place / model), str(out), *text, "--block_size", str(BLOCK), "--quiet"]


def run(place: Path, out: Path, *more: str, command: str = "shape", model: str = "model") -> dict:
    """What stands beside the weights."""
    assert main([*words(place, out, command, model), *more]) == 0
    return {name: json.loads((out / f"{name}.json").read_text()) for name in ("config", "pruning", "one_shot")}


def loss_by_transformers(model: LlamaForCausalLM, place: Path) -> float:
    """On the text that judges."""
    with ready(place / "model", texts(place / "text.txt")) as start, torch.no_grad():
        rows, total = start.judged.rows, 0.0
        for ids, length in zip(rows.ids, rows.lengths, strict=True):
            row = torch.from_numpy(ids[:length].astype(np.int64))[None]
            total += torch.nn.functional.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="sum").item()
        return total / rows.predicted


def load(folder: Path) -> LlamaForCausalLM:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, torch_dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def make_place(folder: Path) -> Path:
    """A model, one with planted dead units, and a text."""
    make_model(folder / "model")
    make_model(folder / "planted", planted=True)
    write_text(folder / "text.txt")
    return folder
