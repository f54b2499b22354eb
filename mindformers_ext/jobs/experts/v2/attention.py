# SPDX-License-Identifier: Apache-2.0
"""The heads of a mixture, or of a dense LLaMA, become experts: the attention experts of LLaMA-MoE v2.

Expert e has key/value head e and its query heads; of finer experts several have the same key/value head, each a part of
its query heads. A dense model becomes a mixture of one expert, which is its feed-forward part. Dense layers at the ends
keep their attention.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.families import LLAMA, LLAMA_MOE_V2, LLAMA_MOE_V2_RESIDUAL, MISTRAL, MIXTRAL
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.dtypes import BY_NUMPY, float_dtype
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.tensors import Reader
from mindformers_ext.jobs.checkpoint.hf_code import with_code
from mindformers_ext.jobs.checkpoint.source import open_hf, read_config
from mindformers_ext.jobs.experts.cut import in_type
from mindformers_ext.jobs.experts.v2.forms import MATRICES, V2, Sizes, config_of
from mindformers_ext.jobs.experts.v2.layer_tables import GATE, GATES, read_table
from mindformers_ext.jobs.experts.v2.mixtral import Piece, check_names, cut_task, mixture_tasks, sized
from mindformers_ext.jobs.experts.v2.parts import Made, random_gate
from mindformers_ext.jobs.experts.writing import Task, copied, given, write_model
from mindformers_ext.jobs.merge.output import MergeReport, OutputRequest, check_output
from mindformers_ext.jobs.merge.sidecars import copy_tokenizer, write_json
from mindformers_ext.surgery.experts.split import LayerSplit
from mindformers_ext.weights.convert import plan_to_mindspore

DENSE = (LLAMA.name, MISTRAL.name)
MIXED = (MIXTRAL.name, LLAMA_MOE_V2.name, LLAMA_MOE_V2_RESIDUAL.name)


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """A folder whose heads become experts. ``experts`` None: one for each key/value head. ``scale`` None: experts /
    chosen. ``ends``: dense layers at each end of a dense model; a mixture has its own."""

    model: Path
    output: OutputRequest
    chosen: int | None
    scale: float | None = None
    experts: int | None = None
    ends: int = 0
    gates: Path | None = None
    dtype: str | None = None
    seed: int = 0


def convert_attention(request: AttentionRequest, write: bool = True) -> MergeReport:
    """Write the model with attention experts, or with ``write`` false only check everything.

    Raises:
        UserError: anything wrong with model, options, gates or output; nothing is left half-written.
    """
    check_output(request.output, [request.model])
    if not request.model.is_dir():
        raise UserError(f"--model_path '{request.model}' is no folder: give a Hugging Face folder")
    kind, config = float_dtype(request.dtype) if request.dtype else None, read_config(request.model)
    spec = model_spec_from_hf(config)
    experts = request.experts or spec.num_key_value_heads
    _check(request, spec, config, experts)
    ends = len(spec.dense_layers) // 2 if spec.moe else request.ends
    layers = range(ends, spec.num_hidden_layers - ends)
    with closing(open_hf(request.model)) as reader:
        plan_to_mindspore(reader, spec).check_copies(reader)
        gates = _gates(request, spec, experts, layers, fingerprint(reader))
        heads, names = _head_tasks(reader, spec, experts, layers, kind)
        told = None if kind else config.get("torch_dtype") or config.get("dtype")
        stored = max((info.dtype for info in reader.infos.values()), key=lambda item: item.itemsize)
        dtype = str(told or BY_NUMPY[kind or stored].long)
        sizes = _sizes(spec, ends)
        if spec.moe:
            others = other_tasks(reader, spec, names, kind)
        else:
            others = mixture_tasks(reader, _as_mixture(spec, sizes), V2, kind, skip=names)
        result = config_of(V2, config, sizes, dtype) | {"use_attn_moe": True, "attn_experts": experts}
        scale = experts / (request.chosen or 1) if request.scale is None else request.scale
        result |= {"top_k_attn": request.chosen, "scale_factor_attn": scale}
        if "router_aux_loss_coef" in config:
            result["router_aux_loss_coef"] = config["router_aux_loss_coef"]
        tasks = [*others, *heads, *gates]
        check_names(result, tasks)
        notes = [f"scale_factor_attn {scale:g}: the sum of the chosen attention experts is multiplied by it"]
        notes += ["no --gate_weights_file: attention gates are random until they are trained"] * (not request.gates)

        def beside(folder: Path) -> list[str]:
            write_json(folder / CONFIG, with_code(folder, result))
            return copy_tokenizer(str(request.model), request.model, folder)

        return write_model(request.output, tasks, beside, notes, write)


def _check(request: AttentionRequest, spec: ModelSpec, config: Mapping[str, Any], experts: int) -> None:
    problems = Problems(f"'{request.model}' with attention experts")
    groups, heads = spec.num_key_value_heads, spec.num_attention_heads
    if spec.model_type not in MIXED and config.get("model_type") not in DENSE:
        problems.add(f"it is a {config.get('model_type')}", f"give a {', '.join((*DENSE, *MIXED))}")
    if spec.moe and spec.moe.expert_bias:
        problems.add("it is aligned (add_rescale_bias)", "give the model before that, and align what comes out")
    if spec.attn_experts:
        problems.add("its heads are experts already", "give the model before that")
    if spec.qkv_bias or spec.out_bias or spec.mlp_bias or spec.qk_norm:
        problems.add("it has biases or norms of heads", "attention experts have none")
    if spec.sliding_window is not None:
        problems.add(f"sliding_window={spec.sliding_window}", "set it to null in a copy")
    if experts < 1 or experts % groups or heads % experts:
        problems.add(f"--attn_experts {experts}", f"give {groups}, or a multiple of it that divides {heads}")
    if request.chosen is None:
        problems.add("--top_k_attn is missing", "give how many attention experts a token passes")
    elif not 1 <= request.chosen <= experts:
        problems.add(f"--top_k_attn {request.chosen} of {experts} experts", f"choose 1 to {experts}")
    if request.scale is not None and not 0 < request.scale < math.inf:
        problems.add(f"--scale_factor_attn {request.scale}", "give a number above 0")
    own = len(spec.dense_layers) // 2
    if spec.moe and request.ends not in (0, own):
        problems.add(f"--num_moe_contract_layers {request.ends}", f"this mixture has {own}: leave the option out")
    if not spec.moe and (request.ends < 0 or 2 * request.ends >= spec.num_hidden_layers):
        problems.add(
            f"--num_moe_contract_layers {request.ends} of {spec.num_hidden_layers} layers",
            "no layer would be MoE" if request.ends > 0 else "give 0 or more",
        )
    problems.raise_if_any()


def _sizes(spec: ModelSpec, ends: int) -> Sizes:
    """Of the mixture as it is, or of one expert that is the dense part."""
    moe, always = spec.moe, spec.moe.shared_expert if spec.moe else None
    return Sizes(
        layers=spec.num_hidden_layers,
        ends=ends,
        experts=moe.num_local_experts if moe else 1,
        chosen=moe.num_experts_per_tok if moe else 1,
        size=spec.expert_size,
        always=always.intermediate_size if always else 0,
        whole=spec.intermediate_size,
        scale=moe.routed_scaling_factor if moe else 1.0,
    )


def _as_mixture(spec: ModelSpec, sizes: Sizes) -> Made:
    whole = LayerSplit(sizes.whole, (np.arange(sizes.whole),))
    gate = np.zeros((1, spec.hidden_size), np.float32)
    return Made(sizes, dict.fromkeys(sizes.mixtures, whole), dict.fromkeys(sizes.mixtures, gate), ())


def _gates(request: AttentionRequest, spec: ModelSpec, experts: int, layers: range, weights: str) -> list[Task]:
    shape, found = (experts, spec.hidden_size), {}
    table = read_table(request.gates, GATES) if request.gates else None
    for layer in layers:
        if table is None:
            found[layer] = random_gate(*shape, request.seed + 1, layer)  # not that of the experts
            continue
        table.check_made_from(model=weights)
        if layer not in table.layers or table.layers[layer][GATE].shape != shape:
            raise UserError(f"'{table.path}', layer {layer}: no gate {list(shape)} is there: give attention's gates")
        found[layer] = table.layers[layer][GATE]
    return [given(f"model.layers.{layer}.self_attn.gate.weight", gate) for layer, gate in found.items()]


def _head_tasks(
    reader: Reader, spec: ModelSpec, experts: int, layers: range, kind: np.dtype | None
) -> tuple[list[Task], set[str]]:
    """The projections of each expert, and the names of what they are cut from."""
    width, times = spec.head_dim, experts // spec.num_key_value_heads
    queries = spec.num_attention_heads // experts * width
    rows = {"q": (0, queries, 1), "k": (0, width, times), "v": (0, width, times), "o": (1, queries, 1)}
    tasks, names = [], set[str]()
    for layer in layers:
        for letter, (axis, size, shared) in rows.items():
            name = f"model.layers.{layer}.self_attn.{letter}_proj.weight"
            names.add(name)
            pieces = []
            for expert in range(experts):
                to = f"model.layers.{layer}.self_attn.{letter}_proj.{expert}.weight"
                start = expert // shared * size
                target = sized(in_type(reader.infos[name], kind), to, axis, size)
                pieces.append(Piece(target, axis, np.arange(start, start + size), 1.0))
            tasks.append(cut_task(reader, name, pieces))
    return tasks, names


def other_tasks(reader: Reader, spec: ModelSpec, skip: Collection[str], kind: np.dtype | None) -> list[Task]:
    """Everything of a mixture but what to ``skip``; dense layers under their own names, gates as they are."""
    renamed = {
        f"model.layers.{layer}.mlp.{matrix}.weight": f"model.layers.{layer}.{V2.dense.format(V2.matrix[matrix])}"
        for layer in spec.dense_layers
        for matrix in MATRICES
    }
    tasks = []
    for name, info in reader.infos.items():
        if name in skip or name.endswith("rotary_emb.inv_freq"):
            continue
        target = info if name.endswith(V2.gate) else in_type(info, kind)
        if name in renamed:
            piece = Piece(replace(target, name=renamed[name]), 0, np.arange(info.shape[0]), 1.0)
            tasks.append(cut_task(reader, name, [piece]))
        else:
            tasks.append(copied(reader, target))
    return tasks
