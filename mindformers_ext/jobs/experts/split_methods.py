# SPDX-License-Identifier: Apache-2.0
"""How a layer is split: clustering, random, graph, gradient. One row each in ``METHODS``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.jobs.experts.dense_model import TEMPLATE, DenseModel, template_kind
from mindformers_ext.jobs.experts.feature_files import check_features, find_features, read_shard
from mindformers_ext.jobs.experts.importance import LEVELS, TYPES
from mindformers_ext.jobs.experts.importance_scores import check_importance, read_scores, score_folders
from mindformers_ext.jobs.experts.metis import graph_bytes, split_graph
from mindformers_ext.jobs.experts.splits import GRAPH_PARTS, open_split
from mindformers_ext.surgery.experts.cluster import STARTS, balanced_clusters, check_finite
from mindformers_ext.surgery.experts.gradient import CRITERIA, independent_split, residual_split, sharing_split
from mindformers_ext.surgery.experts.objective import METRICS
from mindformers_ext.surgery.experts.random import random_split
from mindformers_ext.surgery.experts.split import LayerSplit, expert_size
from mindformers_ext.surgery.experts.words import KERNELS

EXPERTS = 8


@dataclass(frozen=True, kw_only=True)
class SplitRequest:
    """What to split and how. None: the method's default, or nothing, where it has no such option."""

    model_path: Path
    save_path: Path
    method: str
    template: str = TEMPLATE
    layers: tuple[int, ...] | None = None
    num_experts: int | None = None
    seed: int = 0
    workers: int | None = None
    ray: str | None = None
    overwrite: bool = False
    allow_pickle: bool = False
    metric: str | None = None
    starts: int | None = None
    init_labels: Path | None = None
    hidden_features_path: Path | None = None
    threshold: float | None = None
    score_file_path: Path | None = None
    expert_size: int | None = None
    expert_num_residual: int | None = None
    criterion: str | None = None
    kernel: str | None = None
    accumulate_level: str | None = None
    importance_type: str | None = None
    share_neurons: bool | None = None
    exact: bool | None = None
    visualization_path: Path | None = None


@dataclass(frozen=True)
class Method:
    """One way to split.

    own: the request's words that it knows. settings: what goes into split_meta.json and decides the result, checked.
    folder: below the save path. mark: short name of a layer's input, which is checked whole. solve: the split, and
    figures about it. disk: bytes that a layer of so many neurons leaves at most.
    """

    own: tuple[str, ...]
    settings: Callable[[SplitRequest, DenseModel], dict[str, Any]]
    folder: Callable[[SplitRequest, DenseModel], Path]
    mark: Callable[[SplitRequest, DenseModel, int], str]
    solve: Callable[[SplitRequest, DenseModel, int], tuple[LayerSplit, dict[str, Any]]]
    disk: Callable[[int], int] = lambda width: 16 * width


def check_words(request: SplitRequest) -> Method:
    """The method of the request; words of other methods are a ``UserError``."""
    if request.method not in METHODS:
        raise UserError(f"--method '{request.method}' is unknown: choose one of {', '.join(METHODS)}")
    method = METHODS[request.method]
    every = {name for other in METHODS.values() for name in other.own}
    foreign = [
        field.name
        for field in fields(request)
        if field.name in every and field.name not in method.own and getattr(request, field.name) is not None
    ]
    if foreign:
        owners = [name for name, other in METHODS.items() if set(foreign) <= set(other.own)]
        raise UserError(
            f"--method {request.method} has no {', '.join(f'--{name}' for name in foreign)}: leave it out, or choose "
            f"--method {' or '.join(owners) or 'otherwise'}"
        )
    template_kind(request.template)
    if request.seed < 0:
        raise UserError(f"--seed {request.seed} is below 0: give a whole number from 0 on")
    return method


def chosen(request: SplitRequest, name: str, allowed: Any, default: str) -> str:
    """The request's word ``name``, which must be allowed."""
    value = getattr(request, name) or default
    if value not in allowed:
        raise UserError(f"--{name} '{value}' is unknown: choose one of {', '.join(allowed)}")
    return str(value)


def _equal(request: SplitRequest, model: DenseModel) -> dict[str, Any]:
    """Settings that methods with experts of one size have in common."""
    experts = EXPERTS if request.num_experts is None else request.num_experts
    expert_size(model.spec.intermediate_size, experts)
    return {
        "method": request.method,
        "num_experts": experts,
        "template": request.template,
        "intermediate_size": model.spec.intermediate_size,
        "seed": request.seed,
    }


def _name(request: SplitRequest, model: DenseModel, what: str) -> Path:
    return Path(f"{model.name}-{EXPERTS if request.num_experts is None else request.num_experts}Expert-Split-{what}")


def _rows(request: SplitRequest, model: DenseModel, layer: int) -> np.ndarray:
    return model.matrix(template_kind(request.template), layer)


def _cluster_settings(request: SplitRequest, model: DenseModel) -> dict[str, Any]:
    starts = STARTS if request.starts is None else request.starts
    if starts < 1:
        raise UserError(f"--starts {starts} is below 1: give how many random beginnings are tried")
    metric = chosen(request, "metric", METRICS, METRICS[0])
    initial = {"init_labels": True} if request.init_labels else {"starts": starts}  # which ones is in the layers' marks
    return {**_equal(request, model), "metric": metric, **initial}


def _cluster_folder(request: SplitRequest, model: DenseModel) -> Path:
    end = "" if request.metric in (None, METRICS[0]) else f"-{request.metric}"
    return _name(request, model, f"Clustering{end}")


def _cluster_mark(request: SplitRequest, model: DenseModel, layer: int) -> str:
    rows = _rows(request, model, layer)
    try:
        check_finite(rows)
    except UserError as error:
        raise UserError(f"layer {layer}, {template_kind(request.template)}: {error}") from error
    digest = hashlib.sha256(np.ascontiguousarray(rows).data)
    initial = _initial(request, model, layer)
    if initial is not None:
        digest.update(initial.data)
    return digest.hexdigest()


def _initial(request: SplitRequest, model: DenseModel, layer: int) -> np.ndarray | None:
    if request.init_labels is None:
        return None
    experts = EXPERTS if request.num_experts is None else request.num_experts
    width = model.spec.intermediate_size
    split = open_split(request.init_labels, request.template, layer, experts, request.allow_pickle, width)
    if len(set(split.sizes)) != 1:
        raise UserError(f"--init_labels '{request.init_labels}': layer {layer} has experts of different sizes")
    return split.labels()


def _cluster(request: SplitRequest, model: DenseModel, layer: int) -> tuple[LayerSplit, dict[str, Any]]:
    settings = _cluster_settings(request, model)
    initial = _initial(request, model, layer)
    found = balanced_clusters(
        _rows(request, model, layer),
        settings["num_experts"],
        settings["metric"],
        (request.seed, layer),
        settings.get("starts", 1),
        initial,
    )
    return LayerSplit.from_labels(found.labels, settings["num_experts"]), {"inertia": found.inertia}


def _random(request: SplitRequest, model: DenseModel, layer: int) -> tuple[LayerSplit, dict[str, Any]]:
    settings = _equal(request, model)
    return random_split(model.spec.intermediate_size, settings["num_experts"], (request.seed, layer)), {}


def _graph_settings(request: SplitRequest, model: DenseModel) -> dict[str, Any]:
    threshold = 1.0 if request.threshold is None else request.threshold
    if not 0 < threshold < float("inf"):
        raise UserError(f"--threshold {threshold} is not above 0: give what co-activation of a shard counts at most")
    if request.hidden_features_path is None:
        raise UserError("--method graph needs --hidden_features_path, the folder that the stage features has written")
    return {
        **_equal(request, model),
        "metric": chosen(request, "metric", KERNELS, "l1_norm"),
        "threshold": threshold,
    }


def _graph_folder(request: SplitRequest, model: DenseModel) -> Path:
    return _name(request, model, f"Graph-{request.metric or 'l1_norm'}") / GRAPH_PARTS


def _graph_shards(request: SplitRequest, layer: int) -> tuple[Path, ...]:
    assert request.hidden_features_path is not None
    kind = template_kind(request.template)
    return find_features(request.hidden_features_path, kind, layer, request.allow_pickle).outputs


def _graph_mark(request: SplitRequest, model: DenseModel, layer: int) -> str:
    """From the shards' names, sizes and first values: hashing all would read gigabytes."""
    assert request.hidden_features_path is not None
    check_features(request.hidden_features_path, [layer], request.template, fingerprint(model.reader))
    digest = hashlib.sha256()
    for path in _graph_shards(request, layer):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
    first = read_shard(_graph_shards(request, layer)[0], request.allow_pickle)
    width = model.spec.intermediate_size
    if first.shape[1] != width:
        raise UserError(
            f"layer {layer}: features have {first.shape[1]} neurons, the model has {width}: give this model's features"
        )
    digest.update(np.ascontiguousarray(first).data)
    return digest.hexdigest()


def _graph(request: SplitRequest, model: DenseModel, layer: int) -> tuple[LayerSplit, dict[str, Any]]:
    settings = _graph_settings(request, model)
    shards = (read_shard(path, request.allow_pickle) for path in _graph_shards(request, layer))
    folder = request.save_path / _graph_folder(request, model).parent
    file = folder / request.template.format(layer)
    return split_graph(
        shards,
        model.spec.intermediate_size,
        settings["num_experts"],
        settings["metric"],
        settings["threshold"],
        (request.seed, layer),
        file,
    )


def _gradient_settings(request: SplitRequest, model: DenseModel) -> dict[str, Any]:
    experts, clusters = _gradient_experts(request), _clusters(request)
    if not 1 <= experts <= clusters:
        raise UserError(
            f"--expert_num {experts}: '{request.score_file_path}' has importance of {clusters} data clusters, one "
            "per expert; give at most so many"
        )
    if request.share_neurons and request.exact:
        raise UserError(
            "--exact has no effect with --share_neurons True, where each expert takes its best: leave it out"
        )
    return _gradient_words(request, model)


def _clusters(request: SplitRequest) -> int:
    if request.score_file_path is None:
        raise UserError("--method gradient needs --score_file_path, the folder with a folder per data cluster")
    return len(score_folders(request.score_file_path))


def _gradient_experts(request: SplitRequest) -> int:
    return _clusters(request) if request.num_experts is None else request.num_experts


def _gradient_words(request: SplitRequest, model: DenseModel) -> dict[str, Any]:
    """The settings; importance is looked at only where it alone says how many experts there are."""
    experts = _gradient_experts(request)
    width, residual = model.spec.intermediate_size, request.expert_num_residual or 0
    size = request.expert_size if request.expert_size is not None else width // max(experts + residual, 1)
    return {
        "method": request.method,
        "num_experts": experts,
        "num_residual": residual,
        "expert_size": size,
        "template": request.template,
        "intermediate_size": width,
        "criterion": chosen(request, "criterion", CRITERIA, "max"),
        "kernel": chosen(request, "kernel", KERNELS, "l1_norm"),
        "accumulate_level": chosen(request, "accumulate_level", LEVELS, "sample"),
        "importance_type": chosen(request, "importance_type", TYPES, "feature_change"),
        "share_neurons": bool(request.share_neurons),
        "exact": bool(request.exact),
    }


def _gradient_folder(request: SplitRequest, model: DenseModel) -> Path:
    words = _gradient_words(request, model)
    kind = "-".join(words[name] for name in ("criterion", "kernel", "accumulate_level", "importance_type"))
    residual = f"-{words['num_residual']}Residuals" if words["num_residual"] else ""
    share = "-Share" if words["share_neurons"] else ""
    own = f"{words['num_experts']}Experts{residual}-{words['expert_size']}Neurons{share}"
    return Path(f"{model.name}-Split-Gradient-{kind}") / own


def _scores(request: SplitRequest, model: DenseModel, layer: int) -> np.ndarray:
    words = _gradient_settings(request, model)
    assert request.score_file_path is not None
    name = f"{request.template.format(layer)}.{TYPES[words['importance_type']]}"
    width = model.spec.intermediate_size
    return read_scores(request.score_file_path, name, words["num_experts"], width, request.allow_pickle)


def _gradient_mark(request: SplitRequest, model: DenseModel, layer: int) -> str:
    assert request.score_file_path is not None
    words = _gradient_settings(request, model)
    made = {"kernel": words["kernel"], "level": words["accumulate_level"], "type": words["importance_type"]}
    check_importance(request.score_file_path, made, layer, fingerprint(model.reader))
    scores = _scores(request, model, layer)
    _gradient(request, model, layer)  # sizes that do not fit are told before anything is written; it takes no time
    return hashlib.sha256(scores.data).hexdigest()


def _gradient(request: SplitRequest, model: DenseModel, layer: int) -> tuple[LayerSplit, dict[str, Any]]:
    words = _gradient_settings(request, model)
    scores = _scores(request, model, layer) * (1 if words["criterion"] == "max" else -1)
    size, residual, share, exact = (words[name] for name in ("expert_size", "num_residual", "share_neurons", "exact"))
    if residual:
        split = residual_split(scores, size, residual, share, exact)
    else:
        split = sharing_split(scores, size) if share else independent_split(scores, size, exact)
    held = float(sum(scores[expert, ids].sum() for expert, ids in enumerate(split.experts)))
    return split, {"score": held if words["criterion"] == "max" else -held}


METHODS: Mapping[str, Method] = {
    "clustering": Method(
        ("num_experts", "metric", "starts", "init_labels"), _cluster_settings, _cluster_folder, _cluster_mark, _cluster
    ),
    "random": Method(
        ("num_experts",), _equal, lambda request, model: _name(request, model, "Random"), lambda *_: "", _random
    ),
    "graph": Method(
        ("num_experts", "metric", "threshold", "hidden_features_path"),
        _graph_settings,
        _graph_folder,
        _graph_mark,
        _graph,
        graph_bytes,
    ),
    "gradient": Method(
        (
            *("num_experts", "score_file_path", "expert_size", "expert_num_residual", "criterion", "kernel"),
            *("accumulate_level", "importance_type", "share_neurons", "exact", "visualization_path"),
        ),
        _gradient_settings,
        _gradient_folder,
        _gradient_mark,
        _gradient,
    ),
}
