# SPDX-License-Identifier: Apache-2.0
"""Files of a conversion and of the way back: the list of neurons left out, MindSpore's checkpoint of both ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mindformers_ext.cli.experts import main
from mindformers_ext.formats.ms_file import open_checkpoint
from tests.cli.experts import test_convert
from tests.cli.experts.test_convert import EXPERTS, NAME, logits, words
from tests.helpers.tiny_llama import HIDDEN, LAYERS

made = test_convert.made  # model, text, split and gates


def test_without_the_list_of_neurons_they_stay_in_the_experts_order(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(made, tmp_path / "moe")) == 0
    (tmp_path / "moe" / "expert_neurons.npz").unlink()
    back = ("convert", "--reversed", "--model_path", str(tmp_path / "moe"), "--save_path", str(tmp_path / "back"))
    assert main([*back]) == 0
    assert "no expert_neurons.npz: neurons stay in the experts' order" in capsys.readouterr().err
    first, last = (load_file(path / "model.safetensors") for path in (made / "dense", tmp_path / "back"))
    for layer in range(LAYERS):
        order = np.argsort(torch.load(made / "split" / NAME.format(layer)), kind="stable")
        for name in ("gate", "up"):
            key = f"model.layers.{layer}.mlp.{name}_proj.weight"
            assert torch.equal(last[key], first[key][order])
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 300, (2, 24)))
    wanted = logits(made / "dense", ids)
    assert (logits(tmp_path / "back", ids) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    split = ("--split_file_path", str(made / "split"), "--overwrite", "--quiet")  # the folder that says the same
    assert main([*back, *split]) == 0
    last = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_the_checkpoint_for_mindspore_holds_the_same_neurons(made: Path, tmp_path: Path) -> None:
    """Of both ways: experts side by side, zeros behind the narrower ones; and the dense matrices."""
    dense = load_file(made / "dense" / "model.safetensors")
    assert main(words(made, tmp_path / "moe", "--to_mindspore", tmp_path / "moe.ckpt")) == 0
    back = ("--model_path", str(tmp_path / "moe"), "--save_path", str(tmp_path / "back"), "--quiet")
    assert main(["convert", "--reversed", *back, "--to_mindspore", str(tmp_path / "dense.ckpt")]) == 0
    splits = [np.array(torch.load(made / "split" / NAME.format(layer))) for layer in range(LAYERS)]
    widest = max(np.bincount(labels).max() for labels in splits)
    for layer, labels in enumerate(splits):
        for ours, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            matrix = dense[f"model.layers.{layer}.mlp.{name}_proj.weight"].numpy()
            rows = matrix.T if name == "down" else matrix
            inside = f"model.layers.{layer}.feed_forward"
            found = read_tensor(tmp_path / "moe.ckpt", f"{inside}.ffn.{ours}.weight")
            found = found.transpose(0, 2, 1) if name == "down" else found
            assert found.shape == (EXPERTS, widest, HIDDEN)
            for expert in range(EXPERTS):
                mine = rows[labels == expert]
                np.testing.assert_array_equal(found[expert, : len(mine)], mine)
                assert not found[expert, len(mine) :].any()
            np.testing.assert_array_equal(read_tensor(tmp_path / "dense.ckpt", f"{inside}.{ours}.weight"), matrix)


def read_tensor(path: Path, name: str) -> np.ndarray:
    reader = open_checkpoint(path)
    try:
        return np.array(reader.read(name))
    finally:
        reader.close()
