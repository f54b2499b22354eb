# SPDX-License-Identifier: Apache-2.0
"""Whether tensors are those that a config.json describes: every dimension, and which of the optional ones exist.

A stack of layers is put together tensor by tensor, so nothing else would notice that layer 2 is wider than layer 1, or
that embedding and head have different numbers of rows; such a folder cannot be loaded by anyone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mindformers_ext.core.errors import Problems
from mindformers_ext.core.parameters import shape_of
from mindformers_ext.surgery.merge.architectures import Architecture, TensorRow

SHOWN = 8  # tensors that are listed
KEYS = {
    "V": "vocab_size",
    "D": "hidden_size",
    "F": "intermediate_size",
    "M": "intermediate_size",
    "H": "num_attention_heads",
    "N": "num_key_value_heads",
    "P": "head_dim",
}


def full_config(table: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with what transformers takes where it is silent, and for heads where it says null."""
    result = {**table.defaults, **config}
    heads = result.get("num_attention_heads")
    if result.get("num_key_value_heads") is None:
        result["num_key_value_heads"] = heads
    if result.get("head_dim") is None and type(heads) is int and heads > 0 and type(result.get("hidden_size")) is int:
        result["head_dim"] = result["hidden_size"] // heads
    return result


def check_fit(
    shapes: Mapping[str, tuple[int, ...]],
    table: Architecture,
    config: Mapping[str, Any],
    whose: str,
    problems: Problems,
) -> None:
    """Add a problem for every tensor of ``shapes`` that ``config``, the config.json of ``whose``, describes otherwise.

    ``config`` has the number of layers; tensors that ``table`` does not know are left alone.
    """
    full = full_config(table, config)
    sizes: dict[str, int] = {"1": 1, "E": table.experts}
    for letter, key in KEYS.items():
        value = full.get(key)
        if type(value) is not int or value < 1:
            problems.add(f"config.json of {whose} has {key}={value!r}", "a whole number above 0 is expected")
            return
        sizes[letter] = value
    faults: list[tuple[str, str]] = []
    for row, name in _named(table, int(config["num_hidden_layers"])):
        fault = _fault(row, name, shapes, full, sizes)
        if fault:
            faults.append(fault)
    for found, advice in faults[:SHOWN]:
        problems.add(f"{found} of {whose}", advice)
    if len(faults) > SHOWN:
        problems.add(f"and {len(faults) - SHOWN} more tensors", "the same reason")


def _named(table: Architecture, layers: int) -> Iterator[tuple[TensorRow, str]]:
    for row in (*table.pre, *table.post):
        yield row, row.name
    for layer in range(layers):
        for row in table.layer_rows():
            yield row, row.name.replace("{layer}", str(layer))


def _fault(
    row: TensorRow, name: str, shapes: Mapping[str, tuple[int, ...]], full: Mapping[str, Any], sizes: Mapping[str, int]
) -> tuple[str, str] | None:
    """What is wrong with one tensor and what to do, or None."""
    wanted = bool(full.get(row.switch)) if row.switch else not row.optional
    if name not in shapes:
        return (f"'{name}' is missing, {_why(row)} in config.json", "take models that all have it") if wanted else None
    if row.switch and not wanted:
        return (
            f"'{name}' exists, but {row.switch} is not set in config.json",
            "whoever loads the model would leave it out: set base_model to a model that has it, or take models without",
        )
    shape = tuple(sum(shape_of(part, sizes)[0] for part in word.split("+")) for word in row.dims.split())
    if shapes[name] == shape:
        return None
    keys = sorted({KEYS[letter] for letter in row.dims if letter in KEYS})
    listed = ", ".join(f"{key} {full[key]}" for key in keys)
    advice = (
        "embedding and head need one row per token: tokenizer_source: base (or union) rearranges them"
        if row.vocab and shapes[name][1:] == shape[1:]
        else "all layers of a model have one size: take layers of models of that size, and as base_model one of them"
    )
    return f"'{name}' is {list(shapes[name])}, not {list(shape)} as by the config.json ({listed})", advice


def _why(row: TensorRow) -> str:
    return f"and {row.switch} is set" if row.switch else "but described"
