# SPDX-License-Identifier: Apache-2.0
"""Small models and their masks of every kind, for both engines and for surgery."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mindformers_ext.core.pruning import ModelShape
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.surgery.prune.cut import FullMasks, full_masks, tensor_cut
from mindformers_ext.weights.convert import rule_set
from tests.helpers.prune_oracle import Sizes, random_weights

VOCAB, LAYERS = 23, 3
MHA = ModelShape(
    hidden_size=12,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=4,
    intermediate_size=10,
    num_hidden_layers=LAYERS,
)
GQA = replace(MHA, num_attention_heads=12, num_key_value_heads=4)
Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A model of ``shape`` and how its masks are drawn: by module the units that stay, soft or 1."""

    shape: ModelShape
    keep: dict[str, int]
    soft: bool = True
    tied: bool = False
    empty: str = ""  # a module whose first layer loses all units

    def values(self, seed: int = 0) -> Values:
        """Masks by module, float32."""
        rng, found = np.random.default_rng(seed), {}
        for name, keep in self.keep.items():
            shape = self.shape.mask_shape(name)
            mask = rng.uniform(0.05, 1.0, shape) if self.soft else np.ones(shape)
            for row in np.atleast_2d(mask):  # a view
                row[rng.permutation(shape[-1])[keep:]] = 0.0
            if name == self.empty:
                mask[0] = 0.0
            found[name] = mask.astype(np.float32)
        return found

    def masks(self, seed: int = 0, fold_head: bool = False) -> FullMasks:
        """The same of every layer."""
        return full_masks(self.values(seed), self.shape, self.tied, fold_head)

    def weights(self, seed: int = 1) -> dict[str, np.ndarray]:
        """By Hugging Face's names."""
        s = self.shape
        return random_weights(
            np.random.default_rng(seed), s.num_hidden_layers, s.hidden_size, s.num_attention_heads,
            s.num_key_value_heads, s.head_dim, s.intermediate_size, VOCAB, self.tied,
        )  # fmt: skip

    def model(self) -> ModelSpec:
        """The spec of the model."""
        sizes = {name: getattr(self.shape, name) for name in ModelShape.__dataclass_fields__}
        return ModelSpec(vocab_size=VOCAB, tie_word_embeddings=self.tied, pad_token_id=-1, rms_norm_eps=1e-5, **sizes)

    def sizes(self) -> Sizes:
        """The same for the oracle."""
        return Sizes(self.shape.head_dim, tied=self.tied)


SHAPE = {"hidden": 7, "head": 2, "intermediate": 6, "layer": 2}
CASES = {
    "soft": Case(MHA, SHAPE),
    "hard": Case(MHA, SHAPE, soft=False),
    "hidden alone": Case(MHA, {"hidden": 5}),
    "heads alone": Case(MHA, {"head": 3}),
    "whole layers": Case(MHA, {"layer": 1}),
    "halves": Case(MHA, {"head_layer": 2, "mlp": 1}),
    "no intermediate in one layer": Case(MHA, {"intermediate": 4, "hidden": 9}, empty="intermediate"),
    "groups, whole ones": Case(GQA, {"kv_head": 2, "hidden": 8}),
    "groups, queries in them": Case(GQA, {"q_in_group": 2, "intermediate": 5}),
    "groups, both": Case(GQA, {"kv_head": 2, "q_in_group": 2, "layer": 2, "hidden": 8}),
    "tied": Case(MHA, SHAPE, tied=True),
    "tied, groups": Case(GQA, {"kv_head": 3, "hidden": 6}, tied=True),
}


def oracle_masks(masks: FullMasks) -> dict:
    """As ``prune_oracle.logits`` takes them."""
    by_layer = {
        "heads": [layer.heads for layer in masks.layers],
        "intermediate": [layer.intermediate for layer in masks.layers],
        "attention": [layer.attention for layer in masks.layers],
        "mlp": [layer.mlp for layer in masks.layers],
    }
    return {"hidden": masks.hidden, **by_layer}


def cut_weights(case: Case, masks: FullMasks) -> dict[str, np.ndarray]:
    """The pruned weights by name, in memory; a layer of which half stays is there with zeros."""
    found = {}
    rules = rule_set(case.model()).rules
    stays = [n for n, layer in enumerate(masks.layers) if layer.attention or layer.mlp]
    weights = case.weights()
    for rule in rules:
        for number, layer in enumerate(stays) if rule.per_layer else ((0, None),):
            name = str(rule.hf).format(layer=layer)
            cut = tensor_cut(name, str(rule.dims), masks, layer)
            parts = list(cut.blocks(np.array_split(weights[name], 3)))
            shape = cut.shape(weights[name].shape)
            found[str(rule.hf).format(layer=number)] = np.concatenate(parts) if parts else np.zeros(shape, np.float32)
    return found
