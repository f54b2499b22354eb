# SPDX-License-Identifier: Apache-2.0
"""Folders as they lie on people's disks: other names, other files beside, Meta's and Mistral's own releases."""

from __future__ import annotations

import json
import struct
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mindformers_ext.core.config.hf import hf_config_from_spec, model_spec_from_hf
from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.checkpoint.convert import ConvertRequest, convert
from mindformers_ext.jobs.checkpoint.inspect import inspect_ckpt
from mindformers_ext.jobs.checkpoint.renamed import notes_of
from mindformers_ext.jobs.checkpoint.source import is_hf_file, open_hf
from mindformers_ext.jobs.merge.dense import MergeRequest, merge
from mindformers_ext.jobs.merge.output import OutputRequest
from mindformers_ext.weights.convert import rule_set

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
LLAMA = SIZES | {"model_type": "llama", "num_key_value_heads": 1}
MIXTRAL = SIZES | {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 2}
META = {  # written out, so that a wrong line of the table is seen
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers.0.self_attn.q_proj": "layers.0.attention.wq",
    "model.layers.0.self_attn.k_proj": "layers.0.attention.wk",
    "model.layers.0.self_attn.v_proj": "layers.0.attention.wv",
    "model.layers.0.self_attn.o_proj": "layers.0.attention.wo",
    "model.layers.0.input_layernorm": "layers.0.attention_norm",
    "model.layers.0.post_attention_layernorm": "layers.0.ffn_norm",
    "model.layers.0.mlp.gate_proj": "layers.0.feed_forward.w1",
    "model.layers.0.mlp.down_proj": "layers.0.feed_forward.w2",
    "model.layers.0.mlp.up_proj": "layers.0.feed_forward.w3",
    "model.layers.0.block_sparse_moe.gate": "layers.0.feed_forward.gate",
}


def weights(config: dict) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [item for binding in rule_set(model_spec_from_hf(config)).bindings for item in binding.hf.items()]
    return {name: rng.normal(size=shape).astype("f4") for name, shape in shapes}


def make(path: Path, config: dict) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(hf_config_from_spec(model_spec_from_hf(config))))
    return path


def params(path: Path) -> None:
    (path / "params.json").write_text(json.dumps({"dim": 16, "n_layers": 1, "n_heads": 2, "head_dim": 8}))


def as_meta(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """Meta's name, and rows in which row i of a head's first half stands before row i of its second."""
    stem = name.removesuffix(".weight")
    found = META.get(stem) or stem.replace("model.", "", 1).replace("block_sparse_moe", "feed_forward")
    if found.endswith((".wq", ".wk")):
        order = [8 * head + half + row for head in range(len(array) // 8) for row in range(4) for half in (0, 4)]
        array = np.ascontiguousarray(array[order])
    return f"{found}.weight", array


def assert_holds(path: Path, tensors: dict[str, np.ndarray]) -> None:
    with closing(open_hf(path)) as reader:
        assert set(reader.infos) == set(tensors)
        for name, array in tensors.items():
            assert reader.infos[name].shape == array.shape
            for index in ((), (slice(1, 11),), (1,), (slice(5, 7), slice(0, 2)), (slice(0, 0),)):
                if len(index) <= array.ndim:
                    np.testing.assert_array_equal(reader.read(name, index), array[index], strict=True)


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
@pytest.mark.parametrize("name", ["consolidated.safetensors", "consolidated.00.pth"])
def test_a_release_of_meta_or_mistral_is_read(tmp_path, config, name):
    tensors = weights(config)
    release = dict(as_meta(*item) for item in tensors.items())
    path = make(tmp_path / "model", config)
    params(path)
    if name.endswith("pth"):
        extra = {"rope.freqs": torch.zeros(4)}
        torch.save({key: torch.from_numpy(value) for key, value in release.items()} | extra, path / name)
    else:
        save_file(release, path / name)
        assert is_hf_file(path / name)
    assert_holds(path, tensors)
    assert_holds(path / name, tensors)
    report = convert(ConvertRequest(input_path=path, output_path=tmp_path / "out.safetensors"))
    assert any("Meta's names" in note for note in report.notes)
    save_file(tensors, path / "model.safetensors")  # Hugging Face's own go first
    with closing(open_hf(path)) as reader:
        assert not notes_of(reader)


def test_attention_scores_are_those_of_metas_rotation(tmp_path):
    """Meta turns neighbouring pairs as complex numbers, Hugging Face halves of a head."""
    path = make(tmp_path / "model", LLAMA)
    params(path)
    tensors = weights(LLAMA)
    release = dict(as_meta(*item) for item in tensors.items())
    save_file(release, path / "consolidated.safetensors")
    x = np.random.default_rng(1).normal(size=(2, 16))  # tokens at positions 3 and 8
    angle = np.outer([3, 8], 1e4 ** (-np.arange(4) / 4))

    def meta(rows: np.ndarray) -> np.ndarray:
        pairs = (x @ rows.T).reshape(2, -1, 4, 2)
        return (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)[:, None]

    def halves(rows: np.ndarray) -> np.ndarray:
        heads = (x @ rows.T).reshape(2, -1, 2, 4)
        return (heads[:, :, 0] + 1j * heads[:, :, 1]) * np.exp(1j * angle)[:, None]

    with closing(open_hf(path)) as reader:
        q, k = (reader.read(f"model.layers.0.self_attn.{name}_proj.weight") for name in "qk")
    expected = (
        meta(release["layers.0.attention.wq.weight"])[1] * meta(release["layers.0.attention.wk.weight"])[0].conj()
    )
    found = halves(q)[1] * halves(k)[0].conj()
    np.testing.assert_allclose(found.real.sum(-1), expected.real.sum(-1), rtol=1e-6)


def test_what_of_a_release_is_not_read_says_what_to_do(tmp_path):
    path = make(tmp_path / "model", LLAMA)
    params(path)
    for number in range(2):
        torch.save({"norm.weight": torch.zeros(16)}, path / f"consolidated.0{number}.pth")
    for given in (path, path / "consolidated.01.pth"):
        with pytest.raises(UserError, match=r"2 slices .*\*\.safetensors.*convert_llama_weights_to_hf"):
            open_hf(given)
    (path / "consolidated.01.pth").unlink()
    torch.save({"layers.0.attention.wqkv.weight": torch.zeros(16, 16)}, path / "consolidated.00.pth")
    with pytest.raises(UserError, match=r"1 tensors of no kind known .*wqkv.*download"):
        open_hf(path)
    torch.save({"norm.weight": torch.zeros(16)}, path / "consolidated.00.pth")
    (path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json' does not exist: params.json beside it .*put the config.json"):
        convert(ConvertRequest(input_path=path, output_path=tmp_path / "out.ckpt"))
    (path / "params.json").write_text('{"dim": 16, "n_heads": 0}')
    with pytest.raises(UserError, match="tells no even head_dim"):
        open_hf(path)


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod.module."])
def test_a_prefix_of_all_names_is_left_out_and_said(tmp_path, prefix):
    tensors = weights(LLAMA)
    path = make(tmp_path / "model", LLAMA)
    save_file({prefix + name: array for name, array in tensors.items()}, path / "model.safetensors")
    assert_holds(path, tensors)
    report = convert(ConvertRequest(input_path=path, output_path=tmp_path / "out.safetensors"))
    assert any(f"every name begins with '{prefix}'" in note for note in report.notes)


def test_names_of_no_kind_are_one_line(tmp_path):
    path = make(tmp_path / "model", LLAMA)
    save_file({f"engine.{name}": array for name, array in weights(LLAMA).items()}, path / "model.safetensors")
    with pytest.raises(
        UserError, match="none of the 12 tensors has a name of this model: .*'engine.*state_dict"
    ) as error:
        convert(ConvertRequest(input_path=path, output_path=tmp_path / "out.ckpt"))
    assert "1 problem" in str(error.value)


def test_an_adapter_inside_a_model_is_one_line(tmp_path):
    path = make(tmp_path / "model", LLAMA)
    names = {name.replace("q_proj.", "q_proj.base_layer."): array for name, array in weights(LLAMA).items()}
    save_file({f"base_model.model.{name}": array for name, array in names.items()}, path / "model.safetensors")
    with pytest.raises(UserError, match="merge_and_unload") as error:
        open_hf(path)
    assert "\n" not in str(error.value)


def test_an_adapter_beside_a_model_is_not_the_model(tmp_path):
    tensors = weights(LLAMA)
    path = make(tmp_path / "model", LLAMA)
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        (path / name).write_bytes(b"not looked at")
    with pytest.raises(UserError, match="holds an adapter .* and no model"):
        open_hf(path)
    first, *rest = tensors
    shards = {"pytorch_model-00001-of-00002.bin": [first], "pytorch_model-00002-of-00002.bin": rest}
    for file, names in shards.items():
        torch.save({name: torch.from_numpy(tensors[name]) for name in names}, path / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_holds(path, tensors)
    for file in path.glob("pytorch_model*"):
        file.unlink()
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, path / "pytorch_model.bin")
    assert_holds(path, tensors)
    save_file(tensors, path / "weights.safetensors")  # one file under any name, beside an adapter
    (path / "pytorch_model.bin").unlink()
    assert_holds(path, tensors)


def test_eight_bit_weights_are_one_line(tmp_path):
    path = make(tmp_path / "model", LLAMA)
    save_file(weights(LLAMA), path / "model.safetensors")
    assert len(load_file(path / "model.safetensors")) > 10
    header = {f"{number}.weight": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [number, number + 1]}
              for number in range(24)}  # fmt: skip
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
    with pytest.raises(UserError, match=r"'0.weight' and 23 more tensors have type F8_E4M3: .* 16-bit") as error:
        open_hf(path)
    assert str(error.value).count("\n") == 2  # of the folder, of the file, of the type


def test_every_command_that_reads_other_names_says_so(tmp_path):
    path = make(tmp_path / "model", LLAMA)
    save_file({f"module.{name}": array for name, array in weights(LLAMA).items()}, path / "model.safetensors")
    models = [{"model": str(path), "parameters": {"weight": 1.0}}]
    (tmp_path / "merge.yaml").write_text(json.dumps({"merge_method": "linear", "models": models}))
    output = OutputRequest(folder=tmp_path / "merged", shard_bytes=10**9, copy_tokenizer=False)
    request = MergeRequest(config=tmp_path / "merge.yaml", output=output)
    for notes in (inspect_ckpt(path).notes, merge(request, write=False).notes):
        assert any("every name begins with 'module.'" in note for note in notes)
