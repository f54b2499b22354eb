# SPDX-License-Identifier: Apache-2.0
"""What a mixture is worth, recomputed with transformers: every rung of the ladder on a text's second half."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from mindformers_ext.cli.experts import main
from tests.cli.experts import test_convert
from tests.cli.experts.test_convert import EXPERTS, NAME, words
from tests.helpers.tiny_llama import LAYERS, WIDTH

made = test_convert.made  # model, text, split and gates

BLOCK = 32  # tokens of a row that judges
Change = Callable[[int, torch.Tensor], torch.Tensor]  # of a layer's number and neurons


def test_the_ladder_is_that_of_transformers(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The losses on the text's second half, against transformers' dense model whose neurons are left out by hooks; the
    gate's is tests/cli/experts/test_convert.py."""
    judged = ("--eval_text", made / "text.txt", "--block_size", BLOCK)
    rows = _rows(made)
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    dense = LlamaForCausalLM.from_pretrained(made / "dense").eval()
    wanted = {"dense": _loss(dense, second)}
    for name, change in (
        ("oracle", _oracle(made, 3)),
        ("random", _random(made, 3, len(second))),
        ("static", _static(dense, first, 3)),
    ):
        with _neurons(dense, change):
            wanted[name] = _loss(dense, second)
    found = _ladder(words(made, tmp_path / "three", "--num_selects", 3, *judged), capsys)
    assert found.keys() - wanted.keys() == {"gate"}
    for name, loss in wanted.items():
        assert found[name] == pytest.approx(loss, abs=6e-5), name
    assert len({round(loss, 3) for loss in found.values()}) == 5
    found = _ladder(words(made, tmp_path / "all", "--num_selects", EXPERTS, *judged), capsys)
    assert len(found) == 5 and all(loss == pytest.approx(wanted["dense"], abs=1e-4) for loss in found.values())


def _ladder(command: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    """Printed losses by way."""
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("  ")}


def _rows(made: Path) -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(made / "dense").encode(
        (made / "text.txt").read_text("utf-8"), add_special_tokens=False
    )
    return [[1, *ids[at : at + BLOCK - 1]] for at in range(0, len(ids), BLOCK - 1)]


@torch.no_grad()
def _loss(model: LlamaForCausalLM, rows: list[list[int]]) -> float:
    total, count = 0.0, 0
    for row in rows:
        found = model(torch.tensor([row])).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(found, torch.tensor(row[1:]), reduction="sum"))
        count += len(row) - 1
    return total / count


@contextmanager
def _neurons(model: LlamaForCausalLM, change: Change) -> Iterator[None]:
    """``change`` takes the place of the neurons (B, S, F) that enter each layer's down_proj."""
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given, number=number: (change(number, given[0]),))
        for number, layer in enumerate(model.model.layers)
    ]
    yield
    for handle in handles:
        handle.remove()


def _oracle(made: Path, chosen: int) -> Change:
    """Of each token the experts with the largest sums of squares."""
    labels = _labels(made)

    def change(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros(*hidden.shape[:-1], EXPERTS).index_add(-1, labels[layer], hidden**2)
        return hidden * _inside(labels[layer], scores.topk(chosen).indices)

    return change


def _random(made: Path, chosen: int, rows: int) -> Change:
    """The experts with the largest of numpy's numbers of seed 0: layer after layer, one for each token and expert."""
    labels, generator = _labels(made), np.random.default_rng(0)
    drawn = [iter(torch.from_numpy(generator.random((rows, BLOCK, EXPERTS)))) for _ in range(LAYERS)]

    def change(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * _inside(labels[layer], next(drawn[layer])[: hidden.shape[1]].topk(chosen).indices)

    return change


def _labels(made: Path) -> list[torch.Tensor]:
    return [torch.tensor(torch.load(made / "split" / NAME.format(layer))) for layer in range(LAYERS)]


def _inside(labels: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(..., F) of the experts (..., K) that are kept."""
    return (labels == kept[..., None]).any(-2)


def _static(model: LlamaForCausalLM, rows: list[list[int]], chosen: int) -> Change:
    """In each layer as many neurons as ``chosen`` mean experts have: those that add most on ``rows``."""
    sums = torch.zeros(LAYERS, WIDTH, dtype=torch.float64)

    def add(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        sums[layer] += hidden.abs().double().sum((0, 1))
        return hidden

    with _neurons(model, add):
        _loss(model, rows)
    kept = torch.zeros(LAYERS, WIDTH)
    for layer, block in enumerate(model.model.layers):
        added = sums[layer] * block.mlp.down_proj.weight.detach().double().norm(dim=0)
        kept[layer, added.topk(round(WIDTH * chosen / EXPERTS)).indices] = 1
    return lambda layer, hidden: hidden * kept[layer]
