# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model cut for 16 ranks (dp 2, mp 4, pp 2, ep 2, sharded optimizer) and back, bit for bit."""

import ml_dtypes
import numpy as np
import pytest

from mindformers_ext.cli import transform_ckpt
from mindformers_ext.formats.rank_dirs import rank_files
from mindformers_ext.formats.safetensors_dir import SafetensorsDir
from tests.cli.checkpoint.test_convert import assert_holds, hf_folder, refused, run, spec_of
from tests.helpers.sliced import PP2

# The model of the golden strategy files.
SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=4
)


def transform(*words):
    """``tools/transform_ckpt.py`` in this process."""
    return transform_ckpt.main([str(word) for word in words])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_model_passes_through_16_ranks(tmp_path, dtype, suffix):
    """Ranks are merged by the converter or before it; sizes come from the description that each rank carries."""
    arrays = hf_folder(tmp_path / "hf", spec_of(4, 4, **SIZES), dtype)
    whole, ranks = tmp_path / f"mixtral{suffix}", tmp_path / "ranks"
    assert run("--model", "mixtral", "--input_path", tmp_path / "hf", "--output_path", whole) == 0
    assert transform("--src_ckpt_dir", whole, "--dst_ckpt_strategy", PP2, "--dst_ckpt_dir", ranks) == 0
    assert len(rank_files(ranks)) == 16
    assert transform("--src_ckpt_dir", ranks, "--src_ckpt_strategy", PP2, "--dst_ckpt_dir", tmp_path / "merged") == 0
    merged = tmp_path / "merged" / "rank_0" / f"checkpoint_0{suffix}"
    for place, words in (("a", [merged]), ("b", [ranks, "--strategy_dir", PP2])):
        assert run("--reversed", "--input_path", *words, "--output_path", tmp_path / place) == 0
        reader = SafetensorsDir(tmp_path / place)
        assert_holds(reader, arrays)
        reader.close()
        assert (tmp_path / place / "config.json").is_file()


def test_a_description_of_another_rank_is_noticed(tmp_path, capsys):
    hf_folder(tmp_path / "hf", spec_of(4, 4, **SIZES))
    whole, ranks = tmp_path / "mixtral.ckpt", tmp_path / "ranks"
    assert run("--input_path", tmp_path / "hf", "--output_path", whole) == 0
    assert transform("--src_ckpt_dir", whole, "--dst_ckpt_strategy", PP2, "--dst_ckpt_dir", ranks) == 0
    described = [path.with_name(path.name + ".json") for path in rank_files(ranks).values()]
    described[0].write_text(described[9].read_text())
    refused(
        capsys,
        ["--reversed", "--input_path", ranks, "--strategy_dir", PP2, "--output_path", tmp_path / "b"],
        "describes another checkpoint",
    )
