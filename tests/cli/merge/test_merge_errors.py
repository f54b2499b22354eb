# SPDX-License-Identifier: Apache-2.0
"""Every mistake of a merge has its own message, exit code 2, and leaves nothing at the output."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mindformers_ext.cli.merge import main
from tests.helpers.merge_models import family, make_model, tensors_of, write_model

pytest.importorskip("torch", reason="merging computes with torch")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, two models trained from it, and models that do not fit them."""
    folder = tmp_path_factory.mktemp("models")
    family(folder, layers=4)
    make_model(folder / "wide", hidden=48)
    make_model(folder / "mistral", kind="mistral")
    make_model(folder / "phi", kind="phi3")
    return folder


@pytest.fixture(autouse=True)
def _inside(place, monkeypatch):
    monkeypatch.chdir(place)


def slices(*ranges, method="slerp", **more):
    """Slices of ft1 and base; ``ranges`` are pairs (of ft1, of base)."""
    parts = [{"sources": [{"model": "ft1", "layer_range": a}, {"model": "base", "layer_range": b}]} for a, b in ranges]
    return {"slices": parts, "merge_method": method, "base_model": "base", "parameters": {"t": 0.5}} | more


def listed(method="ties", names=("base", "ft1", "ft2"), **more):
    values = {"weight": 0.5, "density": 0.5} if method in ("ties", "dare_ties", "della") else {"weight": 0.5}
    return {"models": [{"model": name, "parameters": values} for name in names], "merge_method": method} | more


TIES = listed(base_model="base")
CASES = {
    # B1 words
    "method": (listed("foo"), "merge_method 'foo' is unknown", "linear, slerp"),
    "no method": ({"models": [{"model": "base"}]}, "merge_method is None", "slerp"),
    "top key": (TIES | {"paramters": {}}, "unknown key 'paramters'", "did you mean 'parameters'"),
    "source key": (
        slices(([0, 4], [0, 4])) | {"slices": [{"sources": [{"model": "base", "layers_range": [0, 4]}]}]},
        "unknown key 'layers_range'",
        "did you mean 'layer_range'",
    ),
    "condition key": (
        slices(([0, 4], [0, 4]), parameters={"t": [{"filtre": "mlp", "value": 1}]}),
        "unknown key 'filtre'",
        "did you mean 'filter'",
    ),
    # B2 roles
    "ties without base": (listed(), "ties has no base_model", "trained from"),
    "slerp without base": (slices(([0, 4], [0, 4]), base_model=None), "slerp has no base_model", "t = 0"),
    "slerp of three": (
        listed("slerp", base_model="base", parameters={"t": 0.5}),
        "has 2 models besides the base",
        "exactly 1",
    ),
    "no t": (slices(([0, 4], [0, 4]), parameters={}), "slerp needs t", "under parameters"),
    "no weight": (TIES | {"models": [{"model": "ft1"}, {"model": "ft2"}]}, "ties needs weight for 'ft1'", "'ft2'"),
    "unlisted base of linear": (listed("linear", ("ft1", "ft2"), base_model="base"), "needs weight for 'base'", ""),
    "twin": (listed(names=("base", "ft1", "ft1"), base_model="base"), "'ft1' is listed twice", "another one"),
    "base of a slice": (
        {
            "slices": [{"sources": [{"model": "ft1", "layer_range": [0, 4]}]}],
            "merge_method": "ties",
            "base_model": "base",
            "parameters": {"weight": 1},
        },
        "does not list the base model 'base'",
        "",
    ),
    # B3 layers
    "beyond": (slices(([0, 5], [0, 5])), "layer_range [0, 5] of 'ft1'", "has 4 layers"),
    "negative": (slices(([-1, 4], [0, 4])), "layer_range is [-1, 4]", "counted from 0"),
    "reversed": (slices(([4, 2], [4, 2])), "layer_range is [4, 2]", "not below"),
    "uneven": (slices(([0, 4], [1, 4])), "different numbers of layers", "'base' 3"),
    "empty": (slices(([2, 2], [2, 2])), "no layer at all", ""),
    "both": (TIES | {"slices": []}, "models and slices", "one of the two"),
    "neither": ({"merge_method": "ties"}, "neither models nor slices", ""),
    "stack of two": (slices(([0, 4], [0, 4]), method="passthrough"), "has 2 models", "exactly 1"),
    # B4 shapes and classes
    "shapes": (listed("linear", ("base", "wide")), "has different shapes", "[80, 48]"),
    "classes": (listed("linear", ("base", "mistral")), "'mistral' is a MistralForCausalLM", "--allow-crimes"),
    # B8 values
    "dtype": (TIES | {"dtype": "bfloat"}, "dtype is 'bfloat'", "bfloat16"),
    "density": (
        TIES | {"models": [{"model": "ft1", "parameters": {"weight": 1, "density": -0.5}}]},
        "density in",
        "0 to 1",
    ),
    "density 2": (TIES | {"parameters": {"density": [0.5, 2]}}, "density in parameters is 2.0", "0 to 1"),
    "not a number": (TIES | {"parameters": {"lambda": "much"}}, "parameters.lambda is 'much'", "a number"),
    "not a switch": (TIES | {"parameters": {"normalize": 0.3}}, "normalize in parameters", "true or false"),
    "epsilon": (
        listed("della", base_model="base", parameters={"epsilon": 0.6}),
        "density 0.5 and epsilon 0.6",
        "between",
    ),
    "template": (TIES | {"chat_template": "chatlm"}, "chat_template is 'chatlm'", "chatml"),
    "two tokenizers": (
        TIES | {"tokenizer_source": "base", "tokenizer": {"source": "base"}},
        "both tokenizer_source",
        "",
    ),
    "strange tokenizer": (TIES | {"tokenizer_source": "ft9"}, "tokenizer source 'ft9'", "none of the models"),
    "no folder": (listed("linear", ("base", "some/where")), "'some/where' does not exist here", "hf download"),
    "adapter": (listed("linear", ("base", "ft1+lora")), "'lora' does not exist here", "check the path"),
    "modules": ({"modules": {"vision": {}}, "merge_method": "linear"}, "modules is", "default"),
    "compat": (TIES | {"compat": {"post_gradient": "end"}}, "compat.post_gradient='end'", "first, last"),
}


def refused(config, out, capsys, *flags, command="yaml"):
    """The message of a run that must fail and leave nothing."""
    Path("config.yml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    before = {path.name for path in Path().iterdir()}
    assert main([command, "config.yml", out, "--quiet", *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    assert {path.name for path in Path().iterdir()} == before
    return message


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named(name, capsys):
    config, found, advice = CASES[name]
    message = refused(copy.deepcopy(config), "out", capsys)
    assert found in message and advice in message, message


def test_all_mistakes_of_one_file_come_together(capsys):
    config = TIES | {"paramters": {}, "dtype": "float17", "compat": {"x": 1}}
    assert "3 problems" in refused(config, "out", capsys)


def test_every_shape_that_differs_is_counted(capsys):
    message = refused(listed("linear", ("base", "wide")), "out", capsys)
    assert message.count("has different shapes") == 8 and "more shapes" in message


def test_a_parameter_without_meaning_is_a_note_or_with_strict_an_error(capsys):
    config = TIES | {"parameters": {"normalise": True, "t": 0.5}}
    Path("config.yml").write_text(yaml.safe_dump(config))
    assert main(["yaml", "config.yml", "noted", "--dry-run"]) == 0
    notes = capsys.readouterr().err
    assert "parameter 'normalise' in parameters is unknown (did you mean 'normalize'?)" in notes
    assert "'t' in parameters does not belong to ties" in notes
    assert "normalise" in refused(config, "out", capsys, "--strict")
    inner = listed(base_model="base")
    inner["models"][1]["parameters"] = {"weight": 1, "normalize": False}
    assert "is not read there" in refused(inner, "out", capsys, "--strict")


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--out-shard-size", "five"], "'five' is not understood"),
        (["--out-shard-size", "0"], "is not understood"),
        (["--no-safe-serialization"], "only safetensors"),
        (["--device", "npu"], "device 'npu' cannot be used"),
        (["--cuda", "--device", "cpu"], "contradict"),
        (["-j", "0"], "--num-threads 0"),
        (["--random-seed", "-1"], "--random-seed -1"),
        (["--to-mindspore", "x.bin"], "must end in .ckpt"),
    ],
)
def test_flags_that_cannot_be_had(flags, found, capsys):
    assert found in refused(TIES, "out", capsys, *flags)


def test_a_missing_accelerator_is_no_silent_run_on_the_processor(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert "no CUDA device" in refused(TIES, "out", capsys, "--cuda")


def test_flags_without_effect_say_so(capsys):
    Path("config.yml").write_text(yaml.safe_dump(TIES))
    assert main(["yaml", "config.yml", "noted", "--dry-run", "--low-cpu-memory", "--clone-tensors"]) == 0
    notes = capsys.readouterr().err
    assert "--low-cpu-memory has no effect" in notes and "--clone-tensors has no effect" in notes


@pytest.mark.parametrize("damage", ["tensor", "shard", "cut", "outside"])
def test_damaged_models_are_refused(damage, place, capsys, tmp_path):
    model = make_model(tmp_path / "model", near=place / "base", seed=4, shard=60_000)
    if damage == "tensor":
        tensors = {
            name: array for name, array in tensors_of(model).items() if name != "model.layers.2.mlp.up_proj.weight"
        }
        config = json.loads((model / "config.json").read_text())
        for path in model.glob("model*"):
            path.unlink()
        write_model(model, tensors, config)
    first = sorted(model.glob("model-*.safetensors"))[:1]
    if damage == "shard":
        first[0].unlink()
    if damage == "cut":
        first[0].write_bytes(first[0].read_bytes()[:-10])
    if damage == "outside":
        index = model / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(first[0].name, "../x.safetensors"))
    found = {
        "tensor": "'model.layers.2.mlp.up_proj.weight' is missing in",
        "shard": "is not a file",
        "cut": "copy or download it again",
        "outside": "expected a weight file of this folder",
    }[damage]
    assert found in refused(listed("linear", ("base", str(model))), "out", capsys)


def test_other_architectures_work_only_when_told(capsys):
    Path("config.yml").write_text(yaml.safe_dump(listed("linear", ("base", "mistral"))))
    assert main(["yaml", "config.yml", "crime", "--quiet", "--allow-crimes"]) == 0
    assert set(tensors_of(Path("crime"))) == set(tensors_of(Path("base")))
    message = refused(listed("linear", ("base", "phi")), "out", capsys, "--allow-crimes")
    assert "is missing in 'phi'" in message


def test_a_full_disk_is_seen_before_the_work(capsys, monkeypatch):
    from mindformers_ext.formats import disk

    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    assert "the disk has 1000 (0.00 GB) free" in refused(TIES, "out", capsys)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, place):
    """The same by a limit on the size of files, in a process of its own."""
    Path("config.yml").write_text(yaml.safe_dump(TIES))

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    words = [sys.executable, str(ROOT / "tools/merge.py"), "yaml", "config.yml", str(tmp_path / "out"), "--quiet"]
    done = subprocess.run(words, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "the system refused" in done.stderr and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


SLOWLY = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
from mindformers_ext.cli.merge import main
from mindformers_ext.formats.safetensors_file import SafetensorsFileWriter as Writer
add = Writer.add_parts
Writer.add_parts = lambda self, info, parts: (time.sleep(0.3), add(self, info, parts))
sys.exit(main(["yaml", "config.yml", "out", "--quiet", "-j", "1"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_leaves_nothing(number, tmp_path):
    """Every tensor waits a little, so that the signal comes in the middle on a busy machine too."""
    (tmp_path / "config.yml").write_text(yaml.safe_dump(TIES))
    for name in ("base", "ft1", "ft2"):
        shutil.copytree(name, tmp_path / name)
    words = [sys.executable, "-c", SLOWLY, str(ROOT)]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(tmp_path.glob(".out.*.partial/*")):
        time.sleep(0.01)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, 130), message
    assert sorted(os.listdir(tmp_path)) == ["base", "config.yml", "ft1", "ft2"] and "Traceback" not in message


def test_two_runs_into_one_folder(capsys):
    from mindformers_ext.formats.atomic import fresh_folder

    Path("config.yml").write_text(yaml.safe_dump(TIES))
    with fresh_folder(Path("busy")):
        assert main(["yaml", "config.yml", "busy", "--quiet"]) == 2
    assert "another process" in capsys.readouterr().err


def test_yaml_that_would_run_code_is_refused(capsys):
    text = "merge_method: !!python/object/apply:os.system ['touch ran']\nmodels: [{model: base}]\n"
    assert "the tag !!python/object/apply:os.system is refused" in refused(text, "out", capsys)
    assert not Path("ran").exists()
    assert "stands twice" in refused("merge_method: ties\nmerge_method: linear\n", "out", capsys)


def test_a_missing_shard_of_pytorch_files_and_code_in_one_of_them(place, capsys, tmp_path):
    """Indexed .bin files: a shard that would run code is refused as a single file is."""
    import torch

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    model = make_model(tmp_path / "model", near=place / "base", seed=4)
    tensors = {name: torch.from_numpy(array.astype("float32")) for name, array in tensors_of(model).items()}
    (model / "model.safetensors").unlink()
    first, second = dict(list(tensors.items())[:9]), dict(list(tensors.items())[9:])
    torch.save(first, model / "pytorch_model-00001-of-00002.bin")
    places = dict.fromkeys(first, "pytorch_model-00001-of-00002.bin")
    places |= dict.fromkeys(second, "pytorch_model-00002-of-00002.bin")
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = listed("linear", ("base", str(model)))
    assert "pytorch_model-00002-of-00002.bin" in refused(config, "out", capsys)
    torch.save({"a": Evil()}, model / "pytorch_model-00002-of-00002.bin")
    assert "asks to run" in refused(config, "out", capsys) and not (tmp_path / "ran").exists()
    torch.save(second, model / "pytorch_model-00002-of-00002.bin")
    Path("config.yml").write_text(yaml.safe_dump(config | {"dtype": "float32"}))
    assert main(["yaml", "config.yml", str(tmp_path / "out"), "--quiet"]) == 0
