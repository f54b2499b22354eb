# SPDX-License-Identifier: Apache-2.0
"""What a predictor makes of prompts and of the model's folder, with a network that says a given text."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mindformers_ext.core.config.sampling import SamplingSpec
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.tokenizers import train_sentencepiece
from mindformers_ext.jobs.predict.end_ids import end_ids
from mindformers_ext.jobs.predict.generate import Generation
from mindformers_ext.jobs.predict.predict import open_predictor

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"


class Parrot:
    """Says the ids of ``said``, one after the other, and then id 5 for ever."""

    rank = 0

    def __init__(self, said: list[int]) -> None:
        self.said = said

    def agree(self, digest: bytes) -> bool:
        return True

    def session(self, rows: int, length: int, positions: int, use_cache: bool = True) -> Parrot:
        self.rows = rows
        return self

    def prompt(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.place = 0
        return self.token(ids, lengths)

    def token(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        logits = np.zeros((self.rows, 610), np.float32)
        logits[:, self.said[self.place] if self.place < len(self.said) else 5] = 1
        self.place += 1
        return logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_sentencepiece(standard_library_text(200_000), tmp_path / "tokenizer.model", 600)
    words = {"tokenizer_class": "LlamaTokenizer", "chat_template": TEMPLATE}
    words["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    return tmp_path


def predictor(folder: Path, said: list[int], chat: bool = False):
    sampling = SamplingSpec(do_sample=False, max_length=40)
    run = SimpleNamespace(sampling=sampling, tokenizer=str(folder / "tokenizer.model"), load=str(folder), rows=2)
    model = ModelSpec(
        vocab_size=610,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    made = open_predictor(run, NetworkSpec(model=model, seq_length=40), chat)
    made._generation = Generation(Parrot(said), made.sampling, 40, 1)
    return made


def test_blank_lines_keep_their_place_and_the_rest_is_answered_in_order(folder):
    made = predictor(folder, [600, 601, 2])
    shown: list[tuple[int, str]] = []
    lines = ["", "one", " ", "two", "three", ""]
    found = list(made.answers(made.prompts(lines), lambda number, text: shown.append((number, text))))
    assert [item.prompt for item in found] == lines
    assert [item.finish for item in found] == ["blank", "eos", "blank", "eos", "eos", "blank"]
    assert [item.answer for item in found] == ["" if not line.strip() else "<|im_start|><|im_end|>" for line in lines]
    assert sorted({number for number, _ in shown}) == [1, 3, 4]
    assert "".join(text for number, text in shown if number == 3) == "<|im_start|><|im_end|>"
    events: list[object] = []
    for item in made.answers(made.prompts(lines), lambda number, text: events.append(number) if text else None):
        events.append(item.finish)
    order = [event for place, event in enumerate(events) if place == 0 or event != events[place - 1]]
    assert order == ["blank", 1, "eos", "blank", 3, "eos", 4, "eos", "blank"]  # nothing is shown before its turn


@pytest.mark.parametrize("said", [[115, 154, 2], [14, 244, 163, 156, 132, 2], [14, 244, 5], [115, 600, 154, 300, 2]])
def test_what_is_shown_as_it_comes_is_the_answer(folder, said):
    """Bytes of characters, and bytes that are none: o and 0x96, a line break and an emoji, half of one."""
    made = predictor(folder, said)
    shown: list[str] = []
    (answer,) = made.answers(made.prompts(["one"]), lambda number, text: shown.append(text))
    assert "".join(shown) == answer.answer and len(answer.answer) >= 2


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_what_the_models_folder_says_ends_an_answer(folder, name):
    (folder / name).write_text(json.dumps({"eos_token_id": [2, 601, 9999]}))
    made = predictor(folder, [600, 601, 7])
    assert made.sampling.eos_token_ids == (2, 601) and "eos_token_id 9999 in" in made.notes[0]
    (answer,) = made.answers(made.prompts(["one"]))
    assert (answer.answer, answer.new_tokens, answer.finish) == ("<|im_start|>", 2, "eos")


def test_in_a_chat_the_tokenizers_end_token_ends_a_turn(folder):
    words = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    assert predictor(folder, []).sampling.eos_token_ids == (2,)
    made = predictor(folder, [7, 601, 600], chat=True)  # added in the order of their roles: the end token first
    assert made.sampling.eos_token_ids == (2, 600)
    assert [item.finish for item in made.answers(made.prompts(["hi"]))] == ["eos"]


def test_end_ids_of_any_form(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "config.json").write_text('{"eos_token_id": [2, 7]}')
    assert end_ids([tmp_path, tmp_path / "none"], 100) == ((7, 2), [])
    for wrong in ('"2"', "[2.5]", "true", "[[2]]"):
        (tmp_path / "config.json").write_text(f'{{"eos_token_id": {wrong}}}')
        with pytest.raises(UserError, match="neither a token id nor a list"):
            end_ids([tmp_path], 100)


@pytest.mark.parametrize("add_bos", [True, False])
def test_plain_text_is_framed_by_the_tokenizer_and_chat_by_the_template(folder, add_bos):
    words = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": add_bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    (plain,) = predictor(folder, []).prompts(["hi"])
    (chat,) = predictor(folder, [], chat=True).prompts(["hi"])
    assert (plain.tokens[0] == 1) == add_bos
    inner = plain.tokens[add_bos:]
    assert chat.tokens == (600, *inner, 601, 600)
