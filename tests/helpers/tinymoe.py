# SPDX-License-Identifier: Apache-2.0
"""A family made outside the package: its names, its table of weights, and a gate that adds a learned offset."""

from __future__ import annotations

from mindformers_ext.core.families import GATES, QWEN2_MOE, ConfigWord, Family, GateWeight, register_family
from mindformers_ext.core.parameters import ROUTED
from mindformers_ext.weights.qwen2_moe import STYLES
from mindformers_ext.weights.rules import Rule
from mindformers_ext.weights.tables import Table, register_table

NAME, CLASS = "tinymoe", "TinyMoeForCausalLM"
LAYER = "model.layers.{layer}."
OFFSET = Rule(f"{LAYER}mlp.gate.offset", (f"{LAYER}feed_forward.{ROUTED}router.offset",), "E")

GATES["offset"] = (GateWeight("dense.weight", "E D"), GateWeight("offset", "E", "zeros"))
register_table(NAME, Table({"per_expert": (*STYLES["per_expert"], OFFSET)}))
register_family(
    Family(
        name=NAME,
        hf_class=CLASS,
        yaml_names=(("TinyMoeConfig", CLASS),),
        has_experts=True,
        defaults=QWEN2_MOE.defaults,
        words=(
            ConfigWord("num_experts", "moe", "num_local_experts", "int", 4),
            ConfigWord("num_experts_per_tok", "moe", "num_experts_per_tok", "int", 2),
            ConfigWord("moe_intermediate_size", "moe", "intermediate_size", "int", 24),
            ConfigWord("shared_expert_intermediate_size", "shared", "intermediate_size", "int", 20),
        ),
        moe={"gate": "offset", "use_gating_sigmoid": True},
        shared={"gated": True},
        chooses_layers=True,
    )
)


def register_mindspore_gate() -> None:
    """The gate as a cell of MindSpore, with the cut of its one operator."""
    import mindspore.ops.operations as P
    from mindspore import Parameter, Tensor, ops

    from mindformers_ext.ms.moe.gate import GATES, LinearGate
    from mindformers_ext.ms.strategies import STRATEGIES, Shards

    class OffsetGate(LinearGate):
        def __init__(self, spec, moe, operators):
            super().__init__(spec, moe, operators)
            self.offset = Parameter(ops.zeros(moe.num_local_experts), "offset", parallel_optimizer=False)
            self.add = Shards(spec).shard(P.Add(), "offset")

        def scores(self, x_TD: Tensor) -> Tensor:
            return self.add(self.dense(x_TD), self.offset)

    STRATEGIES["offset"] = (("tok -", "-"), ())
    GATES["offset"] = OffsetGate


def register_torch_gate() -> None:
    """The gate as a module of PyTorch."""
    import torch

    from mindformers_ext.pt.moe.gate import GATES, LinearGate

    class OffsetGate(LinearGate):
        def __init__(self, spec, moe):
            super().__init__(spec, moe)
            self.offset = torch.nn.Parameter(torch.zeros(moe.num_local_experts))

        def logits(self, x_GND: torch.Tensor) -> torch.Tensor:
            return super().logits(x_GND) + self.offset

    GATES["offset"] = OffsetGate
