# SPDX-License-Identifier: Apache-2.0
"""Everything about a run that can be judged before a network is built, in the order in which it is cheap."""

from __future__ import annotations

import ctypes.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.cluster.cluster_rules import TOGETHER, check_network, settled
from mindformers_ext.core.cluster.tensor_parallel import check_tensor_parallel
from mindformers_ext.core.config.lora import lora_from_yaml
from mindformers_ext.core.config.recompute import recompute_from_yaml
from mindformers_ext.core.config.train import TRAINERS
from mindformers_ext.core.config.view import network_spec_from_yaml, yaml_notes
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.checkpoint.saved import check_shapes, checkpoint_file, choose_resume, fault, remove_leftovers
from mindformers_ext.jobs.checkpoint.transform import TransformRequest
from mindformers_ext.jobs.engine.door import engine_of
from mindformers_ext.jobs.run.dataset import check_dataset
from mindformers_ext.jobs.run.sections import check_sections
from mindformers_ext.jobs.run.slices import settle_slices

TRAINING = ("train", "finetune")
RUN_MODES = (*TRAINING, "eval", "predict")
DATASET = {"train": "train_dataset", "finetune": "train_dataset", "eval": "eval_dataset"}


@dataclass(frozen=True)
class CheckedRun:
    """A configuration that can run, and what the user should read in the log.

    ``merge``: slices that one process must put together before any loads ``load_checkpoint``.
    """

    config: dict[str, Any]
    spec: NetworkSpec
    notes: tuple[str, ...]
    engine: str = "ms"
    merge: TransformRequest | None = None


def check_run(config: Mapping[str, Any], where: str) -> CheckedRun:
    """Check ``config`` (from the file ``where``) and settle what to load and to resume.

    Raises:
        UserError: the first group of mistakes found: keys and values, then the device, files, and data.
    """
    result = {**config, "output_dir": config.get("output_dir") or "./output"}
    mode = result.get("run_mode")
    if mode not in RUN_MODES:
        raise UserError(f"{where}: run_mode={mode!r}: choose one of {', '.join(RUN_MODES)} (--run_mode)")
    engine = engine_of(result)
    own = runs_here(result, engine)
    try:
        check_sections(result, mode)
        spec = network_spec_from_yaml(result, device_count(result, engine))
        together = launched(engine) and predicts_together(result)
        notes = _check_together(result, spec, engine) if together else []
        notes += [*yaml_notes(result), *check_network(spec, TOGETHER if together else mode)]
        if engine == "ms" and mode != "predict":
            recompute_from_yaml(result, settled(spec)[0])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    check_device(str((result.get("context") or {}).get("device_target", "Ascend")))
    _check_lora(result, mode)
    if result.get("use_parallel") and not launched(engine):
        result["use_parallel"] = False
        script = "torchrun_launcher.sh" if engine == "pt" else "msrun_launcher.sh"
        notes.append(f"use_parallel becomes False: this process was started alone (scripts/{script})")
        if own:  # nothing reads the YAML again
            spec = network_spec_from_yaml(result, 1)
    if own and not names_our_network(result):
        raise UserError(
            f"{where}: {TRAINERS[engine]} has Mixtral and LLaMA (LlamaForCausalLM, MixtralForCausalLM), "
            f"not {((result.get('model') or {}).get('arch') or {}).get('type')}"
        )
    if mode == "predict" and not result.get("input_data"):
        raise UserError('run_mode predict has nothing to predict: give --predict_data "a prompt"')
    merge = None
    here = evaluates_here(result)
    if not generates_here(result) and not here:  # jobs.predict and jobs.evaluate judge weights and data themselves
        found, merge = (_settle_here(result), None) if own else _settle_checkpoint(result, spec)
        notes += found
        check_tokenizer(result, spec, mode)
    if mode in DATASET and not here:
        check_dataset(result, DATASET[mode], spec, mode, engine)
    if mode == "predict":
        result.setdefault("save_file", str(Path(result["output_dir"]) / "text_generation_result.txt"))
    return CheckedRun(result, spec, tuple(notes), engine, merge)


def _check_lora(config: Mapping[str, Any], mode: str) -> None:
    """What a run with adapters cannot do yet."""
    if lora_from_yaml(config) is None:
        return
    if mode not in TRAINING:
        raise UserError(
            f"pet_config with run_mode {mode}: merge the adapters into the base first (python "
            "tools/merge_lora.py --help), load the result, and leave pet_config out"
        )
    if config.get("resume_training"):
        raise UserError(
            "pet_config with resume_training is not built: the checkpoints hold the adapters only; start "
            "again from the base weights"
        )


def runs_here(config: Mapping[str, Any], engine: str) -> bool:
    """Whether our own loop does the run (``jobs.train``): asked for by ``--trainer own``, and always so for PyTorch.

    Raises:
        UserError: a trainer that does not exist, or has not this engine or run mode.
    """
    loop, mode = config.get("loop"), config.get("run_mode")
    if loop not in (None, "own", "mindformers"):
        raise UserError(f"loop={loop!r} is unknown: choose own or mindformers (--trainer)")
    if engine == "pt" and loop == "mindformers":
        raise UserError("--trainer mindformers runs on MindSpore: leave it out, or use --engine ms")
    if engine == "ms" and loop == "own" and mode == "eval" and not evaluates_here(config):
        raise UserError(
            "--trainer own with run_mode eval measures perplexity on one device, without pet_config: leave out "
            "--use_parallel, merge adapters first (tools/merge_lora.py), or use --trainer mindformers"
        )
    return engine == "pt" or (loop == "own" and mode in TRAINING)


def launched(engine: str = "ms") -> bool:
    """Whether a launcher started this process as one of several (or a simulation plays them)."""
    if engine == "pt":
        return "RANK" in os.environ and "WORLD_SIZE" in os.environ
    return any(os.environ.get(name) for name in ("MS_ROLE", "RANK_TABLE_FILE", "RANK_ID", "MS_SIMULATION_LEVEL"))


def names_our_network(config: Mapping[str, Any]) -> bool:
    """Whether the configuration means a network of ours: by its name, or as ``mf.adapt`` reads LlamaForCausalLM."""
    model = config.get("model") or {}
    words = model.get("model_config") or {}
    names = (words.get("type"), (model.get("arch") or {}).get("type"))
    experts = (config.get("moe_config") or words.get("moe_config") or {}).get("expert_num", 1) or 1
    if names == ("LlamaConfig", "LlamaForCausalLM"):
        return experts > 1 or (config.get("context") or {}).get("device_target", "Ascend") != "Ascend"
    return names in (("MixtralConfig", "MixtralForCausalLM"), ("PortableLlamaConfig", "PortableLlamaForCausalLM"))


def generates_here(config: Mapping[str, Any]) -> bool:
    """Whether ``jobs.predict.predict`` answers: a network of ours, without adapters. Else MindFormers does."""
    words = (config.get("model") or {}).get("model_config") or {}
    return bool(
        config.get("run_mode") == "predict"
        and names_our_network(config)
        and not config.get("adapter_id")
        and not words.get("pet_config")
    )


def predicts_together(config: Mapping[str, Any]) -> bool:
    """Whether several processes hold the network that answers."""
    return generates_here(config) and bool(config.get("use_parallel"))


def _check_together(config: Mapping[str, Any], spec: NetworkSpec, engine: str) -> list[str]:
    """What several processes need to predict together, and what only one can do; returns notes."""
    if engine == "pt":
        raise UserError(
            "prediction by several processes together is not built for the PyTorch engine: start one "
            "process, without use_parallel"
        )
    notes = check_tensor_parallel(spec)
    if not config.get("load_checkpoint"):
        raise UserError(
            "prediction on several devices needs load_checkpoint: random weights of each would not fit together"
        )
    given = config.get("input_data")
    if given in ("-", ["-"]):
        raise UserError(
            "--predict_data - reads the standard input of one process: give the prompts, or a text file "
            "with one on each line, to several"
        )
    return notes


def evaluates_here(config: Mapping[str, Any]) -> bool:
    """Whether ``jobs.predict.evaluate`` measures: one device, our network, no adapters, perplexity alone."""
    words = (config.get("model") or {}).get("model_config") or {}
    metrics = config.get("metric") or {}
    names = {item.get("type") for item in (metrics if isinstance(metrics, list) else [metrics])}
    return bool(
        config.get("run_mode") == "eval"
        and not config.get("use_parallel")
        and names_our_network(config)
        and names <= {"PerplexityMetric", None}
        and not words.get("pet_config")
    )


def device_count(config: Mapping[str, Any], engine: str = "ms") -> int:
    """Devices of the whole job: what the launcher says, 1 without ``use_parallel``."""
    if not config.get("use_parallel", False):
        return 1
    for name in ("WORLD_SIZE",) if engine == "pt" else ("MS_WORKER_NUM", "RANK_SIZE"):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return 1


def check_device(target: str) -> None:
    """Whether MindSpore can use ``target`` here, found out without importing it.

    Raises:
        UserError: no such device, or its software is not installed.
    """
    if target not in ("Ascend", "CPU", "GPU"):
        raise UserError(f"device_target={target!r} is unknown: choose Ascend, GPU or CPU (--device_target)")
    if target == "CPU":
        return
    if target == "Ascend":
        if not _has_library("libascendcl.so"):
            raise UserError(
                "device_target is Ascend, but this machine has no Ascend software (libascendcl.so of CANN is not "
                "found): run with --device_target CPU, or source CANN's set_env.sh"
            )
        return
    if not _has_library("libcuda.so.1"):
        raise UserError("device_target is GPU, but this machine has no CUDA driver: run with --device_target CPU")


def _has_library(name: str) -> bool:
    places = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    for variable in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        if os.environ.get(variable):
            places.append(os.path.join(os.environ[variable], "lib64"))
    if any(place and (Path(place) / name).exists() for place in places):
        return True
    return ctypes.util.find_library(name.removeprefix("lib").partition(".so")[0]) is not None


def check_tokenizer(config: Mapping[str, Any], spec: NetworkSpec, mode: str) -> None:
    """The tokenizer's ids must be rows of the embedding; predict needs a tokenizer.

    Raises:
        UserError: the file is missing, or its vocabulary is larger than ``vocab_size``.
    """
    section = (config.get("processor") or {}).get("tokenizer") or {}
    name = section.get("vocab_file") or section.get("tokenizer_file")
    if not name:
        if mode == "predict":
            raise UserError(
                "run_mode predict needs a tokenizer: set processor.tokenizer.vocab_file to the .model file "
                "(--processor.tokenizer.vocab_file)"
            )
        return
    path = Path(name)
    if not path.is_file():
        if mode == "predict":
            raise UserError(f"processor.tokenizer.vocab_file {path} does not exist: give the model's tokenizer")
        return
    if path.suffix == ".model":
        from mindformers_ext.data.tokenizers import SentencePieceTokenizer

        size = SentencePieceTokenizer(path).vocab_size
        if size > spec.model.vocab_size:
            rows = spec.model.vocab_size
            raise UserError(
                f"the tokenizer {path} has {size} pieces, model_config.vocab_size is {rows}: ids from {rows} on have "
                f"no embedding; set vocab_size to {size} or more, or give the model's own tokenizer"
            )


def _settle_checkpoint(config: dict[str, Any], spec: NetworkSpec) -> tuple[list[str], TransformRequest | None]:
    """Check ``load_checkpoint`` and choose where to resume; returns notes, and what to merge. Changes ``config``."""
    notes: list[str] = []
    if config.get("resume_training") and config["run_mode"] in TRAINING:
        notes += _settle_resume(config)
    name = config.get("load_checkpoint")
    if not name:
        if config["run_mode"] in ("eval", "predict"):
            notes.append("no load_checkpoint: the network keeps its random weights")
        return notes, None
    path = Path(name)
    if not path.exists():
        raise UserError(
            f"load_checkpoint {path} does not exist: give a .ckpt or .safetensors file, or a folder with rank_0 in it"
        )
    if path.is_dir() and (path / "config.json").is_file():
        raise UserError(
            f"load_checkpoint {path} is a Hugging Face folder: convert it first (python convert_weight.py "
            "--help) and give the result"
        )
    settled, merge = settle_slices(config, spec, _suffix(config))
    notes += settled
    if merge is None:
        notes += _check_checkpoint(config, spec, Path(config["load_checkpoint"]))
    return notes, merge


def _settle_here(config: dict[str, Any]) -> list[str]:
    """The same for our own loop, which judges weights itself, of more kinds. Changes ``config``."""
    if config.get("resume_training") and config["run_mode"] in TRAINING:
        return _settle_resume(config, any_kind=True)
    return [] if config.get("load_checkpoint") else ["no load_checkpoint: the network starts from random weights"]


def _settle_resume(config: dict[str, Any], any_kind: bool = False) -> list[str]:
    name, wanted = config.get("load_checkpoint"), config["resume_training"]
    folder = Path(name or Path(config["output_dir"]) / "checkpoint")
    suffix = _suffix(config)
    if any_kind and not any(folder.glob(f"rank_*/*{suffix}")) and any(folder.glob("rank_*/*.safetensors")):
        suffix = ".safetensors"
    if not name and not any(folder.glob(f"rank_*/*{suffix}")):
        left = remove_leftovers(folder)
        config["resume_training"] = False
        what = f" ({', '.join(path.name for path in left)} was half written)" if left else ""
        return [f"resume_training: {folder} holds no whole checkpoint yet{what}, the run starts from step 0"]
    if suffix == ".safetensors" and not config.get("use_parallel") and not any_kind:
        raise UserError(
            f"cannot resume from {folder}: MindFormers resumes one device from .ckpt only, load_ckpt_format is "
            "safetensors; save with checkpoint_format: ckpt, or start from the weights without --resume_training"
        )
    config["load_checkpoint"] = str(folder)
    if folder.is_file():
        reason = fault(folder)
        if reason:
            raise UserError(f"cannot resume from {folder}: {reason}")
        return [f"resuming from {folder}"]
    point = choose_resume(folder, wanted if isinstance(wanted, str) else None, suffix)
    config["resume_training"] = point.saved.path.name
    notes = [f"passed over: {reason}" for reason in point.passed_over]
    remove_leftovers(folder)
    return [
        *notes,
        f"resuming from {point.saved.path}, the newest whole checkpoint (epoch {point.saved.epoch}, step "
        f"{point.saved.step} of it)",
    ]


def _check_checkpoint(config: dict[str, Any], spec: NetworkSpec, path: Path) -> list[str]:
    """Shapes of a whole checkpoint; a sliced one can only be judged with its strategy."""
    suffix = _suffix(config)
    resume = config.get("resume_training")
    file = path / "rank_0" / resume if path.is_dir() and isinstance(resume, str) else checkpoint_file(path, suffix)
    if file is None:
        raise UserError(
            f"load_checkpoint {path} holds no {suffix} file: give a checkpoint file, or a folder with rank_0 in it "
            "(load_ckpt_format chooses .ckpt or .safetensors)"
        )
    if len(list(path.glob("rank_*"))) > 1 or config.get("auto_trans_ckpt"):
        return []
    check_shapes(file, spec.model)
    if file.suffix != ".safetensors":
        return []
    notes = []
    if config.get("load_ckpt_format", "ckpt") != "safetensors":
        config["load_ckpt_format"] = "safetensors"
        notes.append("load_ckpt_format becomes safetensors, the kind of load_checkpoint")
    if not config.get("use_parallel") and file.parent.name.startswith("rank_"):
        config["load_checkpoint"] = str(_outside_rank_folder(file, Path(config["output_dir"])))
    return notes


def _outside_rank_folder(file: Path, output_dir: Path) -> Path:
    """A link to ``file``: MindFormers takes safetensors in a folder rank_0 for one slice of several and refuses it."""
    link = output_dir / "loaded" / file.name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(file.resolve())
    return link


def _suffix(config: Mapping[str, Any]) -> str:
    return ".safetensors" if config.get("load_ckpt_format") == "safetensors" else ".ckpt"
