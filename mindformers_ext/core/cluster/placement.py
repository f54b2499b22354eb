# SPDX-License-Identifier: Apache-2.0
"""Which slice of every parameter one device holds: the arithmetic that a compiled graph has to agree with.

A stage's devices form a box of data_parallel x model_parallel, data_parallel = outer x expert_parallel.
``ms.strategies`` cuts the network by the same words; here they are numbers, for memory estimates and for tests
of the compiled graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mindformers_ext.core.config.keys import SHARDED_MODES
from mindformers_ext.core.config.lora import LORA_A, LORA_B, LoraSpec
from mindformers_ext.core.spec import NetworkSpec

WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a number
OPTIMIZER_THRESHOLD = 64  # KB: MindSpore's default below which the optimizer's cut leaves a slice whole
ADAM_STATES = 2
Row = tuple[str, int, tuple[int, ...], str]


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
    spec: NetworkSpec, threshold: int = OPTIMIZER_THRESHOLD, lora: LoraSpec | None = None
) -> tuple[PlacedParameter, ...]:
    """Every weight of the network with its stage and its slice on one device of that stage.

    Args:
        spec: as ``core.cluster.cluster_rules.settled`` leaves it.
        threshold: KB; smaller slices are not cut by the optimizer (``parallel_optimizer_threshold``).
        lora: its adapters are added, and they alone are trained.
    """
    parallel = spec.parallel
    sharded = parallel.parallel_mode in SHARDED_MODES and parallel.device_num > 1
    mp = parallel.model_parallel if sharded else 1
    dp = parallel.data_parallel if sharded else 1
    ep = parallel.expert_parallel if sharded and spec.model.moe else 1
    parts = {"-": 1, "mp": mp, "ep": ep, "head": head_cuts(spec) if sharded else 1}
    placed = []
    for name, stage, whole, words in _with_adapters(_parameters(spec), lora):
        is_router = name.endswith("router.dense.weight")  # always float32, never cut
        numbers = "float32" if is_router else spec.numerics.param_dtype
        cuts = [parts[word] for word in words.split()]
        gathered = tuple(size // cut for size, cut in zip(whole, cuts, strict=True))
        copies = dp * mp // math.prod(cuts)
        local, kilobytes = gathered, math.prod(gathered) * WIDTH[numbers] / 1024
        may_cut = sharded and parallel.enable_parallel_optimizer and not is_router
        if may_cut and kilobytes >= threshold and gathered[0] % copies == 0:
            local = (gathered[0] // copies, *gathered[1:])
        trained = lora is None or name.endswith((LORA_A, LORA_B))
        placed.append(PlacedParameter(name, stage, whole, gathered, local, numbers, trained))
    return tuple(placed)


def head_cuts(spec: NetworkSpec) -> int:
    """Parts into which model parallel cuts the vocabulary: 1 where it cannot or may not."""
    mp = spec.parallel.model_parallel
    return 1 if spec.parallel.vocab_emb_dp or spec.model.vocab_size % mp else mp


def _with_adapters(rows: Iterable[Row], lora: LoraSpec | None) -> Iterator[Row]:
    """The rows, and behind each adapted matrix W (out, in) its A (rank, in) and B (out, rank), cut as W is."""
    for name, stage, whole, words in rows:
        yield name, stage, whole, words
        layer = name.removesuffix(".weight")
        if lora and layer != name and len(whole) == 2 and "router" not in name and lora.wants(layer):
            rows_word, columns_word = words.split()
            yield f"{layer}.{LORA_A}", stage, (lora.rank, whole[1]), f"- {columns_word}"
            yield f"{layer}.{LORA_B}", stage, (whole[0], lora.rank), f"{rows_word} -"


def _parameters(spec: NetworkSpec) -> Iterator[Row]:
    """(name, stage, whole shape, what cuts each dimension) of every weight, in the network's order."""
    model, stages = spec.model, spec.parallel.pipeline_stage
    hidden, ffn, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    yield "model.tok_embeddings.embedding_weight", 0, (model.vocab_size, hidden), "head -"
    for index in range(layers):
        stage, start = spec.layer_stage(index), f"model.layers.{index}."
        rows: list[tuple[str, tuple[int, ...], str]] = [
            ("attention_norm.weight", (hidden,), "-"),
            ("attention.wq.weight", (queries, hidden), "mp -"),
            ("attention.wk.weight", (keys, hidden), "mp -"),
            ("attention.wv.weight", (keys, hidden), "mp -"),
            ("attention.wo.weight", (hidden, queries), "- mp"),
            ("ffn_norm.weight", (hidden,), "-"),
        ]
        if model.moe:
            experts = model.moe.num_local_experts
            rows += [
                ("feed_forward.router.dense.weight", (experts, hidden), "- -"),
                ("feed_forward.ffn.w1.weight", (experts, ffn, hidden), "ep mp -"),
                ("feed_forward.ffn.w2.weight", (experts, hidden, ffn), "ep - mp"),
                ("feed_forward.ffn.w3.weight", (experts, ffn, hidden), "ep mp -"),
            ]
        else:
            rows += [
                ("feed_forward.w1.weight", (ffn, hidden), "mp -"),
                ("feed_forward.w2.weight", (hidden, ffn), "- mp"),
                ("feed_forward.w3.weight", (ffn, hidden), "mp -"),
            ]
        for name, whole, words in rows:
            yield start + name, stage, whole, words
    yield "model.norm_out.weight", stages - 1, (hidden,), "-"
    if not model.tie_word_embeddings:
        yield "lm_head.weight", stages - 1, (model.vocab_size, hidden), "head -"
