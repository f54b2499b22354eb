# SPDX-License-Identifier: Apache-2.0
"""What lies beside the weights of a merge: config.json, the tokenizer's files, the model card."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.hf_config import DEFAULTS
from mindformers_ext.jobs.convert import COMPANIONS

SPECIAL = ("chat_template.json",)
TOKENIZER_FILES = (*COMPANIONS, *SPECIAL)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML}
DEFAULT_THETA = 10000.0


def with_both_ropes(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the rotary settings in both spellings: transformers 4 reads rope_theta and rope_scaling at the
    top and silently takes its own default without them, transformers 5 reads rope_parameters."""
    result = dict(config)
    kind = str(config.get("model_type"))
    nested = config.get("rope_parameters")
    if isinstance(nested, Mapping):
        theta = nested.get("rope_theta", config.get("rope_theta"))
        scaling = {key: value for key, value in nested.items() if key != "rope_theta"}
        rope = scaling.get("rope_type", scaling.get("type", "default"))
    else:
        theta = config.get("rope_theta")
        scaling = dict(config.get("rope_scaling") or {})
        rope = scaling.get("rope_type", scaling.get("type", "default"))
    theta = DEFAULTS.get(kind, {}).get("rope_theta", DEFAULT_THETA) if theta is None else theta
    result["rope_theta"] = theta
    result["rope_scaling"] = None if rope == "default" else scaling
    result["rope_parameters"] = {**scaling, "rope_theta": theta, "rope_type": rope}
    return result


def merged_config(
    donor: Mapping[str, Any], *, layers: int, layer_types: Sequence[str] | None, dtype: str, tied: bool,
    vocab: int | None,
) -> dict[str, Any]:  # fmt: skip
    """The merge's config.json, from that of the model that gives it.

    ``layer_types``: the kind of each layer's attention, where the models say it; ``vocab``: the new number of tokens.
    """
    result = with_both_ropes(donor)
    for key in ("_name_or_path", "auto_map"):
        result.pop(key, None)
    result["num_hidden_layers"] = layers
    if "layer_types" in result:
        result["layer_types"] = list(layer_types) if layer_types else None
    result.pop("dtype", None)
    result["torch_dtype"] = dtype
    result["tie_word_embeddings"] = tied
    if vocab is not None:
        result["vocab_size"] = vocab
    return result


def ties_by_default(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding: what config.json says, else what the kind of model does."""
    return bool(config.get("tie_word_embeddings", False))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file as transformers writes it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template and generation settings as they are; returns the names of the files copied."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def vocabulary(folder: Path) -> object:
    """What decides the ids of a folder's tokens: equal for equal vocabularies, None where there is no tokenizer."""
    table = folder / "tokenizer.json"
    if table.is_file():
        try:
            content = json.loads(table.read_text(encoding="utf-8"))
            added = {item["content"]: item["id"] for item in content.get("added_tokens") or []}
            words = content["model"]["vocab"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"'{table}' cannot be read as a tokenizer: copy it again") from error
        if isinstance(words, list):
            words = {item[0]: place for place, item in enumerate(words)}
        return {**words, **added}
    model = folder / "tokenizer.model"
    return model.read_bytes() if model.is_file() else None


def check_vocabularies(wanted: str, folders: Mapping[str, Path]) -> None:
    """One tokenizer for all is right only where all models number their tokens alike; a ``UserError`` otherwise."""
    found = {name: vocabulary(folder) for name, folder in folders.items()}
    first = next(iter(found))
    other = [name for name, words in found.items() if words != found[first]]
    if other:
        raise UserError(
            f"tokenizer source '{wanted}': '{other[0]}' numbers its tokens otherwise than '{first}' (or has no "
            "tokenizer), and embeddings are not rearranged here: give the models one tokenizer first, or leave the key "
            "out to merge row by row"
        )


def chosen_template(wanted: str, folders: Sequence[Path]) -> str | None:
    """The Jinja text that ``chat_template`` asks for; "auto" is the most common one of the inputs."""
    if wanted != "auto":
        return TEMPLATES.get(wanted, wanted)
    found = Counter(text for folder in folders if (text := _template_of(folder)))
    return found.most_common(1)[0][0] if found else None


def _template_of(folder: Path) -> str | None:
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        text = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise UserError(f"'{config}' is not a table of settings: copy it again") from error
    return text if isinstance(text, str) else None


def write_template(folder: Path, template: str) -> None:
    """Put the chat template where transformers 4 and 5 look for it."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if config.is_file():
        write_json(config, {**json.loads(config.read_text(encoding="utf-8")), "chat_template": template})


def model_card(title: str, method: str, models: Sequence[str], base: str | None, config_text: str) -> str:
    """README.md of a merge, as the hub shows it."""
    hub = [name for name in models if name.count("/") == 1 and not name.startswith((".", "/", "~"))]
    front = ["---", *(["base_model:", *(f"- {name}" for name in hub)] if hub else []), "library_name: transformers",
             "tags:", "- mergekit", "- merge", "---"]  # fmt: skip
    based = f" with `{base}` as its base" if base else ""
    listed = "\n".join(f"- `{name}`" for name in models)
    return (
        "\n".join(front)
        + f"\n# {title}\n\nA merge of language models by the method `{method}`{based}.\n\n## Models\n\n{listed}\n\n"
        + f"## Configuration\n\n```yaml\n{config_text.strip()}\n```\n"
    )
