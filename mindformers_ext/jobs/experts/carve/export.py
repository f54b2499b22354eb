# SPDX-License-Identifier: Apache-2.0
"""Carved layers as a folder: a Qwen2-MoE or Mixtral that transformers computes as it is, or a LLaMA-MoE of ours.

A stock router weighs the A chosen by a softmax made to sum to one. Its rows are so small that all weights are one A-th,
but for an error that was measured, and A stands in the experts' last matrices. The shared expert has a gate of 0, whose
sigmoid is one half, and twice its last matrix. Ours adds experts up as they are, and can choose them by a threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mindformers_ext.core.families import LLAMA_MOE, THRESHOLD
from mindformers_ext.formats.dtypes import BY_NUMPY, float_dtype
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.tensors import Array
from mindformers_ext.jobs.checkpoint.hf_code import with_code
from mindformers_ext.jobs.checkpoint.renamed import notes_of
from mindformers_ext.jobs.checkpoint.source import read_config
from mindformers_ext.jobs.experts.carve.layer_files import DOWN, ROUTER, ROUTER_BIAS, LayerFiles
from mindformers_ext.jobs.experts.carve.request import FORMS, OURS, CarveRequest
from mindformers_ext.jobs.experts.changed import ChangedReader
from mindformers_ext.jobs.experts.convert import MixtureRequest, convert, dense_folder
from mindformers_ext.jobs.experts.dense_model import DenseModel
from mindformers_ext.jobs.experts.gating import Gating, preset
from mindformers_ext.jobs.experts.v2.forms import Sizes, config_of
from mindformers_ext.jobs.experts.v2.mixtral import check_dense, check_names, mixture_tasks
from mindformers_ext.jobs.experts.v2.parts import Made
from mindformers_ext.jobs.experts.writing import write_model
from mindformers_ext.jobs.merge.output import MergeReport
from mindformers_ext.jobs.merge.sidecars import copy_tokenizer, write_json
from mindformers_ext.surgery.experts.words import BIAS, ONLY

PLAIN_SUM = "moefication"  # of what gates can do with the experts' outputs
DOWN_NAME = "model.layers.{}.mlp.down_proj.weight"
PASSED = (
    "Chosen are the groups whose score is above the layer's threshold: of some tokens none, of others all, and as many "
    "as said on average over the calibration"
)
SAVING = (
    "transformers and our PyTorch engine compute what a token passes; in MindSpore's training every expert has as many "
    "rows as the busiest one, and a new token is computed by all experts: expect no saving there"
)
HOLD_GATES = (
    "to train it further hold its gates still (runner_config.freeze_gate: True) or use LoRA: its router rows are small "
    "and shaken by a rate that suits the other weights"
)
Beside = Callable[[Path], None]


def check_form(request: CarveRequest, model: DenseModel) -> None:
    """``UserError``: the form cannot say such a model."""
    if request.form == OURS:
        with dense_folder(request.model):
            return
    if request.form in FORMS:
        check_dense(request.model, model.spec, read_config(request.model), FORMS[request.form])


def export(request: CarveRequest, model: DenseModel, files: LayerFiles, beside: Beside) -> MergeReport:
    """Write the mixture; ``beside`` writes more into its folder.

    Raises:
        UserError: values that do not fit their type, or no room; nothing is left half-written.
    """
    layers = range(model.spec.num_hidden_layers)
    changes = {DOWN_NAME.format(layer): partial(files.array, layer, DOWN) for layer in layers}
    splits = {layer: files.split(layer) for layer in layers}
    gates = {layer: files.array(layer, ROUTER) for layer in layers}
    if request.form == OURS:
        biases = {layer: {BIAS: files.array(layer, ROUTER_BIAS)} for layer in layers if by_threshold(request)}
        ours = MixtureRequest(
            model=request.model,
            splits=splits,
            gates={layer: {ONLY: rows} | biases.get(layer, {}) for layer, rows in gates.items()},
            gating=_gating(request, len(splits[0].experts)),
            output=request.output,
            dtype=request.dtype,
            changes=changes,
            beside=beside,
        )
        return convert(ours)
    return _stock(request, model, Made(_sizes(request, model), splits, gates, ()), changes, beside)


def by_threshold(request: CarveRequest) -> bool:
    """Whether a token passes the experts above a threshold, however many."""
    return request.recipe.router == THRESHOLD


def _gating(request: CarveRequest, experts: int) -> Gating:
    if by_threshold(request):
        own = preset(PLAIN_SUM, experts, experts)
        return Gating(chosen=experts, network=THRESHOLD, balance=0.0, **own)
    chosen = request.recipe.active
    return Gating(chosen=chosen, network="linear", **preset(PLAIN_SUM, experts, chosen))


def _sizes(request: CarveRequest, model: DenseModel) -> Sizes:
    recipe, whole = request.recipe, model.spec.intermediate_size
    size = whole // recipe.experts
    return Sizes(
        layers=model.spec.num_hidden_layers,
        ends=0,
        experts=recipe.experts - recipe.shared,
        chosen=recipe.active,
        size=size,
        always=recipe.shared * size,
        whole=whole,
        scale=1.0,
    )


def _stock(
    request: CarveRequest, model: DenseModel, made: Made, changes: Mapping[str, Callable[[], Array]], beside: Beside
) -> MergeReport:
    form, config = FORMS[request.form], read_config(request.model)
    kind = float_dtype(request.dtype) if request.dtype else None
    tasks = mixture_tasks(ChangedReader(model.reader, changes), made, form, kind, float(request.recipe.active))
    stored = max((info.dtype for info in model.reader.infos.values()), key=lambda item: item.itemsize)
    told = None if kind else config.get("torch_dtype") or config.get("dtype")
    words = config_of(form, config, made.sizes, str(told or BY_NUMPY[kind or stored].long))
    check_names(words, tasks)

    def more(folder: Path) -> list[str]:
        write_json(folder / CONFIG, with_code(folder, words))
        beside(folder)
        return copy_tokenizer(str(request.model), request.model, folder)

    return write_model(request.output, tasks, more, notes_of(model.reader), True)


def how_to_load(form: str, folder: Path) -> str:
    """A line about what computes such a folder."""
    if form == OURS:
        return f"a {LLAMA_MOE.name} with its code: load '{folder.name}' with trust_remote_code=True"
    return f"a stock {form}, which transformers computes without code of ours"


def weight_words(figures: Mapping[str, Any]) -> str:
    """What the file's weights are off one, in a sentence."""
    return (
        f"expert weights are 1 within {figures['weight_largest']:.2%} (mean {figures['weight_mean']:.3%}); "
        f"{figures['weight_same']:.3%} of all choices are those of exact logits (float32, calibration tokens)"
    )
