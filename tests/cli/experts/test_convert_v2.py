# SPDX-License-Identifier: Apache-2.0
"""``convert --style``: what cannot be is told in one line, ends with code 2 and leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindformers_ext.cli.experts import main
from tests.helpers.llama_moe_v2_models import DENSE, random_tensors, v2_words, write_folder

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 3}
WORDS = {**DENSE, **SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
TENSORS = random_tensors(WORDS)
HALVES = [list(range(6)), list(range(6, 12))]
RESIDUAL = {"residual": [0, 1, 2, 3], "0": [4, 5, 6, 7], "1": [8, 9, 10, 11]}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("v2") / "dense", WORDS, TENSORS)


def run(dense: Path, folder: Path, *more: object, style: str = "mixtral") -> int:
    words = ("convert", "--style", style, "--model_path", dense, "--save_path", folder / "out", "--quiet", *more)
    return main([*map(str, words)])


def assert_refused(code: int, folder: Path, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = capsys.readouterr().err
    assert code == 2 and said in text and "Traceback" not in text, text
    assert not list(folder.glob("*out*"))


TWO = ("--num_experts", 2, "--top_k", 1)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--top_k", 1), "--num_experts is missing"),
        (("--num_experts", 2), "--top_k is missing"),
        (("--num_experts", 0, "--top_k", 1), "--num_experts 0: give 1 or more"),
        (("--num_experts", 2, "--top_k", 3), "--top_k 3 of 2 experts: choose 1 to 2"),
        ((*TWO, "--scale_factor", 0), "--scale_factor 0.0"),
        ((*TWO, "--scale_factor", "nan"), "--scale_factor nan"),
        ((*TWO, "--num_moe_contract_layers", -1), "--num_moe_contract_layers -1"),
        ((*TWO, "--num_moe_contract_layers", 2), "no layer would be MoE"),
        (("--num_experts", 5, "--top_k", 1), "12 cannot be cut into 5 experts of one size: choose one of 2, 3, 4, 6"),
        ((*TWO, "--share_neurons"), "neurons in their order are never shared"),
        ((*TWO, "--num_selects", 3), "--num_selects (counts with no --style)"),
        ((*TWO, "--gate_weights_file", "nowhere.pt"), "'nowhere.pt' does not exist"),
        ((*TWO, "--gate_weights_file", "gates.bin"), "'gates.bin' is of no known format"),
    ],
)
def test_options(dense: Path, tmp_path: Path, more: tuple, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(run(dense, tmp_path, *more), tmp_path, said, capsys)


def layered(value: Any) -> dict[str, Any]:
    return {str(layer): value for layer in range(3)}


@pytest.mark.parametrize(
    ("content", "style", "more", "said"),
    [
        (layered(RESIDUAL), "mixtral", (), "has residual neurons: give --style mixtral-residual"),
        (layered(HALVES), "mixtral-residual", (), "has no residual neurons: give --style mixtral"),
        (layered([[0, 1], [2, 12]]), "mixtral", (), "layer 0: expert 1 names neuron 12, the layer has 12"),
        (layered([[0, 1], [-2, 3]]), "mixtral", (), "expert 1 names neuron -2"),
        (layered([[0, 1, 2], [3, 3, 4]]), "mixtral", (), "expert 1 names a neuron twice"),
        (layered([[0, 1, 2], [3, 4]]), "mixtral", (), "all must be alike"),
        (layered([[0, 1], [1, 2]]), "mixtral", (), "3 of 12 neurons are used, 4 times in all"),
        ({"0": HALVES, "1": HALVES}, "mixtral", (), "lacks layer 2"),
        ({**layered(HALVES), "one": HALVES}, "mixtral", (), "has a layer called 'one'"),
        (layered({"0": [1], "2": [2]}), "mixtral", (), "numbered from 0"),
        (layered([[0.5], [1.5]]), "mixtral", (), "whole numbers of 1 dimension(s) are expected"),
        (layered(HALVES), "mixtral", ("--num_experts", 3), "has 2 routed experts"),
        (layered(HALVES), "mixtral", ("--pad_intermediate",), "the file says which neurons experts have"),
        ({"about": {"kind": "gate_weights"}, "layers": layered(HALVES)}, "mixtral", (), "holds gate_weights, not"),
        ({"about": {"model": "0" * 64}, "layers": layered(HALVES)}, "mixtral", (), "made from other model"),
    ],
)
def test_neuron_files(
    dense: Path,
    tmp_path: Path,
    content: dict,
    style: str,
    more: tuple,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "neurons.json"
    path.write_text(json.dumps(content))
    code = run(dense, tmp_path, "--top_k", 1, "--neuron_indices_file", path, *more, style=style)
    assert_refused(code, tmp_path, said, capsys)


def test_shared_neurons_are_written_when_asked_for(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "n.json").write_text(json.dumps(layered([[0, 1], [1, 2]])))
    words = ("--top_k", 1, "--neuron_indices_file", tmp_path / "n.json", "--share_neurons")
    main([*map(str, ("convert", "--style", "mixtral", "--model_path", dense, "--save_path", tmp_path / "o", *words))])
    assert "25.0 % of a layer's neurons are in some expert" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gate", "more", "said"),
    [
        ([[0.0] * 16] * 3, (), "found a gate [3, 16], expected [2, 16]: --truncate_gates takes the first ones"),
        ([[0.0] * 15] * 2, ("--truncate_gates",), "found a gate [2, 15], expected [2, 16]"),
        ([[float("inf")] * 16] * 2, (), "holds NaN or infinite values"),
        ([0.0] * 16, (), "numbers of 2 dimension(s) are expected"),
    ],
)
def test_gate_files(
    dense: Path, tmp_path: Path, gate: list, more: tuple, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "gates.npz", **{f"{layer}.gate": np.array(gate, np.float32) for layer in range(3)})
    code = run(dense, tmp_path, *TWO, "--gate_weights_file", tmp_path / "gates.npz", *more)
    assert_refused(code, tmp_path, said, capsys)


def bare(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def says(**words: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**WORDS, **words})) and None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (bare, "safetensors"),
        (cut, "model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps(v2_words("vanilla"))),
            "is a mixture of experts",
        ),
        (says(model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"]), "model_type='gpt_neox'"),
        (says(intermediate_size=13), "gate_proj"),
    ],
)
def test_models(tmp_path: Path, spoil: Callable[[Path], object], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "dense", WORDS, TENSORS)
    spoil(folder)
    assert_refused(run(folder, tmp_path, *TWO), tmp_path, said, capsys)


def test_outputs(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that holds something, or what is read; with --overwrite the first is replaced."""
    assert run(dense, tmp_path, *TWO) == 0
    assert run(dense, tmp_path, *TWO) == 2 and "pass --overwrite" in capsys.readouterr().err
    assert run(dense, tmp_path, *TWO, "--overwrite") == 0
    words = ("convert", "--style", "mixtral", "--model_path", dense, "--save_path", dense, "--overwrite", *TWO)
    assert main([*map(str, words)]) == 2 and "which is read" in capsys.readouterr().err


def test_without_torch_scores_become_neurons_and_a_model(dense: Path, tmp_path: Path) -> None:
    """Files as .npz, in a process that may not import torch."""
    scores = np.random.default_rng(0).random((2, 12)).astype(np.float32)
    named = {f"{layer}.{cluster}": scores[cluster] for layer in range(3) for cluster in range(2)}
    np.savez(tmp_path / "scores.npz", **named)
    base = ["--model_path", dense, "--save_path"]
    split = ["split", "--method", "gradient", "--score_file_path", tmp_path / "scores.npz", *base, tmp_path]
    moe = ["convert", "--style", "mixtral-residual", "--top_k", 1, "--quiet", *base, tmp_path / "moe"]
    commands = [
        [*map(str, (*split, "--num_experts_residual", 1))],
        [*map(str, (*moe, "--neuron_indices_file", tmp_path / "neuron_indices.npz"))],
    ]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"from mindformers_ext.cli.experts import main\nsys.exit(sum(main(words) for words in {commands!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["intermediate_size_residual"] == 4
