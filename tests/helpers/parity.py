# SPDX-License-Identifier: Apache-2.0
"""Our networks beside transformers': the same random weights, the same tokens; logits, loss and every gradient.

Import this before anything of transformers: MindSpore's generated code must meet protobuf first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import mindspore as ms
import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from mindspore import Tensor, nn

from mindformers_ext.core.config.hf import hf_config_from_spec, model_spec_from_hf
from mindformers_ext.core.families import FAMILIES
from mindformers_ext.core.layers import MoESpec, SharedExpertSpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.ms.causal_lm import build_causal_lm
from mindformers_ext.ms.engine import MindSporeNetwork
from mindformers_ext.ms.step import LossNetwork
from mindformers_ext.weights.convert import to_mindspore

MODES = {"GRAPH": ms.GRAPH_MODE, "PYNATIVE": ms.PYNATIVE_MODE}
# A parameter whose gradient is this small beside the model's largest has none: only rounding is left of it
# (transformers normalises a single choice to 1, so its gate learns nothing).
NO_GRADIENT = 1e-6


@dataclass(frozen=True)
class Case:
    """A tiny model and its input. ``capacity_factor`` 0 is dropless; ``family`` "" is Mixtral or LLaMA, ``ffn`` their
    width and that of dense layers, ``expert`` that of routed experts where it is another, ``shared`` the shared one's.
    """

    name: str
    heads: int
    kv_heads: int
    hidden: int
    head_dim: int
    ffn: int
    vocab: int
    seq_length: int
    tied: bool
    layers: int = 2
    batch: int = 2
    experts: int = 0
    chosen: int = 1
    capacity_factor: float = 0.0
    sdrop: bool = False
    theta: float = 1e4
    std: float = 0.3
    aux_coefficient: float = 0.0
    family: str = ""
    expert: int | None = None
    shared: int = 0
    dense_layers: tuple[int, ...] = ()
    normalised: bool = True

    def model(self, dropless: bool = False) -> ModelSpec:
        """The model as its own config.json describes it, then with the case's capacity."""
        row = FAMILIES.get(self.family)
        moe = MoESpec(
            num_local_experts=self.experts,
            num_experts_per_tok=self.chosen,
            norm_topk_prob=self.normalised,
            norm_single_choice=self.normalised,
            intermediate_size=self.expert,
            shared_expert=SharedExpertSpec(intermediate_size=self.shared, **row.shared) if row and row.shared else None,
        )
        spec = ModelSpec(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope_theta=self.theta,
            tie_word_embeddings=self.tied,
            pad_token_id=-1,
            moe=moe if self.experts else None,
            dense_layers=self.dense_layers,
            family=self.family,
            qkv_bias=self.family == "qwen2_moe",
            **(row.model if row else {}),
        )
        config = hf_config_from_spec(spec)
        spec = model_spec_from_hf(config | ({"router_aux_loss_coef": self.aux_coefficient} if self.experts else {}))
        if dropless or not spec.moe:
            return spec
        return replace(spec, moe=replace(spec.moe, capacity_factor=self.capacity_factor, enable_sdrop=self.sdrop))

    def ids(self) -> np.ndarray:
        """(B, S+1) token ids."""
        return np.random.default_rng(7).integers(0, self.vocab, (self.batch, self.seq_length + 1)).astype(np.int32)


@dataclass(frozen=True)
class Outcome:
    """What a network says: logits (B, S, V), the loss, the gradient of every parameter under MindSpore's names."""

    logits: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]


@dataclass(frozen=True)
class Difference:
    """Largest differences; ``gradient`` is the worst parameter's max |difference| / max |reference|."""

    logits: float
    largest_logit: float
    loss: float
    gradient: float
    worst: str


def reference_model(case: Case) -> torch.nn.Module:
    """transformers' model with large random weights: logits of order 1 to 5, norms away from 1."""
    import transformers

    spec = case.model(dropless=True)
    kind = getattr(transformers, spec.family_row.hf_class)
    torch.manual_seed(3)
    model = kind(kind.config_class(**hf_config_from_spec(spec), attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, case.std)
    return model.float().eval()


def run_reference(case: Case, model: torch.nn.Module) -> Outcome:
    """transformers' own loss (it shifts labels inside) and autograd."""
    ids = torch.from_numpy(case.ids().astype(np.int64))
    model.zero_grad()
    found = model(input_ids=ids, labels=ids, use_cache=False)
    found.loss.backward()
    # An expert that no token chose has no gradient there, and one of zeros here.
    named = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    return Outcome(found.logits[:, :-1].detach().numpy(), found.loss.item(), to_mindspore(named, case.model()))


def build_ours(case: Case, weights: dict[str, np.ndarray]) -> nn.Cell:
    """Our network, weights loaded before anything compiles."""
    network = build_causal_lm(NetworkSpec(model=case.model(), seq_length=case.seq_length, batch_size=case.batch))
    MindSporeNetwork(network).load(weights)
    return network


def run_ours(case: Case, weights: dict[str, np.ndarray], mode: str) -> Outcome:
    """Our network's logits, LM loss and gradients in ``mode``; the gradients are those of the LM loss alone."""
    ms.set_context(mode=MODES[mode])
    network = build_ours(case, weights)
    ids = case.ids()
    parameters = network.trainable_params()
    step = ms.value_and_grad(LossNetwork(network), None, parameters, has_aux=True)
    terms, gradients = step(Tensor(ids))
    dropped = terms[4].asnumpy()
    assert not dropped.any(), f"the case drops assignments: {dropped}"
    logits = network(Tensor(ids[:, :-1])).asnumpy()
    named = {p.name: g.asnumpy() for p, g in zip(parameters, gradients, strict=True)}
    return Outcome(logits, float(terms[1].asnumpy()), named)


def compare(ours: Outcome, reference: Outcome) -> Difference:
    """Largest differences of everything; the same parameters must have gradients on both sides."""
    assert ours.gradients.keys() == reference.gradients.keys()
    largest = max(float(np.abs(g).max()) for g in reference.gradients.values())
    relative = {}
    for name, expected in reference.gradients.items():
        assert ours.gradients[name].shape == expected.shape, name
        scale = float(np.abs(expected).max())
        scale = scale if scale > NO_GRADIENT * largest else largest
        relative[name] = float(np.abs(ours.gradients[name] - expected).max()) / scale
    worst = max(relative, key=lambda name: relative[name])
    return Difference(
        logits=float(np.abs(ours.logits - reference.logits).max()),
        largest_logit=float(np.abs(reference.logits).max()),
        loss=abs(ours.loss - reference.loss),
        gradient=relative[worst],
        worst=worst,
    )


@functools.cache
def reference_of(case: Case) -> tuple[dict[str, np.ndarray], Outcome]:
    """transformers' weights under MindSpore's names, and what it computes with them; once for both modes."""
    model = reference_model(case)
    return to_mindspore(model.state_dict(), case.model()), run_reference(case, model)


def in_modes(cases: Iterable[Case], chosen: Callable[[Case], str], turns: str = "") -> list[ParameterSet]:
    """``case`` and ``mode`` of a test: each case in the mode that is ``chosen`` for it, with --all in the other too.

    ``turns``: the group in which the cases take turns.
    """
    long = pytest.mark.long(
        "the same case runs in the other mode; tests/parity/test_mixtral.py runs short ones in both"
    )
    first = pytest.mark.turn(turns) if turns else ()
    return [
        pytest.param(case, mode, id=f"{case.name}-{mode}", marks=first if mode == chosen(case) else long)
        for case in cases
        for mode in MODES
    ]


def check(case: Case, mode: str) -> None:
    """Hold the acceptance limits for one case in one mode and print what was measured."""
    weights, reference = reference_of(case)
    found = compare(run_ours(case, weights, mode), reference)
    print(
        f"\n{case.name:<28} {mode:<8} logits {found.logits:.1e} (max |logit| {found.largest_logit:.1f})  "
        f"loss {found.loss:.1e}  gradient {found.gradient:.1e} ({found.worst})",
        end="",
    )
    assert 1.0 <= found.largest_logit <= 12.0, "weights too small or too large for the limits to mean anything"
    assert found.logits <= 1e-4
    assert found.loss <= 1e-5
    assert found.gradient <= 1e-3
