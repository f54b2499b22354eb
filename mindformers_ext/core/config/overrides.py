# SPDX-License-Identifier: Apache-2.0
"""``--a.b.c value`` from the command line, checked against the configuration: a typo is an error, not a new key."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from mindformers_ext.core.config.file import parse_yaml
from mindformers_ext.core.config.keys import OUR_SECTIONS, known_keys
from mindformers_ext.core.config.mixture_words import SEED_SECTION, SEED_WORDS, WORDS
from mindformers_ext.core.config.view import advice
from mindformers_ext.core.errors import Problems, nearest

# Keys that these sections may hold although a file leaves them out (arguments and defaults of MindFormers 1.9.0).
# Sections not named here and not in ``core.config.keys`` take only the keys that the file already has.
OPEN_SECTIONS: dict[str, tuple[str, ...]] = {
    "context": (
        "mode",
        "device_target",
        "device_id",
        "max_call_depth",
        "max_device_memory",
        "save_graphs",
        "save_graphs_path",
        "jit_config",
        "ascend_config",
        "memory_optimize_level",
        "mempool_block_size",
        "enable_graph_kernel",
        "deterministic",
        "affinity_cpu_list",
        "runtime_num_threads",
    ),
    "context.jit_config": ("jit_level",),
    "context.ascend_config": ("precision_mode", "parallel_speed_up_json_path"),
    "lr_schedule": ("type", "learning_rate", "lr_end", "warmup_ratio", "warmup_steps", "warmup_lr_init", "total_steps"),
    "optimizer": ("type", "betas", "beta1", "beta2", "eps", "weight_decay", "learning_rate"),
    "runner_wrapper": (
        "type",
        "scale_sense",
        "use_clip_grad",
        "max_grad_norm",
        "local_norm",
        "calculate_per_token_loss",
    ),
    "runner_wrapper.scale_sense": ("type", "loss_scale_value", "scale_factor", "scale_window"),
    "train_dataset": (
        "data_loader",
        "input_columns",
        "num_parallel_workers",
        "python_multiprocessing",
        "drop_remainder",
        "batch_size",
        "repeat",
        "numa_enable",
        "prefetch_size",
        "seed",
    ),
    "train_dataset.data_loader": ("type", "dataset_dir", "shuffle", "num_samples", "num_shards", "shard_id", *WORDS),
    SEED_SECTION: SEED_WORDS,
    "trainer": ("type", "model_name"),
    "model.arch": ("type",),
    "processor": ("tokenizer",),
    "processor.tokenizer": ("vocab_file", "tokenizer_file"),
    "parallel.parallel_optimizer_config": (
        "gradient_accumulation_shard",
        "parallel_optimizer_threshold",
        "optimizer_weight_shard_size",
    ),
}
OPEN_SECTIONS["eval_dataset"] = OPEN_SECTIONS["train_dataset"]
OPEN_SECTIONS["eval_dataset.data_loader"] = OPEN_SECTIONS["train_dataset.data_loader"][: -len(WORDS)]


def apply_overrides(config: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A copy of ``config`` with each ``(dotted path, text)`` set; ``config`` itself is not changed.

    The text is one YAML value (``0.1``, ``True``, ``[0.9, 0.95]``, ``null``). A step may be a list index, or the type
    of what stands there (``callbacks.1.prefix``, ``callbacks.CheckpointMonitor.prefix``). Where the file shares a
    section by an anchor (``train_dataset`` and ``train_dataset_task.dataset_config``), both see the change. A text
    stays a text: ``58`` over ``"58GB"`` gives ``"58"``. Later pairs win.

    Raises:
        UserError: lists every path that leads nowhere, with the nearest known key, and every text that is not YAML.
    """
    problems = Problems("command line options")
    result: dict[str, Any] = copy.deepcopy(dict(config))  # deepcopy keeps shared sections shared
    for path, text in pairs:
        _set(result, path, text, problems)
    problems.raise_if_any()
    return result


def parse_dotted(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """``--a.b v`` and ``--a.b=v`` as pairs, in order.

    Raises:
        UserError: an option without a value, a value without an option, or a name without a dot: that is a misspelt
            flag, not a key.
    """
    problems = Problems("command line options")
    pairs: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, given, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            problems.add(f"'{word}' belongs to no option", "options look like --section.key value")
            continue
        if not given:
            if not rest or rest[0].startswith("--"):
                problems.add(f"--{name} has no value", f"write --{name} VALUE")
                continue
            value = rest.pop(0)
        if "." not in name:
            problems.add(f"unknown option --{name}", "keys of the file need their section: --section.key value")
            continue
        pairs.append((name, value))
    problems.raise_if_any()
    return pairs


def _set(config: dict[str, Any], path: str, text: str, problems: Problems) -> None:
    try:
        value = parse_yaml(text, f"--{path}")
    except ValueError as error:
        problems.add(str(error), "write one YAML value, quoted for the shell")
        return
    steps = path.split(".")
    here: Any = config
    for depth, step in enumerate(steps):
        section, last = ".".join(steps[:depth]), depth == len(steps) - 1
        if isinstance(here, list):
            key: Any = _place(here, section, step)
            if key is None:
                problems.add(f"--{path}: '{section}' is a list of {len(here)}", f"use an index below {len(here)}")
                return
        elif not isinstance(here, dict):
            problems.add(f"--{path}: '{section}' is the value {here!r}, not a section", "check the path")
            return
        elif step not in here and step not in _known(section):
            problems.add(
                f"--{path}: unknown key '{step}'" + (f" in '{section}'" if section else ""),
                _advice(section, step, here),
            )
            return
        else:
            key = step
            if not last and (here.get(step) is None):
                here[step] = {}
        if last:
            _replace(here, key, value, text, path, problems)
        else:
            here = here[key]


def _place(items: list[Any], section: str, step: str) -> int | None:
    """The place in a list that ``step`` names: its number, or the type of what stands there. Sheared-LLaMA's callback
    is added where it is missing."""
    if step.isdecimal():
        return int(step) if int(step) < len(items) else None
    types = [item.get("type") if isinstance(item, dict) else None for item in items]
    if step not in types and f"{section}.{step}" == SEED_SECTION:
        items.append({"type": step})
        return len(types)
    return types.index(step) if step in types else None


def _replace(here: Any, key: Any, value: Any, text: str, path: str, problems: Problems) -> None:
    old = here[key] if isinstance(here, list) else here.get(key)
    if isinstance(old, dict) and path in OUR_SECTIONS and not isinstance(value, dict):
        problems.add(f"--{path}={value!r} would replace a whole section", "name one of its keys: " + ", ".join(old))
        return
    keeps_text = isinstance(old, str) and value is not None and not isinstance(value, str)
    here[key] = text if keeps_text else value


def _known(section: str) -> tuple[str, ...]:
    return known_keys(section) if section in OUR_SECTIONS else OPEN_SECTIONS.get(section, ())


def _advice(section: str, step: str, here: dict[str, Any]) -> str:
    if section in OUR_SECTIONS:
        return advice(section, step)
    known = sorted({*here, *_known(section)})
    return nearest(step, known) if known else f"'{section}' holds no keys"
