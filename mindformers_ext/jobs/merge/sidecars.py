# SPDX-License-Identifier: Apache-2.0
"""What lies beside the weights of a merge: config.json, the tokenizer's files, the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.config.hf_attention import with_both_ropes
from mindformers_ext.jobs.checkpoint.companions import copy_companions

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def merged_config(
    donor: Mapping[str, Any],
    *,
    layers: int,
    layer_types: Sequence[str] | None,
    dtype: str,
    tied: bool,
    vocab: int | None,
    tokens: Mapping[str, Any],
) -> dict[str, Any]:
    """The merge's config.json, from that of the model that gives it.

    ``layer_types``: the kind of each layer's attention, where the models say it; ``vocab``: the new number of tokens;
    ``tokens``: the config.json that numbers the special tokens, that of the tokenizer's model.
    """
    result = with_both_ropes(donor)
    for key in ("_name_or_path", "auto_map"):
        result.pop(key, None)
    result["num_hidden_layers"] = layers
    if "layer_types" in result or len(set(layer_types or ())) > 1:
        result["layer_types"] = list(layer_types) if layer_types else None
    result.pop("dtype", None)
    result["torch_dtype"] = dtype
    result["tie_word_embeddings"] = tied
    if vocab is not None:
        result["vocab_size"] = vocab
    return result | {key: tokens[key] for key in SPECIAL_IDS if key in tokens}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file as transformers writes it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer(name: str, source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template and generation settings of model ``name`` as they are; returns notes."""
    copied = copy_companions(source, target)
    return [*copied.notes, *([] if copied.names else [f"'{name}' has no tokenizer files to copy"])]


@dataclass(frozen=True)
class Card:
    """What the model card says. ``copy`` is the name of the configuration's copy beside it; ``what`` was made, how;
    ``more`` stands at the end."""

    method: str
    models: Sequence[str]
    base: str | None
    config: str
    copy: str
    what: str = "A merge of language models by the method"
    tags: tuple[str, ...] = ("mergekit", "merge")
    more: str = ""


def write_card(folder: Path, title: str, card: Card) -> None:
    """README.md of a merge, as the hub shows it, and the configuration as it was given."""
    (folder / "README.md").write_text(_card(title, card), encoding="utf-8")
    (folder / card.copy).write_text(card.config, encoding="utf-8")


def _card(title: str, card: Card) -> str:
    hub = [name for name in card.models if name.count("/") == 1 and not name.startswith((".", "/", "~"))]
    front = [
        "---",
        *(["base_model:", *(f"- {name}" for name in hub)] if hub else []),
        "library_name: transformers",
        "tags:",
        *(f"- {tag}" for tag in card.tags),
        "---",
    ]
    based = f" with `{card.base}` as its base" if card.base else ""
    listed = "\n".join(f"- `{name}`" for name in card.models)
    return (
        "\n".join(front)
        + f"\n# {title}\n\n{card.what} `{card.method}`{based}.\n\n"
        + f"## Models\n\n{listed}\n\n"
        + f"## Configuration\n\n```yaml\n{card.config.strip()}\n```\n"
        + (f"\n{card.more}" if card.more else "")
    )
