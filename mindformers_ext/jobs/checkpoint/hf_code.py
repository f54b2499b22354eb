# SPDX-License-Identifier: Apache-2.0
"""The code that a LLaMA-MoE folder carries, so that transformers loads it with ``trust_remote_code=True``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mindformers_ext.core.families import LLAMA_MOE
from mindformers_ext.formats.atomic import write_text

SAVED = Path(__file__).parent / "model_code"
CAUSAL = LLAMA_MOE.hf_class
STEM = CAUSAL.removesuffix("ForCausalLM")
MODELS = {
    "AutoModel": f"{STEM}Model",
    "AutoModelForCausalLM": CAUSAL,
    "AutoModelForSequenceClassification": f"{STEM}ForSequenceClassification",
}


def auto_map() -> dict[str, str]:
    """The entry of ``config.json`` by which transformers finds the classes."""
    models = {auto: f"modeling_{LLAMA_MOE.name}.{name}" for auto, name in MODELS.items()}
    return {"AutoConfig": f"configuration_{LLAMA_MOE.name}.{STEM}Config", **models}


def code_files() -> dict[str, str]:
    """File name -> text of every file that a model's folder carries."""
    return {path.name: path.read_text("utf-8") for path in sorted(SAVED.glob(f"*_{LLAMA_MOE.name}.py"))}


def with_code(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` of a model that is written into ``folder``: where transformers has no network for it, with ours."""
    return save_code(folder, config) if config.get("model_type") == LLAMA_MOE.name else dict(config)


def save_code(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Write the code into a folder that exists, and return ``config`` with the entries that lead to it.

    ``architectures`` stays where it names one of the classes, and is the causal model's otherwise.
    """
    for name, text in code_files().items():
        write_text(folder / name, text)
    given = list(config.get("architectures") or ())
    named = given if given and set(given) <= set(MODELS.values()) else [CAUSAL]
    return {**config, "model_type": LLAMA_MOE.name, "architectures": named, "auto_map": auto_map()}


@contextmanager
def own_code(config: Mapping[str, Any]) -> Iterator[Path | None]:
    """A folder that lasts as long as the context, with ``config`` and our code of its network; None where transformers
    has that network itself. The code that lies in a model's folder may be anybody's, and is not run."""
    if config.get("model_type") != LLAMA_MOE.name:
        yield None
        return
    with TemporaryDirectory() as place:
        folder = Path(place) / f"mindformers_ext_{LLAMA_MOE.name}"  # transformers keeps a copy by the last name
        folder.mkdir()
        write_text(folder / "config.json", json.dumps(save_code(folder, config)))
        yield folder
