# SPDX-License-Identifier: Apache-2.0
"""MindFormers' words for the rotary embedding beyond the trained positions: ``extend_method``, ``scaling_factor``.

PI and NTK have a number as factor, the others a mapping: linear {factor}; LLAMA3 {factor, low_freq_factor,
high_freq_factor, original_max_position_embeddings}; YARN {factor, original_max_position_embeddings, beta_fast,
beta_slow, mscale, mscale_all_dim}. NTK multiplies the base once for all lengths, so it becomes another ``theta``. Ours
are DYNAMIC {factor}, transformers' rule (MindFormers' DYNAMIC_NTK is another one and not built), and in YARN's mapping
attention_factor and truncate.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any

from mindformers_ext.core.config.keys import MODEL
from mindformers_ext.core.config.values import read_value
from mindformers_ext.core.errors import Problems, nearest
from mindformers_ext.core.rope import NEEDED, READ, RopeScaling, grown

METHOD, FACTOR = "extend_method", "scaling_factor"
NUMBERS = {"PI": "linear", "NTK": ""}  # with a number as factor; NTK is no method of ours
MAPPINGS = {"LINEAR": "linear", "LLAMA3": "llama3", "YARN": "yarn", "DYNAMIC": "dynamic"}
KINDS = {"original_max_position_embeddings": "int", "truncate": "bool"}  # of a field's value; the others: float


def read_extension(words: Mapping[str, Any], theta: float, problems: Problems) -> tuple[float, RopeScaling | None]:
    """Base and scaling that ``model_config`` asks for."""
    method, factor = words.get(METHOD), words.get(FACTOR)
    name = "NONE" if method is None else str(method).upper()
    if name == "NONE":
        if factor not in (None, 1, 1.0):
            problems.add(f"{MODEL}.{FACTOR}={factor!r} without {METHOD}", f"set {METHOD}, or leave it out")
        return theta, None
    if name in NUMBERS and not isinstance(factor, Mapping):
        number = read_value(f"{MODEL}.{FACTOR}", factor, "float", 1.0, problems)
        if name == "NTK":
            return theta * number, None
        return theta, RopeScaling(rope_type=NUMBERS[name], factor=number) if number != 1 else None
    if name not in MAPPINGS or not isinstance(factor, Mapping):
        known = ", ".join(("None", *NUMBERS, *MAPPINGS))
        problems.add(
            f"{MODEL}.{METHOD}={method!r} with {FACTOR}={factor!r} is not built",
            f"these are: {known}; {' and '.join(NUMBERS)} with a number, the others with a mapping of factor and more",
        )
        return theta, None
    return theta, _scaling(MAPPINGS[name], factor, problems)


def _scaling(kind: str, given: Mapping[str, Any], problems: Problems) -> RopeScaling | None:
    scaling = scaling_from(kind, given, f"{MODEL}.{FACTOR}", problems)
    # MindFormers takes mscale where mscale_all_dim is 0, transformers then takes neither: said as one number
    if scaling and scaling.mscale is not None and not scaling.mscale_all_dim and scaling.attention_factor is None:
        alone = replace(scaling, mscale=None, mscale_all_dim=None)
        return alone if scaling.mscale == 1 else replace(alone, attention_factor=grown(scaling.mscale, scaling.factor))
    return scaling


def scaling_from(
    kind: str, given: Mapping[str, Any], where: str, problems: Problems, ignored: Collection[str] = ()
) -> RopeScaling | None:
    """The scaling of method ``kind`` with the fields that ``given`` (called ``where``) holds.

    A problem for a field that the method does not read, but those of ``ignored``, and for one that is missing; then
    None.
    """
    defaults = {item.name: item.default for item in fields(RopeScaling)} | {"factor": 1.0}
    known, values = ("factor", *READ[kind]), {}
    for name, value in given.items():
        if name in known:
            values[name] = read_value(f"{where}.{name}", value, KINDS.get(name, "float"), defaults[name], problems)
        elif name not in ignored:
            problems.add(f"unknown key '{where}.{name}'", nearest(str(name), sorted(known)))
    missing = [name for name in ("factor", *NEEDED.get(kind, ())) if values.get(name) is None]
    if missing:
        problems.add(f"{where} of rope_type {kind} lacks {', '.join(missing)}", "copy it from the original config.json")
        return None
    return RopeScaling(rope_type=kind, **values)


def written_extension(scaling: RopeScaling | None) -> dict[str, Any]:
    """The two words for ``scaling``; none for none."""
    if scaling is None:
        return {}
    name = next(word for word, kind in MAPPINGS.items() if kind == scaling.rope_type)
    said = scaling.said()
    del said["rope_type"]
    if scaling.rope_type == "yarn":  # MindFormers wants all of these
        said |= {key: getattr(scaling, key) for key in ("beta_fast", "beta_slow")}
    return {METHOD: name.lower() if name == "LINEAR" else name, FACTOR: said}
