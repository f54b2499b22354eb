# SPDX-License-Identifier: Apache-2.0
"""What can be judged of a run's data mixture before a network is built: its rows, its length, what it continues."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.mixture_words import MIXTURE
from mindformers_ext.core.config.run import OWN, Runner, RunSpec
from mindformers_ext.core.config.values import section_at
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.data.mixture.rules import ALIASES, RULES, Rule
from mindformers_ext.data.mixture.schedule import ERROR, RENORMALISE, REPEAT
from mindformers_ext.data.mixture.state import LARGEST, MixtureState, check_continues, state_from_json
from mindformers_ext.formats.ms_file import open_checkpoint
from mindformers_ext.formats.tensors import Reader
from mindformers_ext.jobs.run.dataset import SAMPLE_ROWS, check_rows
from mindformers_ext.jobs.run.mixture import Mixture, open_mixture

DATA = "data."  # of a batch source's own state in a checkpoint: data.<name>
STATE = "mixture"  # such a name: the bytes of a JSON text
# Keys that would change which rows come when, with the values that mean off.
OFF: dict[str, tuple[object, ...]] = {
    "train_dataset.repeat": (None, 1),
    "train_dataset.drop_remainder": (None, True),
    "train_dataset.eod_reset": (None, False),
    "train_dataset.dynamic_batch": (None, False),
    "ignore_data_skip": (None, False),
    "data_skip_steps": (None, 0),
}


def check_mixture(run: RunSpec, config: Mapping[str, Any], spec: NetworkSpec, rows: int) -> list[str]:
    """Check the data mixture of ``run``, a step of which takes ``rows`` rows of all processes; returns notes.

    Raises:
        UserError: what ``open_mixture`` refuses; rows that do not fit the network; an epoch shorter than a step; too
            few rows where none may come twice; a checkpoint of another mixture; a runner that cannot do it.
    """
    assert run.data is not None and run.data.mixture is not None
    _check_words(run, config)
    mixture = open_mixture(run.data.mixture)
    own = mixture.state(run.data.seed, rows)
    steps = steps_of_epoch(mixture, rows) * int(section_at(config, "runner_config").get("epochs") or 1)
    notes = [*mixture.notes, *_length_notes(mixture, steps * rows)]
    if mixture.settings.moves and mixture.interval >= steps:
        notes.append(f"the proportions will not move: the run has {steps} steps, a window {mixture.interval}")
    most = max(1, SAMPLE_ROWS // (len(mixture.files) + len(mixture.evaluated)))
    for word, files in (("domain", mixture.files), ("eval rows of", mixture.evaluated)):
        for name, paths in zip(mixture.names, files, strict=bool(files)):
            check_rows(paths, run.data, spec, run, most, f"{word} {name}")
    where = _resumed_file(run)
    if where is not None:
        with closing(open_checkpoint(where)) as reader:
            continued(held_state(reader), own, mixture, str(where))
    return notes


def check_plain(run: RunSpec) -> None:
    """Whether a run over one data set continues one that was no mixture.

    Raises:
        UserError: its checkpoint says where a data mixture stood.
    """
    where = _resumed_file(run)
    if where is None:
        return
    with closing(open_checkpoint(where)) as reader:
        is_mixed = f"{DATA}{STATE}" in reader.infos
    if is_mixed:
        raise UserError(
            f"cannot resume from {where}: its run drew a data mixture, train_dataset.data_loader.type is not "
            f"{MIXTURE}: give its mixture, or start from its weights without --resume_training"
        )


def _check_words(run: RunSpec, config: Mapping[str, Any]) -> None:
    """What a mixture cannot be combined with, by the words alone."""
    assert run.data is not None and run.data.mixture is not None
    problems = Problems("the data mixture (MixtureDataset)")
    if not run.trains:
        problems.add(
            f"run_mode {run.mode}: it is for training, which measures losses by domain",
            f"set {run.data.section}.data_loader.type to MindDataset and give one domain's files",
        )
    if run.family is None:
        problems.add(f"{run.network} is a network of MindFormers' own", "set MindDataset, or take a family of ours")
    rule = run.data.mixture.rule or "constant"
    if run.runner is not Runner.OWN_LOOP and (
        run.data.mixture.interval or RULES.get(ALIASES.get(rule, rule), Rule()).moves
    ):
        problems.add(
            "MindFormers' loop cannot measure losses by domain or move proportions",
            f"give --trainer {OWN}, or leave eval_interval out and take an update_type that does not move",
        )
    for place, off in OFF.items():
        section, _, name = place.rpartition(".")
        value = section_at(config, section).get(name)
        if value not in off:
            problems.add(f"{place}={value!r} is not built with it", "leave it out")
    problems.raise_if_any()


def _length_notes(mixture: Mixture, planned: int) -> list[str]:
    """How often domains come in ``planned`` rows, by the proportions at the start.

    Raises:
        UserError: more rows than there are, or than a fixed proportion has, where none may come twice.
    """
    rows = np.array([domain.rows for domain in mixture.domains], np.float64)
    wanted = mixture.proportions * planned
    over = [place for place in range(len(rows)) if wanted[place] > rows[place]]
    told = ", ".join(
        f"{mixture.names[i]} {wanted[i]:.0f} of {rows[i]:.0f} rows ({wanted[i] / rows[i]:.1f} passes)" for i in over
    )
    held = rows.sum() if mixture.settings.moves else rows[mixture.proportions > 0].sum()
    if mixture.on_exhausted != REPEAT and planned > held:
        raise UserError(
            f"on_exhausted {mixture.on_exhausted}: the run takes {planned} rows, its domains have {held:.0f}: "
            "train fewer steps (runner_config.epochs, data_loader.num_samples), or set on_exhausted to repeat"
        )
    if over and mixture.on_exhausted == ERROR and not mixture.settings.moves:
        raise UserError(
            f"on_exhausted error: the run takes about {told}: give them more rows or smaller proportions, or train "
            "fewer steps (runner_config.epochs, data_loader.num_samples)"
        )
    what = {REPEAT: "rows come again", RENORMALISE: "then the others are drawn instead", ERROR: "then the run ends"}
    return [f"by its first proportions the run takes {told}: {what[mixture.on_exhausted]}"] if over else []


def _resumed_file(run: RunSpec) -> Path | None:
    """The checkpoint of the first rank that ``run``, settled, continues from; None where it starts, or where slices are
    yet to be merged."""
    if not (run.trains and run.resume and run.load):
        return None
    path = Path(run.load)
    path = path if path.is_file() else path / "rank_0" / str(run.resume)
    return path if path.is_file() else None


def steps_of_epoch(mixture: Mixture, rows: int) -> int:
    """Steps of one epoch, ``rows`` each.

    Raises:
        UserError: not even one.
    """
    if mixture.samples < rows:
        raise UserError(
            f"an epoch of the data mixture has {mixture.samples} rows, one step takes {rows}: give more data, a larger "
            "data_loader.num_samples, or a smaller batch_size"
        )
    return mixture.samples // rows


def state_arrays(state: MixtureState) -> dict[str, np.ndarray]:
    """A state as the tensor of a checkpoint: the bytes of its text."""
    return {STATE: np.frombuffer(state.to_json().encode(), np.uint8).astype(np.int32)}


def continued(state: Mapping[str, np.ndarray], own: MixtureState, mixture: Mixture, where: str) -> MixtureState:
    """The state held in ``state``, of the checkpoint ``where``, if ``mixture``, which begins as ``own``, can go on.

    Raises:
        UserError: there is none, or it is that of another mixture.
    """
    held = state.get(STATE)
    if held is None:
        raise UserError(
            f"cannot resume from {where}: it holds no data mixture, so its run had other data: set "
            "data_loader.type to MindDataset, or start from its weights without --resume_training"
        )
    text = np.asarray(held).astype(np.uint8).tobytes().decode("utf-8", "replace")
    saved = state_from_json(text, where)
    check_continues(saved, own, where)
    if not mixture.settings.moves and not np.allclose(saved.proportions, own.proportions, rtol=0, atol=1e-9):
        raise UserError(
            f"cannot resume from {where}: its data mixture had the proportions {list(saved.proportions)}, which "
            f"update_type {mixture.settings.rule} keeps, now they are {list(own.proportions)}: give the same ones, or "
            "start from its weights without --resume_training"
        )
    return saved


def held_state(reader: Reader) -> dict[str, np.ndarray]:
    """What an open checkpoint holds of a batch source; of more than a state can have nothing is read."""
    names = [name for name in reader.infos if name.startswith(DATA)]
    small = [name for name in names if float(np.prod(reader.infos[name].shape, dtype=np.float64)) <= LARGEST]
    return {name.removeprefix(DATA): np.asarray(reader.read(name)) for name in small}
