# SPDX-License-Identifier: Apache-2.0
"""``convert_weight.py`` over layouts: the round-trip matrix, every command of the seed document, wrong combinations."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mindformers_ext.cli import check_parity, convert_reversed, inspect_ckpt
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.formats.ms_ckpt import CkptFile, CkptWriter
from mindformers_ext.formats.ms_file import open_checkpoint
from mindformers_ext.formats.safetensors_dir import SafetensorsDir
from mindformers_ext.formats.tensors import MappingReader
from mindformers_ext.weights.convert import plan_to_mindspore
from tests.cli.checkpoint.test_convert import ROOT, assert_holds, hf_folder, refused, run, spec_of

MATRIX = list(itertools.product((8, 12), (False, True), (np.float32, ml_dtypes.bfloat16), ("per_expert", "fused")))


def per_expert(arrays, spec, style):
    """The same weights as Hugging Face publishes them."""
    if style == "per_expert":
        return arrays
    result = dict(arrays)
    for layer in range(spec.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        gate_up, down = (result.pop(prefix + f"mlp.experts.{name}") for name in ("gate_up_proj", "down_proj"))
        result[prefix + "block_sparse_moe.gate.weight"] = result.pop(prefix + "mlp.gate.weight")
        for e, (both, w2) in enumerate(zip(gate_up, down, strict=True)):
            w1, w3 = np.split(both, 2)
            named = {"w1": w1, "w2": w2, "w3": w3}
            result |= {prefix + f"block_sparse_moe.experts.{e}.{name}.weight": w for name, w in named.items()}
    return result


@pytest.mark.parametrize("experts, tied, dtype, style", MATRIX)
def test_round_trips(tmp_path, experts, tied, dtype, style):
    """8 and 12 experts, tied or not, types, spellings; inside: shards, layouts, qkv_concat and formats. 256 in all."""
    spec = spec_of(experts, tied=tied)
    for files in (1, 5):
        folder = tmp_path / f"hf{files}"
        arrays = hf_folder(folder, spec, dtype, style)
        if files > 1:
            size = sum(array.nbytes for array in arrays.values())
            for path in folder.glob("model*"):
                path.unlink()
            folder.joinpath("config.json").unlink()
            folder.joinpath("tokenizer.model").unlink()
            folder.rmdir()
            arrays = hf_folder(folder, spec, dtype, style, shard=size // 4)
            assert len(list(folder.glob("*.safetensors"))) >= 4
        wanted = per_expert(arrays, spec, style)
        for gmm, qkv, suffix in itertools.product((False, True), (False, True), (".ckpt", ".safetensors")):
            out, back = tmp_path / f"m{files}{gmm}{qkv}{suffix}", tmp_path / f"b{files}{gmm}{qkv}{suffix[1:]}"
            words = ["--input_path", folder, "--output_path", out, f"--use_gmm={gmm}", "--qkv_concat", str(qkv)]
            assert run(*words) == 0
            assert run("--reversed", "--input_path", out, "--output_path", back, "--max_shard_size", "3KB") == 0
            reader = SafetensorsDir(back)
            assert_holds(reader, wanted)
            if style == "per_expert" and suffix == ".ckpt":  # the source's name in the description is the result's own
                assert json.loads(Path(f"{out}.json").read_text())["source_hash"] == fingerprint(reader)
            reader.close()


def seed(command, tmp_path, script="convert_weight.py"):
    """A command as the seed document has it, {path} filled in, from a shell in an empty folder."""
    command = command.replace("{path}", str(tmp_path)).replace("/path/to", str(tmp_path))
    assert command.startswith("python convert_weight.py ") or script != "convert_weight.py"
    command = command.replace("python convert_weight.py", f"{sys.executable} {ROOT / script}", 1)
    return subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)


def described(path):
    return json.loads(path.with_name(path.name + ".json").read_text())


@pytest.mark.parametrize("script", ["convert_weight.py", "research/mixtral/convert_weight.py"])
def test_the_commands_of_the_seed(tmp_path, script):
    arrays = hf_folder(tmp_path / "torch_ckpt_dir")
    half = {name: array.astype(np.float16) for name, array in arrays.items()}
    done = seed(
        """python convert_weight.py \\
        --model mixtral \\
        --input_path {path}/torch_ckpt_dir \\
        --output_path {path}/ms_ckpt_path/mixtral.ckpt \\
        --dtype fp16""",
        tmp_path,
        script,
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "torch_ckpt_dir").rename(tmp_path / "mixtral_torch_ckpt_dir")
    done = seed(
        """python convert_weight.py \\
        --model mixtral \\
        --reversed \\
        --input_path {path}/ms_ckpt_path/mixtral.ckpt \\
        --output_path {path}/torch_ckpt_dir/ \\
        --dtype fp16""",
        tmp_path,
        script,
    )
    assert done.returncode == 0, done.stderr
    assert_holds(SafetensorsDir(tmp_path / "torch_ckpt_dir"), half)
    torch = "--torch_ckpt_idr=/path/to/mixtral_torch_ckpt_dir --mindspore_ckpt_path=/path/to/new_mixtral.ckpt"
    before = "--pre_ckpt_path=/path/to/mixtral.ckpt --mindspore_ckpt_path=/path/to/new_mixtral.ckpt"
    os.link(tmp_path / "ms_ckpt_path" / "mixtral.ckpt", tmp_path / "mixtral.ckpt")  # without its description
    out = tmp_path / "new_mixtral.ckpt"
    for gmm, source in (("True", torch), ("False", torch), ("True", before)):
        done = seed(f"python convert_weight.py --use_gmm={gmm} --dtype='fp16' {source}", tmp_path, script)
        assert done.returncode == 0, done.stderr
        assert ("--torch_ckpt_idr is read as" in done.stderr) == (source == torch)
        layout = "gmm" if gmm == "True" else "dense"
        words = described(out)
        assert (words["layout"], words["dtype"], words["experts"]) == (layout, "float16", 3)
        shape = CkptFile(out).infos["model.layers.0.feed_forward.ffn.w1.weight"].shape
        assert shape == ((3, 8, 12) if gmm == "True" else (3, 12, 8))
        assert check_parity.main(["--hf", str(tmp_path / "torch_ckpt_dir"), "--ckpt", str(out), "--weights_only"]) == 0
        out.unlink()
        Path(f"{out}.json").unlink()


def test_convert_reversed_and_its_types(tmp_path):
    arrays = hf_folder(tmp_path / "hf")
    assert run("--input_path", tmp_path / "hf", "--output_path", tmp_path / "m.ckpt", "--use_gmm") == 0
    script = [sys.executable, str(ROOT / "research/mixtral/convert_reversed.py")]
    words = [
        "--mindspore_ckpt_path",
        str(tmp_path / "m.ckpt"),
        "--torch_ckpt_dir",
        f"{tmp_path}/back/",
        "--strategy_dir",
        "None",
        "--dtype",
        "fp16",
    ]
    done = subprocess.run([*script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_holds(SafetensorsDir(tmp_path / "back"), {name: array.astype(np.float16) for name, array in arrays.items()})
    assert convert_reversed.main([*words[:2], "--torch_ckpt_dir", str(tmp_path / "same"), "--dry_run"]) == 0
    assert not (tmp_path / "same").exists()


@pytest.mark.parametrize("word, value", [("True", True), ("False", False), ("1", True), ("0", False), ("true", True)])
def test_booleans_are_booleans(tmp_path, word, value):
    hf_folder(tmp_path / "hf")
    for number, words in enumerate([[f"--use_gmm={word}"], ["--use_gmm", word]]):
        out = tmp_path / f"{number}.ckpt"
        assert run("--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path", out, *words) == 0
        assert described(out)["layout"] == ("gmm" if value else "dense")
        assert described(out)["dtype"] == "float16"  # what this form has always written without --dtype


def test_relayout_of_checkpoints_with_and_without_description(tmp_path, capsys):
    arrays = hf_folder(tmp_path / "hf")
    dense, gmm, again = (tmp_path / f"{name}.ckpt" for name in ("dense", "gmm", "again"))
    assert run("--input_path", tmp_path / "hf", "--output_path", dense) == 0
    assert run("--pre_ckpt_path", dense, "--output_path", gmm, "--use_gmm", "--qkv_concat") == 0
    refused(capsys, ["--pre_ckpt_path", gmm, "--output_path", again, "--use_gmm", "True"], "already lies gmm")
    words = ["--pre_ckpt_path", gmm, "--output_path", again, "--use_gmm=True", "--qkv_concat", "--dtype", "fp16"]
    refused(capsys, words, "already lies gmm")
    refused(capsys, ["--input_path", dense, "--output_path", again], "already lies dense", "nothing else to do")
    refused(capsys, ["--input_path", dense, "--output_path", dense, "--overwrite", "--use_gmm"], "is the input")
    assert not again.exists()
    assert run("--input_path", gmm, "--output_path", again, "--use_gmm=False") == 0
    assert again.read_bytes() == dense.read_bytes()
    Path(f"{gmm}.json").unlink()
    refused(capsys, ["--input_path", gmm, "--output_path", tmp_path / "x.ckpt"], "pass --config")  # w_qkv needs heads
    assert run("--input_path", gmm, "--output_path", tmp_path / "x.ckpt", "--config", tmp_path / "hf") == 0
    assert (tmp_path / "x.ckpt").read_bytes() == dense.read_bytes()
    Path(f"{dense}.json").unlink()
    refused(capsys, ["--input_path", dense, "--output_path", tmp_path / "y.ckpt", "--qkv_concat"], "number of heads")
    assert run("--input_path", dense, "--output_path", tmp_path / "y.ckpt", "--use_gmm") == 0
    assert described(tmp_path / "y.ckpt")["config"] == {}
    assert run("--reversed", "--input_path", tmp_path / "y.ckpt", "--output_path", tmp_path / "back") == 0
    assert_holds(SafetensorsDir(tmp_path / "back"), arrays)


def test_square_experts_are_never_guessed(tmp_path, capsys):
    spec = spec_of(intermediate_size=8)
    arrays = hf_folder(tmp_path / "hf", spec)
    out, back = tmp_path / "m.ckpt", tmp_path / "back"
    assert run("--input_path", tmp_path / "hf", "--output_path", out, "--use_gmm") == 0
    assert run("--reversed", "--input_path", out, "--output_path", back) == 0
    assert_holds(SafetensorsDir(back), arrays)
    words = ["--reversed", "--input_path", out, "--output_path", tmp_path / "b2", "--config", tmp_path / "hf"]
    refused(capsys, [*words, "--input_layout", "dense"], "contradictory", "its description says gmm")
    Path(f"{out}.json").unlink()
    refused(capsys, words, "--input_layout gmm")
    assert run(*words, "--input_layout", "gmm") == 0
    assert_holds(SafetensorsDir(tmp_path / "b2"), arrays)


def test_dense_models_with_qkv_concat(tmp_path, capsys):
    arrays = hf_folder(tmp_path / "hf", spec_of(experts=0))
    out = tmp_path / "m.safetensors"
    assert run("--model", "llama", "--input_path", tmp_path / "hf", "--output_path", out, "--qkv_concat") == 0
    reader = open_checkpoint(out)
    assert reader.infos["model.layers.1.feed_forward.w_gate_hidden.weight"].shape == (24, 8)
    assert reader.infos["model.layers.1.attention.w_qkv.weight"].shape == (16, 8)
    assert run("--reversed", "--input_path", out, "--output_path", tmp_path / "back") == 0
    assert_holds(SafetensorsDir(tmp_path / "back"), arrays)
    words = ["--input_path", tmp_path / "hf", "--output_path", tmp_path / "x.ckpt", "--use_gmm"]
    refused(capsys, words, "leave --use_gmm out")


def test_overflow_is_counted_in_every_layout(tmp_path, capsys):
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    hf_folder(tmp_path / "hf", extra={name: np.full((12, 8), 1e5, np.float32)})
    words = ["--input_path", tmp_path / "hf", "--output_path", tmp_path / "m.ckpt", "--dtype", "fp16", "--use_gmm"]
    refused(capsys, words, f"'{name}': 96 of 96 values do not fit float16")
    assert run(*words, "--allow_overflow") == 0
    assert f"96 values became infinite in 1 tensors, most in '{name}' (96)" in capsys.readouterr().err


def test_dry_run_writes_nothing_and_says_what_would_be(tmp_path, capsys):
    hf_folder(tmp_path / "hf")
    words = ["--input_path", tmp_path / "hf", "--output_path", tmp_path / "deep" / "m.ckpt", "--use_gmm", "--dry_run"]
    assert run(*words) == 0
    text = capsys.readouterr().out
    assert "plan: Hugging Face -> MindSpore, gmm" in text and "23 tensors, 0.000 GB to write" in text
    assert (
        "  model.layers.0.feed_forward.ffn.w2.weight (3, 12, 8) float32 <- stack of "
        "model.layers.0.block_sparse_moe.experts.0.w2.weight and 2 more, transposed\n"
    ) in text
    assert os.listdir(tmp_path) == ["hf"]
    refused(capsys, [*words, "--model", "llama"], "--model llama but")


def test_a_description_left_by_a_killed_run_is_no_obstacle(tmp_path, capsys):
    """Killed between the two renames: the description is there, the checkpoint is not."""
    hf_folder(tmp_path / "hf")
    out = tmp_path / "m.ckpt"
    words = ["--input_path", tmp_path / "hf", "--output_path", out]
    assert run(*words) == 0
    whole = out.read_bytes()
    out.unlink()
    assert run(*words) == 0 and out.read_bytes() == whole
    with CkptWriter(out) as writer:  # another file moved beside the description
        writer.add("x", np.ones(3, np.float32))
    words = ["--reversed", "--input_path", out, "--output_path", tmp_path / "b"]
    refused(capsys, words, "describes another checkpoint")


@pytest.mark.parametrize(
    "words, texts",
    [
        (["--pre_ckpt_path", "x.ckpt"], ["input must be given once", "--input_path, --pre_ckpt_path"]),
        (["--mindspore_ckpt_path", "x.ckpt"], ["output must be given once"]),
        (["--reversed", "--use_gmm"], ["--use_gmm does not go with --reversed"]),
        (["--reversed", "--qkv_concat"], ["--qkv_concat does not go with --reversed"]),
        (["--input_layout", "gmm"], ["describes a MindSpore input"]),
        (["--input_layout", "square"], ["dense", "gmm"]),
        (["--strategy_dir", "none_there"], ["none_there"]),
    ],
)
def test_wrong_combinations(tmp_path, capsys, words, texts):
    hf_folder(tmp_path / "hf")
    refused(capsys, ["--input_path", tmp_path / "hf", "--output_path", tmp_path / "m.ckpt", *words], *texts)
    assert os.listdir(tmp_path) == ["hf"]


def test_rank_folders_need_their_strategy(tmp_path, capsys):
    (tmp_path / "ckpt" / "rank_0").mkdir(parents=True)
    words = ["--reversed", "--input_path", tmp_path / "ckpt", "--output_path", tmp_path / "b"]
    refused(capsys, words, "--strategy_dir")


def test_weights_only_names_what_differs(tmp_path, capsys):
    arrays = hf_folder(tmp_path / "hf")
    out = tmp_path / "m.ckpt"
    assert run("--input_path", tmp_path / "hf", "--output_path", out, "--qkv_concat") == 0
    words = ["--hf", str(tmp_path / "hf"), "--ckpt", str(out), "--weights_only"]
    assert check_parity.main(words) == 0
    assert "23 of 23 tensors are bit-equal (checkpoint dense with qkv_concat)" in capsys.readouterr().out
    reader = MappingReader(arrays)
    plan = plan_to_mindspore(reader, spec_of())
    with CkptWriter(out) as writer:
        for name, array in plan.run(reader):
            writer.add(name, array + np.float32(0.5) if name == "model.norm_out.weight" else array)
    Path(f"{out}.json").unlink()
    assert check_parity.main(words) == 1
    text = capsys.readouterr().out
    assert "differs: model.norm_out.weight, by up to 5.0" in text and "22 of 23" in text


def test_inspect_every_format(tmp_path, capsys):
    hf_folder(tmp_path / "hf")
    out = tmp_path / "m.ckpt"
    assert run("--input_path", tmp_path / "hf", "--output_path", out, "--use_gmm", "--dtype", "bf16") == 0
    capsys.readouterr()
    assert inspect_ckpt.main([str(out), "--grep", r"layers\.1\.feed_forward\.ffn"]) == 0
    text = capsys.readouterr().out
    assert "layers.1.feed_forward.ffn.w1.weight" in text and "layers.0" not in text
    assert "(3, 8, 12)" in text and "bfloat16" in text and "layout: gmm" in text and "23 tensors" in text
    assert text.count("layout") == 1
    assert inspect_ckpt.main([str(out), "--json"]) == 0
    words = json.loads(capsys.readouterr().out)
    assert words["layout"] == "gmm" and words["description"]["experts"] == 3 and len(words["tensors"]) == 23
    assert words["bytes"] == sum(row["bytes"] for row in words["tensors"])
    assert inspect_ckpt.main([str(tmp_path / "hf")]) == 0
    assert "model.embed_tokens.weight" in capsys.readouterr().out
    assert inspect_ckpt.main([str(tmp_path / "hf" / "model.safetensors")]) == 0
    assert inspect_ckpt.main([str(tmp_path / "none")]) == 2
    assert inspect_ckpt.main([str(out), "--grep", "("]) == 2
    Path(f"{out}.json").write_text("{")
    assert inspect_ckpt.main([str(out)]) == 2


def test_help_loads_no_framework(tmp_path):
    for script in ("convert_weight.py", "research/mixtral/convert_reversed.py", "tools/inspect_ckpt.py"):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", str(ROOT / script), "--help"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
        assert not loaded & {"torch", "mindspore", "transformers", "mindformers", "numpy"}
        assert "examples:" in done.stdout
