# SPDX-License-Identifier: Apache-2.0
"""The measurements run and check that both engines computed the same; nothing here asserts a time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mindformers_ext.data.corpus import standard_library_text
from mindformers_ext.data.tokenizers import train_sentencepiece
from tests.helpers.one_shot import make_model, write_text
from tests.helpers.tiny_llama import make_llama, sentences

pytestmark = [pytest.mark.slow, pytest.mark.turn("bench")]


def bench(repo_root: Path, name: str, *arguments: str) -> str:
    command = [sys.executable, f"tools/bench/{name}.py", *arguments]
    result = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    return result.stdout


def test_moe_layer_measures_equal_outputs(repo_root: Path) -> None:
    text = bench(repo_root, "moe_layer", "--tokens", "48", "--rounds", "2", "--capacity_factor", "0")
    assert len(re.findall(r"ratio wall \d+\.\d+  CPU \d+\.\d+", text)) == 2
    checked = re.search(r"dropped 0.00% .* checked 48 of 48 tokens equal, largest difference .* (\S+)$", text, re.M)
    assert checked and float(checked[1]) < 1e-4


def test_train_step_and_compile_time_report(repo_root: Path) -> None:
    assert re.search(r"train step .* ratio wall \d+\.\d+", bench(repo_root, "train_step", "--rounds", "1"))
    text = bench(repo_root, "v2_train_step", "--rounds", "1", "--hidden", "32", "--length", "32")
    assert re.search(r"residual v2, pt .* ratio wall \d+\.\d+", text) and re.search(r"loss \d\.\d+, \S+ apart", text)
    assert re.search(r"t\(2\) / t\(1\) = \d+\.\d+", bench(repo_root, "compile_time", "--layers", "1", "2"))


def test_weights_are_measured_against_cp(repo_root: Path, tmp_path: Path) -> None:
    small = ["--width", "256", "--folder", str(tmp_path)]
    lines = bench(repo_root, "convert", "--rounds", "1", "--experts", "2", *small).splitlines()
    assert sum("ratio to cp: to disk" in line for line in lines) == 8
    text = bench(repo_root, "reshard", "--gigabytes", "0.03", *small)
    assert "the ranks cut from the merged file equal the first ones, byte by byte" in text
    assert len(re.findall(r"of cp, peak \d+ MB", text)) == 2
    assert not any(tmp_path.iterdir())


def test_preprocessing_is_measured_against_sentencepiece_and_mindformers(repo_root: Path, tmp_path: Path) -> None:
    train_sentencepiece(standard_library_text(200_000), tmp_path / "tokenizer.model", 1000)
    words = ["--model_file", str(tmp_path / "tokenizer.model"), "--megabytes", "1", "--rounds", "1"]
    text = bench(repo_root, "preprocess", *words)
    tokens = dict(re.findall(r"^(ours, 1 worker|ours, 2 workers|sentencepiece) +(\d+) tokens", text, re.M))
    assert len(tokens) == 3 and len(set(tokens.values())) == 1, "all encode the same text into as many tokens"
    assert len(re.findall(r"tokens/s \d+\.\d+ for the whole command", text)) == 4


def test_a_mixture_is_read_and_planned_beside_plain_rows(repo_root: Path, tmp_path: Path) -> None:
    small = ["--rows", "280", "--width", "33", "--batch", "8", "--rounds", "1", "--folder", str(tmp_path)]
    text = bench(repo_root, "mixture", *small, "--plan", "20000")
    assert re.search(r"mixture of 7 domains \d+ rows/s: ratio wall \d+\.\d+  CPU \d+\.\d+", text) and not any(
        tmp_path.iterdir()
    )
    assert re.search(r"planned 20000 rows in \d+\.\d s, peak \d+ MB .*, state \d+ bytes", text)


def test_a_ray_cluster_is_measured_against_processes(repo_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'mindformers_ext[ray]'")
    train_sentencepiece(standard_library_text(200_000), tmp_path / "tokenizer.model", 1000)
    words = ["--model_file", str(tmp_path / "tokenizer.model"), "--megabytes", "5", "--rounds", "1", "--ray"]
    text = bench(repo_root, "preprocess", *words)
    tokens = dict(re.findall(r"^(processes|ray) +(\d+) tokens", text, re.M))
    assert len(tokens) == 2 and len(set(tokens.values())) == 1
    assert re.search(r"^ray / processes: \d+\.\d+ ", text, re.M)


def test_generation_is_measured_and_its_answers_are_equal(repo_root: Path) -> None:
    small = ["--prompt", "20", "--new", "6", "--hidden", "64", "--ffn", "96", "--layers", "2", "--rounds", "1"]
    text = bench(repo_root, "generate", *small, "--batches", "1", "2")
    assert len(re.findall(r"^batch \d (?:prefill|decode) +transformers .* at most +\d", text, re.M)) == 4
    assert len(re.findall(r"^ +(?:mindspore|pytorch) .* ratio wall -?\d.*  CPU .* of the limit \d", text, re.M)) == 8
    assert text.count("equal answers 1 of 1") == text.count("equal answers 2 of 2") == 2
    assert re.search(r"^mindspore, second start: first token .* \(batch 1\), .* \(batch 2\)", text, re.M)


def test_carving_is_measured(repo_root: Path, tmp_path: Path) -> None:
    small = ["--tokens", "512", "--hidden", "64", "--width", "128"]
    text = bench(repo_root, "carve_layer", *small)
    assert len(re.findall(r"s of CPU, limit \d+", text)) == 2 and "peak memory" in text
    small = ["--hidden", "48", "--width", "96", "--layers", "2", "--heads", "3", "--vocabulary", "64", "--rounds", "3"]
    assert re.search(
        r"^ratio \d+\.\d\d, limit by what is read 1\.\d\d;", bench(repo_root, "carve_decode", *small), re.M
    )
    make_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text(". ".join(sentences(120, 0)), encoding="utf-8")
    words = ["--calibration", str(tmp_path / "text.txt"), "--held_out", str(tmp_path / "text.txt"), "--seeds", "1", "2"]
    words += ["--tokens", "300", "--held_out_tokens", "200", "--block_size", "32", "--shares", "50"]
    model, output = str(tmp_path / "model"), str(tmp_path / "out")
    first = bench(repo_root, "carve_quality", model, "--output", output, *words)
    assert len(re.findall(r"^ +50 % +cmoe +\S+ \+- \S+ +to 'emp \+ refit' \S+ \+- \S+$", first, re.M)) == 3
    again = bench(repo_root, "carve_quality", model, "--output", output, *words)
    assert again.splitlines()[:-1] == first.splitlines()[:-1]


def test_clusters_are_measured(repo_root: Path) -> None:
    assert re.search(r"256x64: ours \d+\.\d+, .*ours \d+\.\d+ s", bench(repo_root, "cluster", "--only", "256x64"))


def test_one_shot_pruning_is_judged_once_and_goes_on(repo_root: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    text = write_text(tmp_path / "text.txt")
    words = [str(tmp_path / "model"), "--calibration", str(text), "--output", str(tmp_path / "out"), "--tokens", "150"]
    words += ["--held_out_tokens", "90", "--order_tokens", "60", "--block_size", "32"]
    words += ["--shares", "0.1", "--seeds", "0", "--methods", "minitron", "flap"]
    first = bench(repo_root, "one_shot_quality", *words)
    assert len(re.findall(r"^  .* \d\.\d{4}  \([+-]\d\.\d{4}\)$", first, re.M)) == 11
    again = bench(repo_root, "one_shot_quality", *words)
    assert "0.1 minitron: " in first and "0.1 minitron: " not in again and "used again" in again
    table = [text.split("held-out loss")[-1].split("peak")[0] for text in (first, again)]
    assert table[0] == table[1]
