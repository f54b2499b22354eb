# SPDX-License-Identifier: Apache-2.0
"""What a merge writes is a model: sizes and constants are compared before a byte is written, results are looked at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindformers_ext.cli.merge import main
from tests.helpers.merge_models import family, make_model, tensors_of, write_model

pytest.importorskip("torch", reason="merging computes with torch")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models that differ in one thing each."""
    folder = tmp_path_factory.mktemp("models")
    base, *_ = family(folder, layers=2)
    for name, words in {
        "wide": {"ffn": 64},
        "broad": {"hidden": 48},
        "long": {"vocab": 96},
        "heads": {"num_attention_heads": 8, "num_key_value_heads": 4},
        "grouped": {"num_key_value_heads": 4},
        "theta": {"rope_theta": 500000.0},
        "eps": {"rms_norm_eps": 1e-6},
        "scaled": {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "gelu": {"hidden_act": "gelu"},
        "biased": {"attention_bias": True},
        "swish": {"hidden_act": "swish", "head_dim": 8, "rope_scaling": {"rope_type": "default"}},
        "window": {"kind": "mistral", "sliding_window": 16},
    }.items():
        make_model(folder / name, **{"layers": 2, "seed": 9} | words)
    new = json.loads((make_model(folder / "nested", layers=2, near=base) / "config.json").read_text())
    new["rope_parameters"] = {"rope_theta": new.pop("rope_theta"), "rope_type": "default"}
    (folder / "nested/config.json").write_text(json.dumps(new))
    wrong = json.loads((make_model(folder / "wrong", layers=2, near=base) / "config.json").read_text())
    (folder / "wrong/config.json").write_text(json.dumps(wrong | {"intermediate_size": 47}))
    return folder


@pytest.fixture(autouse=True)
def _inside(place, monkeypatch):
    monkeypatch.chdir(place)


def run(config, out, capsys, *flags):
    """Exit code and what was said."""
    Path("config.yml").write_text(yaml.safe_dump(config))
    code = main(["yaml", "config.yml", str(out), *flags])
    return code, capsys.readouterr().err


def stack(*parts, **more):
    slices = [{"sources": [{"model": name, "layer_range": list(layers)}]} for name, *layers in parts]
    return {"slices": slices, "merge_method": "passthrough"} | more


def mean(*names, method="linear", **more):
    return {"models": [{"model": n, "parameters": {"weight": 1}} for n in names], "merge_method": method} | more


STACKS = {
    "feed-forward": (stack(("base", 0, 2), ("wide", 1, 2)), "mlp.gate_proj.weight' is [64, 32], not [48, 32]"),
    "first layer": (stack(("base", 0, 1), ("wide", 1, 2), ("base", 1, 2)), "model.layers.1.mlp.up_proj.weight"),
    "width": (stack(("base", 0, 2), ("broad", 1, 2)), "hidden_size 32"),
    "key heads": (stack(("base", 0, 2), ("grouped", 1, 2)), "num_key_value_heads differs: 'base' 2, 'grouped' 4"),
    "embedding and head": (stack(("base", 0, 2), ("long", 1, 2)), "'lm_head.weight' is [96, 32], not [80, 32]"),
    "config of another": (stack(("wide", 0, 2), base_model="base"), "all layers of a model have one size"),
    "biases in some layers": (stack(("biased", 0, 1), ("base", 1, 2)), "self_attn.q_proj.bias' is missing"),
    "biases unsaid": (stack(("base", 0, 1), ("biased", 1, 2)), "exists, but attention_bias is not set"),
    "a model that is not its config": (stack(("wrong", 0, 2)), "not [47, 32]"),
    "linear": (mean("wrong"), "not [47, 32]"),
    "ties": (mean("wrong", "ft1", method="ties", base_model="wrong"), "intermediate_size 47) of the merge"),
}


@pytest.mark.parametrize("name", STACKS)
def test_what_would_be_no_model_is_refused_before_a_byte_is_written(name, tmp_path, capsys):
    config, found = STACKS[name]
    heard = ""
    for flags in ((), ("--allow-crimes",)):
        code, said = run(config, tmp_path / "out", capsys, *flags)
        assert code == 2 and "Traceback" not in said and not any(tmp_path.iterdir()), said
        heard += said
    assert found in heard


def test_a_stack_of_one_kind_of_layers_loads(tmp_path, capsys):
    """The rows of the embedding are written as vocab_size where the base says otherwise."""
    from transformers import AutoModelForCausalLM

    config = stack(("long", 0, 2), ("long", 1, 2), base_model="base")
    code, said = run(config, tmp_path / "out", capsys)
    assert code == 0 and "vocab_size is 96" in said
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


def test_truncation_cuts_embedding_and_head_of_a_stack_alike(tmp_path, capsys):
    code, said = run(stack(("base", 0, 2), ("long", 1, 2)), tmp_path / "out", capsys, "--unsafe-truncate-embeddings")
    got = tensors_of(tmp_path / "out")
    assert code == 0 and got["lm_head.weight"].shape == got["model.embed_tokens.weight"].shape == (80, 32), said
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 80


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ("heads", "num_attention_heads differs: 'base' 4, 'heads' 8"),
        ("gelu", "hidden_act differs: 'base' silu, 'gelu' gelu"),
    ],
)
def test_equal_shapes_of_another_meaning_are_refused_or_a_crime(other, found, tmp_path, capsys):
    code, said = run(mean("base", other), tmp_path / "out", capsys)
    assert code == 2 and found in said and "--allow-crimes" in said and not any(tmp_path.iterdir())
    code, said = run(mean("base", other), tmp_path / "out", capsys, "--allow-crimes")
    assert code == 0 and f"note: {found.split(':')[0]}" in said and "that of 'base'" in said


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ("theta", "rope_theta differs ('base' 10000.0, 'theta' 500000.0): the merge has 10000.0, that of 'base'"),
        ("eps", "rms_norm_eps differs"),
        ("scaled", "rope_scaling differs"),
    ],
)
def test_constants_that_differ_are_named_with_the_one_written(other, found, tmp_path, capsys):
    code, said = run(mean("base", other), tmp_path / "out", capsys)
    assert code == 0 and found in said
    code, said = run(mean("base", other, base_model=other), tmp_path / "other", capsys)
    assert code == 0 and f"that of '{other}'" in said
    written, own = (json.loads(Path(p, "config.json").read_text()) for p in (tmp_path / "other", other))
    assert all(written[key] == own.get(key) for key in ("rope_theta", "rms_norm_eps"))


@pytest.mark.parametrize("other", ["swish", "nested"])
def test_two_spellings_of_one_model_are_no_difference(other, tmp_path, capsys):
    code, said = run(mean("base", other), tmp_path / "out", capsys)
    assert code == 0 and "differs" not in said


def test_a_window_is_named_too(tmp_path, capsys):
    code, said = run(mean("base", "window"), tmp_path / "out", capsys, "--allow-crimes")
    assert code == 0 and "sliding_window differs ('base' None, 'window' 16)" in said


BIG = {
    "linear": {},
    "passthrough": {},
    "task_arithmetic": {"base_model": "base"},
    "dare_linear": {"base_model": "base", "parameters": {"density": 0.5}},
    "ties": {"base_model": "base", "parameters": {"density": 0.9}},
    "slerp": {"base_model": "base", "parameters": {"t": 0.3}},
    "karcher": {},
    "multislerp": {},
}


@pytest.fixture(scope="module")
def large(place):
    """A model of seven weights that float16 does not hold."""
    tensors = {name: array.astype(np.float32) for name, array in tensors_of(place / "base").items()}
    tensors["model.layers.1.mlp.up_proj.weight"].reshape(-1)[:7] = 1e5
    config = json.loads((place / "base/config.json").read_text())
    return write_model(place / "large", tensors, config)


@pytest.mark.parametrize("method", BIG)
@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_results_beyond_a_type_are_refused_or_counted(method, key, large, tmp_path, capsys):
    more = BIG[method] | {key: "float16"}
    config = stack(("large", 0, 2), **more) if method == "passthrough" else mean("large", method=method, **more)
    if method == "slerp" or (method == "multislerp" or method == "karcher"):
        config["models"].append({"model": "base", "parameters": {"weight": 0.1}})
    code, said = run(config, tmp_path / "out", capsys)
    if key == "out_dtype" and code == 0:  # a share of them may fit
        assert all(np.isfinite(array.astype(np.float32)).all() for array in tensors_of(tmp_path / "out").values())
        return
    assert code == 2 and "model.layers.1.mlp.up_proj.weight" in said and "float16" in said, said
    assert "--allow-overflow" in said and not any(tmp_path.iterdir())
    code, said = run(config, tmp_path / "out", capsys, "--allow-overflow")
    got = tensors_of(tmp_path / "out")
    lost = sum(int((~np.isfinite(array.astype(np.float32))).sum()) for array in got.values())
    assert code == 0 and (not lost or f"{lost} values became infinite" in said), said


def test_seven_weights_are_seven(large, tmp_path, capsys):
    code, said = run(mean("large", dtype="float16"), tmp_path / "out", capsys, "--allow_overflow")
    assert code == 0 and "7 values became infinite or NaN in 1 tensors" in said


def test_a_mixture_is_looked_at_too(large, tmp_path, capsys):
    experts = [{"source_model": name, "positive_prompts": [f"w{n}"]} for n, name in enumerate(("large", "ft1"), 5)]
    moe = {"base_model": "base", "gate_mode": "random", "dtype": "float16", "experts": experts}
    Path("moe.yml").write_text(yaml.safe_dump(moe))
    assert main(["moe", "moe.yml", str(tmp_path / "out")]) == 2
    assert "experts.0.w3.weight': 7 or more values" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_nan_that_was_there_is_no_overflow(tmp_path, capsys):
    tensors = tensors_of(Path("base"))
    tensors["model.norm.weight"][3] = np.nan
    write_model(tmp_path / "nan", tensors, json.loads(Path("base/config.json").read_text()))
    code, said = run(mean(str(tmp_path / "nan"), "ft1"), tmp_path / "out", capsys)
    assert code == 0 and "held NaN or infinite values" in said


def test_companions_that_are_links_out_of_the_folder_stay_where_they_are(tmp_path, capsys):
    """In a download of the hub the files are links into the repository's own folder: these are copied."""
    (tmp_path / "secret").write_text("secret")
    make_model(tmp_path / "ft", layers=2, near=Path("base"))
    (tmp_path / "ft/merges.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "ft/vocab.json").symlink_to("tokenizer.json")
    code, said = run(mean(str(tmp_path / "ft")), tmp_path / "out", capsys)
    assert code == 0 and "not copied, as they are links" in said and "merges.txt" in said
    assert not (tmp_path / "out/merges.txt").exists() and (tmp_path / "out/vocab.json").is_file()
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    (tmp_path / "models--a--b/blobs").mkdir(parents=True)
    make_model(snapshot, layers=2, near=Path("base"))
    (snapshot / "tokenizer.json").rename(tmp_path / "models--a--b/blobs/1")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    code, said = run(mean(str(snapshot)), tmp_path / "hub", capsys)
    assert code == 0 and (tmp_path / "hub/tokenizer.json").is_file() and "not copied" not in said


def test_an_unknown_method_is_refused_without_torch(tmp_path):
    import subprocess
    import sys

    (tmp_path / "c.yml").write_text(yaml.safe_dump(mean("base") | {"merge_method": "slurp"}))
    code = (
        "import sys; from mindformers_ext.cli.merge import main; code = main(sys.argv[1:]); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    words = [sys.executable, "-c", code, "yaml", str(tmp_path / "c.yml"), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "did you mean 'slerp'" in done.stderr
