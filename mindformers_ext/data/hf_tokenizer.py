# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a folder: that of transformers' AutoTokenizer, made of its files by the ``tokenizers`` library.

tokenizer.json is taken as it is, a tokenizer.model is converted; then come the added and special tokens, and what
stands in front of and behind a text, as transformers 4 puts them there (PreTrainedTokenizerFast, LlamaTokenizerFast).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.sentencepiece_file import BLANK, SentencePieceFile, library_form
from mindformers_ext.data.tokenizer_settings import (
    FLAGS,
    LLAMA,
    TABLE,
    Special,
    Token,
    TokenizerSettings,
    text_of,
)
from mindformers_ext.data.word_cache import WordEncoder, is_separable

# where no file names a token: what LLaMA's, Mixtral's and their kin are called
USUAL = {
    "unk": ("<unk>",),
    "bos": ("<s>", "<|begin_of_text|>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("<pad>",),
}


class HuggingFaceTokenizer:
    """Text to ids and back."""

    def __init__(self, path: Path, settings: TokenizerSettings, of_file: SentencePieceFile | None = None) -> None:
        """The tokenizer of the file ``path`` with ``settings``; a wrong file is a ``UserError``.

        ``of_file``: what was read from ``path`` where it is a SentencePiece model; else it is a tokenizer.json.
        """
        if of_file is None:
            model = _loaded(path)
        else:
            settings = _as_llama(settings, of_file)
            model = _library(path, lambda: _converted(of_file, settings))
        self.path = path
        self._model: Any = _library(path, lambda: _completed(model, settings))
        self._special = _special_ids(self._model, settings, of_file)
        self._frame: tuple[list[int], list[int]] = _library(path, lambda: _frame(self._model))
        marks = self._model.get_added_tokens_decoder()
        # the library builds a dictionary of all tokens to count them: 26 ms of 49 000
        self._size = max(int(self._model.get_vocab_size(with_added_tokens=True)), max(marks, default=-1) + 1)
        plain = {
            token.content: np.int32(number).tobytes()
            for number, token in marks.items()
            if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        }
        self._marks = {} if settings.splits_special else plain
        rest = {token.content for token in marks.values()} - self._marks.keys()
        self._cut, self._hard = _either(self._marks), _either(rest)
        numbers = (self._model.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self._bytes = frozenset(number for number in numbers if number is not None)
        blank = self._model.token_to_id(BLANK)
        self._words = WordEncoder(self._plain, blank) if is_separable(self._model) else None

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: every id is below it."""
        return self._size

    @property
    def base_size(self) -> int:
        """Number of ids without added tokens that lie beyond them."""
        return int(self._model.get_vocab_size(with_added_tokens=False))

    @property
    def special_ids(self) -> dict[str, int]:
        """``unk_id``, ``bos_id``, ``eos_id`` and ``pad_id``; -1 where the files name none."""
        return dict(self._special)

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """What the tokenizer itself puts in front of a text and behind it."""
        return self._frame

    @property
    def byte_ids(self) -> frozenset[int]:
        """Ids of single bytes: the library writes a run of them that is no UTF-8 as one mark for each byte."""
        return self._bytes

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """Token ids of each text, without what frames it: lists, or int32 arrays."""
        if self._words is None:
            return self._plain(texts)
        sections: list[str] = []
        hard: list[str] = []  # the library encodes the whole text
        plans: list[list[str] | bool] = []  # True: hard; False: a text without marks
        for text in texts:
            if self._hard and self._hard.search(text):
                hard.append(text)
                plans.append(True)
            elif self._cut and self._cut.search(text):
                parts = [part for part in self._cut.split(text) if part]
                sections += [part for part in parts if part not in self._marks]
                plans.append(parts)
            else:
                sections.append(text)
                plans.append(False)
        rest, encoded = iter(self._plain(hard)), iter(self._words.encode(sections))
        return [
            next(rest)
            if plan is True
            else np.frombuffer(self._joined(plan, encoded) if plan else next(encoded), np.int32)
            for plan in plans
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; BOS, EOS and padding give nothing, an unknown token its own mark."""
        silent = {self._special[name] for name in ("bos_id", "eos_id", "pad_id")} - {self._special["unk_id"]}
        kept = [int(token) for token in ids if int(token) not in silent]
        return str(self._model.decode(kept, skip_special_tokens=False))

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _joined(self, parts: list[str], encoded: Iterator[bytes]) -> bytes:
        return b"".join([self._marks[part] if part in self._marks else next(encoded) for part in parts])


def _library(path: Path, work: Callable[[], Any]) -> Any:
    """What ``work`` makes with the library, whose faults are the file's."""
    try:
        return work()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 the library raises plain Exception for every fault in the file
        raise UserError(
            f"{path} is no {path.suffix[1:]} tokenizer ({error}): give one of a Hugging Face model"
        ) from error
    except BaseException as error:  # noqa: BLE001 what the library did not foresee comes as a panic, below Exception
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{path} is damaged, the tokenizers library fails on it ({error}): copy it again") from error


def _loaded(path: Path) -> Any:
    """The library's tokenizer of a tokenizer.json."""
    import tokenizers

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no {TABLE} (not UTF-8): give a {TABLE}") from error
    try:
        return _library(path, lambda: tokenizers.Tokenizer.from_str(text))
    except UserError as error:
        raise UserError(f"{path} is no {TABLE}: {error}") from error


def _converted(model: SentencePieceFile, settings: TokenizerSettings) -> Any:
    kind = settings.kind
    if kind and not kind.from_model:
        raise UserError(
            f"the files beside {model.path} call it a {kind.name}, which is made of a {TABLE}: put that beside it "
            "(transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes it)"
        )
    names = {number: token.content for number, token in settings.added.items() if number < 3}
    prefix = bool(settings.prefix_space) if settings.says_prefix else True
    return library_form(model, settings.legacy, prefix, names)


def _as_llama(settings: TokenizerSettings, model: SentencePieceFile) -> TokenizerSettings:
    """As the slow LLaMA tokenizer, which is converted, has its special tokens: never normalised. Where no file names
    the class, those of the model under their own texts."""
    special: dict[str, Special] = {}
    if settings.kind is None:
        ids = {name: model.special_ids[f"{name}_id"] for name in ("bos", "eos", "unk")}
        special |= {f"{name}_token": model.pieces[token].text for name, token in ids.items() if token >= 0}
    special |= settings.special
    made = {
        name: Token(token, normalized=False, special=True) if isinstance(token, str) else token
        for name, token in special.items()
    }
    if settings.kind is None:
        return replace(settings, kind=LLAMA, special=made, add_bos=settings.add_bos is not False)
    return replace(settings, special=made)


def _completed(model: Any, settings: TokenizerSettings) -> Any:
    """``model`` with the added and special tokens and the frame of ``settings``."""
    model.no_padding()
    model.no_truncation()
    tokens: list[Any] = [_added(token) for _, token in sorted(settings.added.items())]
    known = {token.content for token in (*model.get_added_tokens_decoder().values(), *tokens)}
    texts = {text_of(token) for token in settings.all_special}
    for token in settings.all_special:
        made = token if isinstance(token, str) else _added(token)
        if (made not in known) if isinstance(made, str) else (made not in tokens):
            tokens.append(_added(Token(made, special=True)) if isinstance(made, str) else made)
    for token in tokens:
        token.special = token.special or token.content in texts
    model.add_tokens(tokens)
    model.encode_special_tokens = settings.splits_special
    kind = settings.kind
    if kind and kind.checks_prefix and not (settings.says_prefix and settings.prefix_space is None):
        _set_prefix(model, bool(settings.prefix_space))
    if kind and kind.frames:
        model.post_processor = _processor(model, settings)
    return model


def _added(token: Token) -> Any:
    from tokenizers import AddedToken

    flags = {name: getattr(token, name) for name in FLAGS if getattr(token, name) is not None}
    return AddedToken(token.content, **flags)


def _set_prefix(model: Any, wanted: bool) -> None:
    """A cutter of text that knows ``add_prefix_space`` has the settings' value of it."""
    from tokenizers import pre_tokenizers

    if model.pre_tokenizer is None:
        return
    state = json.loads(model.pre_tokenizer.__getstate__())
    if state.get("add_prefix_space", wanted) != wanted:
        kind = getattr(pre_tokenizers, state.pop("type"))
        model.pre_tokenizer = kind(**{**state, "add_prefix_space": wanted})


def _processor(model: Any, settings: TokenizerSettings) -> Any:
    """What puts BOS in front and EOS behind where ``add_bos_token`` and ``add_eos_token`` say so."""
    from tokenizers import processors

    bos, eos = (
        settings.special.get(name) if asked else None
        for name, asked in (("bos_token", settings.add_bos), ("eos_token", settings.add_eos))
    )
    before, after = _mark(bos), _mark(eos)
    named = [(text_of(token), model.token_to_id(text_of(token))) for token in (bos, eos) if token]
    return processors.TemplateProcessing(
        single=[*before, "$A:0", *after], pair=[*before, "$A:0", *after, "$B:1"], special_tokens=named
    )


def _mark(token: Special | None) -> list[str]:
    return [f"{text_of(token)}:0"] if token else []


def _frame(model: Any) -> tuple[list[int], list[int]]:
    found = model.encode("a", add_special_tokens=True)
    own = [place for place, added in enumerate(found.special_tokens_mask) if not added]
    if not own:
        return found.ids, []
    return found.ids[: own[0]], found.ids[own[-1] + 1 :]


def _either(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern of any of ``texts``, the longest first, which splits with what it finds; None where there is none."""
    listed = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, listed)) + ")") if listed else None


def _special_ids(model: Any, settings: TokenizerSettings, of_file: SentencePieceFile | None) -> dict[str, int]:
    """By the files' names, else by the model's own numbers, else by the usual names."""
    result = {}
    for kind, usual in USUAL.items():
        name = f"{kind}_token"
        if name in settings.special:
            names: Sequence[str] = (text_of(settings.special[name]),)
        elif of_file is not None:
            result[f"{kind}_id"] = of_file.special_ids[f"{kind}_id"]
            continue
        else:
            names = usual
        ids = [model.token_to_id(text) for text in names]
        result[f"{kind}_id"] = next((token for token in ids if token is not None), -1)
    return result
