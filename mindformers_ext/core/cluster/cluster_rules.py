# SPDX-License-Identifier: Apache-2.0
"""Every rule between a network, its cluster and the job, checked at once before anything is built.

MindFormers checks a part of these late or not at all (``ep <= dp``, ``dp % ep`` and ``E % ep`` never: ep > dp gives a
group size of 0 and an unreadable shape error). Errors are raised together; what may be unwanted comes back as warnings.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

from mindformers_ext.core.config.keys import SHARDED_MODES
from mindformers_ext.core.config.run import RUN_MODES, TRAINING
from mindformers_ext.core.errors import Problems
from mindformers_ext.core.layers import LEGACY_CONSTANT
from mindformers_ext.core.spec import ModelSpec, NetworkSpec, ParallelSpec

SIZES = (
    "data_parallel",
    "model_parallel",
    "pipeline_stage",
    "expert_parallel",
    "context_parallel",
    "micro_batch_num",
    "pp_interleave_num",
)
TOGETHER = "predict_together"  # each process has its part of the network (core.tensor_parallel): nothing is cut
JUDGED_MODES = (*RUN_MODES, "predict_with_train_model", TOGETHER)


def check_network(spec: NetworkSpec, run_mode: str = "train") -> list[str]:
    """Check ``spec`` for ``run_mode`` (of ``JUDGED_MODES``) and return the warnings, one line each.

    The sizes are judged as ``effective_spec`` leaves them.

    Raises:
        UserError: lists every broken rule with its numbers and the nearest valid choice.
    """
    problems = Problems("these settings do not fit together")
    problems.one_of("run_mode", run_mode, JUDGED_MODES)
    spec.model.collect(problems)
    spec.numerics.collect(problems)
    problems.positive("seq_length", spec.seq_length)
    problems.positive("batch_size", spec.batch_size)
    for name in (*SIZES, "micro_batch_interleave_num", "device_num"):
        problems.positive(name, getattr(spec.parallel, name))
    if problems.lines:  # products of wrong numbers would only repeat the mistakes
        problems.raise_if_any()
    kept, warnings = effective_spec(spec)
    for check in (_slices, _lengths, _widths, _pipeline, _experts, _router_load):
        check(kept, run_mode, problems, warnings)
    _quiet_losses(kept, run_mode, warnings)
    problems.raise_if_any()
    return warnings


def check_cluster(spec: NetworkSpec) -> list[str]:
    """Judge the sizes of a network that is MindFormers' own, by its rule alone: their product is the number of devices.

    Returns warnings, one line each.

    Raises:
        UserError: another product, with the nearest valid choice.
    """
    problems = Problems("these settings do not fit together")
    for name in (*SIZES, "device_num"):
        problems.positive(name, getattr(spec.parallel, name))
    problems.raise_if_any()
    kept, warnings = effective_spec(spec)
    _product(kept, problems)
    problems.raise_if_any()
    return warnings


def effective_spec(spec: NetworkSpec) -> tuple[NetworkSpec, list[str]]:
    """The spec that is really built, and what changed: build from this one, not from the one read.

    Outside ``semi_auto_parallel`` and ``auto_parallel`` MindFormers resets every size to 1; with a pipeline it gives up
    ``vocab_emb_dp``.
    """
    parallel, warnings = spec.parallel, []
    if parallel.parallel_mode not in SHARDED_MODES:
        lost = [f"{name}={getattr(parallel, name)}" for name in SIZES if getattr(parallel, name) != 1]
        lost += [f"{name}=True" for name in ("use_seq_parallel", "pipeline_interleave") if getattr(parallel, name)]
        if lost:
            warnings.append(f"in {parallel.parallel_mode} mode every size is 1, so {', '.join(lost)} has no effect")
        ones: dict[str, Any] = dict.fromkeys(SIZES, 1)
        parallel = replace(parallel, **ones, use_seq_parallel=False, full_batch=False, pipeline_interleave=False)
    elif parallel.pipeline_stage > 1 and parallel.vocab_emb_dp:
        warnings.append(f"vocab_emb_dp becomes False because pipeline_stage={parallel.pipeline_stage}")
        parallel = replace(parallel, vocab_emb_dp=False)
    elif parallel.pipeline_stage == 1 and parallel.pp_interleave_num > 1:
        warnings.append(f"pp_interleave_num={parallel.pp_interleave_num} has no effect at pipeline_stage=1")
        parallel = replace(parallel, pp_interleave_num=1)
    return replace(spec, parallel=parallel), warnings


def uncut_slots(spec: NetworkSpec) -> tuple[str, str] | None:
    """Why MindSpore cannot cut the training graph of ``spec``, and what to do: dropless slots follow from the load.
    PyTorch can, and so can prediction, which gives experts no slots. None where nothing hinders."""
    parallel, moe = spec.parallel, spec.model.moe
    if parallel.parallel_mode not in SHARDED_MODES or parallel.device_num == 1:
        return None
    if moe is None or moe.capacity_factor > 0 or moe.use_gmm:
        return None
    return (
        f"capacity_factor={moe.capacity_factor:g} (dropless) in {parallel.parallel_mode} mode: a graph that MindSpore "
        "cuts has the number of an expert's slots in it",
        "set use_gmm: True, a capacity_factor above 0, or parallel.parallel_mode: 0",
    )


def router_tokens(spec: NetworkSpec, run_mode: str = "train") -> int:
    """Tokens N of one routing group; 0 where a group would be empty.

    ``batch_size`` counts sequences per data-parallel slice in training, of the whole batch otherwise; under sequence
    parallel each slice is cut once more over the model-parallel ranks.
    """
    parallel = spec.parallel
    cut = parallel.model_parallel if parallel.use_seq_parallel else 1
    if run_mode not in TRAINING:
        cut *= parallel.data_parallel
    return spec.batch_size * spec.seq_length // cut


def nearest_sizes(parallel: ParallelSpec, model: ModelSpec) -> tuple[int, int, int]:
    """The (dp, mp, pp) nearest to the given ones with dp * mp * pp == device_num that also suits the model.

    Nearest: fewest sizes changed, then the smallest sum of their log ratios. Data parallel alone always suits.
    """
    given = (parallel.data_parallel, parallel.model_parallel, parallel.pipeline_stage)
    widths = math.gcd(*model.cut_widths.values(), model.hidden_size)
    stages = max(model.num_hidden_layers // parallel.pp_interleave_num, 1)
    if model.tie_word_embeddings or (model.moe and model.moe.balance_via_topk_bias):
        stages = 1
    divisors = _divisors(parallel.device_num)
    choices = [
        (parallel.device_num // (mp * pp), mp, pp)
        for mp, pp in product(divisors, divisors)
        if parallel.device_num % (mp * pp) == 0 and widths % mp == 0 and pp <= stages
    ]

    def distance(choice: tuple[int, int, int]) -> tuple[int, float]:
        pairs = list(zip(choice, given, strict=True))
        return sum(new != old for new, old in pairs), sum(abs(math.log(new / old)) for new, old in pairs)

    return min(choices, key=distance)


def _product(spec: NetworkSpec, problems: Problems) -> None:
    parallel = spec.parallel
    sizes = ("data_parallel", "model_parallel", "pipeline_stage", "context_parallel")
    dp, mp, pp, cp = (getattr(parallel, name) for name in sizes)
    if parallel.parallel_mode == "semi_auto_parallel" and dp * mp * pp * cp != parallel.device_num:
        near, asked = nearest_sizes(parallel, spec.model), dp * mp * pp * cp
        advice = "the nearest choice is data_parallel={}, model_parallel={}, pipeline_stage={}".format(*near)
        if parallel.device_num == 1:  # of a file written for a cluster, started as one process
            advice = (
                f"start {asked} processes (bash scripts/msrun_launcher.sh COMMAND {asked}), see what it needs on "
                f"{asked} devices (python tools/dryrun.py --config FILE --worker_num {asked}), or, for a network that "
                "one device holds, set use_parallel to False"
            )
        problems.add(
            f"data_parallel*model_parallel*pipeline_stage*context_parallel = {dp}*{mp}*{pp}*{cp} = {asked}"
            f" is not the device count {parallel.device_num}",
            advice,
        )


def _slices(spec: NetworkSpec, run_mode: str, problems: Problems, warnings: list[str]) -> None:
    parallel, dp = spec.parallel, spec.parallel.data_parallel
    if parallel.context_parallel != 1:
        problems.add(
            f"context_parallel={parallel.context_parallel}",
            "this network is not cut along the sequence: set context_parallel: 1",
        )
    _product(spec, problems)
    if run_mode not in TRAINING and spec.batch_size % dp:
        problems.divides("model_config.batch_size", spec.batch_size, "data_parallel", dp)
    if parallel.parallel_mode == "data_parallel" and parallel.device_num > 1 and run_mode in TRAINING:
        if not parallel.gradients_mean:
            warnings.append(
                "gradients_mean=False has no effect in data_parallel mode: the gradients of all devices "
                "are averaged, as one device with the whole batch would have them"
            )


def _lengths(spec: NetworkSpec, run_mode: str, problems: Problems, warnings: list[str]) -> None:
    limit = spec.model.max_position_embeddings
    if spec.seq_length > limit:
        problems.add(
            f"seq_length={spec.seq_length} exceeds max_position_embedding={limit}",
            f"use a seq_length up to {limit} or raise max_position_embedding",
        )
    if spec.parallel.use_seq_parallel and spec.seq_length % spec.parallel.model_parallel:
        problems.divides(
            "seq_length", spec.seq_length, "model_parallel (use_seq_parallel)", spec.parallel.model_parallel
        )


def _widths(spec: NetworkSpec, run_mode: str, problems: Problems, warnings: list[str]) -> None:
    model, mp, parallel = spec.model, spec.parallel.model_parallel, spec.parallel
    widths = {**model.cut_widths, "hidden_size": model.hidden_size}
    near = _nearest(mp, _divisors(math.gcd(*widths.values())))
    for name, width in widths.items():
        if width % mp:
            problems.add(
                f"{name}={width} is not a multiple of model_parallel={mp}",
                f"the nearest model_parallel that divides every width is {near}",
            )
    if model.vocab_size % mp:
        warnings.append(
            f"vocab_size={model.vocab_size} is not a multiple of model_parallel={mp}: the output layer "
            "and the loss are not cut"
        )
    if parallel.enable_parallel_optimizer and parallel.parallel_mode in SHARDED_MODES and run_mode != TOGETHER:
        for name, width in (("vocab_size", model.vocab_size), ("hidden_size", model.hidden_size)):
            if width % parallel.device_num:
                warnings.append(
                    f"{name}={width} is not a multiple of the {parallel.device_num} devices: "
                    "enable_parallel_optimizer may leave its parameters whole"
                )


def _pipeline(spec: NetworkSpec, run_mode: str, problems: Problems, warnings: list[str]) -> None:
    stages, micro, layers = spec.parallel.pipeline_stage, spec.parallel.micro_batch_num, spec.model.num_hidden_layers
    parts = spec.parallel.pp_interleave_num
    if stages == 1:
        if micro > 1 and run_mode in TRAINING:
            warnings.append(f"micro_batch_num={micro} has no effect at pipeline_stage=1")
        return
    if run_mode == "eval":
        problems.add(f"pipeline_stage={stages} in eval", "set pipeline_stage: 1")
    if run_mode in TRAINING and spec.model.moe and spec.model.moe.balance_via_topk_bias:
        problems.add(
            f"balance_via_topk_bias=True with pipeline_stage={stages}: no stage sees the load of all layers",
            "balance by aux_loss_factor instead, or set pipeline_stage: 1",
        )
    if run_mode in TRAINING and spec.model.tie_word_embeddings:
        problems.add(
            f"tie_word_embeddings=True with pipeline_stage={stages}: the first and the last stage would each learn a "
            "table of their own, for MindSpore exchanges no gradients between them",
            "set pipeline_stage: 1",
        )
    if run_mode in TRAINING and micro < stages:
        problems.add(f"micro_batch_num={micro} is below pipeline_stage={stages}", f"use at least {stages}")
    if layers < stages:
        problems.add(f"pipeline_stage={stages} exceeds num_layers={layers}", f"use at most {layers} stages")
    elif layers < stages * parts:
        problems.add(
            f"pipeline_stage*pp_interleave_num = {stages}*{parts} = {stages * parts} exceeds num_layers={layers}",
            f"use a pp_interleave_num up to {layers // stages}",
        )
    if parts > 1 and not spec.parallel.pipeline_interleave:
        problems.add(
            f"pp_interleave_num={parts} without MindSpore's schedule for it",
            "set parallel.pipeline_config.pipeline_interleave: True, or pp_interleave_num: 1",
        )
    if parts == 1 and spec.parallel.pipeline_interleave:
        warnings.append("pipeline_interleave=True with pp_interleave_num=1: no stage has several parts to interleave")


def _experts(spec: NetworkSpec, run_mode: str, problems: Problems, warnings: list[str]) -> None:
    parallel = spec.parallel
    dp, ep, mp = parallel.data_parallel, parallel.expert_parallel, parallel.model_parallel
    if not spec.model.moe:
        if ep > 1:
            warnings.append(f"expert_parallel={ep} has no effect on a dense network")
        return
    experts = spec.model.moe.num_local_experts
    near = f"the nearest expert_parallel that fits is {_nearest(ep, _divisors(math.gcd(dp, experts)))}"
    if ep > dp:
        problems.add(f"expert_parallel={ep} exceeds data_parallel={dp}", near)
    elif dp % ep:
        problems.add(f"data_parallel={dp} is not a multiple of expert_parallel={ep}", near)
    if experts % ep:
        problems.add(f"expert_num={experts} is not a multiple of expert_parallel={ep}", near)
    if mp > 1 and not parallel.use_seq_parallel and run_mode != TOGETHER:
        warnings.append(
            f"model_parallel={mp} with experts but without sequence parallel: every model-parallel rank routes and "
            "exchanges the same tokens; parallel_config.use_seq_parallel: True shares them out"
        )
    if ep > 1 and not parallel.enable_alltoall:
        if run_mode in TRAINING:
            problems.add(
                f"enable_alltoall=False with expert_parallel={ep}: MindSpore does not compile this network "
                "with gathers and slices in its place",
                "set parallel.enable_alltoall: True",
            )
        else:
            warnings.append(f"enable_alltoall=False with expert_parallel={ep}: tokens move by gather and slice, slower")


def _router_load(spec: NetworkSpec, run_mode: str, problems: Problems, warnings: list[str]) -> None:
    moe, tokens = spec.model.moe, router_tokens(spec, run_mode)
    if not moe:
        return
    load = moe.num_experts_per_tok * tokens
    if load > moe.max_router_load:
        problems.add(
            f"num_experts_chosen*tokens of a routing group = {moe.num_experts_per_tok}*{tokens} = {load} exceeds "
            f"max_router_load={moe.max_router_load}",
            f"use at most {moe.max_router_load // moe.num_experts_per_tok} tokens (batch_size*seq_length) per group, "
            f"or set moe_config.max_router_load to {load} or more",
        )


def _quiet_losses(spec: NetworkSpec, run_mode: str, warnings: list[str]) -> None:
    moe = spec.model.moe
    if not moe or run_mode not in TRAINING:
        return
    if moe.balance_via_topk_bias and not moe.topk_bias_update_rate:
        warnings.append("balance_via_topk_bias=True with topk_bias_update_rate=0 never moves the bias")
    if moe.topk_bias_update_rate and not moe.balance_via_topk_bias:
        warnings.append(f"topk_bias_update_rate={moe.topk_bias_update_rate} has no effect: balance_via_topk_bias=False")
    if moe.aux_loss_type == LEGACY_CONSTANT and moe.aux_losses:
        warnings.append(f"aux_loss_type={LEGACY_CONSTANT!r} has no gradient: it balances nothing, and is for comparing")
    if not spec.return_extra_loss and (moe.aux_losses or moe.z_loss_factor):
        warnings.append("return_extra_loss=False: the routing losses are not part of the loss")


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]


def _nearest(wanted: int, choices: list[int]) -> int:
    """The choice nearest to ``wanted``; the smaller of two equally near ones."""
    return min(choices, key=lambda choice: (abs(choice - wanted), choice))
