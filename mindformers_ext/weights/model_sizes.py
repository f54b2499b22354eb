# SPDX-License-Identifier: Apache-2.0
"""The sizes of a model from the shapes of its MindSpore checkpoint, where no configuration is told."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.parameters import EMBEDDING, HEAD
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.tensors import TensorInfo

_LAYER = "model.layers.0."
_W1, _DENSE_W1 = _LAYER + "feed_forward.ffn.w1.weight", _LAYER + "feed_forward.w1.weight"
_WQ, _WK = (_LAYER + f"attention.{name}.weight" for name in ("wq", "wk"))


def sizes_from_shapes(infos: Mapping[str, TensorInfo]) -> ModelSpec:
    """A spec with the sizes that shapes show, enough to move tensors between dense and gmm, and no more.

    Head counts are not in the shapes (any pair that multiplies to the rows would do), so ``w_qkv`` cannot be taken
    apart with it.

    Raises:
        UserError: the shapes do not tell.
    """
    layers = sum(1 for name in infos if name.endswith(".attention_norm.weight") and name.startswith("model.layers."))
    # without its head a checkpoint may be tied, or cut: only a configuration knows
    needed = [EMBEDDING, HEAD, _WQ, _WK]
    missing = [name for name in needed if name not in infos or len(infos[name].shape) != 2]
    if missing or not layers:
        raise UserError(
            f"the checkpoint does not show its sizes ('{(missing or ['any layer'])[0]}' is not there): "
            "pass --config with a Hugging Face config.json"
        )
    vocab, hidden = infos[EMBEDDING].shape
    q, kv = infos[_WQ].shape[0], infos[_WK].shape[0]
    width, experts = _expert_width(infos, hidden)
    head = gcd(q, kv)
    return ModelSpec(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=q // head,
        num_key_value_heads=kv // head,
        head_dim=head,
        moe=MoESpec(num_local_experts=experts, num_experts_per_tok=1) if experts else None,
    )


def _expert_width(infos: Mapping[str, TensorInfo], hidden: int) -> tuple[int, int]:
    """F and the number of experts (0: dense)."""
    stacked, plain = infos.get(_W1), infos.get(_DENSE_W1)
    if stacked and len(stacked.shape) == 3 and hidden in stacked.shape[1:]:
        experts, *sides = stacked.shape
        sides.remove(hidden)
        return sides[0], experts
    if plain and len(plain.shape) == 2:
        return plain.shape[0], 0
    raise UserError("the checkpoint does not show the width of its feed-forward: pass --config with a config.json")
