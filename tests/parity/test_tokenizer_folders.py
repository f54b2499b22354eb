# SPDX-License-Identifier: Apache-2.0
"""One tokenizer per folder: the ids of transformers' AutoTokenizer, whatever the folder holds."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.tokenizers import encode_framed, open_tokenizer, train_sentencepiece

CHARACTERS = "  ab the\n\n\t.,'é漢\U0001f600▁\xa0\x00<>s/unk019ﬁÅ\u200d\r\u2028\x85﷽"
MARKS = ("<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "[TOOL]", "new word", "<0x0A>", "▁")
ADDED = {  # what fine-tuners add: special ones, ordinary ones, ones that swallow blanks, one that is a whole word
    "special": {"content": "<|im_start|>", "special": True, "normalized": False},
    "ends": {"content": "<|im_end|>", "special": True, "normalized": False, "rstrip": True},
    "plain": {"content": "[TOOL]", "special": False, "normalized": True, "lstrip": True},
    "blank": {"content": "new word", "special": False, "normalized": True},
    "word": {"content": "the", "special": False, "normalized": False, "single_word": True},
}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    chance = random.Random(0)
    lines = [line for text in standard_library_text(30_000) for line in text.split("\n") if line.strip()]
    made = [
        "",
        " ",
        "  ",
        "\n",
        " a",
        "a ",
        "<s>",
        "<s> ",
        " <s>a",
        "a<s>",
        "▁",
        "▁a",
        "a<|im_end|>  b",
        "other thenew word",
    ]
    made += chance.sample(lines, 40)
    made += ["".join(chance.choices(CHARACTERS, k=chance.randint(0, 30))) for _ in range(100)]
    pieces = [*MARKS, *MARKS, " ", "\n", "the", "a bc", *lines[:20]]
    return made + ["".join(chance.choices(pieces, k=chance.randint(1, 5))) for _ in range(100)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small(tmp_path_factory.mktemp("small"))


def train_small(folder: Path) -> Path:
    """A model as the quickstart's: LLaMA's three special tokens, and one that pads."""
    path = folder / "tokenizer.model"
    train_sentencepiece(standard_library_text(200_000), path, 600)
    return path


def judge(folder: Path, **words):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, **words)


def make(folder: Path, model: Path, settings: dict, kind: str = "LlamaTokenizer") -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copyfile(model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **settings}))
    return folder


def check(folder: Path, texts: list[str]) -> None:
    """Plain text and text of a template, both ways of asking; and every id decodes."""
    theirs, ours = judge(folder), open_tokenizer(folder)
    for special in (True, False):
        expected = theirs(texts, add_special_tokens=special)["input_ids"]
        found = [encode_framed(ours, text) for text in texts] if special else ours.encode_batch(texts)
        for text, one, other in zip(texts, expected, found, strict=True):
            assert [int(token) for token in other] == one, text
    assert len(theirs) == ours.vocab_size
    for name in ("bos", "eos", "unk"):
        token = getattr(theirs, f"{name}_token_id")
        assert ours.special_ids[f"{name}_id"] == (-1 if token is None else token)
    for token, text in theirs.added_tokens_decoder.items():
        if token not in ours.special_ids.values():
            assert ours.decode([token]).strip() == theirs.decode([token]).strip() == str(text).strip()


SETTINGS = {
    "nothing": {},
    "no_bos": {"add_bos_token": False},
    "eos": {"add_eos_token": True},
    "new": {"legacy": False},
    "no_prefix": {"add_prefix_space": False},
    "no_prefix_new": {"add_prefix_space": False, "legacy": False},
    "null_prefix": {"add_prefix_space": None},
    "split": {"split_special_tokens": True},
    "named": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"},
    "added": {"added_tokens_decoder": {str(600 + n): FLAGS | token for n, token in enumerate(ADDED.values())}},
    "gap": {"added_tokens_decoder": {"0": FLAGS | {"content": "<unk>"}, "700": FLAGS | ADDED["special"]}},
    "more": {"additional_special_tokens": ["<|im_start|>", "[TOOL]"], "extra_special_tokens": {"call": "<|im_end|>"}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_folder_with_tokenizer_model_alone_and_saved_with_tokenizer_json(small, texts, tmp_path, name):
    folder = make(tmp_path / "model", small, SETTINGS[name])
    check(folder, texts)
    judge(folder).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/tokenizer.json").is_file() and (tmp_path / "saved/tokenizer.model").is_file()
    check(tmp_path / "saved", texts)
    (tmp_path / "saved/tokenizer.model").unlink()
    if SETTINGS[name].get("add_prefix_space") is None:  # else transformers makes it anew from the .model
        check(tmp_path / "saved", texts)


def test_tokens_added_by_hand_are_found_wherever_they_are_written(small, texts, tmp_path):
    """Saved as fast tokenizers save it, without tokenizer.json, and as transformers did before version 4.34."""
    tokenizer = judge(make(tmp_path / "one", small, {}))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["[TOOL]", "new word"])
    folder = tmp_path / "two"
    tokenizer.save_pretrained(folder)
    check(folder, texts)
    (folder / "tokenizer.json").unlink()
    check(folder, texts)
    assert list(open_tokenizer(folder / "tokenizer.model").encode_batch(["<|im_end|>"])[0]) == [601]
    old = make(tmp_path / "old", small, {"bos_token": {"__type": "AddedToken", "content": "<s>", **FLAGS}})
    (old / "added_tokens.json").write_text(json.dumps({"[TOOL]": 602, "<|im_end|>": 601, "<|im_start|>": 600}))
    special = {"eos_token": {"content": "</s>", **FLAGS}, "additional_special_tokens": ["<|im_end|>"]}
    (old / "special_tokens_map.json").write_text(json.dumps(special))
    check(old, texts)


def test_a_tokenizer_json_that_frames_its_texts_itself(small, texts, tmp_path):
    judge(make(tmp_path / "one", small, {"add_eos_token": True})).save_pretrained(tmp_path / "two")
    (tmp_path / "two/tokenizer.model").unlink()
    config = json.loads((tmp_path / "two/tokenizer_config.json").read_text())
    for kind in ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer"):
        words = config | {"tokenizer_class": kind, "add_bos_token": False}
        (tmp_path / "two/tokenizer_config.json").write_text(json.dumps(words))
        check(tmp_path / "two", texts)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("prefix", [None, True, False])
def test_byte_level_tokenizers(texts, tmp_path, kind, prefix):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    made.save(str(tmp_path / "tokenizer.json"))
    words = {"tokenizer_class": kind, "added_tokens_decoder": SETTINGS["added"]["added_tokens_decoder"]}
    words |= {} if prefix is None else {"add_prefix_space": prefix}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    check(tmp_path, texts)


def test_config_json_names_the_class_where_nothing_else_does(small, texts, tmp_path):
    shutil.copyfile(small, tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    check(tmp_path, texts)


def test_real_tokenizers(real_tokenizer, texts, wiki_file, tmp_path):
    """Also the file alone: a lone .model is LLaMA's tokenizer."""
    lines = [*texts, *wiki_file.read_text(encoding="utf-8").split("\n")[:300]]
    theirs = judge(make(tmp_path / "real", real_tokenizer, {}))
    expected = theirs(lines)["input_ids"]
    for path in (real_tokenizer, tmp_path / "real/tokenizer.model", tmp_path / "real"):
        ours = open_tokenizer(path)
        assert [encode_framed(ours, text) for text in lines] == expected
