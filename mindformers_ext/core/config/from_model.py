# SPDX-License-Identifier: Apache-2.0
"""The YAML of a run that nobody has written one for: from a model's spec and a few words, with a default for the rest.

What comes out is read again like any YAML (``core.config.run``, ``core.config.view``); nothing depends on where it came
from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mindformers_ext.core.config.keys import KEYS, MODEL
from mindformers_ext.core.config.run import AUTO, CPU, OWN, PERPLEXITY, PYTORCH, TRAINER_KEY
from mindformers_ext.core.config.values import section_at
from mindformers_ext.core.config.view import yaml_from_network_spec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec, NumericsSpec

# Below this many tokens a window is cut, where the model has more positions: one batch of logits stays near a gigabyte.
LONGEST_WINDOW = 2048
LONGEST_ROW = 512  # of training, where the data do not tell
MAX_NEW_TOKENS = {"predict": 128, "chat": 512}
BATCH = 4  # rows of a training step
# parts of a spec whose defaults are MindFormers' own and say nothing about this model
UNSAID = ("kernels", "parallel", "moe", "shared", "network")
FULL, HALF = "float32", ("float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class FirstTry:
    """What is asked of a model without a YAML.

    job: train, eval, predict or chat. load: weights; tokenizer: its file or folder, "" where none was found.
    device: of ``DEVICES``; engine: of ``ENGINES``, None where the device tells. stored: type of the weights there.
    seq_length: tokens of a window or row, None: a default. data: the file that is read; columns: of MindRecord; rows:
    how many there are. prompts: of prediction.
    """

    job: str
    load: str
    tokenizer: str = ""
    device: str = CPU
    engine: str | None = None
    stored: str = FULL
    seq_length: int | None = None
    data: str = ""
    columns: tuple[str, ...] = ("input_ids",)
    rows: int = BATCH
    prompts: tuple[str, ...] = field(default=())


def yaml_from_model(model: ModelSpec, asked: FirstTry) -> dict[str, Any]:
    """The content of a MindFormers YAML that does what is ``asked`` of ``model``."""
    train = asked.job == "train"
    mode = "predict" if asked.job == "chat" else asked.job
    network = NetworkSpec(
        model=model,
        seq_length=asked.seq_length or _length(model, asked.job),
        batch_size=min(BATCH, asked.rows) if train else 1,
        numerics=_numerics(asked),
    )
    sections = _short(yaml_from_network_spec(network))
    kind, architecture = model.family_row.yaml_names[0]  # on every device ours
    words = {"type": kind, **{name: value for name, value in section_at(sections, MODEL).items() if name != "type"}}
    if words.get("moe_gate") == model.family_row.gate:  # the name says it
        del words["moe_gate"]
    sections["model"] = {"model_config": words, "arch": {"type": architecture}}
    head: dict[str, Any] = {"run_mode": mode, "seed": 0, "output_dir": "./output", "use_parallel": False}
    head |= {"engine": asked.engine} if asked.engine else {}
    head |= {TRAINER_KEY: OWN} if train else {}
    head |= {"load_checkpoint": asked.load, "context": {"mode": 0, "device_target": asked.device}}
    result = {**head, **sections}
    if asked.tokenizer:
        result["processor"] = {"tokenizer": {"vocab_file": asked.tokenizer}}
    result |= _PARTS[mode](model, asked, section_at(result, MODEL))
    return result


def _length(model: ModelSpec, job: str) -> int:
    positions = model.max_position_embeddings
    return {"train": min(positions, LONGEST_ROW), "eval": min(positions, LONGEST_WINDOW)}.get(job, positions)


def _numerics(asked: FirstTry) -> NumericsSpec:
    """float32 on a CPU, from weights that PyTorch leaves in the type of the file; elsewhere the type of the file, which
    training keeps for products alone, if it has float32's range."""
    if asked.stored not in HALF:
        return NumericsSpec()
    if asked.device == CPU:
        keeps = asked.job != "train" and asked.engine in (PYTORCH, AUTO)
        return NumericsSpec(param_dtype=asked.stored) if keeps else NumericsSpec()
    if asked.job == "train":
        return NumericsSpec(compute_dtype=asked.stored if asked.stored == "bfloat16" else FULL)
    return NumericsSpec(compute_dtype=asked.stored, param_dtype=asked.stored)


def _short(sections: dict[str, Any]) -> dict[str, Any]:
    """``sections`` without what MindFormers takes anyway; empty ones go."""
    for key in KEYS:
        found = section_at(sections, key.section)
        unsaid = key.part in UNSAID or key.kind in ("bool", "layers")
        if key.name in found and (found[key.name] in (None, []) or (unsaid and found[key.name] == key.default)):
            assert isinstance(found, dict)
            del found[key.name]
    alone = ("use_parallel", "parallel", "runner_config")  # of one device; training says its own
    return {name: value for name, value in sections.items() if value != {} and name not in alone}


def _predict(model: ModelSpec, asked: FirstTry, words: Mapping[str, Any]) -> dict[str, Any]:
    assert isinstance(words, dict)
    words |= {"use_past": True, "do_sample": False, "max_new_tokens": MAX_NEW_TOKENS[asked.job]}
    prompts = asked.prompts
    return {"input_data": prompts[0] if len(prompts) == 1 else list(prompts)} if prompts else {}


def _eval(model: ModelSpec, asked: FirstTry, words: Mapping[str, Any]) -> dict[str, Any]:
    return {"metric": {"type": PERPLEXITY}, "eval_dataset": _data(asked, shuffle=False)}


def _train(model: ModelSpec, asked: FirstTry, words: Mapping[str, Any]) -> dict[str, Any]:
    """Finetuning: Alpaca's schedule, which hurts no model that is trained already."""
    schedule = {"type": "CosineWithWarmUpLR", "learning_rate": 2.0e-5, "lr_end": 0.0, "warmup_ratio": 0.03}
    return {
        "runner_config": {"epochs": 1, "batch_size": min(BATCH, asked.rows), "sink_mode": False},
        "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1.0e-8, "weight_decay": 0.0},
        "lr_schedule": {**schedule, "total_steps": -1},
        "runner_wrapper": {"type": "MFTrainOneStepCell", "use_clip_grad": True, "scale_sense": 1.0},
        "callbacks": [
            {"type": "MFLossMonitor", "per_print_times": 1, "tensorboard": False},
            {
                "type": "CheckpointMonitor",
                "prefix": model.model_type,
                "save_checkpoint_steps": 100,
                "keep_checkpoint_max": 2,
            },
        ],
        "train_dataset": _data(asked, shuffle=True),
    }


def _data(asked: FirstTry, shuffle: bool) -> dict[str, Any]:
    return {
        "data_loader": {"type": "MindDataset", "dataset_dir": asked.data, "shuffle": shuffle},
        "input_columns": list(asked.columns),
        "drop_remainder": shuffle,
    }


_PARTS = {"predict": _predict, "eval": _eval, "train": _train}
