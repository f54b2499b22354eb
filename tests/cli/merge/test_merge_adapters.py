# SPDX-License-Identifier: Apache-2.0
"""``MODEL+ADAPTER`` in a merge's YAML: PEFT's LoRA adapters, merged into their model as it is read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindformers_ext.cli.merge import main
from tests.helpers.adapters import PREFIX, make_adapter, merged, write_adapter
from tests.helpers.merge_models import BF16, family, make_model, tensors_of

pytest.importorskip("torch", reason="merging computes with torch")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    base, *_ = family(folder, layers=2, dtype="float32")
    make_adapter(folder / "lora", tensors_of(base))
    make_model(folder / "half", layers=2, near=base)
    return folder


@pytest.fixture(autouse=True)
def _inside(place, monkeypatch):
    monkeypatch.chdir(place)


def run(config, out, *flags, command="yaml"):
    Path("config.yml").write_text(yaml.safe_dump(config))
    return main([command, "config.yml", str(out), *map(str, flags)])


def stack(name, **more):
    slices = [{"sources": [{"model": name, "layer_range": [0, 2]}]}]
    return {"slices": slices, "merge_method": "passthrough"} | more


def adapter_of(folder="lora"):
    from safetensors.numpy import load_file

    return load_file(Path(folder) / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["base+lora", {"model": {"path": "base"}, "lora": {"path": "lora"}}])
def test_the_adapter_is_in_the_weights(name, tmp_path):
    assert run(stack(name), tmp_path / "out", "--quiet") == 0
    got, want = tensors_of(tmp_path / "out"), merged(tensors_of(Path("base")), adapter_of(), 8 / 4)
    assert set(got) == set(want)
    for key, array in got.items():
        np.testing.assert_allclose(array, want[key], rtol=0, atol=1e-6, err_msg=key)
    changed = "model.layers.1.mlp.down_proj.weight"
    assert not np.array_equal(got[changed], tensors_of(Path("base"))[changed])


def test_it_is_one_model_among_others(tmp_path):
    """A task vector of an adapter: base, base with adapter, another one."""
    parts = [{"model": "base"}, *({"model": n, "parameters": {"weight": 0.5}} for n in ("base+lora", "ft1"))]
    config = {"models": parts, "merge_method": "task_arithmetic", "base_model": "base"}
    assert run(config, tmp_path / "out", "--quiet") == 0
    base, one = tensors_of(Path("base")), tensors_of(Path("ft1"))
    want = merged(base, adapter_of(), 2.0)
    for key, array in tensors_of(tmp_path / "out").items():
        b = base[key].astype(np.float64)
        np.testing.assert_allclose(array, b + 0.5 * (want[key] - b) + 0.5 * (one[key] - b), rtol=0, atol=2e-6)
    assert "base+lora" in (tmp_path / "out/README.md").read_text()


def test_the_type_is_the_models_or_the_one_asked_for(tmp_path):
    base = tensors_of(Path("half"))
    make_adapter(tmp_path / "lora", base)
    want = merged(base, adapter_of(tmp_path / "lora"), 2.0)
    name = f"half+{tmp_path / 'lora'}"
    assert run(stack(name), tmp_path / "half", "--quiet") == 0
    assert run(stack(name), tmp_path / "wide", "--quiet", "--lora-merge-dtype", "fp32") == 0
    key = "model.layers.0.self_attn.q_proj.weight"
    half, wide = tensors_of(tmp_path / "half")[key], tensors_of(tmp_path / "wide")[key]
    assert half.dtype == BF16 and np.array_equal(half, want[key].astype(np.float32).astype(BF16))
    assert wide.dtype == np.float32
    np.testing.assert_allclose(wide, want[key], atol=1e-6)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 3}, 3 / 4),
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"alpha_pattern": {"q_proj": 1}}, None),
    ],
)
def test_how_much_an_adapter_adds(config, scale, tmp_path):
    base = tensors_of(Path("base"))
    tensors = make_adapter(tmp_path / "lora", base, **config)
    assert run(stack(f"base+{tmp_path / 'lora'}"), tmp_path / "out", "--quiet") == 0
    for key, array in tensors_of(tmp_path / "out").items():
        factor = scale if scale is not None else (1 if "q_proj" in key else 8) / 4
        np.testing.assert_allclose(array, merged(base, tensors, factor)[key], rtol=0, atol=2e-6, err_msg=key)


def test_embeddings_and_whole_tensors(tmp_path):
    """Adapted embeddings have transposed parts; ``modules_to_save`` are tensors as they are, a new head among them."""
    base = tensors_of(Path("base"))
    random = np.random.default_rng(0)
    low = random.standard_normal((4, 80)).astype(np.float32)
    high = random.standard_normal((32, 4)).astype(np.float32)
    head = random.standard_normal((80, 32)).astype(np.float32)
    tensors = {
        PREFIX + "model.embed_tokens.lora_embedding_A": low,
        PREFIX + "model.embed_tokens.lora_embedding_B": high,
        PREFIX + "lm_head.weight": head,
        PREFIX + "model.norm.modules_to_save.weight": np.full(32, 2.0, np.float32),
    }
    write_adapter(tmp_path / "lora", tensors, 4)
    assert run(stack(f"base+{tmp_path / 'lora'}"), tmp_path / "out", "--quiet") == 0
    got = tensors_of(tmp_path / "out")
    want = base["model.embed_tokens.weight"] + 2.0 * (high.astype(np.float64) @ low).T
    np.testing.assert_allclose(got["model.embed_tokens.weight"], want, atol=1e-5)
    assert np.array_equal(got["lm_head.weight"], head) and (got["model.norm.weight"] == 2).all()


def test_an_expert_with_an_adapter(tmp_path):
    experts = [{"source_model": name} for name in ("ft1", "base+lora")]
    config = {"base_model": "base+lora", "gate_mode": "random", "experts": experts}
    assert run(config, tmp_path / "out", "--quiet", command="moe") == 0
    got, want = tensors_of(tmp_path / "out"), merged(tensors_of(Path("base")), adapter_of(), 2.0)
    expert, donor = "model.layers.1.block_sparse_moe.experts.{}.w2.weight", "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_allclose(got[expert.format(1)], want[donor], atol=1e-6)
    assert np.array_equal(got[expert.format(0)], tensors_of(Path("ft1"))[donor])
    attention = "model.layers.0.self_attn.o_proj.weight"
    np.testing.assert_allclose(got[attention], want[attention], atol=1e-6)


def test_pytorch_files_and_a_path_with_a_plus(tmp_path):
    import torch

    make_model(tmp_path / "a+b", layers=2, near=Path("base"), dtype="float32")
    lora = tmp_path / "lora"
    tensors = make_adapter(lora, tensors_of(tmp_path / "a+b"))
    (lora / "adapter_model.safetensors").unlink()
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, lora / "adapter_model.bin")
    assert run(stack(str(tmp_path / "a+b")), tmp_path / "plain", "--quiet") == 0
    assert run(stack(f"{tmp_path / 'a+b'}+{lora}"), tmp_path / "out", "--quiet") == 0
    want = merged(tensors_of(tmp_path / "plain"), tensors, 2.0)
    for key, array in tensors_of(tmp_path / "out").items():
        np.testing.assert_allclose(array, want[key], rtol=0, atol=2e-6)


def _spoil(folder, what):
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = adapter_of(folder)
    name = PREFIX + "model.layers.0.self_attn.q_proj.lora_{}.weight"
    if isinstance(what, dict):
        config |= what
    elif what == "half":
        del tensors[name.format("B")]
    elif what == "shape":
        tensors[name.format("B")] = np.zeros((7, 4), np.float32)
    elif what == "layer":
        tensors[PREFIX + "model.layers.9.self_attn.q_proj.lora_A.weight"] = tensors.pop(name.format("A"))
        tensors[PREFIX + "model.layers.9.self_attn.q_proj.lora_B.weight"] = tensors.pop(name.format("B"))
    elif what == "strange":
        tensors[PREFIX + "model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = np.zeros(3, np.float32)
    write_adapter(folder, tensors, 4)
    (folder / "adapter_config.json").write_text(json.dumps(config))


MISTAKES = {
    "dora": ({"use_dora": True}, "use_dora=True is not built"),
    "kind": ({"peft_type": "IA3"}, "peft_type='IA3' is not built"),
    "list": ({"peft_type": ["LORA"]}, "is not built"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "alpha": ({"lora_alpha": "much"}, "lora_alpha='much'"),
    "pattern": ({"alpha_pattern": {"(a+)+$": 2}}, "names of layers are expected"),
    "half": ("half", "has lora_A alone"),
    "shape": ("shape", "the adapter's parts [7, 4] and [4, 32]"),
    "layer": ("layer", "are not in the model: model.layers.9"),
    "strange": ("strange", "are not understood"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_adapter_that_cannot_be_merged_is_named(name, tmp_path, capsys):
    change, found = MISTAKES[name]
    make_adapter(tmp_path / "lora", tensors_of(Path("base")))
    _spoil(tmp_path / "lora", change)
    assert run(stack(f"base+{tmp_path / 'lora'}"), tmp_path / "out", "--quiet") == 2
    said = capsys.readouterr().err
    assert found in said and "Traceback" not in said and not (tmp_path / "out").exists(), said


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("base+ft1", "'ft1' is no adapter of PEFT"),
        ("base+lora+lora", "has 2 '+'"),
        ("base+", "is not MODEL+ADAPTER"),
        ("base+nowhere", "'nowhere' does not exist here"),
    ],
)
def test_a_name_that_is_no_model_with_adapter(name, found, tmp_path, capsys):
    assert run(stack(name), tmp_path / "out", "--quiet") == 2
    assert found in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_an_unknown_type_for_adapters(tmp_path, capsys):
    assert run(stack("base+lora"), tmp_path / "out", "--lora-merge-dtype", "fp17") == 2
    assert "--lora-merge-dtype is 'fp17'" in capsys.readouterr().err
