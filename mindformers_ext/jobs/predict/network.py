# SPDX-License-Identifier: Apache-2.0
"""A network to generate with, from a YAML and weights of any kind, which stream into its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.config.keys import KEYS, MODEL
from mindformers_ext.core.config.run import ASCEND, RunSpec
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.spec import DeviceSpec, ModelSpec, NetworkSpec
from mindformers_ext.formats.rank_dirs import rank_folders
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.tensors import Reader
from mindformers_ext.jobs.checkpoint.composer import open_composer
from mindformers_ext.jobs.checkpoint.renamed import notes_of
from mindformers_ext.jobs.checkpoint.saved import checkpoint_file, holds_whole
from mindformers_ext.jobs.checkpoint.source import (
    TORCH_SUFFIXES,
    described_layout,
    is_hf_file,
    open_hf,
    open_ms,
    read_config,
)
from mindformers_ext.jobs.engine.door import open_engine
from mindformers_ext.jobs.engine.protocols import Network
from mindformers_ext.weights.convert import plan_relayout, plan_to_mindspore
from mindformers_ext.weights.layouts import Layout, resolve_layout
from mindformers_ext.weights.plan import Plan

COMPARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "sliding_window",
    "full_attention_layers",
    "rope_scaling",
)
COMPARED_MOE = ("num_local_experts", "num_experts_per_tok")
SUFFIXES = (".ckpt", ".safetensors")
MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Weights:
    """Opened weights and the checked plan by which they become the network's."""

    reader: Reader
    plan: Plan
    what: str

    def close(self) -> None:
        """Let go of the files."""
        self.reader.close()


def open_weights(path: Path, spec: ModelSpec, strategy_dir: Path | None = None) -> Weights:
    """Any weights of the model ``spec``: nothing but headers is read.

    Args:
        path: a Hugging Face folder, a .ckpt or .safetensors file of either layout, a folder with one of them or with
            rank_0, a folder of several rank folders, or a Composer checkpoint of LLM-Shearing (.pt).
        strategy_dir: the strategy files of several ranks; by default the folder ``strategy`` beside ``path``.

    Raises:
        UserError: nothing there, or not of this model: sizes, names and constants that differ are listed.
    """
    is_file = is_hf_file(path)
    folder = path.parent if is_file else path
    if folder.is_dir() and (is_file or (folder / CONFIG).is_file()):
        if (folder / CONFIG).is_file():
            check_same_model(spec, read_config(folder), folder)
        reader = open_hf(path)
        names = "".join(f" ({note})" for note in notes_of(reader))
        what = f"Hugging Face {'file' if is_file else 'folder'} {path}{names}"
        return _planned(reader, lambda: plan_to_mindspore(reader, spec), what)
    if path.is_file() and path.suffix in TORCH_SUFFIXES:
        composer = open_composer(path)
        return _planned(composer, lambda: plan_to_mindspore(composer, spec), f"Composer checkpoint {path}")
    file, strategies, what = _ms_source(path, strategy_dir, spec)
    reader, meta = open_ms(file, strategies)

    def plan() -> Plan:
        if meta and meta.config:
            check_same_model(spec, meta.config, file)
        layout = resolve_layout(reader.infos, spec, described_layout(meta))
        return plan_relayout(reader, spec, layout, Layout())

    return _planned(reader, plan, what)


def _planned(reader: Reader, plan: Any, what: str) -> Weights:
    try:
        return Weights(reader, plan(), what)
    except UserError as error:
        reader.close()
        raise UserError(f"load_checkpoint, {what}, does not fit the network of the configuration: {error}") from error


def _ms_source(path: Path, strategy_dir: Path | None, spec: ModelSpec) -> tuple[Path, Path | None, str]:
    """What ``open_ms`` opens, and its name in messages."""
    if not path.exists():
        raise UserError(
            f"load_checkpoint {path} does not exist: give a Hugging Face folder, a .ckpt or .safetensors "
            "file, or a folder with rank_0 in it"
        )
    ranks = rank_folders(path) if path.is_dir() else {}
    found = [file for suffix in SUFFIXES if (file := checkpoint_file(path, suffix))]
    if len(ranks) > 1 and not (strategy_dir is None and found and holds_whole(found[0], spec)):
        strategies = strategy_dir or path.parent / "strategy"
        if not strategies.exists():
            raise UserError(
                f"load_checkpoint {path} holds the slices of {len(ranks)} ranks: give the folder of their "
                "strategy files (--src_strategy_path_or_dir)"
            )
        return path, strategies, f"{len(ranks)} ranks in {path}, cut by {strategies}"
    if not found:
        raise UserError(
            f"load_checkpoint {path} holds no .ckpt or .safetensors file: give a checkpoint file, a "
            "Hugging Face folder, or a folder with rank_0 in it"
        )
    return found[0], None, f"file {found[0]}"


def check_same_model(spec: ModelSpec, config: Mapping[str, Any], where: Path) -> None:
    """Constants that shapes do not tell must be equal in the YAML and in the weights' own config.json.

    Raises:
        UserError: lists what differs, in the YAML's words.
    """
    theirs = model_spec_from_hf(config)
    names = {(key.part, key.field): f"{key.section}.{key.name}" for key in KEYS}
    names["model", "rope_scaling"] = f"{MODEL}.extend_method, scaling_factor"
    problems = Problems(f"configuration and {where}")
    pairs: list[tuple[str, str, object, object]] = [("model", name, spec, theirs) for name in COMPARED]
    if theirs.rope_scaling and theirs.rope_scaling.original_max_position_embeddings is None:
        pairs.append(("model", "max_position_embeddings", spec, theirs))  # where the scaling begins
    if spec.moe and theirs.moe:
        pairs += [("moe", name, spec.moe, theirs.moe) for name in COMPARED_MOE]
    elif bool(spec.moe) != bool(theirs.moe):
        kinds = {True: "experts", False: "no experts"}
        problems.add(
            f"the configuration has {kinds[bool(spec.moe)]}, the weights {kinds[bool(theirs.moe)]}",
            "correct moe_config.expert_num",
        )
    for part, name, ours, other in pairs:
        mine, its = getattr(ours, name), getattr(other, name)
        if mine != its:
            problems.add(f"{names[part, name]} is {mine}, the weights' {name} is {its}", f"set it to {its}")
    problems.raise_if_any()


def open_network(
    engine: str, device: DeviceSpec, spec: NetworkSpec, weights: Weights | None, length: int = 1
) -> Network:
    """The network on ``device``, with ``weights`` streamed in, or with random ones.

    It drops no token, whatever the capacity in training was. ``length``: tokens per row of the network's own graph;
    generation does not run it, for it has graphs of its own, of the prompts' lengths.
    """
    opened = open_engine(engine)
    opened.use(device)
    network = opened.build(dropless_spec(spec, device, length), empty=weights is not None)
    if weights is not None:
        with closing(weights):
            network.fill(weights.plan.run(weights.reader))
    return network


def dropless_spec(spec: NetworkSpec, device: DeviceSpec, length: int = 1) -> NetworkSpec:
    """``spec`` as prediction builds it: no token is dropped; grouped products where they are asked for and exist."""
    model = spec.model
    if model.moe:  # weights of either layout become dense ones (open_weights), which grouped experts take too
        grouped = model.moe.use_gmm and device.target == ASCEND
        model = replace(model, moe=replace(model.moe, capacity_factor=0.0, use_gmm=grouped))
    return replace(spec, model=model, seq_length=length)


def asked_weights(run: RunSpec, spec: ModelSpec) -> tuple[Weights | None, str]:
    """What ``run`` loads, None where it names nothing; and a note about it."""
    if not run.load:
        return None, "no load_checkpoint: the network keeps its random weights"
    weights = open_weights(Path(run.load), spec, run.strategies)
    return weights, f"weights: {weights.what}"


def check_memory(spec: NetworkSpec, rows: int, positions: int, available: int | None = None) -> int:
    """Bytes of a cache for ``rows`` texts of ``positions`` tokens, in one process or in several of this machine.

    Raises:
        UserError: more than ``available`` bytes (default: what this machine has free).
    """
    model = spec.model
    width = 2 if spec.numerics.compute_dtype == "float16" else 4
    cache = 2 * rows * positions * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * width
    free = _free_memory() if available is None else available
    if free is not None and cache > free:
        raise UserError(
            f"a cache for {rows} texts of {positions} tokens takes {cache / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
            "lower --predict_batch_size, or max_length"
        )
    return cache


def _free_memory() -> int | None:
    """Bytes that can be had without swapping, None where nobody tells."""
    if not MEMORY.is_file():
        return None
    lines = dict(line.split(":", 1) for line in MEMORY.read_text(encoding="ascii").splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
