# SPDX-License-Identifier: Apache-2.0
"""One layer in memory: values and gradients at its inner points equal transformers' hooks and autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tests.helpers.parity  # noqa: F401 MindSpore before transformers
from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.layers import POINTS
from mindformers_ext.core.parameters import EMBEDDING, HEAD, LAYER
from mindformers_ext.core.spec import DeviceSpec, NetworkSpec
from mindformers_ext.jobs.engine.door import open_probe
from mindformers_ext.weights.convert import to_mindspore

pytestmark = pytest.mark.slow  # all together more than 10 seconds

LENGTH, LENGTHS = 24, (24, 15)


class Judge:
    """transformers' values and gradients at every point of every layer, of the summed loss of the predicted tokens."""

    def __init__(self, tied: bool) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=101, hidden_size=36, intermediate_size=53, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=3, head_dim=12, tie_word_embeddings=tied, initializer_range=0.2,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        self.spec = model_spec_from_hf(config.to_dict())
        self.weights = to_mindspore(model.state_dict(), self.spec)
        self.ids = np.random.default_rng(0).integers(0, 101, (2, LENGTH)).astype(np.int32)
        self.real = np.arange(LENGTH)[None] < np.array(LENGTHS)[:, None]
        self.points: list[dict[str, torch.Tensor]] = [{} for _ in model.model.layers]
        for found, layer in zip(self.points, model.model.layers, strict=True):
            self._hooks(found, layer)
        ids, mask = torch.from_numpy(self.ids).long(), torch.from_numpy(self.real)
        self.embedded = model.model.embed_tokens(ids).detach().requires_grad_()
        logits = model(inputs_embeds=self.embedded, attention_mask=mask.long()).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.reshape(-1, 101), ids[:, 1:].reshape(-1), reduction="none")
        loss = (losses.view(2, -1) * mask[:, 1:]).sum()
        loss.backward()
        self.loss = float(loss.detach())

    @staticmethod
    def _hooks(found: dict[str, torch.Tensor], layer: Any) -> None:
        def keep(name: str, entering: bool = False) -> Any:
            def hook(module: Any, given: tuple, left: Any) -> None:
                tensor = given[0] if entering else left
                tensor = tensor[0] if isinstance(tensor, tuple) else tensor
                tensor.retain_grad()
                found[name] = tensor

            return hook

        mlp = layer.mlp
        layer.self_attn.register_forward_hook(keep("attention_output"))
        layer.register_forward_hook(keep("input", True))
        layer.input_layernorm.register_forward_hook(keep("attention_input"))
        layer.self_attn.o_proj.register_forward_hook(keep("context", True))
        mlp.register_forward_hook(keep("mlp_input", True))
        mlp.gate_proj.register_forward_hook(keep("gate_linear"))
        mlp.act_fn.register_forward_hook(keep("gate"))
        mlp.down_proj.register_forward_hook(keep("hidden", True))
        mlp.register_forward_hook(keep("mlp_output"))
        layer.register_forward_hook(keep("output"))

    def apart(self, found: np.ndarray, wanted: torch.Tensor) -> float:
        """Largest difference over the largest value, at tokens that are no padding."""
        kept = self.real.reshape(-1)
        ours = found.reshape(len(kept), -1)[kept]
        theirs = wanted.detach().numpy().reshape(len(kept), -1)[kept]
        return float(np.abs(ours - theirs).max() / np.abs(theirs).max())

    def layer(self, index: int) -> list[tuple[str, np.ndarray]]:
        prefix = LAYER.format(index)
        return [(name.removeprefix(prefix), a) for name, a in self.weights.items() if name.startswith(prefix)]


@pytest.mark.parametrize(("engine", "tied"), [("pt", False), ("pt", True), ("ms", True)])
def test_values_and_gradients_equal_autograd(engine: str, tied: bool) -> None:
    judge = Judge(tied)
    probe = open_probe(engine, NetworkSpec(model=judge.spec, seq_length=LENGTH), DeviceSpec("CPU"))
    states, worst = [judge.embedded.detach().numpy()], 0.0
    for index in range(3):
        probe.fill(index, judge.layer(index))
        output, values = probe.forward(states[-1], tuple(POINTS))
        states.append(output)
        worst = max(worst, *(judge.apart(values[name], judge.points[index][name]) for name in POINTS))
    head = judge.weights[EMBEDDING if tied else HEAD]
    probe.fill_head(judge.weights["model.norm_out.weight"], [head[:50], head[50:]])
    counted = np.concatenate((judge.real[:, 1:], np.zeros((2, 1), bool)), 1)
    loss, gradient = probe.loss(states[-1], np.roll(judge.ids, -1, 1), counted)
    assert abs(loss - judge.loss) <= 1e-5 * judge.loss
    assert probe.loss_alone(states[-1], np.roll(judge.ids, -1, 1), counted) == pytest.approx(loss, rel=1e-6)
    inner = tuple(POINTS)[1:]
    for index in (2, 1, 0):
        probe.fill(index, judge.layer(index))
        gradient, values, gradients = probe.backward(states[index], gradient, inner, inner)
        points = judge.points[index]
        worst = max(worst, *(judge.apart(gradients[name], points[name].grad) for name in inner))
        worst = max(worst, *(judge.apart(values[name], points[name]) for name in inner))
    worst = max(worst, judge.apart(gradient, judge.embedded.grad))
    print(f"\n{engine} tied={tied}: {worst:.1e}", end="")
    assert worst <= 1e-5
