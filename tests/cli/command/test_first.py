# SPDX-License-Identifier: Apache-2.0
"""``mfext predict, eval, train, chat`` with a folder and no YAML, judged by transformers on the same folder."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import yaml

from mindformers_ext.cli import mfext, run_mindformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

PROMPT = "The Work is licensed"
NEW = 50
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def text(repo_root: Path) -> str:
    return (repo_root / "LICENSE").read_text("utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A Hugging Face LLaMA with tied embeddings and a byte-level tokenizer, as transformers saves them; its weights are
    large enough to have preferences."""
    out = tmp_path_factory.mktemp("first") / "model"
    raw = tokenizers.ByteLevelBPETokenizer()
    raw.train_from_iterator([text], vocab_size=500, special_tokens=["<s>", "</s>"], show_progress=False)
    raw._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw._tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(config).save_pretrained(out)
    fast.save_pretrained(out)
    return out


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def judge(folder: Path) -> tuple[object, object]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def greedy(folder: Path, prompt: str = PROMPT, new: int = NEW) -> str:
    """transformers' answer behind ``prompt``."""
    model, tokenizer = judge(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=1)
    whole, before = (tokenizer.decode(part, skip_special_tokens=True) for part in (out[0], ids[0]))
    return whole[len(before) :]


def mf(*words: object) -> int:
    return mfext.main([*map(str, words)])


def answers() -> list[str]:
    lines = Path("output/predictions.jsonl").read_text("utf-8").splitlines()[:-1]
    return [json.loads(line)["answer"] for line in lines]


ENGINES = [pytest.param("auto"), pytest.param("pt"), pytest.param("ms", marks=pytest.mark.slow)]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_is_transformers_and_its_yaml_gives_it_again(
    engine: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max_new_tokens", NEW, "--engine", engine, "--device_target", "CPU"]
    assert mf("predict", *options, folder, PROMPT, "--save_yaml", "job.yaml", "--context.mode", 0) == 0
    expected = greedy(folder)
    assert answers() == [expected] and len(expected) > NEW // 2
    assert ("engine auto: PyTorch" in capsys.readouterr().err) == (engine == "auto")
    Path("output/predictions.jsonl").unlink()
    assert run_mindformer.main(["--config", "job.yaml"]) == 0
    assert answers() == [expected]


def test_pytorch_leaves_half_weights_in_their_type(folder: Path, tmp_path: Path) -> None:
    """On a CPU it computes in float32 with them, as transformers does that loads them so."""
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(half)
    options = ["--max_new_tokens", NEW, "--engine", "pt", "--device_target", "CPU"]
    assert mf("predict", half, PROMPT, *options, "--save_yaml", "job.yaml") == 0
    assert answers() == [greedy(half)]
    words = yaml.safe_load(Path("job.yaml").read_text("utf-8"))["model"]["model_config"]
    assert words["param_init_type"] == "bfloat16" and words.get("compute_dtype", "float32") == "float32"


def test_keys_without_effect_are_noted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text("utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"pretraining_tp": 2, "neftune_noise_alpha": 5}), "utf-8")
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    safetensors.torch.save_file({f"module.{name}": one for name, one in tensors.items()}, copy / "model.safetensors")
    assert mf("predict", copy, PROMPT, "--max_new_tokens", 2, "--engine", "pt", "--device_target", "CPU") == 0
    found = capsys.readouterr()
    assert "note: config.json: pretraining_tp=2 has no effect here" in found.err
    assert "note: config.json: not read, as by transformers: neftune_noise_alpha" in found.err
    assert "every name begins with 'module.', which is left out" in found.err + found.out


@pytest.mark.parametrize("engine", ENGINES)
def test_a_perplexity_is_transformers(engine: str, folder: Path, text: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text[:5000], "utf-8")
    assert mf("eval", folder, "--text", file, "--engine", engine, "--device_target", "CPU") == 0
    model, tokenizer = judge(folder)
    ids = tokenizer(text[:5000], return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp().item()
    found = json.loads(Path("output/eval.json").read_text())
    assert found["tokens"] == ids.shape[1] - 1 > 1000 and found["windows"] == 1
    assert found["PerplexityMetric"]["PPL"] == pytest.approx(expected, rel=1e-6)


def test_training_on_a_text_goes_on_from_the_folder_and_leaves_one_that_is_taken_again(
    folder: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(text[:3500], "utf-8")
    options = ["--engine", "pt", "--device_target", "CPU"]
    sizes = ["--seq_length", "32", "--lr_schedule.learning_rate", "1e-2"]
    assert mf("train", folder, "--data", file, *options, *sizes, "--output_dir", "run", "--save_yaml", "run.yaml") == 0
    steps = [json.loads(line) for path in Path("run/metrics").rglob("*.jsonl") for line in path.open()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert sum(losses[-4:]) < sum(losses[:4]) - 1
    for place in ("run", "run/checkpoint", next(Path("run/checkpoint/rank_0").glob("*.ckpt"))):
        capsys.readouterr()
        assert mf("predict", place, PROMPT, *options, "--max_new_tokens", "8") == 0
        text_of = answers()[0]
        assert capsys.readouterr().out == f"{PROMPT}{text_of}\n"
    assert text_of != greedy(folder, new=8)
    first = [path.read_bytes() for path in sorted(Path("run/checkpoint/rank_0").glob("*.ckpt"))]
    assert run_mindformer.main(["--config", "run.yaml", "--output_dir", "again"]) == 0
    assert [path.read_bytes() for path in sorted(Path("again/checkpoint/rank_0").glob("*.ckpt"))] == first


def test_a_converted_checkpoint_is_described_by_what_lies_beside_it(folder: Path) -> None:
    assert mf("convert", "--input_path", folder, "--output_path", "model.ckpt", "--dtype", "float") == 0
    assert mf("predict", "model.ckpt", PROMPT, "--engine", "pt", "--device_target", "CPU", "--max_new_tokens", 9) == 0
    assert answers() == [greedy(folder, new=9)]
    assert mf("convert", "--input_path", folder / "model.safetensors", "--output_path", "one.ckpt") == 0
    assert Path("one.ckpt").stat().st_size == Path("model.ckpt").stat().st_size


def test_chat_puts_a_line_into_the_folders_template(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n"))
    assert mf("chat", folder, "--engine", "pt", "--device_target", "CPU", "--max_new_tokens", "6") == 0
    shown = capsys.readouterr()
    assert "run_mode: predict" in shown.err and "--chat True" in shown.err
    _, tokenizer = judge(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is it?"}], tokenize=False)
    record = json.loads(Path("output/predictions.jsonl").read_text("utf-8").splitlines()[0])
    assert record["new_tokens"] <= 6 and prompt == "user: What is it?\nassistant:"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict"], "takes a folder"),
        (["predict", "HF", "x", "--config", "y.yaml"], "give one of them"),
        (["predict", "none", "x"], "does not exist here and was not downloaded"),
        (["predict", ".", "x"], "nothing tells the sizes"),
        (["predict", "HF"], "nothing to predict"),
        (["predict", "HF", "x", "--epoch", "3"], "unknown option --epoch"),
        (["predict", "HF", "x", "--model.model_config.num_layer", "3"], "num_layer"),
        (["predict", "HF", "x", "--run_mode", "train"], "leave it out"),
        (["eval", "HF"], "give --text FILE"),
        (["eval", "HF", "--text", "none.txt"], "is no file"),
        (["eval", "HF", "more", "--text", "t.txt"], "what is 'more'"),
        (["train", "HF", "--data", "t.txt", "--train_data", "t.txt"], "data, train_data"),
        (["train", "HF", "--data", "t.txt"], "a smaller --seq_length"),
        (["eval", "HF", "--text", "t.txt", "--seq_length", "4096"], "give 1 to 2048"),
        (["predict", "HF", "x", "--save_yaml", "t.txt"], "was not made by mfext"),
        (["predict", "--config", "y.yaml", "--save_yaml", "z.yaml"], "--save_yaml belongs to a folder"),
    ],
)
def test_a_mistake_is_named(
    words: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text("a few words")
    assert mf(*(folder if word == "HF" else word for word in words)) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "t.txt").read_text() == "a few words"
