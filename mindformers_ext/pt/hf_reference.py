# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers as the judge of our networks: a model folder, run in float32 on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mindformers_ext.core.config.hf_attention import with_both_ropes
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.pt.torch_file import TorchFile

# transformers' tokenizers load protobuf. MindSpore's generated code needs protobuf's Python implementation, which it
# asks for while it is imported: too late in a process where protobuf came first. So ask before anyone does.
os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")


class HuggingFaceReference:
    """The causal language model of a Hugging Face folder, with the folder's tokenizer if it has one."""

    def __init__(
        self, folder: Path, weights: Iterable[tuple[str, np.ndarray]] | None = None, code: Path | None = None
    ) -> None:
        """Load ``folder``; nothing is downloaded, no code of it is run.

        Args:
            folder: the model.
            weights: instead of the folder's files, float32 by name.
            code: where config.json and the code of the network are, which is run; wants ``weights``. None:
                transformers' own network.

        Raises:
            UserError: no model there, or weights missing or left over (transformers itself would fill the missing
                ones with random numbers and only warn).
        """
        if not (folder / "config.json").is_file():
            raise UserError(f"no config.json in {folder}: give a Hugging Face model folder")
        self.folder, self.has_code = folder, code is not None
        self.model, wrong = _loaded(folder) if weights is None else _filled(folder, weights, code)
        if wrong:
            listed = "; ".join(f"{kind}: {', '.join(names[:5])} ({len(names)})" for kind, names in wrong.items())
            raise UserError(f"{folder}: config.json and the weights do not belong together. {listed}")
        self.model.eval()

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 logits of shape (B, S, V) for token ids of shape (B, S)."""
        with torch.no_grad():
            return self.model(torch.from_numpy(ids.astype(np.int64)), use_cache=False).logits.float().numpy()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, BOS included, by the folder's own tokenizer; ``UserError`` when it has none."""
        names = ("tokenizer.model", "tokenizer.json")
        if not any((self.folder / name).is_file() for name in names):
            raise UserError(
                f"{self.folder} has no {' or '.join(names)}: copy the model's tokenizer there "
                "(convert_weight.py --reversed --config HF_FOLDER does), or leave out --text"
            )
        from transformers import AutoTokenizer, LlamaConfig

        config = LlamaConfig() if self.has_code else None  # whose tokenizer it is, where the folder does not say
        words: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        return list(AutoTokenizer.from_pretrained(self.folder, config=config, **words)(text)["input_ids"])


def _config(folder: Path, trusted: bool = False) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
    if hasattr(config, "rope_theta"):  # transformers 4 does not read what transformers 5 writes, and takes defaults
        full = with_both_ropes(read_object(folder / "config.json"))
        config.rope_theta, config.rope_scaling = full["rope_theta"], full["rope_scaling"]
    return config


def _loaded(folder: Path) -> tuple[Any, dict[str, list[str]]]:
    """The model with the weights that transformers itself reads, and what does not fit, by kind."""
    from transformers import AutoModelForCausalLM

    if not any(folder.glob("*.safetensors")):
        for path in sorted(folder.glob("pytorch_model*.bin")):
            TorchFile(path)  # refuses what torch.load would build
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        config=_config(folder),
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    return model, {kind: sorted(map(str, names)) for kind, names in report.items() if names}


def _filled(
    folder: Path, weights: Iterable[tuple[str, np.ndarray]], code: Path | None
) -> tuple[Any, dict[str, list[str]]]:
    """The same with given weights."""
    from transformers import AutoModelForCausalLM

    trusted = code is not None
    config = _config(code or folder, trusted)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=trusted
    )
    own = model.state_dict()
    filled: set[int] = set()
    wrong: dict[str, list[str]] = {"unexpected_keys": [], "mismatched_keys": []}
    for name, array in weights:
        if name not in own:
            wrong["unexpected_keys"].append(name)
        elif own[name].shape != array.shape:
            wrong["mismatched_keys"].append(name)
        else:
            own[name].copy_(torch.from_numpy(array))
            filled.add(own[name].data_ptr())  # a tied head is filled with its embedding
    wrong["missing_keys"] = sorted(name for name, tensor in own.items() if tensor.data_ptr() not in filled)
    return model, {kind: names for kind, names in wrong.items() if names}
