# SPDX-License-Identifier: Apache-2.0
"""A dense LLaMA small enough for tests, as a Hugging Face folder with a tokenizer, and jsonl texts for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, HIDDEN, WIDTH, VOCAB = 3, 48, 96, 320
KEYS = ("commoncrawl", "c4", "github", "wikipedia", "books", "arxiv", "stackexchange")
WORDS = (
    "the a of model layer expert gate token loss neuron and or is was sees learns chooses counts one two red".split()
)


def sentences(count: int, seed: int) -> list[str]:
    """Texts of a few words to a few dozen."""
    draws = np.random.default_rng(seed)
    return [" ".join(draws.choice(WORDS, int(draws.integers(3, 40)))) for _ in range(count)]


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE that puts <s> in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(50, 1), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(words), encoding="utf-8")


def make_llama(folder: Path, tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The folder of a LLaMA with grouped queries and random weights, and the model itself."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_texts(folder: Path, each: int = 8) -> Path:
    """A jsonl file for every domain of LLaMA's mixture."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, key in enumerate(KEYS):
        lines = [json.dumps({"content": text}) for text in sentences(each, number)]
        (folder / f"part_{key}_0.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def model_and_text(folder: Path) -> Path:
    """``folder`` with a model, and in text.txt sentences to measure and judge it on."""
    make_llama(folder / "model")
    (folder / "text.txt").write_text(". ".join(sentences(120, 0)), encoding="utf-8")
    return folder
