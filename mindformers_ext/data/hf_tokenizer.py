# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's tokenizer.json, read by the ``tokenizers`` library; its special tokens from the files beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError

BESIDE = ("tokenizer_config.json", "special_tokens_map.json")
# where neither file beside names a token: what LLaMA's, Mixtral's and their kin are called
USUAL = {
    "unk": ("<unk>",),
    "bos": ("<s>", "<|begin_of_text|>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("<pad>",),
}


class HuggingFaceTokenizer:
    """A tokenizer.json: text to ids and back."""

    def __init__(self, path: Path) -> None:
        """Load the file at ``path``; a missing or foreign file is a ``UserError``."""
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}: give a tokenizer.json or the folder that holds it")
        import tokenizers

        try:
            text = path.read_text(encoding="utf-8")
            self._model: Any = tokenizers.Tokenizer.from_str(text)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no tokenizer.json (not UTF-8): give a tokenizer.json") from error
        except Exception as error:  # noqa: BLE001 the library raises plain Exception for every fault in the file
            raise UserError(f"{path} is no tokenizer.json ({error}): give one of a Hugging Face model") from error
        self._model.no_padding()
        self._model.no_truncation()
        self.path = path
        self._special = _special_ids(self._model, path)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._model.get_vocab_size(with_added_tokens=True))

    @property
    def special_ids(self) -> dict[str, int]:
        """``unk_id``, ``bos_id``, ``eos_id`` and ``pad_id``; -1 where the files name none."""
        return dict(self._special)

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """Token ids of each text, without BOS and EOS."""
        return [one.ids for one in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; BOS, EOS and padding give nothing, an unknown token its own mark."""
        silent = {self._special[name] for name in ("bos_id", "eos_id", "pad_id")} - {self._special["unk_id"]}
        kept = [int(token) for token in ids if int(token) not in silent]
        return str(self._model.decode(kept, skip_special_tokens=False))


def _special_ids(model: Any, path: Path) -> dict[str, int]:
    words: dict[str, Any] = {}
    for name in reversed(BESIDE):  # the first one has the last word
        words |= {key: value for key, value in _json(path.with_name(name)).items() if value is not None}
    result = {}
    for kind, usual in USUAL.items():
        value = words.get(f"{kind}_token")
        text = value.get("content") if isinstance(value, dict) else value
        ids = [model.token_to_id(name) for name in ([text] if isinstance(text, str) else usual)]
        result[f"{kind}_id"] = next((token for token in ids if token is not None), -1)
    return result


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): mend it, or take it away") from error
    return content if isinstance(content, dict) else {}
