# SPDX-License-Identifier: Apache-2.0
"""The code that a LLaMA-MoE folder carries, so that transformers loads it with ``trust_remote_code=True``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mindformers_ext.core.config.hf_shared import told_variant
from mindformers_ext.core.families import FAMILIES, LLAMA_MOE, LLAMA_MOE_V2, LLAMA_MOE_V2_RESIDUAL, Family
from mindformers_ext.formats.atomic import write_text

SAVED = Path(__file__).parent / "model_code"
CAUSAL_AUTO, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"


@dataclass(frozen=True)
class SavedCode:
    """Files ``*_NAME.py`` and the classes in them. ``own_name``: the model's folder has ``model_type`` NAME, and its
    class as architecture; otherwise what its config.json says stays, which transformers' own network would misread."""

    name: str
    causal: str
    more: tuple[str, ...]
    own_name: bool

    @property
    def models(self) -> dict[str, str]:
        """Each Auto class with what it makes."""
        stem = self.causal.removesuffix("ForCausalLM")
        ends = {auto: auto.removeprefix("AutoModel") or "Model" for auto in ("AutoModel", CAUSAL_AUTO, *self.more)}
        return {auto: stem + end for auto, end in ends.items()}

    def auto_map(self) -> dict[str, str]:
        """The entry of ``config.json`` by which transformers finds the classes."""
        models = {auto: f"modeling_{self.name}.{name}" for auto, name in self.models.items()}
        return {"AutoConfig": f"configuration_{self.name}.{self.causal.removesuffix('ForCausalLM')}Config", **models}

    def files(self) -> dict[str, str]:
        """File name -> text of every file that a model's folder carries."""
        return {path.name: path.read_text("utf-8") for path in sorted(SAVED.glob(f"*_{self.name}.py"))}


V1 = SavedCode(LLAMA_MOE.name, LLAMA_MOE.hf_class, (CLASSIFIER,), own_name=True)
V2 = SavedCode(LLAMA_MOE_V2.name, LLAMA_MOE_V2.hf_class, (), own_name=False)
CODES = {LLAMA_MOE.name: V1, LLAMA_MOE_V2.name: V2, LLAMA_MOE_V2_RESIDUAL.name: V2}


def auto_map() -> dict[str, str]:
    """The entry of a LLaMA-MoE of the first kind."""
    return V1.auto_map()


def code_files() -> dict[str, str]:
    """The files of a LLaMA-MoE of the first kind."""
    return V1.files()


def code_of(config: Mapping[str, Any]) -> SavedCode | None:
    """The code of the network that ``config`` describes; None where transformers has that network itself."""
    row: Family | None = FAMILIES.get(str(config.get("model_type")))
    if row is None:
        return None
    return CODES.get(row.name) or CODES.get(told_variant(config, row).name)


def with_code(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` of a model that is written into ``folder``: where transformers has no network for it, with ours."""
    return save_code(folder, config, code) if (code := code_of(config)) else dict(config)


def save_code(folder: Path, config: Mapping[str, Any], code: SavedCode = V1) -> dict[str, Any]:
    """Write the code into a folder that exists, and return ``config`` with the entries that lead to it.

    ``architectures`` stays where it names one of the classes, and is the causal model's otherwise.
    """
    for name, text in code.files().items():
        write_text(folder / name, text)
    result = {**config, "auto_map": code.auto_map()}
    if not code.own_name:
        return result
    given = list(config.get("architectures") or ())
    named = given if given and set(given) <= set(code.models.values()) else [code.causal]
    return {**result, "model_type": code.name, "architectures": named}


@contextmanager
def own_code(config: Mapping[str, Any]) -> Iterator[Path | None]:
    """A folder that lasts as long as the context, with ``config`` and our code of its network; None where transformers
    has that network itself. The code that lies in a model's folder may be anybody's, and is not run."""
    code = code_of(config)
    if code is None:
        yield None
        return
    with TemporaryDirectory() as place:
        folder = Path(place) / f"mindformers_ext_{code.name}"  # transformers keeps a copy by the last name
        folder.mkdir()
        write_text(folder / "config.json", json.dumps(save_code(folder, config, code)))
        yield folder
