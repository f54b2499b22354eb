# SPDX-License-Identifier: Apache-2.0
"""A run as its YAML asks for it: the one place where the keys around a network are read, with their defaults.

``core.config.view`` reads the network itself, ``core.config.train`` how our own loop trains it. Whoever carries a run
out gets a ``RunSpec``; the mapping goes on to MindFormers alone, with what the checks have settled (``settled_yaml``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from mindformers_ext.core.byte_sizes import read_size
from mindformers_ext.core.config.mixture_words import MixtureSpec, mixture_from_yaml, with_mixture_words
from mindformers_ext.core.config.ranges import check_ranges
from mindformers_ext.core.config.sampling import SamplingSpec, sampling_from_yaml
from mindformers_ext.core.config.values import read_value, section_at
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.families import Family, family_of_yaml
from mindformers_ext.core.spec import DeviceSpec

TRAINING = ("train", "finetune")
RUN_MODES = (*TRAINING, "eval", "predict")
ASCEND, GPU, CPU = DEVICES = ("Ascend", "GPU", "CPU")
MINDSPORE, PYTORCH = ENGINES = ("ms", "pt")
FRAMEWORKS = {MINDSPORE: "MindSpore", PYTORCH: "PyTorch"}
AUTO = "auto"  # --engine auto: what a run is computed with fastest
OWN, MINDFORMERS = TRAINERS = ("own", "mindformers")
TRAINER_KEY = "loop"  # at the top of the file; the section ``trainer`` is MindFormers'
JIT_LEVELS = ("O0", "O1", "O2")
MODEL = "model.model_config"
DATA_OF = {"train": "train_dataset", "finetune": "train_dataset", "eval": "eval_dataset"}
MINDRECORD = "MindDataset"
TEXTS = "text_generation_result.txt"
PERPLEXITY = "PerplexityMetric"
# What the checks settle: fields of ``RunSpec``, and the keys under which MindFormers reads them.
SETTLED = {
    "use_parallel": "use_parallel",
    "load": "load_checkpoint",
    "load_format": "load_ckpt_format",
    "auto_transform": "auto_trans_ckpt",
    "resume": "resume_training",
}


class Runner(Enum):
    """Who carries a run out."""

    MINDFORMERS = "MindFormers' Trainer"  # mf.run: it trains, evaluates and predicts, with networks of ours or its own
    OWN_LOOP = "our training loop"  # jobs.train, on the engine of the run
    OWN_EVALUATION = "our evaluation"  # jobs.predict.evaluate
    OWN_PREDICTION = "our prediction"  # jobs.predict.predict


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """A data set as its section describes it.

    ``loader``: its type; ``named``: files and folders as given; ``limit``: so many rows are used, None = all;
    ``mixture``: several domains' files, drawn by proportions. ``seed``: of the order of rows.
    """

    section: str
    loader: str = MINDRECORD
    named: tuple[Path, ...] = ()
    columns: tuple[str, ...] = ("input_ids",)
    limit: int | None = None
    drop_remainder: bool = True
    mixture: MixtureSpec | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What is run, on what, by whom, from what and to where.

    mode: of ``RUN_MODES``.
    engine: of ``ENGINES``, ``auto``: chosen for this run; ``trainer``: of ``TRAINERS``, None where nobody is named.
    network, family: the name that the YAML gives its network, and the family of ours that it means, if any.
    runner: what ``choose_runner`` says.
    load: file or folder of weights, None = random ones; ``load_format``: "ckpt" or "safetensors"; ``strategies``: the
        strategy files of slices; ``auto_transform``: cut or merge them for this run.
    resume: whether to continue a run, or the name of the checkpoint file to continue from.
    base: weights below the adapters of a continued run, whose checkpoints hold adapters alone; None = the first ones.
    batch_size, accumulation: rows per device and micro batch, and micro batches per step, as written.
    data: what ``mode`` reads.
    tokenizer: file, as given.
    has_adapters, adapter_ids: LoRA of ``pet_config``, and of MindFormers' prediction.
    metrics: names of what evaluation measures.
    prompts, rows, cached, sampling, save_file: of prediction. ``rows``: prompts computed together, None = all.
        ``sampling`` is there where the prediction is ours, and knows no end tokens yet.
    """

    mode: str
    device: DeviceSpec = DeviceSpec(ASCEND)
    engine: str = MINDSPORE
    auto: bool = False
    trainer: str | None = None
    network: str | None = None
    family: Family | None = None
    runner: Runner = Runner.MINDFORMERS
    output_dir: str = "./output"
    load: str | None = None
    load_format: str = "ckpt"
    strategies: Path | None = None
    auto_transform: bool = False
    resume: bool | str = False
    base: str | None = None
    seed: int = 0
    batch_size: int = 1
    accumulation: int = 1
    data: DataSpec | None = None
    tokenizer: str | None = None
    has_adapters: bool = False
    adapter_ids: tuple[str, ...] = ()
    metrics: frozenset[str] = frozenset()
    prompts: tuple[str, ...] = ()
    rows: int | None = None
    cached: bool = True
    sampling: SamplingSpec | None = None
    save_file: str | None = None
    register_path: str | None = None

    @property
    def trains(self) -> bool:
        """Whether weights change."""
        return self.mode in TRAINING

    @property
    def use_parallel(self) -> bool:
        """Whether several processes do the job together, each on a device of its own."""
        return self.device.together

    @property
    def compiles(self) -> bool:
        """Whether the engine compiles graphs before it computes, which takes long and is said."""
        return self.engine == MINDSPORE and not self.device.pynative

    @property
    def suffix(self) -> str:
        """Of checkpoint files: .ckpt or .safetensors."""
        return f".{self.load_format}"

    @property
    def faster_with_pytorch(self) -> bool:
        """Whether PyTorch gives the same answers sooner than MindSpore: for networks of ours in one process on a CPU,
        where it compiles nothing and reads weights faster (tools/bench/generate.py)."""
        ours = self.runner in (Runner.OWN_PREDICTION, Runner.OWN_EVALUATION)
        return ours and self.device.target == CPU and not self.use_parallel

    def alone(self) -> RunSpec:
        """The same run by this process alone."""
        return _decided(replace(self, device=replace(self.device, together=False)))


def choose_runner(run: RunSpec) -> Runner:
    """Who carries ``run`` out. We evaluate and predict our networks, without adapters; perplexity alone is measured, by
    one process. MindFormers trains where MindSpore computes, unless our loop is asked for."""
    ours = run.family is not None and not run.has_adapters
    if run.mode == "eval" and ours and not run.use_parallel and run.metrics <= {PERPLEXITY}:
        return Runner.OWN_EVALUATION
    if run.mode == "predict" and ours and not run.adapter_ids:
        return Runner.OWN_PREDICTION
    if run.engine == PYTORCH or (run.mode != "predict" and run.trainer == OWN):
        return Runner.OWN_LOOP
    return Runner.MINDFORMERS


def run_spec_from_yaml(config: Mapping[str, Any], where: str = "the configuration") -> RunSpec:
    """The run that ``config`` (from the file ``where``) asks for.

    Raises:
        UserError: no such mode or engine, or an engine that does not run on the device; a value of the wrong kind.
    """
    config = with_mixture_words(config)
    mode = config.get("run_mode")
    if mode not in RUN_MODES:
        raise UserError(f"{where}: run_mode={mode!r}: choose one of {', '.join(RUN_MODES)} (--run_mode)")
    problems = Problems(where)
    check_ranges(config, mode in TRAINING, problems)
    problems.raise_if_any()  # what follows takes the values as they are
    target = device_target(config)
    words, runner, arch = (section_at(config, path) for path in (MODEL, "runner_config", "model.arch"))
    output_dir = str(config.get("output_dir") or "./output")
    given = config.get("input_data") or ()
    asked = RunSpec(
        mode=mode,
        engine=_engine(config, target),
        auto=config.get("engine") == AUTO,
        device=_device(config, target, problems),
        trainer=_trainer(config, problems),
        network=arch.get("type"),
        family=family_of_yaml(config, target),
        output_dir=output_dir,
        load=str(config.get("load_checkpoint") or "") or None,
        load_format="safetensors" if config.get("load_ckpt_format") == "safetensors" else "ckpt",
        strategies=_path(config.get("src_strategy_path_or_dir")),
        auto_transform=bool(config.get("auto_trans_ckpt")),
        resume=config.get("resume_training") or False,
        seed=read_value("seed", config.get("seed"), "int", 0, problems),
        batch_size=_number(runner, "batch_size", Problems("")),  # judged with the network
        accumulation=_number(runner, "gradient_accumulation_steps", problems) or 1,
        data=_data(config, DATA_OF[mode], problems) if mode in DATA_OF else None,
        tokenizer=_tokenizer(config, problems),
        has_adapters=bool(words.get("pet_config")),
        adapter_ids=_texts(config.get("adapter_id") or ()),
        metrics=_metrics(config.get("metric")),
        prompts=_texts(given),
        rows=_rows(config) if mode == "predict" else None,
        cached=words.get("use_past", True) is not False,
        save_file=str(config.get("save_file", Path(output_dir) / TEXTS) or "") or None,
        register_path=str(config.get("register_path") or "") or None,
    )
    problems.raise_if_any()
    run = _decided(asked)
    if run.auto and run.faster_with_pytorch and importlib.util.find_spec("torch"):
        run = _decided(replace(run, engine=PYTORCH))
    if run.runner is Runner.OWN_PREDICTION:
        run = replace(run, sampling=sampling_from_yaml(words, (), run.seed))
    return run


def settled_yaml(config: Mapping[str, Any], asked: RunSpec, settled: RunSpec) -> dict[str, Any]:
    """A copy of ``config``, which ``asked`` was read from, with what is ``settled`` otherwise and where output goes."""
    changed = {
        key: getattr(settled, field)
        for field, key in SETTLED.items()
        if getattr(settled, field) != getattr(asked, field)
    }
    result = {**config, "output_dir": settled.output_dir, **changed}
    if settled.mode == "predict":
        result["save_file"] = settled.save_file
    return result


def device_target(config: Mapping[str, Any]) -> str:
    """The kind of device that a configuration names."""
    return str(section_at(config, "context").get("device_target") or ASCEND)


def data_spec_from_yaml(config: Mapping[str, Any], section: str) -> DataSpec | None:
    """The data set that ``section`` describes, None where it is missing.

    Raises:
        UserError: a value of the wrong kind.
    """
    problems = Problems("the configuration")
    found = _data(config, section, problems)
    problems.raise_if_any()
    return found


def _decided(run: RunSpec) -> RunSpec:
    return replace(run, runner=choose_runner(run))


def _engine(config: Mapping[str, Any], device: str) -> str:
    """``engine`` (``--engine``), else PyTorch on a GPU and MindSpore elsewhere, which ``AUTO`` begins with."""
    name = config.get("engine") or AUTO
    if name not in (*ENGINES, AUTO):
        raise UserError(f"engine={name!r} is unknown: choose one of {', '.join(ENGINES)}, {AUTO} (--engine)")
    if name == AUTO:
        return PYTORCH if device == GPU else MINDSPORE
    if name == PYTORCH and device not in (GPU, CPU):
        raise UserError(f"--engine pt with device_target {device}: PyTorch runs here on GPU and CPU (--device_target)")
    if name == MINDSPORE and device == GPU:
        raise UserError(
            "--engine ms with device_target GPU: MindSpore has no kernels for today's GPUs; leave --engine "
            "out, PyTorch runs there"
        )
    return str(name)


def _trainer(config: Mapping[str, Any], problems: Problems) -> str | None:
    name = config.get(TRAINER_KEY)
    if name is not None:
        problems.one_of(f"{TRAINER_KEY} (--trainer)", name, TRAINERS)
    return name


def _device(config: Mapping[str, Any], target: str, problems: Problems) -> DeviceSpec:
    """The device; memory and jit level are read where they are obeyed, on Ascend."""
    context = _section(config, "context", problems)
    own = context if target == ASCEND else {}
    memory, jit = own.get("max_device_memory"), own.get("jit_config") or {}
    level = jit.get("jit_level") if isinstance(jit, Mapping) else jit
    if level not in (None, "", *JIT_LEVELS):
        raise UserError(f"context.jit_config is {jit!r}: write jit_level: one of {', '.join(JIT_LEVELS)}")
    if memory:  # MindSpore takes no other unit
        memory = f"{read_size(str(memory), 'context.max_device_memory') / 1e9:.3f}".rstrip("0").rstrip(".") + "GB"
    return DeviceSpec(
        target,
        read_value("context.device_id", context.get("device_id"), "int", 0, problems),
        context.get("mode") in (1, "1", "PYNATIVE_MODE"),
        bool(config.get("use_parallel")),
        memory or None,
        level or None,
    )


def _number(runner: Mapping[str, Any], name: str, problems: Problems) -> int:
    return int(read_value(f"runner_config.{name}", runner.get(name), "int", 1, problems))


def _data(config: Mapping[str, Any], section: str, problems: Problems) -> DataSpec | None:
    words = _section(config, section, problems)
    if not words:
        return None
    loader = _section(config, f"{section}.data_loader", problems)
    limit = loader.get("num_samples")
    return DataSpec(
        section=section,
        loader=str(loader.get("type", MINDRECORD)),
        named=tuple(map(Path, _texts(loader.get("dataset_dir") or loader.get("dataset_files") or ()))),
        columns=_texts(words.get("input_columns") or "input_ids"),
        limit=limit if isinstance(limit, int) and limit > 0 else None,
        drop_remainder=bool(words.get("drop_remainder", True)),
        mixture=mixture_from_yaml(loader, f"{section}.data_loader", problems),
        seed=int(words.get("seed") or config.get("seed") or 0),
    )


def _tokenizer(config: Mapping[str, Any], problems: Problems) -> str | None:
    _section(config, "processor", problems)
    words = _section(config, "processor.tokenizer", problems)
    return str(words.get("vocab_file") or words.get("tokenizer_file") or "") or None


def _metrics(given: Any) -> frozenset[str]:
    items = given if isinstance(given, (list, tuple)) else [given]
    return frozenset(str(item["type"]) for item in items if isinstance(item, Mapping) and item.get("type"))


def _rows(config: Mapping[str, Any]) -> int | None:
    rows = config.get("predict_batch_size")
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
        raise UserError(f"predict_batch_size={rows!r}: give a whole number above 0")
    return rows


def _texts(given: Any) -> tuple[str, ...]:
    return tuple(map(str, given)) if isinstance(given, (list, tuple)) else (str(given),)


def _path(given: Any) -> Path | None:
    return Path(given) if given else None


def _section(config: Mapping[str, Any], path: str, problems: Problems) -> Mapping[str, Any]:
    """The section at ``path``; anything else that stands there is a problem."""
    parent, _, name = path.rpartition(".")
    value = section_at(config, parent).get(name)
    if value is not None and value != "" and not isinstance(value, Mapping):
        problems.add(f"{path}={value!r} is not a section", "indent its keys below it")
    return section_at(config, path)
