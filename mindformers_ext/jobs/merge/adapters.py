# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of PEFT's files, read: what they add to which tensor, and which tensors they replace.

W' = W + s B A with s = alpha / r (alpha / sqrt(r) with ``use_rslora``) for a layer with A (r, in) and B (out, r); for
an embedding, and for layers that store W transposed (``fan_in_fan_out``), the transposed product. Sources: Hu et al.
2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732; PEFT's documentation of its checkpoint format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.config.lora import ADAPTER_CONFIG
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.formats.dtypes import is_float
from mindformers_ext.formats.safetensors_file import SafetensorsFile
from mindformers_ext.formats.tensors import Reader, TensorInfo
from mindformers_ext.jobs.checkpoint.source import open_hf, read_config

FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
LAYER = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
WHOLE = re.compile(r"(?:\.modules_to_save(?:\.default)?|\.base_layer)(?=\.(?:weight|bias)$)")
# Keys that change what an adapter adds, with the values that are built; all others tell how it was trained.
BUILT: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base's weights too
    "use_qalora": (False, None),
    "arrow_config": (None,),
}


@dataclass(frozen=True)
class Product:
    """scale * left @ right of two tensors of the adapter's file; ``turned``: of their transposes."""

    left: str
    right: str
    turned: bool
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An open adapter: products by the name of the tensor they are added to, and names that replace a tensor."""

    reader: Reader
    products: Mapping[str, Product]
    whole: Mapping[str, str]


def open_adapter(folder: Path, base: Mapping[str, TensorInfo]) -> Adapter:
    """The adapter in ``folder`` for a model with tensors ``base``.

    Raises:
        UserError: no adapter, one of a kind that is not built, or one that does not fit the model.
    """
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None or not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"'{folder}' is no adapter of PEFT: {ADAPTER_CONFIG} and one of {', '.join(FILES)} are expected"
        )
    config = read_config(folder / ADAPTER_CONFIG)
    problems = Problems(f"the adapter '{folder}'")
    for key, built in BUILT.items():
        if key in config and not any(config[key] is value or config[key] == value for value in built):
            problems.add(
                f"{key}={config[key]!r} is not built",
                "merge it into its model with PEFT first (merge_and_unload)",
            )
    problems.raise_if_any()
    reader: Reader = SafetensorsFile(file) if file.suffix == ".safetensors" else open_hf(file)
    try:
        products, whole = _sorted(reader.infos, config, problems)
        _check(reader.infos, base, products, whole, problems)
        problems.raise_if_any()
    except UserError:
        reader.close()
        raise
    return Adapter(reader, products, whole)


def _sorted(
    infos: Mapping[str, TensorInfo], config: Mapping[str, Any], problems: Problems
) -> tuple[dict[str, Product], dict[str, str]]:
    """Which tensors belong together."""
    pairs: dict[tuple[str, bool], dict[str, str]] = {}
    whole: dict[str, str] = {}
    strange: list[str] = []
    for name in infos:
        short = name.removeprefix(PREFIX)
        match = LAYER.fullmatch(short)
        if match:
            pairs.setdefault((match[1], bool(match[2])), {})[match[3]] = name
        elif "lora" in short or not short.endswith((".weight", ".bias")):
            strange.append(name)
        else:
            whole[WHOLE.sub("", short)] = name
    problems.add_names("tensors", "are not understood", strange, "merge the adapter into its model with PEFT first")
    products = {}
    for (layer, embedding), both in pairs.items():
        if len(both) < 2:
            problems.add(f"'{layer}' has lora_{next(iter(both))} alone", "the adapter's file is not whole")
            continue
        scale = _scale(layer, infos[both["A"]].shape, config, problems)
        turned = embedding or bool(config.get("fan_in_fan_out"))
        left, right = (both["A"], both["B"]) if turned else (both["B"], both["A"])
        products[f"{layer}.weight"] = Product(left, right, turned, scale)
    if not products and not whole:
        problems.add("it holds no tensor of LoRA", "give the folder that PEFT's save_pretrained wrote")
    return products, whole


def _scale(layer: str, shape: tuple[int, ...], config: Mapping[str, Any], problems: Problems) -> float:
    alpha = config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping) or not all(re.fullmatch(r"\^?[\w.]+", str(key)) for key in patterns):
        problems.add(f"alpha_pattern={patterns!r}", "names of layers are expected")
        return 0.0
    for key, value in patterns.items():
        if f".{layer}".endswith("." + str(key).lstrip("^")):
            alpha = value
            break
    rank = shape[0] if shape else 0
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30 or not rank:
        problems.add(
            f"'{layer}' has lora_alpha={alpha!r} and rank {rank}", "two numbers, the rank above 0, are expected"
        )
        return 0.0
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


def _check(
    infos: Mapping[str, TensorInfo],
    base: Mapping[str, TensorInfo],
    products: Mapping[str, Product],
    whole: Mapping[str, str],
    problems: Problems,
) -> None:
    problems.add_names(
        "tensors",
        "of the adapter are not in the model",
        [name for name in products if name not in base],
        "give the model the adapter was trained on",
    )
    for name, product in products.items():
        left, right = infos[product.left], infos[product.right]
        shapes = [info.shape[::-1] if product.turned else info.shape for info in (left, right)]
        if name not in base:
            continue
        good = all(len(shape) == 2 for shape in shapes) and shapes[0][1] == shapes[1][0]
        if not good or base[name].shape != (shapes[0][0], shapes[1][1]):
            problems.add(
                f"'{name}' is {list(base[name].shape)}, the adapter's parts {list(left.shape)} and {list(right.shape)}",
                "give the model the adapter was trained on",
            )
    used = [*whole.values(), *(name for item in products.values() for name in (item.left, item.right))]
    problems.add_names(
        "tensors", "are no floats", [n for n in used if not is_float(infos[n].dtype)], "only floats are merged"
    )
