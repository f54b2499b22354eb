# SPDX-License-Identifier: Apache-2.0
"""``merge.py yaml`` as a user runs it: the tutorial's files, every flag, what is written beside the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindformers_ext.cli.merge import main
from mindformers_ext.formats.ms_file import open_checkpoint
from tests.helpers import merge_oracle as oracle
from tests.helpers.merge_models import family, make_model, tensors_of

pytest.importorskip("torch", reason="merging computes with torch")
ROOT = Path(__file__).resolve().parents[3]
SEED_FLAGS = ["--copy-tokenizer", "--allow-crimes", "--out-shard-size", "1B", "--lazy-unpickle", "--trust-remote-code"]


def run(*words):
    """The command in this process; argparse's own exit is an exit code too."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


def merge(folder, config, *flags, out="out"):
    """Merge by a configuration given as a mapping; the exit code."""
    (folder / "config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    return run("yaml", folder / "config.yml", folder / out, "--quiet", *flags)


def models(*names, **parameters):
    return [{"model": str(name), **({"parameters": parameters} if parameters else {})} for name in names]


def test_the_tutorials_own_file_and_command(tmp_path, monkeypatch, capsys):
    """Tiny models of the same layout under the tutorial's names; 32 layers, so that the gradients are the real ones."""
    monkeypatch.chdir(tmp_path)
    base = make_model(Path("shenzhi-wang/Llama3-8B-Chinese-Chat"), layers=32, hidden=16, ffn=24)
    other = make_model(
        Path("cognitivecomputations/dolphin-2.9-llama3-8b"),
        layers=32,
        hidden=16,
        ffn=24,
        near=base,
        spread=0.05,
        seed=1,
    )
    assert run("yaml", ROOT / "configs/merge/slerp_llama3.yaml", "merge", *SEED_FLAGS) == 0
    assert "peak memory" in capsys.readouterr().out
    got, a, b = (tensors_of(folder) for folder in (Path("merge"), base, other))
    assert set(got) == set(a) and json.loads(Path("merge/config.json").read_text())["num_hidden_layers"] == 32
    expected = {
        "model.layers.0.self_attn.q_proj.weight": 0.0,
        "model.layers.31.self_attn.q_proj.weight": 1.0,
        "model.layers.8.self_attn.o_proj.weight": 0.5 * 30 / 31 + 0.3 / 31,
        "model.norm.weight": 0.5,
        "model.layers.0.mlp.up_proj.weight": 1.0,
        "model.layers.31.mlp.up_proj.weight": 0.0,
        "model.layers.5.input_layernorm.weight": 0.5,
        "lm_head.weight": 0.5,
    }
    for name, t in expected.items():
        want = oracle.slerp(a[name].astype(float), b[name].astype(float), t)
        np.testing.assert_allclose(got[name].astype(float), want, rtol=2**-8, atol=1e-6, err_msg=name)
    assert np.array_equal(got["model.layers.0.self_attn.q_proj.weight"], a["model.layers.0.self_attn.q_proj.weight"])
    assert Path("merge/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    card = Path("merge/README.md").read_text()
    assert "slerp" in card and "cognitivecomputations/dolphin-2.9-llama3-8b" in card
    assert Path("merge/mergekit_config.yml").read_text() == (ROOT / "configs/merge/slerp_llama3.yaml").read_text()


@pytest.mark.parametrize("name", ["slerp", "ties", "dare_ties", "passthrough"])
def test_the_other_files_of_the_tutorial(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((ROOT / f"configs/merge/{name}.yaml").read_text())
    parts = [source for part in config.get("slices", []) for source in part["sources"]] or config["models"]
    sizes = dict(kind="mistral", layers=32, hidden=8, ffn=8, vocab=20)
    first = make_model(Path(parts[0]["model"]), **sizes)
    for number, part in enumerate(parts[1:], 1):
        make_model(Path(part["model"]), near=first, seed=number, **sizes)
    assert run("yaml", ROOT / f"configs/merge/{name}.yaml", "out", *SEED_FLAGS, "--quiet") == 0
    got = json.loads(Path("out/config.json").read_text())
    assert got["num_hidden_layers"] == (40 if name == "passthrough" else 32)
    assert got["torch_dtype"] == config["dtype"] and got["rope_theta"] == got["rope_parameters"]["rope_theta"] == 1e4
    assert all(np.isfinite(array.astype(float)).all() for array in tensors_of(Path("out")).values())


def test_a_stack_is_its_inputs_bytes(tmp_path):
    _, one, two = family(tmp_path, layers=6)
    slices = [
        {"sources": [{"model": str(one), "layer_range": [0, 4]}]},
        {"sources": [{"model": str(two), "layer_range": [3, 6]}]},
    ]
    assert merge(tmp_path, {"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}) == 0
    got, a, b = tensors_of(tmp_path / "out"), tensors_of(one), tensors_of(two)
    for layer, (source, index) in enumerate([(a, 0), (a, 1), (a, 2), (a, 3), (b, 3), (b, 4), (b, 5)]):
        for name in ("self_attn.k_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
            assert np.array_equal(got[f"model.layers.{layer}.{name}"], source[f"model.layers.{index}.{name}"])
    assert np.array_equal(got["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert np.array_equal(got["lm_head.weight"], b["lm_head.weight"])
    assert np.array_equal(got["model.norm.weight"], b["model.norm.weight"])
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 7
    slices.append({"sources": [{"model": str(one), "layer_range": [6, 6]}]})  # names the donor of norm and head
    assert merge(tmp_path, {"slices": slices, "merge_method": "passthrough"}, out="donor") == 0
    assert np.array_equal(tensors_of(tmp_path / "donor")["lm_head.weight"], a["lm_head.weight"])


def test_parameters_come_from_the_nearest_scope(tmp_path):
    base, one, _ = family(tmp_path)
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "dtype": "float32",
        "parameters": {"weight": 9.0, "lambda": [{"filter": "mlp", "value": "5e-1"}, {"value": 1}]},
        "models": [
            *models(base),
            {
                "model": str(one),
                "parameters": {"weight": [{"filter": "lm_head", "value": 3}, {"filter": "layers", "value": [0, 1]}]},
            },
        ],
    }
    assert merge(tmp_path, config) == 0
    got, b, x = (tensors_of(folder) for folder in (tmp_path / "out", base, one))
    for name, factor in (
        ("lm_head.weight", 3),
        ("model.norm.weight", 9),
        ("model.layers.0.mlp.up_proj.weight", 0),
        ("model.layers.3.mlp.up_proj.weight", 0.5),
        ("model.layers.3.self_attn.q_proj.weight", 1),
        ("model.layers.1.self_attn.q_proj.weight", 1 / 3),
    ):
        start, delta = b[name].astype(float), x[name].astype(float) - b[name].astype(float)
        np.testing.assert_allclose(got[name], start + factor * delta, atol=1e-6, err_msg=name)


def test_gradients_of_old_results_and_of_single_layers(tmp_path):
    base, one, _ = family(tmp_path)
    config = {
        "merge_method": "slerp",
        "base_model": str(base),
        "parameters": {"t": [0, 1]},
        "dtype": "bfloat16",
        "slices": [
            {"sources": [{"model": str(m), "layer_range": list(r)} for m in (base, one)]} for r in ((0, 3), (3, 4))
        ],
    }
    assert merge(tmp_path, config) == 0
    assert merge(tmp_path, config | {"compat": {"post_gradient": "last"}}, out="old") == 0
    new, old, b, x = (tensors_of(folder) for folder in (tmp_path / "out", tmp_path / "old", base, one))
    norm, q = "model.norm.weight", "model.layers.{}.self_attn.q_proj.weight"
    assert np.array_equal(new[norm], b[norm]) and np.array_equal(old[norm], x[norm])
    assert np.array_equal(new[q.format(3)], x[q.format(3)])  # a slice of one layer is at the gradient's end
    assert np.array_equal(new[q.format(2)], x[q.format(2)]) and np.array_equal(new[q.format(0)], b[q.format(0)])


@pytest.mark.parametrize("method", ["ties", "dare_ties", "linear"])
def test_the_bytes_depend_on_neither_shards_nor_threads(method, tmp_path):
    base, one, two = family(tmp_path, shard=30_000)
    config = {
        "merge_method": method,
        "base_model": str(base),
        "models": models(one, two, weight=0.5),
        "dtype": "bfloat16",
    }
    if method == "linear":
        config["models"] = models(base, one, two, weight=0.5)
    elif method != "linear":
        config["parameters"] = {"density": 0.5}
    assert merge(tmp_path, config, "-j", 1) == 0
    assert merge(tmp_path, config, "-j", 2, "--out-shard-size", "20K", out="shards") == 0
    whole, parts = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "shards")
    assert (tmp_path / "shards/model.safetensors.index.json").is_file()
    assert set(whole) == set(parts) and all(np.array_equal(whole[name], parts[name]) for name in whole)
    assert merge(tmp_path, config, "--random-seed", 5, out="seed") == 0
    other = tensors_of(tmp_path / "seed")
    same = all(np.array_equal(whole[name], other[name]) for name in whole)
    assert same == (method != "dare_ties")


def test_types_are_cast_once_at_the_end(tmp_path):
    base, one, two = family(tmp_path, dtype="float32")
    config = {"merge_method": "linear", "models": models(one, two, weight=1), "dtype": "float32", "out_dtype": "bf16"}
    assert merge(tmp_path, config) == 0
    got, a, b = (tensors_of(folder) for folder in (tmp_path / "out", one, two))
    for name in got:
        want = (a[name] + b[name]) / np.float32(2)
        assert np.array_equal(got[name], want.astype(got[name].dtype))
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_heads_tied_and_not(tmp_path):
    base, one, _ = family(tmp_path, tie_word_embeddings=True)
    untied = make_model(tmp_path / "untied", near=base, seed=9)
    linear = {"merge_method": "linear", "dtype": "bfloat16"}
    assert merge(tmp_path, linear | {"models": models(base, one, weight=1)}, out="tied") == 0
    assert "lm_head.weight" not in tensors_of(tmp_path / "tied")
    assert json.loads((tmp_path / "tied/config.json").read_text())["tie_word_embeddings"] is True
    assert merge(tmp_path, linear | {"models": models(base, untied, weight=1)}, out="mixed") == 0
    got = tensors_of(tmp_path / "mixed")["lm_head.weight"].astype(float)
    parts = [tensors_of(base)["model.embed_tokens.weight"], tensors_of(untied)["lm_head.weight"]]
    np.testing.assert_allclose(got, sum(part.astype(float) for part in parts) / 2, rtol=2**-8, atol=1e-9)
    assert json.loads((tmp_path / "mixed/config.json").read_text())["tie_word_embeddings"] is False


def test_vocabularies_of_different_length(tmp_path, capsys):
    base = make_model(tmp_path / "base", vocab=80)
    longer = make_model(tmp_path / "longer", vocab=84, seed=1)
    config = {"merge_method": "linear", "models": models(base, longer, weight=1), "dtype": "bfloat16"}
    assert merge(tmp_path, config) == 2
    assert "--unsafe-truncate-embeddings" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert merge(tmp_path, config, "--unsafe-truncate-embeddings") == 0
    assert tensors_of(tmp_path / "out")["lm_head.weight"].shape[0] == 80
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 80


def test_the_tokenizer_that_is_copied(tmp_path):
    base, one, two = family(tmp_path)
    (one / "chat_template.jinja").write_text("{{ messages }}")
    config = {"merge_method": "linear", "models": models(base, one, two, weight=1), "base_model": str(base)}
    more = {"tokenizer_source": str(one), "chat_template": "auto"}
    assert merge(tmp_path, config | more) == 0
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    assert merge(tmp_path, config, "--no-copy-tokenizer", "--no-write-model-card", out="bare") == 0
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == ["config.json", "model.safetensors"]


def test_sidecars_of_both_transformers(tmp_path):
    """A config.json of transformers 5 keeps its rotary settings for readers of 4, layer_types follow the layers."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    kinds = ["full_attention"] * 3 + ["sliding_attention"]
    base, one, _ = family(tmp_path, kind="qwen2", rope_parameters=rope, layer_types=kinds)
    for folder in (base, one):
        config = json.loads((folder / "config.json").read_text())
        del config["rope_theta"], config["torch_dtype"]
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    slices = [{"sources": [{"model": str(m), "layer_range": list(r)}]} for m, r in ((base, (0, 4)), (one, (3, 4)))]
    assert merge(tmp_path, {"slices": slices, "merge_method": "passthrough"}) == 0
    got = json.loads((tmp_path / "out/config.json").read_text())
    assert got["rope_theta"] == 500000.0 and got["rope_scaling"]["factor"] == 8.0 and got["rope_parameters"] == rope
    assert (
        got["layer_types"] == [*kinds, "sliding_attention"] and got["torch_dtype"] == "bfloat16" and "dtype" not in got
    )
    assert "model.layers.4.self_attn.q_proj.bias" in tensors_of(tmp_path / "out")


@pytest.mark.parametrize("kind", ["qwen2", "phi3", "mixtral", "mistral"])
def test_other_architectures(kind, tmp_path):
    base, one, two = family(tmp_path, kind=kind)
    config = {"merge_method": "ties", "base_model": str(base), "models": models(one, two, weight=1, density=0.5)}
    assert merge(tmp_path, config) == 0
    assert set(tensors_of(tmp_path / "out")) == set(tensors_of(base))


def test_pytorch_files_are_read_without_running_them(tmp_path, capsys):
    import pickle

    import torch

    base, one, _ = family(tmp_path, dtype="float32")
    config = {"merge_method": "linear", "models": models(base, one, weight=1), "dtype": "float32"}
    assert merge(tmp_path, config, out="safe") == 0
    torch.save({name: torch.from_numpy(array) for name, array in tensors_of(one).items()}, one / "pytorch_model.bin")
    (one / "model.safetensors").unlink()
    assert merge(tmp_path, config, "--lazy-unpickle", out="bin") == 0
    assert (tmp_path / "bin/model.safetensors").read_bytes() == (tmp_path / "safe/model.safetensors").read_bytes()

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    with (one / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"a": Evil()}, file)
    torch.save({"a": Evil()}, two := one / "pytorch_model.bin")
    assert two.is_file() and merge(tmp_path, config, out="evil") == 2
    assert not (tmp_path / "ran").exists() and not (tmp_path / "evil").exists()
    assert "asks to run" in capsys.readouterr().err


def test_nan_is_named(tmp_path, capsys):
    base, one, _ = family(tmp_path)
    tensors = tensors_of(one)
    tensors["model.norm.weight"][3] = np.nan
    from tests.helpers.merge_models import write_model

    write_model(one, tensors, json.loads((one / "config.json").read_text()))
    config = {"merge_method": "linear", "models": models(base, one, weight=1)}
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    assert run("yaml", tmp_path / "c.yml", tmp_path / "out") == 0
    assert "'model.norm.weight' of" in capsys.readouterr().err
    assert merge(tmp_path, config, "--strict", out="strict") == 2 and not (tmp_path / "strict").exists()


def test_dry_run_overwrite_and_existing_outputs(tmp_path, capsys):
    base, one, _ = family(tmp_path)
    config = {"merge_method": "linear", "models": models(base, one, weight=0.5), "dtype": "bfloat16"}
    assert merge(tmp_path, config, "--dry_run") == 0
    text = capsys.readouterr().out
    assert "nothing was written" in text and not (tmp_path / "out").exists()
    assert "lm_head.weight bfloat16 [80, 32] = linear (weight=0.5) (weight=0.5) of" in text
    assert merge(tmp_path, config) == 0 and merge(tmp_path, config) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert merge(tmp_path, config, "--overwrite", "--out-shard-size", "10K") == 0
    assert not (tmp_path / "out/model.safetensors").exists()  # nothing stale beside the shards
    assert merge(tmp_path, config, "--overwrite", out="ft1") == 2
    assert "which is read" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_to_mindspore(tmp_path):
    base, one, _ = family(tmp_path)
    config = {"merge_method": "linear", "models": models(base, one, weight=1), "dtype": "bfloat16"}
    assert merge(tmp_path, config, "--to-mindspore", tmp_path / "out.ckpt") == 0
    checkpoint = open_checkpoint(tmp_path / "out.ckpt")
    got = checkpoint.read("model.layers.2.attention.wq.weight")
    assert np.array_equal(got, tensors_of(tmp_path / "out")["model.layers.2.self_attn.q_proj.weight"])
    checkpoint.close()


def test_help_is_quick_and_loads_no_framework():
    code = (
        "import sys; from mindformers_ext.cli.merge import parser; parser().format_help();"
        "sys.exit(bool({'torch', 'transformers', 'mindspore', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    for command in ("yaml", "moe"):
        done = subprocess.run(
            [sys.executable, "tools/merge.py", command, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and "--out-shard-size" in done.stdout
