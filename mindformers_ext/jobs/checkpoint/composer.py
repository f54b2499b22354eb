# SPDX-License-Identifier: Apache-2.0
"""LLM-Shearing's Composer checkpoints: read as a model of Hugging Face's, written from one, renamed and nothing else.

A ``.pt`` file is written at once, so the whole model is in memory; a ``.safetensors`` file streams.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.families import LLAMA
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.atomic import fresh_file, fresh_folder, refuse_existing
from mindformers_ext.formats.dtypes import BY_NUMPY, cast, float_dtype
from mindformers_ext.formats.safetensors_dir import CONFIG, SafetensorsDirWriter
from mindformers_ext.formats.safetensors_file import SafetensorsFile, SafetensorsFileWriter
from mindformers_ext.formats.tensors import Array, Reader, TensorInfo
from mindformers_ext.jobs.checkpoint.companions import copy_companions
from mindformers_ext.jobs.checkpoint.renamed import RenamedReader, Stored
from mindformers_ext.jobs.checkpoint.source import describe_checkpoint, open_hf, open_ms, read_config
from mindformers_ext.jobs.checkpoint.torch_dir import TorchDir
from mindformers_ext.jobs.engine.door import write_numbers
from mindformers_ext.weights.composer import composer_name, is_composer, places_of
from mindformers_ext.weights.convert import plan_to_hf, plan_to_mindspore
from mindformers_ext.weights.plan import Plan

SUFFIXES = (".pt", ".pth", ".safetensors")
SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "intermediate_size",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


@dataclass(frozen=True)
class ComposerReport:
    """What was written."""

    tensors: int
    nbytes: int
    notes: tuple[str, ...]


def open_raw(path: Path) -> Reader:
    """The file's tensors by their own names; one of Composer's trainer holds them in state, model."""
    if not path.is_file():
        raise UserError(f"'{path}' is no file: give a Composer checkpoint (.pt)")
    if path.suffix not in SUFFIXES:
        raise UserError(f"'{path}' must end in {', '.join(SUFFIXES)}: give a Composer checkpoint")
    reader: Reader = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchDir(path)
    if not is_composer(reader.infos):
        reader.close()
        raise UserError(f"'{path}' holds no tensor named model.transformer.*: it is no Composer checkpoint")
    return reader


def open_composer(path: Path) -> Reader:
    """A Composer checkpoint without masks under Hugging Face's names; ``UserError`` for any other file."""
    raw = open_raw(path)
    try:
        return as_hugging_face(raw, path)
    except UserError:
        raw.close()
        raise


def as_hugging_face(raw: Reader, path: Path, masked: bool = False) -> Reader:
    """An open Composer checkpoint under Hugging Face's names."""
    places = {name: Stored(at) for name, at in places_of(raw.infos, str(path), masked).items()}
    return RenamedReader(raw, places, f"'{path}': read with Composer's names")


def write_composer(path: Path, tensors: Sequence[tuple[TensorInfo, Iterator[Array]]], overwrite: bool) -> None:
    """Write tensors that have Hugging Face's names under Composer's."""
    infos = [TensorInfo(composer_name(info.name), info.shape, info.dtype) for info, _ in tensors]
    if path.suffix == ".safetensors":
        with fresh_file(path, overwrite) as partial, SafetensorsFileWriter(partial, infos, {"format": "pt"}) as writer:
            for info, (_, blocks) in zip(infos, tensors, strict=True):
                writer.add_parts(info, blocks)
        return
    held = {}
    for info, (_, blocks) in zip(infos, tensors, strict=True):
        flat = np.concatenate([np.asarray(block).reshape(-1) for block in blocks])
        held[info.name] = flat.reshape(info.shape)
    write_numbers(path, held, overwrite)


def check_output(path: Path, overwrite: bool) -> None:
    """The name tells the kind of file, and nothing stands there."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"'{path}' must end in {', '.join(SUFFIXES)}: the ending chooses the format")
    refuse_existing(path, overwrite)


def save_composer(source: Path, output: Path, config: Path | None = None, dtype: str | None = None,
                  overwrite: bool = False) -> ComposerReport:  # fmt: skip
    """A Hugging Face folder or a MindSpore checkpoint as a Composer checkpoint.

    Raises:
        UserError: no dense LLaMA, or anything wrong with input or output; nothing is left half-written.
    """
    check_output(output, overwrite)
    if source.is_dir() and (source / CONFIG).is_file():
        reader, model = open_hf(source), model_spec_from_hf(read_config(source))
        with closing(reader):
            return _save(_of_folder(reader, model, dtype), reader, output, overwrite)
    reader, meta = open_ms(source)
    with closing(reader):
        known = describe_checkpoint(reader, meta, config)
        return _save(plan_to_hf(reader, known.spec, dtype=dtype, layout=known.layout), reader, output, overwrite)


def _of_folder(reader: Reader, model: ModelSpec, dtype: str | None) -> Plan:
    """All tensors of a folder as they are called there."""
    from mindformers_ext.weights.convert import rule_set
    from mindformers_ext.weights.plan import PlannedTensor
    from mindformers_ext.weights.views import whole

    plan_to_mindspore(reader, model)  # every tensor is there and fits
    kind = float_dtype(dtype) if dtype else None
    steps = [
        PlannedTensor(TensorInfo(name, shape, kind or reader.infos[name].dtype), whole(name, shape))
        for binding in rule_set(model).bindings
        for name, shape in binding.hf.items()
    ]
    return Plan(tuple(steps), (), (), kind)


def _save(plan: Plan, reader: Reader, output: Path, overwrite: bool) -> ComposerReport:
    for info in plan.targets:
        composer_name(info.name)  # before anything is written

    def blocks(place: int) -> Iterator[Array]:
        ((_, found),) = Plan((plan.steps[place],), (), (), plan.recast, plan.kept).stream(reader)
        yield from found

    write_composer(output, [(info, blocks(place)) for place, info in enumerate(plan.targets)], overwrite)
    return ComposerReport(len(plan.targets), plan.nbytes, ())


def save_hugging_face(source: Path, output: Path, words: Mapping[str, Any], base: Path | None = None,
                      dtype: str | None = None, overwrite: bool = False) -> ComposerReport:  # fmt: skip
    """A Composer checkpoint as a Hugging Face folder.

    Args:
        source: the checkpoint.
        output: the folder.
        words: keys of config.json; sizes among them must be those of the tensors.
        base: config.json, or the folder of a model that has the same vocabulary, rope and norms; its tokenizer is
            copied.
        dtype: of the written weights; None keeps types.
        overwrite: replace what stands there.

    Raises:
        UserError: sizes that contradict the tensors or are not told, masks, strangers; nothing is left half-written.
    """
    refuse_existing(output, overwrite)
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"output '{output}' holds '{source}', which is read: choose another folder")
    if overwrite and output.is_dir() and any(output.iterdir()) and not (output / CONFIG).is_file():
        raise UserError(f"output '{output}' is not a model folder: remove it yourself or choose another")
    with closing(open_raw(source)) as raw:
        reader = as_hugging_face(raw, source)
        config = described(reader, words, read_config(base) if base else None, str(source))
        model = model_spec_from_hf(config)
        plan_to_mindspore(reader, model)
        kind = float_dtype(dtype) if dtype else None
        infos = [TensorInfo(name, info.shape, kind or info.dtype) for name, info in reader.infos.items()]
        kinds = {BY_NUMPY[info.dtype].long for info in infos}
        config = {**config, "torch_dtype": max(kinds)}
        with fresh_folder(output, overwrite) as partial:
            with SafetensorsDirWriter(partial, infos, 5 * 10**9) as writer:
                for info in infos:
                    array, lost = cast(reader.read(info.name), info.dtype)
                    if lost:
                        raise UserError(f"'{info.name}': {lost} values do not fit {dtype}: choose another --dtype")
                    writer.add(info.name, array)
            (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            found = copy_companions(base, partial) if base and base.is_dir() else None
    notes = found.notes if found else ("no tokenizer was written: copy its files into the folder",)
    return ComposerReport(len(infos), sum(info.nbytes for info in infos), tuple(notes))


def described(reader: Reader, words: Mapping[str, Any], base: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """The config.json of the tensors: ``base`` with the sizes that they have; ``words`` count most.

    Raises:
        UserError: a size among ``words`` is not the tensors', or nothing tells how many heads there are.
    """
    shapes = {name: info.shape for name, info in reader.infos.items()}
    layer = "model.layers.0."
    needed = ("model.embed_tokens.weight", layer + "self_attn.q_proj.weight", layer + "self_attn.k_proj.weight",
              layer + "mlp.gate_proj.weight")  # fmt: skip
    missing = [name for name in needed if len(shapes.get(name, ())) != 2]
    if missing:
        raise UserError(f"'{where}' has no {missing[0]}: it is no whole model")
    (vocab, hidden), (rows, _), (kv_rows, _), (inner, _) = (shapes[name] for name in needed)
    layers = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("model.layers."))
    known = dict(base or {})
    width = (
        words.get("head_dim") or _width(words, rows) or known.get("head_dim") or _width(known, known.get("hidden_size"))
    )
    if not isinstance(width, int) or width < 1 or rows % width or kv_rows % width:
        raise UserError(
            f"'{where}': nothing tells how wide a head is (query rows: {rows}): give num_attention_heads=, or --config "
            "with the source model's config.json"
        )
    found = {
        "hidden_size": hidden,
        "num_attention_heads": rows // width,
        "num_key_value_heads": kv_rows // width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "head_dim": width,
        "vocab_size": vocab,
    }
    problems = Problems(f"'{where}'")
    for name in SIZES:
        if name in words and words[name] != found[name]:
            problems.add(
                f"{name}={words[name]} was given, its tensors have {found[name]}", "correct it or leave it out"
            )
    problems.raise_if_any()
    defaults: dict[str, Any] = {
        "architectures": [LLAMA.hf_class],
        "model_type": LLAMA.name,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    for key in ("_name_or_path", "auto_map", "dtype", "torch_dtype"):
        known.pop(key, None)
    tied = "lm_head.weight" not in shapes
    return {**(known or defaults), **words, **found, "tie_word_embeddings": tied}


def _width(words: Mapping[str, Any], rows: Any) -> int | None:
    heads = words.get("num_attention_heads")
    return (
        rows // heads if isinstance(heads, int) and heads > 0 and isinstance(rows, int) and rows % heads == 0 else None
    )
