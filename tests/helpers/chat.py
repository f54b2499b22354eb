# SPDX-License-Identifier: Apache-2.0
"""A tokenizer folder with Llama 3's chat template at a small vocabulary, and conversations to learn."""

from __future__ import annotations

import json
from pathlib import Path

from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.tokenizers import train_sentencepiece

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
VOCAB = 400
SEED_RECORDS = Path(__file__).resolve().parents[3] / "shared" / "data" / "alpaca_seed.json"


def chat_folder(folder: Path) -> Path:
    """The tokenizer: 400 pieces and Llama 3's marks from 400 on."""
    folder.mkdir(parents=True, exist_ok=True)
    train_sentencepiece(standard_library_text(60_000), folder / "tokenizer.model", VOCAB)
    marks = {
        str(VOCAB + number): {"content": mark, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
        for number, mark in enumerate(MARKS)
    }
    words = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "added_tokens_decoder": marks,
        "chat_template": LLAMA3,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(words), encoding="utf-8")
    return folder


def small_talks(count: int = 24) -> list[dict]:
    """Short conversations of the three forms: ShareGPT's, OpenAI's and alpaca's, some of several turns."""
    found: list[dict] = []
    for number in range(count):
        asked, answer = f"add {number} to {number}", f"that is {2 * number}"
        if number % 3 == 0:
            turns = [("human", asked), ("gpt", answer)] + [("human", "and once more?"), ("gpt", "yes")] * (number % 2)
            found.append({"conversations": [{"from": who, "value": text} for who, text in turns]})
        elif number % 3 == 1:
            turns = [("system", "be brief"), ("user", asked), ("assistant", answer)]
            found.append({"messages": [{"role": who, "content": text} for who, text in turns]})
        else:
            found.append({"instruction": "add", "input": f"{number} and {number}", "output": answer})
    return found
