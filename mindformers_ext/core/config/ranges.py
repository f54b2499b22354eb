# SPDX-License-Identifier: Apache-2.0
"""What the values around a network may be, on any road: kinds and ranges of the run's sections, as data.

The network's own values are judged where they are read (``core.config.view``), the names of keys in ``jobs.run``. A
value of null counts as left out. MindFormers checks few of these, and fails, hangs or trains with something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mindformers_ext.core.config.values import section_at
from mindformers_ext.core.errors import Problems

MOST = 2**31 - 1  # of a count
SEEDS = 2**32 - 1  # numpy takes no larger seed
Fits = Callable[[Any], bool]


@dataclass(frozen=True)
class Kind:
    """What a value must be, in words and as a test."""

    words: str
    fits: Fits


def whole(low: int, high: int = MOST, *more: int) -> Kind:
    """A whole number from ``low`` to ``high``, or one of ``more``."""
    also = "".join(f", or {number}" for number in more)
    start = "above 0" if low == 1 else f"from {low}"
    upper = f" up to {high}" if high != MOST else ""
    return Kind(f"a whole number {start}{upper}{also}", lambda v: is_whole(v) and (low <= v <= high or v in more))


def number(low: float, high: float = math.inf, above: bool = False, below: bool = False) -> Kind:
    """A finite number from ``low`` (``above``: over it) to ``high`` (``below``: under it)."""

    def fits(value: Any) -> bool:
        found = as_number(value)
        if found is None or not math.isfinite(found):
            return False
        return (found > low if above else found >= low) and (found < high if below else found <= high)

    start = "above" if above else "from"
    end = "" if high == math.inf else f" to {'below ' if below else ''}{high:g}"
    return Kind(f"a number {start} {low:g}{end}" if low > -math.inf else "a finite number", fits)


def is_whole(value: Any) -> bool:
    """Whether ``value`` is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def as_number(value: Any) -> float | None:
    """``value`` as a float, None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def is_file_stem(value: Any) -> bool:
    """Whether ``value`` can begin the name of a file and leads nowhere else."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= 100
        and not value.startswith(".")
        and not any(sign in value for sign in '/\\\0:*?"<>|')
        and value.isprintable()
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, str) or isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _is_betas(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(BETA.fits, value))


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


BETA = number(0, 1, below=True)
COUNT = whole(1)
RATE = number(0)
SHARE = number(0, 1)
SWITCH = Kind("True or False", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
PATH = Kind("a path as text", _is_path)
PATHS = Kind("a path or a list of paths", lambda value: _is_texts(value) and "\0" not in "".join(value))
TEXTS = Kind("a text or a list of texts", _is_texts)
STEM = Kind("the beginning of a file's name, without / and no dot in front", is_file_stem)
SECTION = Kind("a section (keys indented below it)", lambda value: isinstance(value, Mapping))
RESUME = Kind("True, False or the name of a checkpoint file", lambda v: isinstance(v, bool) or _is_path(v))
SINK_SIZE = whole(1, MOST, -1)

_DATA = {
    "data_loader": SECTION,
    "input_columns": TEXTS,
    "drop_remainder": SWITCH,
    "batch_size": COUNT,
    "num_parallel_workers": COUNT,
    "python_multiprocessing": SWITCH,
    "prefetch_size": COUNT,
    "numa_enable": SWITCH,
    "seed": whole(0, SEEDS),
    "data_loader.type": TEXT,
    "data_loader.dataset_dir": PATHS,
    "data_loader.dataset_files": PATHS,
    "data_loader.num_samples": Kind("a whole number", is_whole),  # -1 and 0 mean all
    "data_loader.num_parallel_workers": COUNT,
}
# dotted key -> what its value must be
RUN: dict[str, Kind] = {
    "seed": whole(0, SEEDS),
    "output_dir": PATH,
    "load_checkpoint": PATH,
    "src_strategy_path_or_dir": PATH,
    "resume_training": RESUME,
    "use_parallel": SWITCH,
    "auto_trans_ckpt": SWITCH,
    "load_ckpt_format": TEXT,
    "context": SECTION,
    "context.device_id": whole(0, 1023),
    "context.device_target": TEXT,
    "processor": SECTION,
    "processor.tokenizer": SECTION,
    "trainer": SECTION,
    "runner_config": SECTION,
    "runner_config.epochs": whole(1, 10**6),
    "runner_config.batch_size": whole(1, 2**20),
    "runner_config.gradient_accumulation_steps": whole(1, 2**20),
    "runner_config.sink_mode": SWITCH,
    "runner_config.sink_size": SINK_SIZE,
    "runner_config.stop_step": whole(0),
    "runner_config.freeze_gate": SWITCH,
    "runner_config.train_gate_only": SWITCH,
    "runner_config.dpo_beta": number(0, above=True),
    **{f"{name}.{key}": kind for name in ("train_dataset", "eval_dataset") for key, kind in _DATA.items()},
    "train_dataset": SECTION,
    "eval_dataset": SECTION,
}
TRAINING: dict[str, Kind] = {
    "optimizer": SECTION,
    "optimizer.type": TEXT,
    "optimizer.betas": Kind("a list of two numbers from 0 to below 1", _is_betas),
    "optimizer.beta1": BETA,
    "optimizer.beta2": BETA,
    "optimizer.eps": number(0, above=True),
    "optimizer.weight_decay": RATE,
    "lr_schedule": SECTION,
    "lr_schedule.type": TEXT,
    "lr_schedule.learning_rate": RATE,
    "lr_schedule.lr_end": RATE,
    "lr_schedule.warmup_lr_init": RATE,
    "lr_schedule.num_cycles": RATE,
    "lr_schedule.warmup_steps": whole(0),
    "lr_schedule.warmup_epochs": RATE,
    "lr_schedule.warmup_ratio": SHARE,
    "lr_schedule.decay_steps": whole(0),
    "lr_schedule.decay_ratio": SHARE,
    "lr_schedule.total_steps": whole(1, MOST, -1),
    "runner_wrapper": SECTION,
    "runner_wrapper.type": TEXT,
    "runner_wrapper.use_clip_grad": SWITCH,
    "runner_wrapper.max_grad_norm": number(0, above=True),
    "runner_wrapper.scale_sense": Kind(
        "a number above 0, or a section", lambda v: isinstance(v, Mapping) or number(0, above=True).fits(v)
    ),
    "runner_wrapper.scale_sense.type": TEXT,
    "runner_wrapper.scale_sense.loss_scale_value": number(0, above=True),
    "runner_wrapper.scale_sense.scale_factor": number(1),
    "runner_wrapper.scale_sense.scale_window": COUNT,
}
CALLBACK: dict[str, Kind] = {
    "type": TEXT,
    "per_print_times": COUNT,
    "prefix": STEM,
    "directory": PATH,
    "save_checkpoint_steps": whole(0),
    "save_checkpoint_seconds": whole(0),
    "keep_checkpoint_max": whole(0),
    "keep_checkpoint_per_n_minutes": whole(0),
    "integrated_save": SWITCH,
    "async_save": SWITCH,
    "checkpoint_format": TEXT,
    "topk_bias_update_rate": RATE,
}


def check_ranges(config: Mapping[str, Any], trains: bool, problems: Problems) -> None:
    """Add every value of the run's sections that is of another kind or out of range to ``problems``."""
    for path, kind in {**RUN, **(TRAINING if trains else {})}.items():
        section, _, name = path.rpartition(".")
        _check(path, section_at(config, section).get(name), kind, problems)
    for place, callback in enumerate(_callbacks(config, problems) if trains else ()):
        for name, kind in CALLBACK.items():
            _check(f"callbacks.{place}.{name}", callback.get(name), kind, problems)


def _callbacks(config: Mapping[str, Any], problems: Problems) -> Iterator[Mapping[str, Any]]:
    found = config.get("callbacks")
    if found is not None and not isinstance(found, (list, tuple)):
        problems.add(f"callbacks={shown(found)} is not a list", "write each as '- type: NAME'")
        return
    for item in found or ():
        yield item if isinstance(item, Mapping) else {}


def _check(path: str, value: Any, kind: Kind, problems: Problems) -> None:
    if value is None or value == "" and kind is SECTION or kind.fits(value):
        return
    problems.add(f"{path}={shown(value)} is not {kind.words}", "correct it or leave the key out")


def shown(value: Any) -> str:
    """A value in a message, its first characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
