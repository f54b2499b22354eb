# SPDX-License-Identifier: Apache-2.0
"""config.json as transformers writes it reads into a spec, and what we write transformers loads unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mindformers_ext.core.config.hf import hf_config_from_spec, model_spec_from_hf

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_hidden_layers": 2,
    "vocab_size": 97,
    "head_dim": 10,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "rope_theta": 5e5,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("MixtralConfig", {}),
    ("MixtralConfig", {**SMALL, "num_local_experts": 12, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.01}),
    ("LlamaConfig", {}),
    ("LlamaConfig", {**SMALL, "eos_token_id": [3, 4]}),
    ("MistralConfig", {"sliding_window": None}),
]
OURS = {"architectures", "head_dim"}  # we always write them
READER = {"_name_or_path", "transformers_version"}  # the reader adds them


@pytest.mark.parametrize(("name", "arguments"), CASES)
@pytest.mark.parametrize("full", [True, False], ids=["every key", "changed keys"])
def test_there_and_back(name: str, arguments: dict[str, Any], full: bool, tmp_path: Path) -> None:
    theirs = getattr(transformers, name)(**arguments)
    spec = model_spec_from_hf(json.loads(theirs.to_json_string(use_diff=not full)) | {"model_type": theirs.model_type})
    (tmp_path / "config.json").write_text(json.dumps(hf_config_from_spec(spec)), encoding="utf-8")
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    if name != "MistralConfig":  # that one comes back as the llama it is
        changed = {key for key, value in theirs.to_dict().items() if loaded.to_dict().get(key) != value}
        assert changed <= OURS | READER
    assert model_spec_from_hf(loaded.to_dict()) == spec
