# SPDX-License-Identifier: Apache-2.0
"""Converted files before their judges: MindSpore loads them, transformers loads what comes back, logits agree, and
MindFormers' own functions join q, k, v the same way."""

from __future__ import annotations

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
import torch

from mindformers_ext.cli.convert import main
from mindformers_ext.formats.ms_file import open_checkpoint
from mindformers_ext.formats.tensors import MappingReader
from mindformers_ext.jobs.checkpoint.parity import check_parity
from mindformers_ext.weights.convert import plan_to_mindspore, rule_set
from mindformers_ext.weights.layouts import Layout
from tests.helpers.parity import Case, reference_model

CASES = {
    "8 experts": Case(
        "",
        heads=4,
        kv_heads=2,
        hidden=32,
        head_dim=8,
        ffn=48,
        vocab=101,
        seq_length=12,
        tied=False,
        experts=8,
        chosen=2,
    ),
    "12 experts, tied": Case(
        "",
        heads=6,
        kv_heads=3,
        hidden=36,
        head_dim=6,
        ffn=24,
        vocab=64,
        seq_length=12,
        tied=True,
        experts=12,
        chosen=3,
        std=0.25,
    ),
    "dense": Case("", heads=4, kv_heads=1, hidden=36, head_dim=10, ffn=40, vocab=64, seq_length=12, tied=False),
}
RUNS = [
    ("8 experts", Layout(), ".ckpt", None),
    ("8 experts", Layout("gmm", True), ".ckpt", "100KB"),
    ("12 experts, tied", Layout("gmm"), ".safetensors", None),
    ("12 experts, tied", Layout(), ".ckpt", "100KB"),
    ("dense", Layout("dense", True), ".ckpt", None),
    ("dense", Layout(), ".safetensors", "30KB"),
]


def numpy_of(parameter: ms.Parameter) -> np.ndarray:
    if parameter.dtype == ms.bfloat16:
        return parameter.float().asnumpy().astype(ml_dtypes.bfloat16)
    return parameter.asnumpy()


@pytest.mark.parametrize("name, layout, suffix, shard", RUNS, ids=lambda value: str(value))
def test_their_judges_take_them(name, layout, suffix, shard, tmp_path):
    import transformers

    model = reference_model(CASES[name])
    model.save_pretrained(tmp_path / "hf", max_shard_size=shard or "5GB")
    out, back = tmp_path / f"m{suffix}", tmp_path / "back"
    words = [
        "--input_path",
        str(tmp_path / "hf"),
        "--output_path",
        str(out),
        "--qkv_concat",
        str(layout.qkv_concat),
        "--use_gmm",
        str(layout.experts == "gmm"),
    ]
    assert main(words) == 0

    loaded = ms.load_checkpoint(str(out), **({"format": "safetensors"} if suffix == ".safetensors" else {}))
    reader = open_checkpoint(out)
    assert set(loaded) == set(reader.infos)
    expected = {n: s for b in rule_set(CASES[name].model(), layout=layout).bindings for n, s in b.ms.items()}
    for key, parameter in loaded.items():
        array = reader.read(key)
        assert tuple(parameter.shape) == expected[key]
        assert numpy_of(parameter).tobytes() == array.tobytes() and array.shape == expected[key], key
    reader.close()

    result = check_parity(tmp_path / "hf", out)
    print(f"\n{name}, {layout}, {suffix}: max |logits difference| {result.difference:.1e}")
    assert result.difference <= 1e-4 and result.largest > 0.5

    assert main(["--reversed", "--input_path", str(out), "--output_path", str(back) + "/"]) == 0
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        back, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    theirs = model.state_dict()
    assert again.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in again.state_dict().items())


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(8, 2, 4), (6, 3, 8), (4, 4, 2), (4, 1, 6)])
def test_qkv_concat_is_mindformers_own(heads, kv_heads, head_dim):
    mindformers = pytest.importorskip("mindformers.utils.convert_utils")
    case = Case(
        "",
        heads=heads,
        kv_heads=kv_heads,
        hidden=heads * head_dim,
        head_dim=head_dim,
        ffn=20,
        vocab=16,
        seq_length=4,
        tied=False,
    )
    rng = np.random.default_rng(2)
    spec = case.model()
    hf = {
        name: rng.normal(size=shape).astype(np.float32)
        for binding in rule_set(spec).bindings
        for name, shape in binding.hf.items()
    }
    reader = MappingReader(hf)
    ours = dict(plan_to_mindspore(reader, spec, layout=Layout("dense", True)).run(reader))
    for layer in range(2):
        q, k, v = (hf[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv")
        theirs = mindformers.qkv_concat_hf2mg(np.concatenate((q, k, v)), heads, kv_heads, case.hidden)
        np.testing.assert_array_equal(ours[f"model.layers.{layer}.attention.w_qkv.weight"], theirs)
        gate, up = (hf[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        theirs = mindformers.ffn_concat_hf2mg(np.concatenate((gate, up)), case.ffn)
        np.testing.assert_array_equal(ours[f"model.layers.{layer}.feed_forward.w_gate_hidden.weight"], theirs)
