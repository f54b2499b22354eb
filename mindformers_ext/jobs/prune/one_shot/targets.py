# SPDX-License-Identifier: Apache-2.0
"""The shape that is asked for: by its sizes, or by how many parameters of the whole model are to go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import gcd

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.parameters import parameter_count
from mindformers_ext.core.pruning import ModelShape, shape_of_model
from mindformers_ext.core.spec import ModelSpec

LAYERS = "num_hidden_layers"
NAMES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", LAYERS)
AXES = ("intermediate_size", "num_attention_heads", "hidden_size")  # that --fewer_parameters may make smaller
STEP = 16  # widths stay multiples of it where they are
SHARES = 256  # steps in which several axes become smaller together


def read_sizes(words: Sequence[str]) -> dict[str, int]:
    """Sizes from ``NAME=NUMBER`` words; ``UserError`` lists those that are none."""
    problems, found = Problems("--target"), dict[str, int]()
    for word in words:
        name, _, number = word.partition("=")
        problems.one_of("--target", name, NAMES)
        if not (number.isascii() and number.isdecimal()):
            problems.add(f"'{word}' is no size", "write a whole number, as num_attention_heads=6")
        elif name in found:
            problems.add(f"'{word}' beside {name}={found[name]}", "give each size once")
        else:
            found[name] = int(number)
    problems.raise_if_any()
    return found


def target_of(sizes: Mapping[str, int], source: ModelShape) -> ModelShape:
    """The shape with these sizes, the others as they are; with grouped queries and without ``num_key_value_heads`` all
    groups stay.

    Raises:
        UserError: a size is above the model's, heads do not divide into groups, or nothing becomes smaller.
    """
    problems = Problems("--target")
    for name, size in sizes.items():
        problems.positive(name, size)
        if size > getattr(source, name):
            problems.add(f"{name}={size} is above the model's {getattr(source, name)}", "pruning makes smaller")
    problems.raise_if_any()
    heads = sizes.get("num_attention_heads", source.num_attention_heads)
    grouped = source.heads_per_group > 1
    kept = source.num_key_value_heads if grouped else heads
    target = replace(source, **{"num_key_value_heads": kept, **sizes})
    groups = target.num_key_value_heads
    if heads % groups:
        problems.add(f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}", "give both")
    elif not grouped and groups != heads:
        problems.add(f"num_key_value_heads={groups}", f"this model has no groups: leave it out, it is {heads}")
    elif target.heads_per_group > source.heads_per_group:
        problems.add(
            f"{heads} query heads over {groups} key heads are {target.heads_per_group} to one, the model has "
            f"{source.heads_per_group}",
            "keep more key heads, or fewer query heads",
        )
    if target == source:
        problems.add("the sizes are those of the model itself", "give a smaller one")
    problems.raise_if_any()
    return target


def sized(model: ModelSpec, shape: ModelShape) -> ModelSpec:
    """``model`` with the sizes of ``shape``."""
    return replace(model, **{name: getattr(shape, name) for name in ModelShape.__dataclass_fields__})


def with_fewer(model: ModelSpec, share: float, axes: Sequence[str]) -> ModelShape:
    """The largest shape that has ``share`` fewer parameters than the whole model, embeddings included.

    All ``axes`` become smaller by one factor, heads group by group alike; then intermediate_size, where it is among
    them, fills what is left.

    Raises:
        UserError: an unknown axis, a share out of range, or one that these axes cannot give.
    """
    problems = Problems("--fewer_parameters")
    for axis in axes:
        problems.one_of("--axes", axis, AXES)
    if not 0 < share < 1:
        problems.add(f"--fewer_parameters {share}", "give a share between 0 and 1, such as 0.2")
    if not axes:
        problems.add("--axes names none", f"give some of {', '.join(AXES)}")
    problems.raise_if_any()
    most = (1 - share) * parameter_count(model)
    source = shape_of_model(model)
    for part in range(SHARES - 1, 0, -1):
        shape = _scaled(source, part / SHARES, axes)
        if shape != source and parameter_count(sized(model, shape)) <= most:
            return _filled(model, source, shape, most) if "intermediate_size" in axes else shape
    raise UserError(
        f"--fewer_parameters {share} is more than {', '.join(axes)} can give: name more axes with --axes, or ask for a "
        "smaller share"
    )


def fewer_layers(model: ModelSpec, share: float) -> int:
    """How many layers stay where ``share`` of the parameters are to go; ``UserError`` where none would."""
    if not 0 < share < 1:
        raise UserError(f"--fewer_parameters {share}: give a share between 0 and 1, such as 0.2")
    most = (1 - share) * parameter_count(model)
    source = shape_of_model(model)
    for keep in range(source.num_hidden_layers - 1, 0, -1):
        if parameter_count(sized(model, replace(source, num_hidden_layers=keep))) <= most:
            return keep
    raise UserError(f"--fewer_parameters {share} leaves no layer: ask for a smaller share")


def _scaled(source: ModelShape, factor: float, axes: Sequence[str]) -> ModelShape:
    sizes: dict[str, int] = {}
    for axis in axes:
        size = getattr(source, axis)
        step = gcd(size, STEP)
        if axis == "num_attention_heads":
            step = source.num_key_value_heads if source.heads_per_group > 1 else 1
        sizes[axis] = max(step, round(size * factor / step) * step)
    if source.heads_per_group == 1 and "num_attention_heads" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return replace(source, **sizes)


def _filled(model: ModelSpec, source: ModelShape, shape: ModelShape, most: float) -> ModelShape:
    step = gcd(source.intermediate_size, STEP)
    for width in range(source.intermediate_size, shape.intermediate_size, -step):
        wider = replace(shape, intermediate_size=width)
        if parameter_count(sized(model, wider)) <= most:
            return wider
    return shape
