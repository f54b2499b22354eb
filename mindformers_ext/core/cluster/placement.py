# SPDX-License-Identifier: Apache-2.0
"""Which slice of every parameter one device holds: the arithmetic that a compiled graph has to agree with.

A stage's devices form a box of data_parallel x model_parallel, data_parallel = outer x expert_parallel.
``ms.strategies`` cuts the network by the same words; here they are numbers, for memory estimates and for tests
of the compiled graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from mindformers_ext.core.config.keys import SHARDED_MODES
from mindformers_ext.core.config.lora import LORA_A, LORA_B, LoraSpec
from mindformers_ext.core.config.train import ParameterGroup, group_of
from mindformers_ext.core.parameters import WeightRow, model_weights
from mindformers_ext.core.pruning import PruningSpec
from mindformers_ext.core.spec import NetworkSpec

WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a number
OPTIMIZER_THRESHOLD = 64  # KB: MindSpore's default below which the optimizer's cut leaves a slice whole
ADAM_STATES = 2
Row = tuple[str, int, tuple[int, ...], WeightRow]


@dataclass(frozen=True)
class PlacedParameter:
    """One parameter of a pipeline stage. ``gathered`` is the slice that computes, ``local`` the one that is kept.

    They differ where ``enable_parallel_optimizer`` cuts a slice that several devices would hold alike.
    """

    name: str
    stage: int
    whole: tuple[int, ...]
    gathered: tuple[int, ...]
    local: tuple[int, ...]
    numbers: str
    trained: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes kept on one device."""
        return math.prod(self.local) * WIDTH[self.numbers]

    @property
    def gathered_nbytes(self) -> int:
        """Bytes of the slice that computes."""
        return math.prod(self.gathered) * WIDTH[self.numbers]


def placed_parameters(
    spec: NetworkSpec,
    threshold: int = OPTIMIZER_THRESHOLD,
    lora: LoraSpec | None = None,
    pruning: PruningSpec | None = None,
    groups: tuple[ParameterGroup, ...] = (),
) -> tuple[PlacedParameter, ...]:
    """Every weight of the network with its stage and its slice on one device of that stage.

    Args:
        spec: as ``core.cluster.cluster_rules.effective_spec`` leaves it.
        threshold: KB; smaller slices are not cut by the optimizer (``parallel_optimizer_threshold``).
        lora: its adapters are added, and they alone are trained.
        pruning: what its masks need is added, which every device has whole.
        groups: parameters that are trained in another way than the rest.
    """
    parallel = spec.parallel
    sharded = parallel.parallel_mode in SHARDED_MODES and parallel.device_num > 1
    mp = parallel.model_parallel if sharded else 1
    dp = parallel.data_parallel if sharded else 1
    ep = parallel.expert_parallel if sharded and spec.model.moe else 1
    parts = {"-": 1, "mp": mp, "ep": ep, "head": head_cuts(spec) if sharded else 1}
    placed = []
    for name, stage, whole, row in _with_adapters(_parameters(spec), lora):
        numbers = "float32" if row.fixed else spec.numerics.param_dtype
        cuts = [parts[word] for word in row.cut.split()]
        gathered = tuple(size // cut for size, cut in zip(whole, cuts, strict=True))
        copies = dp * mp // math.prod(cuts)
        local, kilobytes = gathered, math.prod(gathered) * WIDTH[numbers] / 1024
        may_cut = sharded and parallel.enable_parallel_optimizer and not row.fixed
        if may_cut and kilobytes >= threshold and gathered[0] % copies == 0:
            local = (gathered[0] // copies, *gathered[1:])
        trained = group_of(name, groups).trained and (lora is None or name.endswith((LORA_A, LORA_B)))
        placed.append(PlacedParameter(name, stage, whole, gathered, local, numbers, trained))
    for name, whole, is_trained in pruning.parameters() if pruning else ():
        placed.append(PlacedParameter(name, 0, whole, whole, whole, "float32", is_trained))
    return tuple(placed)


def head_cuts(spec: NetworkSpec) -> int:
    """Parts into which model parallel cuts the vocabulary: 1 where it cannot or may not."""
    mp = spec.parallel.model_parallel
    return 1 if spec.parallel.vocab_emb_dp or spec.model.vocab_size % mp else mp


def _with_adapters(rows: Iterable[Row], lora: LoraSpec | None) -> Iterator[Row]:
    """The rows, and behind each adapted matrix W (out, in) its A (rank, in) and B (out, rank), cut as W is."""
    for name, stage, whole, row in rows:
        yield name, stage, whole, row
        layer = name.removesuffix(".weight")
        if lora and layer != name and len(whole) == 2 and not row.fixed and lora.wants(layer):
            rows_word, columns_word = row.cut.split()
            yield f"{layer}.{LORA_A}", stage, (lora.rank, whole[1]), replace(row, cut=f"- {columns_word}")
            yield f"{layer}.{LORA_B}", stage, (whole[0], lora.rank), replace(row, cut=f"{rows_word} -")


def _parameters(spec: NetworkSpec) -> Iterator[Row]:
    """(name, stage, whole shape, what cuts each dimension) of every weight, in the network's order."""
    for weight in model_weights(spec.model):
        if weight.layer is not None:
            stage = spec.layer_stage(weight.layer)
        else:
            stage = spec.parallel.pipeline_stage - 1 if weight.last else 0
        yield weight.name, stage, weight.shape, weight.row
