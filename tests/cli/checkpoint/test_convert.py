# SPDX-License-Identifier: Apache-2.0
"""``convert_weight.py`` as a user runs it: round trips, every flag, every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mindformers_ext.cli.convert import main
from mindformers_ext.core.config.hf import hf_config_from_spec
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.ms_ckpt import CkptFile, CkptWriter
from mindformers_ext.formats.safetensors_dir import SafetensorsDir, SafetensorsDirWriter
from mindformers_ext.formats.tensors import MappingReader
from mindformers_ext.weights.convert import rule_set

ROOT = Path(__file__).resolve().parents[3]


def spec_of(experts=3, layers=2, tied=False, **sizes):
    moe = MoESpec(num_local_experts=experts, num_experts_per_tok=2) if experts else None
    base = dict(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2,
        tie_word_embeddings=tied,
    )
    return ModelSpec(**(base | sizes), moe=moe)


def hf_folder(folder, spec=None, dtype=np.float32, style="per_expert", shard=10**9, extra=None):
    """A model folder of random weights, written by our writer (the library judges that one elsewhere)."""
    spec = spec or spec_of()
    rng = np.random.default_rng(5)
    arrays = {
        name: rng.normal(size=shape).astype(dtype)
        for binding in rule_set(spec, style).bindings
        for name, shape in binding.hf.items()
    }
    arrays |= extra or {}
    folder.mkdir()
    with SafetensorsDirWriter(folder, list(MappingReader(arrays).infos.values()), shard) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
    (folder / "config.json").write_text(json.dumps(hf_config_from_spec(spec) | {"torch_dtype": "float32"}))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return arrays


def run(*words):
    """The command in this process; argparse's own exit is an exit code too."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


def shell(*words, **options):
    command = [sys.executable, str(ROOT / "convert_weight.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def assert_holds(reader, arrays):
    assert set(reader.infos) == set(arrays)
    for name, array in arrays.items():
        got = reader.read(name)
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


def refused(capsys, words, *texts):
    """Exit code 2, all ``texts`` in the message, no traceback."""
    assert run(*words) == 2
    err = capsys.readouterr().err
    assert all(text in err for text in texts), err
    assert "Traceback" not in err


def test_the_script_converts_and_converts_back(tmp_path):
    arrays = hf_folder(tmp_path / "hf")
    ckpt, back = tmp_path / "deep" / "m.ckpt", tmp_path / "back"
    done = shell("--model", "mixtral", "--input_path", tmp_path / "hf", "--output_path", ckpt, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "23 tensors" in done.stdout and "converting: 100%" in done.stderr
    assert sorted(path.name for path in ckpt.parent.iterdir()) == ["m.ckpt", "m.ckpt.json"]
    done = shell("--model", "mixtral", "--reversed", "--input_path", ckpt, "--output_path", str(back) + "/")
    assert done.returncode == 0, done.stderr
    assert_holds(SafetensorsDir(back), arrays)
    assert json.loads((back / "config.json").read_text()) == json.loads((tmp_path / "hf" / "config.json").read_text())
    assert sorted(path.name for path in back.iterdir()) == ["config.json", "model.safetensors"]


def test_the_script_fails_in_one_paragraph_and_loads_no_framework(tmp_path):
    done = shell("--input_path", tmp_path / "none", "--output_path", tmp_path / "x.ckpt")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    code = (
        "import sys; from mindformers_ext.cli.convert import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'mindspore', 'transformers', 'mindformers') if m in sys.modules])"
    )
    hf_folder(tmp_path / "hf")
    words = ["--input_path", str(tmp_path / "hf"), "--output_path", str(tmp_path / "x.ckpt")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("experts, tied", [(0, False), (0, True), (2, False), (12, True)])
def test_round_trip_bytes(tmp_path, suffix, dtype, experts, tied):
    spec = spec_of(experts, tied=tied)
    arrays = hf_folder(tmp_path / "hf", spec, dtype, shard=700)
    out = tmp_path / f"m{suffix}"
    model = "mixtral" if experts else "llama"
    assert run("--model", model, "--input_path", tmp_path / "hf", "--output_path", out) == 0
    assert run("--reversed", "--input_path", out, "--output_path", tmp_path / "back", "--max_shard_size", "1KB") == 0
    assert_holds(SafetensorsDir(tmp_path / "back"), arrays)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    # and once more, to the same bytes
    again = tmp_path / f"again{suffix}"
    assert run("--input_path", tmp_path / "back", "--output_path", again) == 0
    if suffix == ".ckpt":
        assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("style", ["fused", "fused_block_sparse"])
def test_fused_folders_are_read(tmp_path, style):
    arrays = hf_folder(tmp_path / "hf", style=style)
    assert run("--input_path", tmp_path / "hf", "--output_path", tmp_path / "m.ckpt") == 0
    prefix = "model.layers.1." + ("mlp" if style == "fused" else "block_sparse_moe")
    gate_up = arrays[prefix + ".experts.gate_up_proj"]
    reader = CkptFile(tmp_path / "m.ckpt")
    for name, part in (("w1", gate_up[:, :12]), ("w3", gate_up[:, 12:])):
        np.testing.assert_array_equal(reader.read(f"model.layers.1.feed_forward.ffn.{name}.weight"), part)


@pytest.mark.parametrize("word, kind", [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16), ("fp32", np.float32)])
def test_dtype_both_ways(tmp_path, word, kind):
    arrays = hf_folder(tmp_path / "hf")
    out, back = tmp_path / "m.ckpt", tmp_path / "back"
    assert run("--input_path", tmp_path / "hf", "--output_path", out, "--dtype", word) == 0
    assert {info.dtype for info in CkptFile(out).infos.values()} == {np.dtype(kind)}
    long = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[word]
    assert json.loads((tmp_path / "m.ckpt.json").read_text())["dtype"] == long
    assert run("--reversed", "True", "--input_path", out, "--output_path", back) == 0
    assert_holds(SafetensorsDir(back), {name: array.astype(kind) for name, array in arrays.items()})
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == long
    assert run("--reversed", "--input_path", out, "--output_path", tmp_path / "fp32", "--dtype", "fp32") == 0
    assert {info.dtype for info in SafetensorsDir(tmp_path / "fp32").infos.values()} == {np.dtype(np.float32)}


def test_overflow(tmp_path, capsys):
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    hf_folder(tmp_path / "hf", extra={name: np.full((12, 8), 1e5, np.float32)})
    words = ["--input_path", tmp_path / "hf", "--output_path", tmp_path / "m.ckpt", "--dtype", "fp16"]
    refused(capsys, words, f"'{name}': 96 of 96 values do not fit float16", "--allow_overflow")
    refused(capsys, [*words, "--allow_overflow", "False"], "do not fit")
    assert os.listdir(tmp_path) == ["hf"]
    assert run(*words, "--allow_overflow") == 0


def test_config_elsewhere_and_tokenizer_files(tmp_path, capsys):
    arrays = hf_folder(tmp_path / "hf")
    out = tmp_path / "m.ckpt"
    with CkptWriter(out) as writer:  # as MindSpore or MindFormers leaves it: no description beside it
        spec = spec_of()
        rng = np.random.default_rng(0)
        for binding in rule_set(spec).bindings:
            for name, shape in binding.ms.items():
                writer.add(name, rng.normal(size=shape).astype(np.float32))
                writer.add("adam_m." + name, np.zeros(shape, np.float32))
        writer.add("global_step", np.int32([7]))
    words = ["--reversed", "--input_path", out, "--output_path", tmp_path / "back"]
    assert run(*words[:-1], tmp_path / "without") == 0
    assert "no config.json was written" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "without").iterdir()} == {"model.safetensors"}
    assert run(*words, "--config", tmp_path / "hf") == 0
    text = capsys.readouterr().out
    assert "left behind, optimizer state: adam_m.model.tok_embeddings.embedding_weight and 22 more" in text
    assert "left behind, counters: global_step" in text
    assert set(SafetensorsDir(tmp_path / "back").infos) == set(arrays)
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"pieces"
    other = tmp_path / "c.json"
    other.write_text(json.dumps(hf_config_from_spec(spec_of(experts=4))))
    refused(capsys, [*words[:-1], tmp_path / "b2", "--config", other], "has shape (3, 8)", "ask for (4, 8)")
    assert run("--input_path", tmp_path / "hf", "--output_path", out, "--overwrite") == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    other.write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    assert run(*words[:-1], tmp_path / "b3", "--config", other) == 0
    assert "differs from the checkpoint's own description in num_experts_per_tok" in capsys.readouterr().err


def test_metadata_that_is_damaged_or_from_the_future(tmp_path, capsys):
    hf_folder(tmp_path / "hf")
    out, beside = tmp_path / "m.ckpt", tmp_path / "m.ckpt.json"
    assert run("--input_path", tmp_path / "hf", "--output_path", out) == 0
    good = json.loads(beside.read_text())
    words = ["--reversed", "--input_path", out, "--output_path", tmp_path / "back"]
    for change, text in (
        ({"version": 3}, "version"),
        ({"config": "x"}, "config='x'"),
        ({"more": 1}, "does not hold"),
        ({"layout": "other"}, "layout='other'"),
        ({"hash": "0" * 64}, "another checkpoint"),
    ):
        beside.write_text(json.dumps(good | change))
        refused(capsys, words, "m.ckpt.json", text)
    for change, text in (
        ({"layout": "gmm"}, "its tensors says dense, its description says gmm"),
        ({"qkv_concat": True}, "description says qkv_concat True, its tensors False"),
        ({"experts": 4}, "has 3 experts, the checkpoint's description 4"),
    ):
        beside.write_text(json.dumps(good | change))
        refused(capsys, words, text)
    beside.write_text("{")
    refused(capsys, words, "is not JSON", "--config")
    beside.write_bytes(b"\xff")
    refused(capsys, words, "not UTF-8", "--config")
    assert not (tmp_path / "back").exists()


def change_file(path, change):
    """Rewrite one safetensors file of a folder with ``change`` made to its tensors."""
    reader = SafetensorsDir(path.parent)
    arrays = {name: reader.read(name) for name in reader.infos}
    reader.close()
    change(arrays)
    save_file(arrays, path, metadata={"format": "pt"})


def test_missing_and_renamed_experts(tmp_path, capsys):
    hf_folder(tmp_path / "hf")
    words = ["--input_path", tmp_path / "hf", "--output_path", tmp_path / "m.ckpt"]
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    change_file(tmp_path / "hf" / "model.safetensors", lambda arrays: arrays.pop(name))
    refused(capsys, words, f"'{name}' (8, 12) is missing", "1 problem")
    change_file(tmp_path / "hf" / "model.safetensors", lambda arrays: arrays.update({name + "s": np.zeros((8, 12))}))
    refused(capsys, words, f"'{name}' (8, 12) is missing", f"'{name}s' is unexpected", "2 problems")
    assert os.listdir(tmp_path) == ["hf"]


def test_cut_and_missing_shards(tmp_path, capsys):
    hf_folder(tmp_path / "hf", shard=1000)
    words = ["--input_path", tmp_path / "hf", "--output_path", tmp_path / "m.ckpt"]
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    os.truncate(shards[1], shards[1].stat().st_size - 3)
    refused(capsys, words, shards[1].name, "copy or download it again")
    shards[2].unlink()
    refused(capsys, words, shards[1].name, shards[2].name, "2 problems")
    assert os.listdir(tmp_path) == ["hf"]


def test_cut_checkpoint(tmp_path, capsys):
    hf_folder(tmp_path / "hf")
    out = tmp_path / "m.ckpt"
    assert run("--input_path", tmp_path / "hf", "--output_path", out) == 0
    words = ["--reversed", "--input_path", out, "--output_path", tmp_path / "back"]
    os.truncate(out, out.stat().st_size - 5)
    refused(capsys, words, "m.ckpt", "copy it again")
    out.write_bytes(b"")
    refused(capsys, words, "is empty")
    refused(capsys, ["--reversed", "--input_path", tmp_path, "--output_path", tmp_path / "back"], "is a folder")
    refused(
        capsys, ["--reversed", "--input_path", tmp_path / "x.bin", "--output_path", tmp_path / "back"], ".safetensors"
    )
    assert not (tmp_path / "back").exists()


def test_existing_outputs(tmp_path, capsys):
    arrays = hf_folder(tmp_path / "hf")
    out, beside, back = tmp_path / "m.ckpt", tmp_path / "m.ckpt.json", tmp_path / "back"
    forward = ["--input_path", tmp_path / "hf", "--output_path", out]
    backward = ["--reversed", "--input_path", out, "--output_path", back]
    out.write_bytes(b"precious")
    refused(capsys, forward, "m.ckpt' exists", "--overwrite")
    refused(capsys, [*forward, "--overwrite", "False"], "m.ckpt' exists")
    assert out.read_bytes() == b"precious"
    out.unlink()
    beside.write_text("precious")
    refused(capsys, forward, "m.ckpt.json' exists")
    assert run(*forward, "--overwrite", "True") == 0
    back.mkdir()
    assert run(*backward) == 0
    refused(capsys, backward, "back' exists")
    assert run(*backward, "--overwrite") == 0
    assert_holds(SafetensorsDir(back), arrays)
    (back / "photos").mkdir()
    refused(capsys, [*backward, "--overwrite"], "not a plain model folder")
    refused(capsys, ["--reversed", "--input_path", out, "--output_path", tmp_path, "--overwrite"], "which is read")
    within = ["--input_path", tmp_path / "hf", "--output_path", tmp_path / "hf" / "model.safetensors", "--overwrite"]
    refused(capsys, within, "among the weights of the input folder")
    assert_holds(SafetensorsDir(tmp_path / "hf"), arrays)


def test_a_failed_overwrite_keeps_the_old_output(tmp_path, capsys):
    hf_folder(tmp_path / "hf")
    out = tmp_path / "m.ckpt"
    words = ["--input_path", tmp_path / "hf", "--output_path", out, "--overwrite"]
    assert run(*words) == 0
    before = out.read_bytes(), (tmp_path / "m.ckpt.json").read_bytes()
    change_file(tmp_path / "hf" / "model.safetensors", lambda arrays: arrays["lm_head.weight"].fill(1e6))
    refused(capsys, [*words, "--dtype", "fp16"], "'lm_head.weight'")  # the last tensor of all
    assert before == (out.read_bytes(), (tmp_path / "m.ckpt.json").read_bytes())
    assert sorted(os.listdir(tmp_path)) == ["hf", "m.ckpt", "m.ckpt.json"]


@pytest.mark.parametrize(
    "words, texts",
    [
        (["--dtype", "int8"], ["int8", "fp16", "bf16", "fp32"]),
        (["--model", "gpt"], ["gpt", "llama", "mixtral"]),
        (["--model", "llama"], ["--model llama but", "mixtral"]),
        (["--overwrite", "maybe"], ["neither True nor False"]),
        (["--max_shard_size", "1GB"], ["needs --reversed"]),
        (["--torch_dir", "x"], ["--torch_dir"]),
        (["--over"], ["--over"]),
    ],
)
def test_wrong_flags(tmp_path, capsys, words, texts):
    hf_folder(tmp_path / "hf")
    refused(capsys, ["--input_path", tmp_path / "hf", "--output_path", tmp_path / "m.ckpt", *words], *texts)
    assert os.listdir(tmp_path) == ["hf"]


def test_wrong_paths_and_configs(tmp_path, capsys):
    hf_folder(tmp_path / "hf")
    to = ["--output_path", tmp_path / "m.ckpt"]
    refused(capsys, ["--input_path", tmp_path / "hf", "--output_path", tmp_path / "m.bin"], ".ckpt or .safetensors")
    refused(capsys, ["--input_path", tmp_path / "hf", "--output_path", str(tmp_path / "out") + "/"], ".ckpt")
    refused(capsys, ["--input_path", tmp_path / "hf" / "config.json", *to], "is not a folder")
    refused(
        capsys, ["--reversed", "--input_path", tmp_path / "no.ckpt", "--output_path", tmp_path / "b"], "is not a file"
    )
    config = tmp_path / "hf" / "config.json"
    good = json.loads(config.read_text())
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "not a table"),
        (json.dumps(good | {"hidden_act": "gelu"}), "gelu"),
    ):
        config.write_text(text)
        refused(capsys, ["--input_path", tmp_path / "hf", *to], message)
    config.unlink()
    refused(capsys, ["--input_path", tmp_path / "hf", *to], "config.json' does not exist")
    assert os.listdir(tmp_path) == ["hf"]


def test_what_the_system_refuses(tmp_path, capsys):
    hf_folder(tmp_path / "hf")
    below_a_file = tmp_path / "hf" / "config.json" / "m.ckpt"
    refused(capsys, ["--input_path", tmp_path / "hf", "--output_path", below_a_file], "config.json", "File exists")


def test_memory_stays_near_the_largest_tensor(tmp_path):
    """500 MB of weights, largest MindSpore tensor 16 MB: a run stays within the interpreter plus two of those."""
    hf_folder(tmp_path / "hf", spec_of(experts=4, hidden_size=1024, intermediate_size=1024, layers=8), shard=10**8)
    code = (  # VmHWM: getrusage's figure would start at this process's own peak
        "import re, sys; from mindformers_ext.cli.convert import main; import mindformers_ext.jobs.checkpoint.convert; "
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); "
        "start = peak(); assert main(sys.argv[1:]) == 0; print('grew', peak() - start)"
    )
    for words in (
        ["--input_path", "hf", "--output_path", "m.ckpt"],
        ["--reversed", "--input_path", "m.ckpt", "--output_path", "back"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=True,
        )
        grew = int(done.stdout.split()[-1]) / 1024
        largest = 4 * 1024 * 1024 * 4 / 2**20
        print(f"{words[0]}: grew {grew:.0f} MB, largest tensor {largest:.0f} MB")
        assert grew < 2 * largest + 8
