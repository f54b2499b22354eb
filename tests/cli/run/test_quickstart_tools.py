# SPDX-License-Identifier: Apache-2.0
"""The tools that the quickstart calls, as commands: what they write, what they say, how they end."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.cli import check_parity, convert, plot_run, preprocess, report_run, tiny_corpus, tiny_model

SIZES = [
    "--hidden_size",
    "32",
    "--intermediate_size",
    "48",
    "--vocab_size",
    "600",
    "--max_position_embeddings",
    "64",
    "--num_local_experts",
    "3",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    argv = ["--output_dir", str(folder), "--vocab_size", "600", "--max_bytes", "300000"]
    assert tiny_corpus.main(argv) == 0
    return folder


@pytest.fixture(scope="module")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "hf"
    argv = ["--output_dir", str(folder), "--tokenizer", str(corpus / "tokenizer.model"), "--seed", "5", *SIZES]
    assert tiny_model.main(argv) == 0
    return folder


def write_metrics(folder: Path, steps: int, last_loss: float = 4.0, layers: int = 2, experts: int = 4) -> None:
    generator = np.random.default_rng(0)
    (folder / "metrics").mkdir()
    with (folder / "metrics" / "rank_0.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            loss = 8.0 + (last_loss - 8.0) * step / steps
            row = {
                "step": step,
                "loss": loss,
                "lm_loss": loss - 0.1,
                "aux_loss": 0.1,
                "learning_rate": 1e-3,
                "tokens_per_second": 5000.0,
                "dropped": [0.05] * layers,
                "expert_load": generator.integers(1, 99, (layers, experts)).tolist(),
            }
            file.write(json.dumps(row) + "\n")


def test_corpus_says_what_it_holds(corpus: Path) -> None:
    described = json.loads((corpus / "corpus.json").read_text())
    for split in ("train", "eval"):
        assert described[f"{split}_documents"] == len((corpus / f"{split}.jsonl").read_text().splitlines()) > 0
    assert described["vocab_size"] == 600
    digest = sha256((corpus / "tokenizer.model").read_bytes()).hexdigest()
    assert described["tokenizer_sha256"] == digest
    assert sorted(path.name for path in corpus.iterdir()) == [
        "corpus.json",
        "eval.jsonl",
        "tokenizer.model",
        "train.jsonl",
    ]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_its_rows_are_what_sentencepiece_says(corpus: Path, tmp_path: Path, workers: str) -> None:
    """The quickstart's rows: every document between BOS and EOS, encoded by the library itself, cut in order."""
    from sentencepiece import SentencePieceProcessor

    from mindformers_ext.ms.mindrecord import read_mindrecord

    model, output = SentencePieceProcessor(model_file=str(corpus / "tokenizer.model")), tmp_path / "train.mindrecord"
    documents = [json.loads(line)["text"] for line in (corpus / "train.jsonl").read_text().split("\n") if line]
    documents += ["a blank at the end ", "  two at the start", "a line at the end\n"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    argv = ["--dataset_type", "jsonl", "--input_glob", str(tmp_path / "train.jsonl"), "--seq_length", "32"]
    argv += ["--model_file", str(corpus / "tokenizer.model"), "--output_file", str(output), "--workers", workers]
    assert preprocess.main(argv) == 0
    stream = [token for text in documents for token in [1, *model.encode(text), 2]]
    rows = [row["input_ids"].tolist() for row in read_mindrecord(output, ("input_ids",))]
    assert rows == [stream[at : at + 33] for at in range(0, len(stream) - 32, 33)]
    summary = json.loads((tmp_path / "train.mindrecord.summary.json").read_text())
    assert (summary["records"], summary["dropped_tokens"]) == (len(rows), len(stream) % 33)


def test_corpus_lists_every_wrong_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--output_dir", str(tmp_path / "x"), "--vocab_size", "9", "--max_bytes", "0", "--held_out_every", "1"]
    assert tiny_corpus.main(argv) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in ("vocab_size=9", "max_bytes=0", "held_out_every=1", "3 problems"))
    assert "Traceback" not in message and not (tmp_path / "x").exists()


def test_corpus_takes_its_size_from_a_yaml_or_from_the_option(
    tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(repo_root / "configs" / "tiny" / "mixtral_pretrain.yaml")
    argv = ["--output_dir", str(tmp_path), "--config", config, "--max_bytes", "400000"]
    assert tiny_corpus.main(argv) == 0
    assert json.loads((tmp_path / "corpus.json").read_text())["vocab_size"] == 2000
    assert tiny_corpus.main([*argv, "--vocab_size", "640"]) == 2
    assert "--config already says vocab_size" in capsys.readouterr().err


def test_model_loads_in_transformers_whole(model: Path, corpus: Path) -> None:
    from mindformers_ext.data.tokenizers import SentencePieceTokenizer
    from mindformers_ext.pt.hf_reference import HuggingFaceReference

    reference = HuggingFaceReference(model)  # refuses missing and left-over weights
    assert type(reference.model).__name__ == "MixtralForCausalLM"
    assert reference.model.config.num_local_experts == 3
    ours = SentencePieceTokenizer(corpus / "tokenizer.model")
    for text in ("Return the name of the file.", "  two blanks\n\n    é 3.14"):
        assert reference.encode(text) == ours.encode(text, bos=True)


def test_llama_loads_too(tmp_path: Path) -> None:
    from mindformers_ext.pt.hf_reference import HuggingFaceReference

    assert tiny_model.main(["--model", "llama", "--output_dir", str(tmp_path / "hf"), *SIZES[:-2]]) == 0
    assert type(HuggingFaceReference(tmp_path / "hf").model).__name__ == "LlamaForCausalLM"


def test_missing_weights_are_refused_by_the_reference(model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from mindformers_ext.core.errors import UserError
    from mindformers_ext.pt.hf_reference import HuggingFaceReference

    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing_keys: model\.layers\.1.*w3"):
        HuggingFaceReference(tmp_path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--num_attention_heads", "3"], "num_attention_heads"),
        (["--num_experts_per_tok", "9"], "exceeds expert_num"),
        (["--tokenizer", "missing.model"], "no tokenizer at missing.model"),
        (["--config", "x.yaml"], "give the sizes in one place"),
    ],
)
def test_model_refuses_what_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    assert tiny_model.main(["--output_dir", str(tmp_path / "hf"), *SIZES, *extra]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--output_dir", str(tmp_path / "hf"), "--vocab_size", "500", "--tokenizer", str(corpus / "tokenizer.model")]
    assert tiny_model.main(argv) == 2
    assert "the tokenizer has 600 pieces, the model vocab_size=500" in capsys.readouterr().err


@pytest.mark.slow
def test_parity_of_a_converted_model_and_its_failure(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "x.ckpt"
    assert convert.main(["--input_path", str(model), "--output_path", str(checkpoint)]) == 0
    capsys.readouterr()
    argv = ["--hf", str(model), "--ckpt", str(checkpoint), "--text", "Return the name.", "--text", "A list of files"]
    assert check_parity.main(argv) == 0
    line = capsys.readouterr().out.strip().split("\n")[-1]
    assert line.startswith("max |logits difference| = ") and line.endswith(" <= 0.0001")

    assert tiny_model.main(["--output_dir", str(tmp_path / "other"), "--seed", "6", *SIZES]) == 0
    assert check_parity.main(["--hf", str(tmp_path / "other"), "--ckpt", str(checkpoint)]) == 1
    assert capsys.readouterr().out.strip().endswith(" > 0.0001")

    argv = ["--output_dir", str(tmp_path / "wide"), *SIZES, "--intermediate_size", "64"]
    assert tiny_model.main(argv) == 0
    assert check_parity.main(["--hf", str(tmp_path / "wide"), "--ckpt", str(checkpoint)]) == 2
    message = capsys.readouterr().err
    assert "6 problems" in message and "feed_forward.ffn.w1.weight' has shape (3, 48, 32)" in message


@pytest.mark.parametrize(("steps", "layers", "experts"), [(50, 2, 4), (3, 1, 3), (120, 12, 64)])
def test_pictures_are_whole_and_of_readable_size(tmp_path: Path, steps: int, layers: int, experts: int) -> None:
    from matplotlib import image

    write_metrics(tmp_path, steps, layers=layers, experts=experts)
    assert plot_run.main([str(tmp_path)]) == 0
    for name in ("loss.png", "expert_load.png"):
        height, width = image.imread(tmp_path / name).shape[:2]
        assert 600 < width < 2500 and 600 < height < 2500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expert_load.png", "loss.png", "metrics"]


def test_a_dense_run_has_no_expert_picture(tmp_path: Path) -> None:
    write_metrics(tmp_path, 5, layers=1, experts=1)
    assert plot_run.main([str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["loss.png"]


def test_report_holds_the_figures_and_judges_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path, 100, last_loss=2.0)
    (tmp_path / "parity.txt").write_text("compared 5 tokens\nmax |logits difference| = 1e-06 <= 0.0001\n")
    (tmp_path / "sample.txt").write_text("Return the ```name```\n| of |")
    argv = [str(tmp_path), "--parity", str(tmp_path / "parity.txt"), "--sample", str(tmp_path / "sample.txt")]
    assert report_run.main(argv) == 0
    page = (tmp_path / "report.md").read_text()
    assert "| last / first | 0.349 (at most 0.75: passed) |" in page
    assert "5,000 tokens/s" in page and "5.00% / 5.00%" in page
    assert "    max |logits difference| = 1e-06 <= 0.0001" in page
    assert "    Return the ```name```\n    | of |" in page
    (tmp_path / "sample.txt").write_text("[{'text_generation_text': ['one\\n\\'two\\'', 'three']}]")
    assert report_run.main(argv) == 0
    assert "    one\n    'two'\n    \n    three\n" in (tmp_path / "report.md").read_text()
    assert report_run.main([*argv, "--max_loss_ratio", "0.3"]) == 1
    assert "FAILED" in (tmp_path / "report.md").read_text()
    assert "ABOVE 0.3" in capsys.readouterr().out
    assert report_run.main([str(tmp_path), "--parity", str(tmp_path / "missing.txt")]) == 2


def test_commands_without_a_run_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (plot_run, report_run):
        assert command.main([str(tmp_path)]) == 2
        assert "no metrics in" in capsys.readouterr().err
