# SPDX-License-Identifier: Apache-2.0
"""A continued run with LoRA adapters: its checkpoints hold adapters and their state, the weights below come from where
they came from at first, which the run's ``adapter_config.json`` tells."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.config.lora import ADAPTER_CONFIG, LORA_A, LORA_B, LoraSpec
from mindformers_ext.core.config.run import RunSpec
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.ms_file import SUFFIXES, open_checkpoint
from mindformers_ext.formats.rank_dirs import rank_folders
from mindformers_ext.jobs.checkpoint.saved import saved_in
from mindformers_ext.jobs.run.keep import kept_above, run_folders

BASE = "base_model_name_or_path"
COMPARED = {"lora_rank": "r", "lora_alpha": "lora_alpha", "target_modules": "target_modules"}
COMPARED |= {"exclude_layers": "exclude_modules"}


def settle_adapters(run: RunSpec, lora: LoraSpec) -> tuple[RunSpec, list[str]]:
    """``run`` with ``load``, where adapters are to be continued from, and ``base``, what lies below them; and notes.

    ``load_checkpoint`` may name either, as in the command that began the run (the base) or in one that continues it
    (its folder ``checkpoint``); what it does not name is ``<output_dir>/checkpoint``, and the base on record.

    Raises:
        UserError: another rank, scale or choice of layers than the run had, or its base is gone.
    """
    given = Path(run.load) if run.load else None
    names_adapters = given is not None and holds_adapters(given)
    place = given if given is not None and names_adapters else Path(run.output_dir) / "checkpoint"
    base = None if names_adapters else run.load
    file, notes = _record(place), []
    if file is None:
        notes.append(
            f"no {ADAPTER_CONFIG} above {place}: lora_alpha of the former run is not known, {lora.alpha} is used"
        )
    else:
        words = read_object(file, "copy it from the run's output folder again")
        _check_same(words, lora, file)
        former = words.get(BASE) if isinstance(words.get(BASE), str) else None
        if words.get("lora_dropout") not in (None, lora.dropout):
            notes.append(f"lora_dropout goes from {words['lora_dropout']} to {lora.dropout}")
        if base and former and Path(base).resolve() != Path(former).resolve():
            notes.append(f"the adapters lie on {base} from now on; the run began on {former}")
        base = base or former
    if base is None:
        notes += _seed_notes(run, place)
    elif not Path(base).exists():
        raise UserError(
            f"the adapters of {place} lie on {base}, which does not exist: give the base weights "
            "(--load_checkpoint BASE), and the run's folder (--output_dir)"
        )
    notes.append(f"adapters on {base}" if base else "adapters on the first weights of the seed")
    return replace(run, load=str(place) if names_adapters else None, base=base), notes


def holds_adapters(path: Path) -> bool:
    """Whether ``path``, a file or a folder with rank folders, is what a run with adapters has saved."""
    if path.is_dir():
        ranks = next(iter(rank_folders(path).values()), None)
        held = [item.path for suffix in SUFFIXES for item in saved_in(ranks, suffix)] if ranks else []
        return bool(held) and holds_adapters(held[-1])
    if not path.is_file() or path.suffix not in SUFFIXES:
        return False
    with closing(open_checkpoint(path)) as reader:
        return "global_step" in reader.infos and any(name.endswith((LORA_A, LORA_B)) for name in reader.infos)


def _record(place: Path) -> Path | None:
    """The description of the adapters in ``place``, from the run's folder."""
    return next((folder / ADAPTER_CONFIG for folder in run_folders(place) if (folder / ADAPTER_CONFIG).is_file()), None)


def _check_same(words: Mapping[str, Any], lora: LoraSpec, file: Path) -> None:
    problems, ours = Problems(f"pet_config is not that of the run to be continued ({file})"), lora.peft_words()
    for key, word in COMPARED.items():
        if word in words and words[word] != ours[word]:
            problems.add(
                f"{key}={ours[word]!r}, the run has {words[word]!r}",
                "set it back, or start a new run in another --output_dir without --resume_training",
            )
    problems.raise_if_any()


def _seed_notes(run: RunSpec, place: Path) -> list[str]:
    """First weights come from the seed, so it must be the former one; a note where that is not known."""
    former = kept_above(place, run.mode)
    if former is None:
        return [f"no run_config above {place}: the seed of the former run is not known, {run.seed} is used"]
    seed = load_yaml(former).get("seed") or 0
    if seed != run.seed:
        raise UserError(
            f"seed={run.seed}, the run had {seed}, and its adapters lie on the first weights of that seed: set --seed "
            f"{seed}, or start a new run without --resume_training"
        )
    return []
