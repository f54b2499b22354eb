# SPDX-License-Identifier: Apache-2.0
"""All splits of a job over its devices that keep the rows of a step and fit the memory, cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mindformers_ext.core.cluster.cluster_rules import check_network, effective_spec, uncut_slots
from mindformers_ext.core.cluster.memory import StageMemory, StepSettings, stage_memory
from mindformers_ext.core.cluster.split_cost import SplitCost, split_cost
from mindformers_ext.core.config.keys import SHARDED_MODES
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec

MACHINE = 8  # devices of one machine: model parallel sends in every layer and stays inside one


@dataclass(frozen=True)
class Split:
    """One way to cut the job: the effective spec, its settings, the fullest stage and the cost."""

    spec: NetworkSpec
    settings: StepSettings
    memory: StageMemory
    cost: SplitCost

    @property
    def words(self) -> dict[str, object]:
        """What to write below ``parallel_config``, with ``gradient_accumulation_steps`` of ``runner_config``."""
        parallel = self.spec.parallel
        return {
            "data_parallel": parallel.data_parallel,
            "model_parallel": parallel.model_parallel,
            "expert_parallel": parallel.expert_parallel,
            "pipeline_stage": parallel.pipeline_stage,
            "micro_batch_num": parallel.micro_batch_num,
            "use_seq_parallel": parallel.use_seq_parallel,
            "gradient_accumulation_steps": self.settings.accumulation_steps,
        }


def step_rows(spec: NetworkSpec, settings: StepSettings) -> int:
    """Sequences of one training step."""
    parallel = spec.parallel
    micro = parallel.micro_batch_num if parallel.pipeline_stage > 1 else 1
    copies = parallel.data_parallel if parallel.parallel_mode in SHARDED_MODES else parallel.device_num
    return spec.batch_size * copies * micro * parallel.micro_batch_interleave_num * settings.accumulation_steps


def fitting_splits(
    spec: NetworkSpec, settings: StepSettings, limit: int | None = None, rows: int | None = None
) -> list[Split]:
    """Every valid split for ``spec.parallel.device_num`` devices whose fullest stage needs at most ``limit`` bytes.

    Args:
        spec: the job as it is cut now; batch per slice, sequence and model are kept.
        settings: what it computes again of some layers is so for all of them.
        limit: bytes of one device; None for any.
        rows: sequences of a step to keep (default: those of ``spec``).
    """
    kept = step_rows(spec, settings) if rows is None else rows
    found = []
    for candidate, changed in _candidates(spec, settings, kept):
        fullest = max(stage_memory(candidate, changed), key=lambda stage: stage.total)
        if limit is None or fullest.total <= limit:
            found.append(Split(candidate, changed, fullest, split_cost(candidate, changed)))
    return sorted(found, key=lambda split: (split.cost.seconds, split.memory.total))


def _candidates(spec: NetworkSpec, settings: StepSettings, rows: int) -> Iterator[tuple[NetworkSpec, StepSettings]]:
    """Settled specs that pass every rule, with the settings that keep the rows of a step."""
    devices, layers = spec.parallel.device_num, spec.model.num_hidden_layers
    experts = spec.model.moe.num_local_experts if spec.model.moe else 1
    again = settings.recompute.for_every_layer(layers)
    for mp in _divisors(devices, MACHINE):
        for pp in _divisors(devices // mp, layers):
            if pp > 1 and settings.pruning:
                continue
            dp = devices // mp // pp
            batches, rest = divmod(rows, spec.batch_size * dp * spec.parallel.micro_batch_interleave_num)
            if rest or batches < 1:
                continue
            for ep in _divisors(dp, experts):
                parallel = replace(
                    spec.parallel,
                    data_parallel=dp,
                    model_parallel=mp,
                    pipeline_stage=pp,
                    expert_parallel=ep,
                    micro_batch_num=batches if pp > 1 else 1,
                    use_seq_parallel=mp > 1,
                    context_parallel=1,
                    vocab_emb_dp=spec.parallel.vocab_emb_dp and mp == 1,
                    enable_alltoall=ep > 1,
                    parallel_mode="semi_auto_parallel",
                )
                candidate = replace(spec, parallel=parallel)
                if is_valid(candidate):
                    steps = 1 if pp > 1 else batches
                    yield effective_spec(candidate)[0], replace(settings, recompute=again, accumulation_steps=steps)


def is_valid(spec: NetworkSpec) -> bool:
    """Whether ``spec`` breaks no rule of training with MindSpore."""
    try:
        check_network(spec, "train")
    except UserError:
        return False
    return uncut_slots(spec) is None


def _divisors(number: int, most: int) -> list[int]:
    return [value for value in range(1, min(number, most) + 1) if number % value == 0]
