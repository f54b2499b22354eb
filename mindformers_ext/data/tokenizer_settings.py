# SPDX-License-Identifier: Apache-2.0
"""What the files beside a tokenizer say of it, read as transformers 4 reads them; loads no library.

tokenizer_config.json goes first. Where it has no ``added_tokens_decoder``, special_tokens_map.json has the last word on
special tokens and added_tokens.json and tokenizer.json name the added ones. What no file says is the default of the
tokenizer's class, whose name comes from tokenizer_config.json or from config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import FAMILIES
from mindformers_ext.core.json_text import TABLES, read_object

TABLE, MODEL = "tokenizer.json", "tokenizer.model"
SETTINGS, SPECIAL_MAP, ADDED, CONFIG = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE, NAMED = "additional_special_tokens", "extra_special_tokens"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Token:
    """An added token. A flag of None is the library's own choice."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False


Special = str | Token  # a token by its text alone takes the flags it has in tokenizer.json


@dataclass(frozen=True)
class TokenizerClass:
    """A class of transformers: its special tokens, whether ``add_bos_token`` and ``add_eos_token`` decide what frames a
    text (otherwise tokenizer.json does), and whether it can be made of a tokenizer.model."""

    name: str
    special: Mapping[str, Special] = field(default_factory=dict)
    frames: bool = False
    add_bos: bool = False
    from_model: bool = False
    checks_prefix: bool = True


LLAMA = TokenizerClass(
    "LlamaTokenizer",
    {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    frames=True,
    add_bos=True,
    from_model=True,
    checks_prefix=False,
)
GEMMA = TokenizerClass(
    "GemmaTokenizer",
    {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    frames=True,
    add_bos=True,
)
_END = Token("<|endoftext|>", normalized=False, special=True)
QWEN2 = TokenizerClass("Qwen2Tokenizer", {"eos_token": _END, "unk_token": _END, "pad_token": _END})
GPT2 = TokenizerClass("GPT2Tokenizer", dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END.content))
PLAIN = TokenizerClass("PreTrainedTokenizer")
CLASSES = {row.name: row for row in (LLAMA, GEMMA, QWEN2, GPT2, PLAIN)}
# of models that no network is built of, but that can be merged: by config.json's model_type
OTHER_MODELS = {
    "phi3": LLAMA,
    **dict.fromkeys(("gemma", "gemma2"), GEMMA),
    "granite": GPT2,
}


@dataclass(frozen=True)
class TokenizerSettings:
    """A tokenizer as its folder describes it.

    ``kind`` is None where no file names a class. ``special``: by transformers' name, in its order, those that are set;
    ``named_special``: by names of the model's own (``image_token``).
    ``added``: by id. ``add_bos`` and ``prefix_space`` None: not said.
    """

    kind: TokenizerClass | None
    special: Mapping[str, Special]
    more_special: tuple[Special, ...]
    named_special: Mapping[str, Special]
    added: Mapping[int, Token]
    add_bos: bool | None
    add_eos: bool
    legacy: bool
    prefix_space: bool | None
    says_prefix: bool
    from_model: bool
    splits_special: bool
    chat_template: Any = None

    @property
    def texts(self) -> dict[str, Any]:
        """The special tokens' texts by name, as chat templates know them."""
        found: dict[str, Any] = {name: text_of(token) for name, token in self.special.items()}
        found |= {MORE: [text_of(token) for token in self.more_special]} if self.more_special else {}
        return found | {name: text_of(token) for name, token in self.named_special.items()}

    @property
    def all_special(self) -> tuple[Special, ...]:
        """Every special token once, in transformers' order."""
        found: dict[str, Special] = {}
        for token in (*self.special.values(), *self.more_special, *self.named_special.values()):
            found.setdefault(text_of(token), token)
        return tuple(found.values())


NO_SETTINGS = TokenizerSettings(None, {}, (), {}, {}, None, False, True, None, False, False, False)


def text_of(token: Special) -> str:
    """The text of a special token."""
    return token if isinstance(token, str) else token.content


def read_settings(folder: Path) -> TokenizerSettings:
    """What the files in ``folder`` say; files that are not there say nothing.

    Raises:
        UserError: a file that is no JSON table, or a value of the wrong kind.
    """
    config = read_table(folder / SETTINGS)
    where = str(folder / SETTINGS)
    kind = _class(config.get("tokenizer_class"), read_table(folder / CONFIG))
    words: dict[str, Any] = {**(kind.special if kind else {}), **config}
    if "added_tokens_decoder" in config:
        added = {
            _id(key, where): token_of(value, where) for key, value in _table(config, "added_tokens_decoder", where)
        }
    else:
        words |= read_table(folder / SPECIAL_MAP)
        added = {}
    special = {name: _special(words[name], where, name) for name in NAMES if words.get(name)}
    more = words.get(MORE) or ()
    if not isinstance(more, (list, tuple)):
        raise UserError(f"{where}: {MORE} is {more!r:.60}, not a list: correct it")
    extra = tuple(_special(token, where, MORE) for token in more)
    named = dict(_table(config, NAMED, where)) if config.get(NAMED) else {}
    if "added_tokens_decoder" not in config:
        added = _legacy_added(folder, {text_of(token) for token in (*special.values(), *extra)})
    by_text = {token.content: token for token in added.values()}
    prefix = config.get("add_prefix_space")
    return TokenizerSettings(
        kind,
        {name: by_text.get(text_of(token), token) for name, token in special.items()},
        extra,
        {name: _special(token, where, name) for name, token in named.items()},
        added,
        bool(config["add_bos_token"]) if "add_bos_token" in config else (kind.add_bos if kind else None),
        bool(config.get("add_eos_token", False)),
        True if config.get("legacy") is None else bool(config["legacy"]),
        None if prefix is None else bool(prefix),
        "add_prefix_space" in config,
        bool(config.get("from_slow", False)),
        bool(config.get("split_special_tokens", False)),
        config.get("chat_template"),
    )


def read_table(path: Path) -> dict[str, Any]:
    """The JSON table at ``path``, empty where there is no file; errors as ``core.json_text.read_object``."""
    return read_object(path, "mend it, or copy it again", TABLES) if path.is_file() else {}


def token_of(value: Any, where: str) -> Token:
    """An added token from its JSON form; ``where`` is the file's name."""
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise UserError(f"{where}: an added token is {value!r:.60}, not a table with its 'content': correct it")
    flags = {name: value[name] for name in FLAGS if name in value}
    wrong = [name for name, flag in flags.items() if not isinstance(flag, bool)]
    if wrong:
        raise UserError(f"{where}: '{wrong[0]}' of the added token {value['content']!r:.40} is not true or false")
    return Token(value["content"], **flags)


def _class(name: Any, config: Mapping[str, Any]) -> TokenizerClass | None:
    name = name or config.get("tokenizer_class")
    if not name:
        kind = str(config.get("model_type"))
        return OTHER_MODELS.get(kind) or (CLASSES.get(FAMILIES[kind].tokenizer) if kind in FAMILIES else None)
    if not isinstance(name, str):
        raise UserError(f"tokenizer_class is {name!r:.60}, not a name: correct it")
    return CLASSES.get(name.removesuffix("Fast"), PLAIN)


def _special(value: Any, where: str, name: str) -> Special:
    if isinstance(value, (str, Token)):
        return value
    if isinstance(value, Mapping):
        token = token_of(value, where)
        return token if "__type" in value else Token(**{**vars(token), "special": True})
    raise UserError(f"{where}: {name} is {value!r:.60}, not a text: correct it")


def _table(config: Mapping[str, Any], name: str, where: str) -> list[tuple[str, Any]]:
    value = config[name]
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {name} is {value!r:.60}, not a table: correct it")
    return list(value.items())


def _id(value: Any, where: str) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 10 else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 31:
        raise UserError(f"{where}: {value!r:.40} is no token id: give a whole number")
    return number


def _legacy_added(folder: Path, special: set[str]) -> dict[int, Token]:
    """The added tokens of added_tokens.json, then those of tokenizer.json, by id."""
    where = str(folder / ADDED)
    found = {
        _id(number, where): Token(text, normalized=text not in special, special=text in special)
        for text, number in read_table(folder / ADDED).items()
    }
    listed = read_table(folder / TABLE).get("added_tokens") or []
    where = str(folder / TABLE)
    if not isinstance(listed, list):
        raise UserError(f"{where}: added_tokens is no list: copy the file again")
    for item in listed:
        token = token_of(item, where)
        found[_id(item.get("id"), where)] = token
    return found
