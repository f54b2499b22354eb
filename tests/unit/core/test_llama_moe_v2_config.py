# SPDX-License-Identifier: Apache-2.0
"""What config.json of a LLaMA-MoE v2 says, and both spellings of its dense layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mindformers_ext.core.config.hf import hf_config_from_spec, hf_notes, model_spec_from_hf
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import FAMILIES, LLAMA_MOE_V2, LLAMA_MOE_V2_RESIDUAL, MIXTRAL
from mindformers_ext.weights.convert import to_hf, to_mindspore
from tests.helpers.llama_moe_v2_models import random_tensors, v2_words


def test_the_published_words_are_read() -> None:
    """Without the width of dense layers it is that of all experts together, the residual part among them."""
    words = v2_words("residual", intermediate_size_dense=None, sliding_window=16)
    spec = model_spec_from_hf(words)
    assert spec.family == LLAMA_MOE_V2_RESIDUAL.name
    assert (spec.intermediate_size, spec.expert_size, spec.dense_layers, spec.sliding_window) == (224, 28, (0, 3), 16)
    assert spec.routing.routed_scaling_factor == 1.5 and spec.routing.norm_single_choice
    assert spec.routing.shared_expert is not None and spec.routing.shared_expert.intermediate_size == 28
    assert [spec.layer(place).moe is None for place in range(4)] == [True, False, False, True]
    assert hf_notes(words) == []


@pytest.mark.parametrize("case", ["vanilla", "contract", "residual", "aligned"])
def test_what_is_written_is_read_back(case: str) -> None:
    spec = model_spec_from_hf(v2_words(case))
    written = hf_config_from_spec(spec)
    assert model_spec_from_hf(written) == spec
    known = ("model_type", "architectures", "scale_factor", "intermediate_size", "num_moe_contract_layers")
    assert {key: written[key] for key in known} == {key: v2_words(case)[key] for key in known}
    own = FAMILIES[spec.model_type]  # as the code that is saved with a model writes it
    saved = {**written, "model_type": LLAMA_MOE_V2.name, "architectures": [LLAMA_MOE_V2.hf_class]}
    assert model_spec_from_hf(saved) == spec and own.variant_of == MIXTRAL.name


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"scale_factor": None}, "scale_factor is missing"),
        ({"scale_factor": 0.0}, "scale_factor is 0.0"),
        ({"num_moe_contract_layers": 2}, "no layer would be a mixture"),
        ({"num_moe_contract_layers": -1}, "num_moe_contract_layers=-1"),
        ({"moe_type": "megablocks"}, "moe_type='megablocks' is not built"),
        ({"add_rescale_bias": "yes"}, "add_rescale_bias"),
        ({"aux_loss_type": "global"}, "aux_loss_type='global'"),
        ({"num_experts_per_tok": 9}, "exceeds expert_num=8"),
    ],
)
def test_what_cannot_be_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        model_spec_from_hf(v2_words("vanilla", **more))


@pytest.mark.parametrize("llama_names", [False, True])
def test_both_spellings_of_dense_layers_are_read_and_one_is_written(llama_names: bool) -> None:
    words = v2_words("contract")
    spec, drawn = model_spec_from_hf(words), random_tensors(words, llama_names=llama_names)
    held = to_mindspore(drawn, spec)
    back = to_hf(held, spec)
    wanted = random_tensors(words)
    assert back.keys() == wanted.keys()
    name = "model.layers.3.mlp.down_proj.weight" if llama_names else "model.layers.3.block_sparse_moe.w2.weight"
    np.testing.assert_array_equal(back["model.layers.3.block_sparse_moe.w2.weight"], drawn[name])


@pytest.mark.parametrize(
    ("lost", "said"), [("model.layers.0.block_sparse_moe.w1.weight", "missing"), ("", "model.layers.0.mlp.odd")]
)
def test_a_missing_or_unexpected_tensor_is_an_error(lost: str, said: str) -> None:
    words = v2_words("contract")
    drawn = random_tensors(words)
    drawn = {name: array for name, array in drawn.items() if name != lost}
    if not lost:
        drawn["model.layers.0.mlp.odd.weight"] = np.zeros((1, 1), np.float32)
    with pytest.raises(UserError, match=said):
        to_mindspore(drawn, model_spec_from_hf(words))
