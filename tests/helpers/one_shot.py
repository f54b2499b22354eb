# SPDX-License-Identifier: Apache-2.0
"""A small LLaMA with planted dead units, and what every measure of one-shot pruning is by direct computation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.tiny_llama import VOCAB, sentences, write_tokenizer

LAYERS, HIDDEN, WIDTH, HEADS, GROUPS, HEAD = 4, 24, 40, 4, 2, 8
DEAD_NEURONS, DEAD_GROUP, DEAD_LAYER, DEAD_CHANNEL = (3, 17), 1, 2, 5
BLOCK, TOKENS, JUDGED = 32, 200, 120


def make_model(folder: Path, planted: bool = False, **more: Any) -> LlamaForCausalLM:
    """The folder (head_dim is not d / H), and the model itself."""
    torch.manual_seed(5)
    words = {"tie_word_embeddings": False, "num_hidden_layers": LAYERS, **more}
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=WIDTH,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=HEAD, max_position_embeddings=64,
        initializer_range=0.25, bos_token_id=1, eos_token_id=2, **words,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if module.__class__.__name__ == "LlamaRMSNorm":
                module.weight.uniform_(0.5, 1.5)
        if planted:
            plant(model)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def plant(model: LlamaForCausalLM) -> None:
    """Neurons, a group of heads, a layer and a channel that do nothing."""
    group = slice(DEAD_GROUP * 2 * HEAD, (DEAD_GROUP + 1) * 2 * HEAD)
    keys = slice(DEAD_GROUP * HEAD, (DEAD_GROUP + 1) * HEAD)
    model.model.embed_tokens.weight[:, DEAD_CHANNEL] = 0
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for linear, rows in ((attention.q_proj, group), (attention.k_proj, keys), (attention.v_proj, keys)):
            linear.weight[rows] = 0
        attention.o_proj.weight[:, group] = 0
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[list(DEAD_NEURONS)] = 0
        mlp.down_proj.weight[:, list(DEAD_NEURONS)] = 0
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight[:, DEAD_CHANNEL] = 0
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight[DEAD_CHANNEL] = 0
            if number == DEAD_LAYER:
                linear.weight[:] = 0


def write_text(path: Path, seed: int = 0, count: int = 60) -> Path:
    """A plain text of sentences."""
    path.write_text(". ".join(sentences(count, seed)), encoding="utf-8")
    return path


class Direct:
    """Everything that a pass measures, of the whole model at once in float64, by hooks and autograd."""

    def __init__(self, model: LlamaForCausalLM, ids: np.ndarray, lengths: np.ndarray) -> None:
        self.model = model.double()
        self.rows: list[list[dict[str, torch.Tensor]]] = []  # by row, by layer
        self.finals: list[torch.Tensor] = []
        self.loss = torch.zeros((), dtype=torch.float64)
        for row, length in zip(ids, lengths, strict=True):
            self._run(torch.from_numpy(row[:length].astype(np.int64))[None])
        self.loss.backward()

    def _run(self, ids: torch.Tensor) -> None:
        found: list[dict[str, torch.Tensor]] = [{} for _ in self.model.model.layers]

        def keep(place: dict[str, torch.Tensor], name: str, entering: bool) -> Callable[..., None]:
            def hook(module: Any, given: tuple, left: Any) -> None:
                tensor = given[0] if entering else (left[0] if isinstance(left, tuple) else left)
                tensor.retain_grad()
                place[name] = tensor

            return hook

        final: dict[str, torch.Tensor] = {}
        hooks = [self.model.model.norm.register_forward_hook(keep(final, "n", False))]
        for place, layer in zip(found, self.model.model.layers, strict=True):
            for module, name, entering in (
                (layer.mlp.down_proj, "z", True),
                (layer.self_attn.o_proj, "c", True),
                (layer.input_layernorm, "n1", False),
                (layer.post_attention_layernorm, "n2", False),
                (layer.input_layernorm, "in", True),
                (layer, "out", False),
            ):
                hooks.append(module.register_forward_hook(keep(place, name, entering)))
        logits = self.model(ids).logits[0, :-1]
        self.loss = self.loss + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        for hook in hooks:
            hook.remove()
        self.rows.append(found)
        self.finals.append(final["n"])

    def each(self, layer: int, name: str) -> list[np.ndarray]:
        """By row (T, n)."""
        return [row[layer][name].detach()[0].numpy() for row in self.rows]

    def every(self, layer: int, name: str) -> np.ndarray:
        """All tokens (T, n)."""
        return np.concatenate(self.each(layer, name))

    def change(self, layer: int, name: str) -> np.ndarray:
        """Value times gradient (T, n)."""
        return np.concatenate([(r[layer][name].detach() * r[layer][name].grad)[0].numpy() for r in self.rows])

    @staticmethod
    def absolute(rows: list[np.ndarray]) -> np.ndarray:
        """sqrt(sum over rows of (mean over tokens of |values|)^2)."""
        return np.sqrt(sum(np.abs(row).mean(0) ** 2 for row in rows))

    def weight(self, layer: int, name: str) -> np.ndarray:
        """(out, in)."""
        return self.model.model.layers[layer].get_submodule(name).weight.detach().numpy()

    def product(self, layer: int, name: str) -> np.ndarray:
        """|w dLoss/dw|."""
        weight = self.model.model.layers[layer].get_submodule(name).weight
        return (weight * weight.grad).abs().detach().numpy()

    def scores(self, method: str) -> dict[str, np.ndarray]:
        """Of neurons, heads, hidden and layers."""
        return {name: np.array(value) for name, value in getattr(self, f"_{method}")().items()}

    def _magnitude(self) -> dict[str, Any]:
        def squares(layer: int, name: str, axis: int) -> np.ndarray:
            return (self.weight(layer, name) ** 2).sum(axis)

        def by_head(values: np.ndarray) -> np.ndarray:
            return values.reshape(-1, HEAD).sum(1)

        layers = range(len(self.model.model.layers))
        ins = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        outs = ("self_attn.o_proj", "mlp.down_proj")
        return {
            "neurons": [
                squares(i, "mlp.gate_proj", 1) + squares(i, "mlp.up_proj", 1) + squares(i, "mlp.down_proj", 0)
                for i in layers
            ],
            "heads": [by_head(squares(i, ins[0], 1) + squares(i, outs[0], 0)) for i in layers],
            "hidden": sum(sum(squares(i, n, 0) for n in ins) + sum(squares(i, n, 1) for n in outs) for i in layers),
            "layers": [sum((self.weight(i, n) ** 2).sum() for n in outs) for i in layers],
        }

    def influence(self) -> list[float]:
        """1 - the mean cosine of what enters and what leaves each layer."""
        found = []
        for i in range(len(self.model.model.layers)):
            came, left = self.every(i, "in"), self.every(i, "out")
            cosine = (came * left).sum(1) / np.linalg.norm(came, axis=1) / np.linalg.norm(left, axis=1)
            found.append(1 - cosine.mean())
        return found

    def _minitron(self) -> dict[str, Any]:
        layers = range(len(self.model.model.layers))
        finals = [final.detach()[0].numpy() for final in self.finals]
        norms = [self.absolute(self.each(i, n)) for i in layers for n in ("n1", "n2")]
        return {
            "neurons": [self.absolute(self.each(i, "z")) for i in layers],
            "heads": [
                np.linalg.norm(self.absolute(self.each(i, "c")).reshape(-1, HEAD), axis=1) for i in layers
            ],
            "hidden": sum(norms) + self.absolute(finals),
            "layers": self.influence(),
        }  # fmt: skip

    def _flap(self) -> dict[str, Any]:
        def weighed(i: int, name: str, matrix: str) -> np.ndarray:
            return self.every(i, name).var(0) * (self.weight(i, matrix) ** 2).sum(0)

        layers = range(len(self.model.model.layers))
        return {
            "neurons": [weighed(i, "z", "mlp.down_proj") for i in layers],
            "heads": [weighed(i, "c", "self_attn.o_proj").reshape(-1, HEAD).sum(1) for i in layers],
            "layers": self.influence(),
        }

    def _taylor(self) -> dict[str, Any]:
        layers = range(len(self.model.model.layers))
        return {
            "neurons": [
                self.product(i, "mlp.gate_proj").sum(1)
                + self.product(i, "mlp.up_proj").sum(1)
                + self.product(i, "mlp.down_proj").sum(0)
                for i in layers
            ],
            "heads": [
                np.abs(self.change(i, "c").reshape(-1, HEADS, HEAD).sum(2)).sum(0) for i in layers
            ],
            "hidden": sum(np.abs(self.change(i, n)).sum(0) for i in layers for n in ("n1", "n2")),
            "layers": self.influence(),
        }  # fmt: skip
