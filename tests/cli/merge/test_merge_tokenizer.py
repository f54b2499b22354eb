# SPDX-License-Identifier: Apache-2.0
"""Merges of models whose tokenizers differ: union, base, one model's, rows of single tokens; embeddings row by row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindformers_ext.cli.merge import main
from tests.helpers.merge_models import family, make_model, tensors_of, tokenizer_json

pytest.importorskip("torch", reason="merging computes with torch")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def special(number, text):
    return {
        "id": number,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def with_words(folder, words, added=()):
    """Give the model this vocabulary."""
    table = tokenizer_json(3)
    table["model"]["vocab"] = dict(words)
    table["added_tokens"] += [special(number, text) for text, number in added]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    return {**words, **dict(added)}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """base (w3..w11), ft1 (two of them changed about, one new, an added <x>) and ft2 (fewer words, <x> elsewhere)."""
    monkeypatch.chdir(tmp_path)
    usual = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 12)}
    base = make_model(Path("base"), vocab=12, dtype="float32")
    one = make_model(Path("ft1"), vocab=14, dtype="float32", seed=1)
    two = make_model(Path("ft2"), vocab=11, dtype="float32", seed=2)
    return {
        "base": with_words(base, usual),
        "ft1": with_words(one, {**usual, "w5": 6, "w6": 5, "new": 12}, [("<x>", 13)]),
        "ft2": with_words(two, {word: place for word, place in usual.items() if place < 10}, [("<x>", 10)]),
    }


def merge(wish, method="linear", names=("base", "ft1", "ft2"), out="out", base="base", **more):
    config = {
        "merge_method": method,
        "models": [{"model": name, "parameters": {"weight": 1.0}} for name in names],
        "dtype": "float32",
        **({"base_model": base} if base else {}),
        **wish,
        **more,
    }
    Path("c.yml").write_text(yaml.safe_dump(config))
    return main(["yaml", "c.yml", out, "--quiet"])


def rows_of(folder, words, name=EMBED):
    tensor = tensors_of(Path(folder))[name]
    return {word: tensor[row] for word, row in words.items()}


def words_of(folder):
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).get_vocab(with_added_tokens=True)


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_a_union_keeps_every_row(name, place):
    assert merge({"tokenizer_source": "union"}) == 0
    words = words_of("out")
    assert words == place["base"] | {"new": 12, "<x>": 13}
    got = rows_of("out", words, name)
    parts = {model: rows_of(model, vocabulary, name) for model, vocabulary in place.items()}
    both = {"new": parts["ft1"]["new"], "<x>": (parts["ft1"]["<x>"] + parts["ft2"]["<x>"]) / 2}  # two owners: the mean
    for word, row in got.items():
        stand_in = parts["base"].get(word, both.get(word))
        want = sum(part.get(word, stand_in) for part in parts.values()) / 3
        np.testing.assert_allclose(row, want, atol=1e-6, err_msg=word)
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == 14
    assert tensors_of(Path("out"))["model.norm.weight"].shape == (32,)


def test_the_tokenizer_loads_in_transformers_and_gives_the_new_ids(place):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("base", "ft1", "ft2"):  # as transformers saves it
        path = Path(name) / "tokenizer_config.json"
        path.write_text(
            json.dumps(
                json.loads(path.read_text())
                | {
                    "added_tokens_decoder": {
                        "0": {key: value for key, value in special(0, "<unk>").items() if key != "id"}
                    }
                }
            )
        )
    (Path("base") / "added_tokens.json").write_text("{}")
    assert merge({"tokenizer_source": "union"}) == 0
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer("w5 new <x> w3")["input_ids"] == [5, 12, 13, 3] and len(tokenizer) == 14
    assert tokenizer.convert_ids_to_tokens(13) == "<x>" and not Path("out/added_tokens.json").exists()
    assert AutoModelForCausalLM.from_pretrained("out").get_input_embeddings().weight.shape[0] == 14


def test_the_tokenizer_of_one_model(place):
    config = json.loads(Path("ft1/config.json").read_text())
    Path("ft1/config.json").write_text(json.dumps(config | {"eos_token_id": 13}))
    assert merge({"tokenizer_source": "ft1"}) == 0
    assert Path("out/tokenizer.json").read_bytes() == Path("ft1/tokenizer.json").read_bytes()
    got, parts = rows_of("out", place["ft1"]), {model: rows_of(model, words) for model, words in place.items()}
    for word in ("w5", "w6", "w3"):
        np.testing.assert_allclose(got[word], sum(part[word] for part in parts.values()) / 3, atol=1e-6)
    assert json.loads(Path("out/config.json").read_text())["eos_token_id"] == 13  # its numbers mean its tokens
    assert merge({"tokenizer_source": "base"}, out="base_words") == 0
    assert Path("base_words/tokenizer.json").read_bytes() == Path("base/tokenizer.json").read_bytes()
    assert tensors_of(Path("base_words"))[EMBED].shape == (12, 32)


def test_unused_rows_stay_unless_trimmed(tmp_path, monkeypatch):
    """An embedding longer than its tokenizer (Qwen2.5's, say) keeps its length and its bytes."""
    monkeypatch.chdir(tmp_path)
    family(tmp_path, vocab=20, dtype="float32")
    usual = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 15)}
    for name in ("base", "ft1"):
        with_words(Path(name), usual)
    with_words(Path("ft2"), usual | {"w3": 4, "w4": 3})
    assert merge({"tokenizer_source": "base"}) == 0
    assert merge({"tokenizer": {"source": "base", "trim_vocab": True, "pad_to_multiple_of": 8}}, out="trim") == 0
    base, one, two = (tensors_of(Path(name))[EMBED] for name in ("base", "ft1", "ft2"))
    two = two[[0, 1, 2, 4, 3, *range(5, 20)]]
    np.testing.assert_allclose(tensors_of(Path("out"))[EMBED], (base + one + two) / 3, atol=1e-6)
    trimmed = tensors_of(Path("trim"))[EMBED]
    assert trimmed.shape == (16, 32)
    np.testing.assert_allclose(trimmed[:15], (base + one + two)[:15] / 3, atol=1e-6)
    np.testing.assert_allclose(trimmed[15], trimmed[:15].mean(0), atol=1e-6)  # padding: the mean of all tokens


def test_rows_of_single_tokens(place):
    tokens = {
        "w4": {"source": "ft1", "force": True},
        "<x>": {"source": "ft2"},
        "extra": {"source": {"kind": "zero"}},
        "<y>": {"source": {"kind": "model_token", "model": "ft1", "token": "w5"}},
        "w3": {"source": {"kind": "model_token", "model": "base", "token_id": 7}, "force": True},
    }
    assert merge({"tokenizer": {"source": "union", "tokens": tokens}}) == 0
    got, parts = rows_of("out", words_of("out")), {model: rows_of(model, words) for model, words in place.items()}
    want = {
        "w4": parts["ft1"]["w4"],
        "<y>": parts["ft1"]["w5"],
        "w3": parts["base"]["w7"],
        "extra": 0,
        "<x>": (parts["ft1"]["<x>"] + 2 * parts["ft2"]["<x>"]) / 3,
    }
    for word, row in want.items():
        np.testing.assert_allclose(got[word], row, atol=1e-6, err_msg=word)


def test_without_a_base_the_mean_stands_in(place):
    assert merge({"tokenizer_source": "union"}, base=None, names=("base", "ft1", "ft2")) == 0
    got, parts = rows_of("out", words_of("out")), {model: rows_of(model, words) for model, words in place.items()}
    owners = [parts["base"]["w11"], parts["ft1"]["w11"]]  # ft2 lacks it
    np.testing.assert_allclose(got["w11"], sum(owners) / 2, atol=1e-6)


def test_tied_models_and_task_vectors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family(tmp_path, vocab=12, dtype="bfloat16", tie_word_embeddings=True)
    usual = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 12)}
    for name in ("base", "ft2"):
        with_words(Path(name), usual)
    with_words(Path("ft1"), {word: place for word, place in usual.items() if place < 11}, [("<x>", 11)])
    assert merge({"tokenizer_source": "union"}, "ties", dtype="bfloat16") == 0
    assert "lm_head.weight" not in tensors_of(Path("out")) and tensors_of(Path("out"))[EMBED].shape == (13, 32)


def test_what_cannot_be_done_is_refused(place, capsys):
    def refused(wish, found):
        assert merge(wish) == 2
        message = capsys.readouterr().err
        assert found in message and "Traceback" not in message and not Path("out").exists()

    refused({"tokenizer": {"tokens": {"w3": {"source": "ft9"}}}}, "tokenizer source 'ft9' is none of the models")
    nothing = {"kind": "model_token", "model": "ft1", "token": "nowhere"}
    refused({"tokenizer": {"tokens": {"q": {"source": nothing}}}}, "'ft1' has no token 'nowhere'")
    refused({"tokenizer": {"tokens": {"q": {"source": {"kind": "one"}}}}}, "kind='one' is unknown")
    refused({"tokenizer": {"tokens": {"q": {"sauce": "ft1"}}}}, "did you mean 'source'?")
    refused({"tokenizer": {"pad_to_multiple_of": 0}}, "above 0")
    Path("ft1/tokenizer.json").rename("ft1/hidden.json")
    refused({"tokenizer_source": "union"}, "has no tokenizer.json")
