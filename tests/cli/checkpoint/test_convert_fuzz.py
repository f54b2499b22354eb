# SPDX-License-Identifier: Apache-2.0
"""Spoiled inputs: exit code 2, one error, nothing written, nothing executed, memory within its limit."""

import json
import os
import pickle
import random
import subprocess
import sys
import zipfile

import pytest
import torch

from mindformers_ext.formats.safetensors_dir import SafetensorsDir
from tests.helpers.fuzz_weights import LIMIT, fault_of, hf_folder

PEAK = 200 * 2**20  # of the process with all 500; it starts at about 40 MB


def test_five_hundred_spoiled_inputs(tmp_path, repo_root):
    command = [sys.executable, "-m", "tests.helpers.fuzz_weights", str(tmp_path), "0", "500"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    peak = f"peak {result['peak'] / 1e6:.0f} MB, address space {LIMIT / 1e6:.0f} MB"
    print(f"\n500 inputs, {len(result['done'])} mutations, {peak}")
    assert not result["violations"], "\n".join(result["violations"])
    assert sum(result["done"].values()) == 500 and min(result["done"].values()) >= 5
    assert result["peak"] < PEAK


class Harm:
    """Unpickling it runs a command."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def repack(path, arrays, change, how=zipfile.ZIP_STORED):
    """torch.save, then every entry of the archive through ``change`` (name, bytes)."""
    torch.save(arrays, path)
    with zipfile.ZipFile(path) as archive:
        items = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in items:
            archive.writestr(name, change(name, data))


def flipped(path, place):
    """One byte of the pickle inside changed, nothing repaired."""
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (entry,) = [item for item in archive.infolist() if item.filename.endswith("data.pkl")]
    raw[entry.header_offset + 30 + len(entry.filename) + 64 + place] ^= 0x21
    path.write_bytes(raw)


NORM = "model.norm.weight"
RNG = random.Random(4)
SPOILED = {
    "code in the table": lambda path, arrays, mark: torch.save({**arrays, "x": Harm(mark)}, path),
    "code alone": lambda path, arrays, mark: path.write_bytes(pickle.dumps(Harm(mark))),
    "code as the table": lambda path, arrays, mark: repack(
        path, arrays, lambda name, data: pickle.dumps(Harm(mark), 2) if name.endswith("data.pkl") else data
    ),
    "before zip": lambda path, arrays, mark: torch.save(arrays, path, _use_new_zipfile_serialization=False),
    "a module": lambda path, arrays, mark: torch.save(torch.nn.Linear(2, 2), path),
    "a list": lambda path, arrays, mark: torch.save([1, 2], path),
    "nested": lambda path, arrays, mark: torch.save({"model": arrays}, path),
    "a number": lambda path, arrays, mark: torch.save({**arrays, "step": 3}, path),
    "one value as 4 TB": lambda path, arrays, mark: torch.save({**arrays, NORM: torch.zeros(1).expand(10**12)}, path),
    "sparse": lambda path, arrays, mark: torch.save({**arrays, NORM: torch.eye(8).to_sparse()}, path),
    "meta": lambda path, arrays, mark: torch.save({**arrays, NORM: torch.ones(8, device="meta")}, path),
    "integers": lambda path, arrays, mark: torch.save({**arrays, NORM: torch.ones(8, dtype=torch.int32)}, path),
    "float8": lambda path, arrays, mark: torch.save({**arrays, NORM: torch.ones(8).to(torch.float8_e4m3fn)}, path),
    "packed": lambda path, arrays, mark: repack(path, arrays, lambda name, data: data, zipfile.ZIP_DEFLATED),
    "short data": lambda path, arrays, mark: repack(
        path, arrays, lambda name, data: data[:-4] if name.endswith("data/7") else data
    ),
    "empty": lambda path, arrays, mark: path.write_bytes(b""),
    "missing tensor": lambda path, arrays, mark: torch.save({n: a for n, a in arrays.items() if n != NORM}, path),
}


def torch_arrays(tmp_path):
    hf_folder(tmp_path / "hf")
    reader = SafetensorsDir(tmp_path / "hf")
    return {name: torch.from_numpy(reader.read(name)) for name in reader.infos}


def convert_bin(tmp_path, spoil):
    """What is wrong with how the conversion of the spoiled file ended, or None; and whether anything ran."""
    folder, mark, out = tmp_path / "bin", tmp_path / "executed", tmp_path / "out"
    for path in (folder, out):
        path.mkdir(exist_ok=True)
    (folder / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    spoil(folder / "pytorch_model.bin", mark)
    found = fault_of(["--input_path", str(folder), "--output_path", str(out / "m.ckpt")], out / "m.ckpt")
    return found, mark.exists()


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_torch_files(tmp_path, kind):
    arrays = torch_arrays(tmp_path)
    assert convert_bin(tmp_path, lambda path, mark: SPOILED[kind](path, arrays, mark)) == (None, False)


def test_damaged_torch_files(tmp_path):
    arrays = torch_arrays(tmp_path)
    for _ in range(30):

        def cut(path, mark):
            torch.save(arrays, path)
            path.write_bytes(path.read_bytes()[: RNG.randrange(path.stat().st_size)])

        def flip(path, mark):
            torch.save(arrays, path)
            flipped(path, RNG.randrange(1000))

        assert convert_bin(tmp_path, cut) == (None, False)
        assert convert_bin(tmp_path, flip) == (None, False)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "names",
    [
        ["pytorch_model.bin"],
        ["weights.pt"],
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
    ],
)
def test_whole_torch_files_give_the_same_checkpoint(tmp_path, kind, names):
    from mindformers_ext.cli.convert import main

    arrays = {name: tensor.to(kind) for name, tensor in torch_arrays(tmp_path).items()}
    arrays["lm_head.weight"] = arrays["lm_head.weight"].t().contiguous().t()  # saved with other strides
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    torch.save({"not": "weights"}, folder / "training_args.bin")
    places = {name: names[number % len(names)] for number, name in enumerate(arrays)}
    for file in names:
        torch.save({name: tensor for name, tensor in arrays.items() if places[name] == file}, folder / file)
    if len(names) > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    word = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[kind]
    assert main(["--input_path", str(folder), "--output_path", str(tmp_path / "a.ckpt")]) == 0
    assert main(["--input_path", str(tmp_path / "hf"), "--output_path", str(tmp_path / "b.ckpt"), "--dtype", word]) == 0
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()
    if len(names) > 1:
        (folder / names[1]).unlink()
        assert main(["--input_path", str(folder), "--output_path", str(tmp_path / "c.ckpt")]) == 2
