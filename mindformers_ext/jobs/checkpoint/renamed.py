# SPDX-License-Identifier: Apache-2.0
"""Weights of Hugging Face's models under other names: behind a prefix of training, or in Meta's and Mistral's files.

Meta's and Mistral's own releases (``consolidated.safetensors`` or ``consolidated.00.pth`` beside ``params.json``) hold
rotary pairs of q and k in neighbouring rows, Hugging Face's in rows half a head apart
(``permute`` of transformers' convert_llama_weights_to_hf.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import UserError, listed
from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.tensors import Array, Index, Reader, TensorInfo

PARAMS = "params.json"
SAFE_RELEASE = "consolidated.safetensors"  # Mistral's
CONSOLIDATED = re.compile(r"consolidated(\.\d+)?\.(safetensors|pth)")
PREFIXES = ("base_model.model.", "_orig_mod.", "module.")  # of PEFT, torch.compile and data parallel training
LORA, WRAPPED = ".lora_", ".base_layer."  # in names of an adapter's weights; in those of the weights that it wraps

# Meta's name -> Hugging Face's, after "layers.N." or alone
LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.gate": "block_sparse_moe.gate",
}
ALONE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
IN_LAYER, EXPERT = re.compile(r"layers\.(\d+)\.(.+)"), re.compile(r"feed_forward\.(experts\.\d+\.w[123])")
ROTATED = ("attention.wq", "attention.wk")
CONSTANTS = ("rope.freqs",)  # computed from rope_theta


@dataclass(frozen=True)
class Stored:
    """Where a tensor is. ``rotated``: rows of one head of q or k, whose rotary pairs are neighbours; 0 elsewhere."""

    name: str
    rotated: int = 0


class RenamedReader:
    """A ``Reader`` of another one's tensors under Hugging Face's names. ``note`` says so."""

    def __init__(self, reader: Reader, places: Mapping[str, Stored], note: str) -> None:
        """``places``: where each tensor is in ``reader``."""
        self._reader, self._places, self.note = reader, places, note
        infos = reader.infos
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, infos[at.name].shape, infos[at.name].dtype) for name, at in places.items()
        }

    def read(self, name: str, index: Index = ()) -> Array:
        """The tensor, or the part that ``index`` selects."""
        place = self._places[name]
        if not place.rotated:
            return self._reader.read(place.name, index)
        size, rows = place.rotated, self.infos[name].shape[0]
        wanted = np.arange(rows)[index[0] if index else slice(None)]
        first, last = (int(wanted.min(initial=rows)), int(wanted.max(initial=-1))) if wanted.size else (0, -1)
        start = first // size * size  # whole heads are read
        stop = (last // size + 1) * size
        heads = self._reader.read(place.name, (slice(start, stop), *index[1:]))
        halves = heads.reshape(-1, size // 2, 2, *heads.shape[1:]).swapaxes(1, 2).reshape(heads.shape)
        return np.ascontiguousarray(halves[wanted - start])

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


def notes_of(reader: object) -> tuple[str, ...]:
    """What is to be said of an open reader's names."""
    return (reader.note,) if isinstance(reader, RenamedReader) else ()


def without_prefix(reader: Reader, path: Path) -> Reader:
    """``reader``, or a view of it without the prefix that every name carries.

    Raises:
        UserError: an adapter stands inside the model.
    """
    names = list(reader.infos)
    wrapped = next((name for name in names if WRAPPED in name), None)
    if wrapped:
        raise UserError(
            f"'{path}' holds a model with an adapter inside ('{wrapped}'): merge it in PEFT (merge_and_unload()), save "
            "that with save_pretrained and give the new folder"
        )
    if any(LORA in name for name in names):  # an adapter's own file
        return reader
    cut = ""
    while more := [one for one in PREFIXES if all(name.startswith(cut + one) for name in names) and names]:
        cut += more[0]
    if not cut:
        return reader
    places = {name.removeprefix(cut): Stored(name) for name in names}
    return RenamedReader(reader, places, f"'{path}': every name begins with '{cut}', which is left out")


def consolidated_files(folder: Path) -> list[Path]:
    """The weights of Meta's and Mistral's own releases in ``folder``."""
    return sorted(path for path in folder.iterdir() if CONSOLIDATED.fullmatch(path.name) and path.is_file())


def released_file(path: Path) -> Path:
    """The one file of a release, whose folder or file ``path`` is.

    Raises:
        UserError: several, which are slices of one model.
    """
    folder = path if path.is_dir() else path.parent
    files = consolidated_files(folder)
    if len(files) > 1 and (path == folder or path.suffix == ".pth"):
        raise UserError(
            f"'{folder}' holds the {len(files)} slices of Meta's release ({files[0].name}, ...), which are "
            "not joined here: download the model's Hugging Face weights (*.safetensors), or join them with "
            "transformers' convert_llama_weights_to_hf.py"
        )
    return files[0] if path == folder else path


def as_hugging_face(reader: Reader, path: Path) -> Reader:
    """Meta's and Mistral's file ``path``, open as ``reader``, under Hugging Face's names and with its rows.

    Raises:
        UserError: another name than theirs, sizes that do not fit, or no head width in params.json and config.json.
    """
    size = _head_size(path.parent)
    places: dict[str, Stored] = {}
    unknown = []
    for name, info in reader.infos.items():
        if name in CONSTANTS:
            continue
        shown, rotated = _shown(name.removesuffix(".weight"))
        if not shown or not name.endswith(".weight"):
            unknown.append(name)
        elif rotated and info.shape[0] % size:
            raise UserError(f"'{path}': '{name}' has {info.shape[0]} rows, which are no heads of {size}: mend {PARAMS}")
        places[f"{shown}.weight"] = Stored(name, size if rotated else 0)
    if unknown:
        raise UserError(
            f"'{path}' holds {len(unknown)} tensors of no kind known in Meta's and Mistral's releases "
            f"({listed(unknown[:5])}): download the model's Hugging Face weights instead"
        )
    return RenamedReader(reader, places, f"'{path}': read with Meta's names; rotary rows of q and k put in order")


def _shown(name: str) -> tuple[str, bool]:
    """Hugging Face's name, "" where there is none, and whether its rows are rotary pairs."""
    match = IN_LAYER.fullmatch(name)
    if not match:
        return ALONE.get(name, ""), False
    part = match[2]
    expert = EXPERT.fullmatch(part)
    found = f"block_sparse_moe.{expert[1]}" if expert else LAYER.get(part)
    return (f"model.layers.{match[1]}.{found}" if found else ""), part in ROTATED


def _head_size(folder: Path) -> int:
    """Rows of one head, which must be even."""
    for name, width, heads in ((PARAMS, "dim", "n_heads"), (CONFIG, "hidden_size", "num_attention_heads")):
        if not (folder / name).is_file():
            continue
        words = read_object(folder / name)
        size, whole, count = (words.get(key) for key in ("head_dim", width, heads))
        if size is None and type(whole) is int and type(count) is int and count > 0:
            size = whole // count
        if type(size) is not int or size < 2 or size % 2:
            raise UserError(f"'{folder / name}' tells no even head_dim (or {width} and {heads}): copy it again")
        return size
    raise UserError(f"'{folder}' lacks {PARAMS}, which tells the width of a head: copy it from where the weights are")
