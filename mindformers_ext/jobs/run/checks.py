# SPDX-License-Identifier: Apache-2.0
"""Everything about a run that can be judged before a network is built, in the order in which it is cheap."""

from __future__ import annotations

import ctypes.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindformers_ext.core.cluster.build import BuildSpec
from mindformers_ext.core.cluster.cluster_rules import TOGETHER
from mindformers_ext.core.cluster.judged import build_network, judge_network, read_network
from mindformers_ext.core.cluster.tensor_parallel import check_tensor_parallel
from mindformers_ext.core.config.foreign import has_our_weights, is_llama
from mindformers_ext.core.config.mixture_words import with_mixture_words
from mindformers_ext.core.config.run import (
    ASCEND,
    CPU,
    DEVICES,
    FRAMEWORKS,
    GPU,
    MINDFORMERS,
    MINDSPORE,
    OWN,
    PYTORCH,
    Runner,
    RunSpec,
    run_spec_from_yaml,
    settled_yaml,
)
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import FAMILIES, own_families
from mindformers_ext.core.preferences import PAIR_COLUMNS, holds_pairs
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.checkpoint.transform import TransformRequest
from mindformers_ext.jobs.run.dataset import check_dataset, rows_of_step
from mindformers_ext.jobs.run.mixture_checks import check_mixture, check_plain
from mindformers_ext.jobs.run.seam import seam_notes, update_rows
from mindformers_ext.jobs.run.sections import check_sections
from mindformers_ext.jobs.run.start import settle_for_mindformers, settle_for_own_loop

LIBRARIES = {ASCEND: "libascendcl.so", GPU: "libcuda.so.1"}


@dataclass(frozen=True)
class CheckedRun:
    """A run that can be carried out, and what the user should read in the log.

    ``config``: the YAML's content with what was settled, for MindFormers and for the record. ``build``: what the
    network is built from. ``merge``: slices that one process must put together before any loads ``run.load``.
    """

    config: dict[str, Any]
    run: RunSpec
    build: BuildSpec
    notes: tuple[str, ...]
    merge: TransformRequest | None = None


def check_run(config: Mapping[str, Any], where: str) -> CheckedRun:
    """Check ``config`` (from the file ``where``) and settle what to load and to resume.

    Raises:
        UserError: the first group of mistakes found: keys and values, then the device, files, and data.
    """
    config = with_mixture_words(config)
    asked = run = run_spec_from_yaml(config, where)
    read, build, notes = check_words(config, run, device_count(run), where, launched(run.engine))
    check_device(run.device.target)
    _check_lora(run)
    _check_pruning(run, build)
    if run.use_parallel and not launched(run.engine):
        run = run.alone()
        alone = replace(read.parallel, parallel_mode="stand_alone", device_num=1)
        build = build_network(replace(read, parallel=alone), config, run, run.engine == MINDSPORE)
        script = "torchrun_launcher.sh" if run.engine == PYTORCH else "msrun_launcher.sh"
        notes.append(f"use_parallel becomes False: this process was started alone (scripts/{script})")
    _check_runner(run, where)
    if run.mode == "predict" and not run.prompts:
        raise UserError('run_mode predict has nothing to predict: give --predict_data "a prompt"')
    merge = None
    # our prediction and our evaluation judge weights and data themselves
    if run.runner is Runner.OWN_LOOP:
        run, found = settle_for_own_loop(run, build)
        notes += found
    elif run.runner is Runner.MINDFORMERS:
        known = run.family is not None or has_our_weights(config)
        run, found, merge = settle_for_mindformers(run, build, known)
        notes += found
    _check_first_weights(run, build.network)
    if run.data and run.data.mixture:
        own = run.runner is Runner.OWN_LOOP
        rows = rows_of_step(run, build.network)[0] if own else update_rows(run, build.network)
        notes += check_mixture(run, config, build.network, rows)
    elif run.family is not None:
        check_plain(run)
    if run.runner in (Runner.OWN_LOOP, Runner.MINDFORMERS) and (run.family is not None or is_llama(config)):
        check_tokenizer(run, build.network)
        if run.mode != "predict":
            check_dataset(run, build.network)
        if run.trains and run.resume:
            notes += seam_notes(config, run, build.network)
    return CheckedRun(settled_yaml(config, asked, run), run, build, tuple(notes), merge)


def check_words(
    config: Mapping[str, Any], run: RunSpec, devices: int, where: str, together: bool = True
) -> tuple[NetworkSpec, BuildSpec, list[str]]:
    """What can be judged by the words of ``config`` alone, from which ``run`` was read, for so many devices.

    Args:
        config: the YAML's content with options applied.
        run: what ``run_spec_from_yaml`` makes of it.
        devices: of the whole job.
        where: the file, for messages.
        together: whether a launcher has started the job's processes.

    Returns:
        The network as written, what is built of it, and notes.

    Raises:
        UserError: lists what is wrong.
    """
    try:
        dead = check_sections(config, run.mode)
        read, notes = read_network(config, run, devices)
        parts = run.runner is Runner.OWN_PREDICTION and run.use_parallel and together
        if parts:
            notes = [*_check_together(run, read), *notes]
        if run.auto:
            notes = [f"engine auto: {FRAMEWORKS[run.engine]} computes this run", *notes]
        notes = [*dead, *notes, *judge_network(read, run, TOGETHER if parts else run.mode)]
        return read, build_network(read, config, run, run.engine == MINDSPORE), notes
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_runner(run: RunSpec, where: str) -> None:
    """Whether ``run.runner`` can do it."""
    if run.engine == PYTORCH and run.trainer == MINDFORMERS and run.trains:
        raise UserError(
            "--trainer mindformers with the PyTorch engine: MindFormers computes with MindSpore; leave --trainer out, "
            "or choose --engine ms"
        )
    pairs = run.data is not None and holds_pairs(run.data.columns)
    if pairs and (run.runner is Runner.MINDFORMERS or not run.trains):
        what = "MindFormers' loop does not" if run.trains else f"run_mode {run.mode} cannot"
        raise UserError(
            f"{where}: input_columns {', '.join(PAIR_COLUMNS)}: {what} learn from pairs of answers: train with "
            f"--trainer {OWN}"
        )
    if run.runner is not Runner.OWN_LOOP:
        return
    who = "the PyTorch engine" if run.engine == PYTORCH else f"--trainer {OWN}"
    if run.family is None:
        ours = ", ".join(FAMILIES[name].hf_class for name in own_families())
        raise UserError(f"{where}: {who} has networks of our own ({ours}), not {run.network}")
    if run.mode == "predict":
        raise UserError("adapter_id belongs to MindFormers' prediction, which the PyTorch engine has not: leave it out")
    if run.mode == "eval":
        raise UserError(
            f"run_mode eval of {who} measures perplexity on one device, without pet_config: "
            "leave out --use_parallel, and merge adapters first (tools/merge_lora.py)"
        )


def _check_first_weights(run: RunSpec, spec: NetworkSpec) -> None:
    """Whether a settled run may start from random weights, if it loads none."""
    moe = spec.model.moe
    if run.trains and not (run.load or run.base) and moe is not None and moe.expert_sizes:
        raise UserError(
            "size_experts without load_checkpoint: experts of different sizes come from a model that was cut, and "
            "random weights have one size; give its weights, or leave size_experts out"
        )


def _check_lora(run: RunSpec) -> None:
    """What a run of ours with adapters cannot do yet."""
    if not run.has_adapters or run.family is None:
        return
    if not run.trains:
        raise UserError(
            f"pet_config with run_mode {run.mode}: merge the adapters into the base first (python "
            "tools/merge_lora.py --help), load the result, and leave pet_config out"
        )


def _check_pruning(run: RunSpec, build: BuildSpec) -> None:
    """Masks are folded into the weights before these are used."""
    if build.pruning is None:
        return
    if not run.trains:
        raise UserError(
            f"l0_module with run_mode {run.mode}: cut the model first (python tools/prune.py --help), load the result, "
            "and leave l0_module out"
        )


def launched(engine: str = MINDSPORE) -> bool:
    """Whether a launcher started this process as one of several (or a simulation plays them)."""
    if engine == PYTORCH:
        return "RANK" in os.environ and "WORLD_SIZE" in os.environ
    return any(os.environ.get(name) for name in ("MS_ROLE", "RANK_TABLE_FILE", "RANK_ID", "MS_SIMULATION_LEVEL"))


def _check_together(run: RunSpec, spec: NetworkSpec) -> list[str]:
    """What several processes need to predict together, and what only one can do; returns notes."""
    if run.engine == PYTORCH:
        raise UserError(
            "prediction by several processes together is not built for the PyTorch engine: start one "
            "process, without use_parallel"
        )
    notes = check_tensor_parallel(spec)
    if not run.load:
        raise UserError(
            "prediction on several devices needs load_checkpoint: random weights of each would not fit together"
        )
    if run.prompts == ("-",):
        raise UserError(
            "--predict_data - reads the standard input of one process: give the prompts, or a text file "
            "with one on each line, to several"
        )
    return notes


def device_count(run: RunSpec) -> int:
    """Devices of the whole job: what the launcher says, 1 without ``use_parallel``."""
    if not run.use_parallel:
        return 1
    for name in ("WORLD_SIZE",) if run.engine == PYTORCH else ("MS_WORKER_NUM", "RANK_SIZE"):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return 1


def check_device(target: str) -> None:
    """Whether MindSpore can use ``target`` here, found out without importing it.

    Raises:
        UserError: no such device, or its software is not installed.
    """
    if target not in DEVICES:
        raise UserError(f"device_target={target!r} is unknown: choose Ascend, GPU or CPU (--device_target)")
    if target == CPU:
        return
    if has_device(target):
        return
    if target == ASCEND:
        raise UserError(
            "device_target is Ascend, but this machine has no Ascend software (libascendcl.so of CANN is not found): "
            "run with --device_target CPU, or source CANN's set_env.sh"
        )
    raise UserError("device_target is GPU, but this machine has no CUDA driver: run with --device_target CPU")


def has_device(target: str) -> bool:
    """Whether the library that drives ``target`` is there; a CPU always is."""
    return target == CPU or _has_library(LIBRARIES[target])


def _has_library(name: str) -> bool:
    places = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    for variable in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        if os.environ.get(variable):
            places.append(os.path.join(os.environ[variable], "lib64"))
    if any(place and (Path(place) / name).exists() for place in places):
        return True
    return ctypes.util.find_library(name.removeprefix("lib").partition(".so")[0]) is not None


def check_tokenizer(run: RunSpec, spec: NetworkSpec) -> None:
    """The tokenizer's ids must be rows of the embedding; predict needs a tokenizer.

    Raises:
        UserError: the file is missing, or its vocabulary is larger than ``vocab_size``.
    """
    predicts = run.mode == "predict"
    if not run.tokenizer:
        if predicts:
            raise UserError(
                "run_mode predict needs a tokenizer: set processor.tokenizer.vocab_file to the .model file "
                "(--processor.tokenizer.vocab_file)"
            )
        return
    path = Path(run.tokenizer)
    if not path.is_file():
        if predicts:
            raise UserError(f"processor.tokenizer.vocab_file {path} does not exist: give the model's tokenizer")
        return
    if path.suffix == ".model":
        from mindformers_ext.data.tokenizers import open_tokenizer

        size = open_tokenizer(path).base_size
        if size > spec.model.vocab_size:
            rows = spec.model.vocab_size
            raise UserError(
                f"the tokenizer {path} has {size} pieces, model_config.vocab_size is {rows}: ids from {rows} on have "
                f"no embedding; set vocab_size to {size} or more, or give the model's own tokenizer"
            )
