# SPDX-License-Identifier: Apache-2.0
"""transformers 4 judges folders that it does not read by itself: fused experts of transformers 5, Meta's names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.errors import UserError
from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.tokenizers import train_sentencepiece
from mindformers_ext.jobs.checkpoint.judge import open_judge
from mindformers_ext.jobs.engine.door import open_reference
from mindformers_ext.weights.convert import to_hf, to_mindspore
from tests.helpers.llama_moe_models import UNEQUAL, folder_of, model_of

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}
QWEN = {"intermediate_size": 24, "moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
CONFIGS = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": 3},
    "qwen3_moe": QWEN,
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 20},
    "llama": {"intermediate_size": 24, "tie_word_embeddings": True},
}
IDS = np.array([[1, 5, 9, 2, 7, 30]])


def published(folder: Path, family: str) -> dict[str, np.ndarray]:
    """A random model as transformers itself writes it; its tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | CONFIGS[family])).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def copy(folder: Path, target: Path, tensors: dict[str, np.ndarray]) -> Path:
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("family", "style"),
    [("mixtral", "fused"), ("mixtral", "fused_block_sparse"), ("qwen3_moe", "fused"), ("qwen2_moe", "fused")],
)
def test_fused_experts_are_split_for_the_judge(tmp_path, family, style):
    tensors = published(tmp_path / "one", family)
    spec = model_spec_from_hf(json.loads((tmp_path / "one/config.json").read_text()))
    fused = to_hf(to_mindspore(tensors, spec), spec, style)
    assert any(name.endswith("experts.gate_up_proj") for name in fused)
    folder = copy(tmp_path / "one", tmp_path / "two", fused)
    expected = open_reference(tmp_path / "one").logits(IDS)
    np.testing.assert_array_equal(open_judge(folder).logits(IDS), expected)
    np.testing.assert_array_equal(open_judge(tmp_path / "one").logits(IDS), expected)
    name = next(name for name in fused if name.endswith("q_proj.weight"))
    copy(tmp_path / "one", folder, {("extra" if key == name else key): array for key, array in fused.items()})
    with pytest.raises(UserError, match=rf"do not belong together. unexpected_keys: extra \(1\); missing_keys: {name}"):
        open_judge(folder)


def test_names_behind_a_prefix_are_judged(tmp_path):
    """With a tied head, which no file holds."""
    tensors = published(tmp_path / "one", "llama")
    folder = copy(tmp_path / "one", tmp_path / "two", {f"module.{name}": array for name, array in tensors.items()})
    np.testing.assert_array_equal(open_judge(folder).logits(IDS), open_reference(tmp_path / "one").logits(IDS))


def test_a_llama_moe_is_judged_by_our_code_and_by_none_of_its_folder(tmp_path, remote_code):
    model = model_of(size_experts=UNEQUAL)
    folder = folder_of(model, tmp_path / "model")
    train_sentencepiece(standard_library_text(50_000), folder / "tokenizer.model", 400)
    for file in folder.glob("*.py"):
        file.write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    judge = open_judge(folder)
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(judge.logits(IDS), expected, rtol=0, atol=1e-5)
    assert judge.encode("a list of names")[0] == 1 and not (tmp_path / "run").exists()
