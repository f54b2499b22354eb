# SPDX-License-Identifier: Apache-2.0
"""Spoils weight files in known ways and converts them; run as a process of its own, so that its memory can be limited.

    python -m tests.helpers.fuzz_weights FOLDER FIRST COUNT

Each input must end with exit code 2, one error text, no traceback and no output. Prints one JSON line: violations,
counts by mutation, peak memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import resource
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mindformers_ext.cli.convert import main
from mindformers_ext.core.config.hf import hf_config_from_spec
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.ms_ckpt import CkptFile, CkptWriter
from mindformers_ext.formats.safetensors_dir import SafetensorsDir, SafetensorsDirWriter
from mindformers_ext.formats.tensors import MappingReader
from mindformers_ext.weights.convert import rule_set

LIMIT = 2 * 2**30  # bytes of address space; the interpreter with numpy takes a third of it
SPEC = ModelSpec(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    moe=MoESpec(num_local_experts=3, num_experts_per_tok=2),
)
HOSTILE = [-1, 0, 1, 7, 2**31, 2**40, 2**63, 10**30, 1.5, True, None, "8", [8], {}, float("inf"), float("nan")]
Mutation = Callable[[Path, random.Random], None]


def hf_folder(folder: Path) -> None:
    """Several shards with an index."""
    rng = np.random.default_rng(1)
    arrays = {
        name: rng.normal(size=shape).astype(np.float32)
        for binding in rule_set(SPEC).bindings
        for name, shape in binding.hf.items()
    }
    folder.mkdir()
    with SafetensorsDirWriter(folder, list(MappingReader(arrays).infos.values()), 4000) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
    (folder / "config.json").write_text(json.dumps(hf_config_from_spec(SPEC) | {"torch_dtype": "float32"}))


def shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def edit_header(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrite the header with ``change`` made (in place, or the text it returns); data stays."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = change(header)
    body = (text if isinstance(text, str) else json.dumps(header)).encode()
    path.write_bytes(len(body).to_bytes(8, "little") + body + raw[8 + length :])


def entry(path: Path, rng: random.Random, change: Callable[[dict, str], object]) -> None:
    """``change`` (header, name of one tensor)."""
    edit_header(path, lambda header: change(header, rng.choice([name for name in header if name != "__metadata__"])))


def truncated(folder: Path, rng: random.Random) -> None:
    path = shard(folder, rng)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def longer(folder: Path, rng: random.Random) -> None:
    path = shard(folder, rng)
    path.write_bytes(path.read_bytes() + bytes(rng.randrange(1, 99)))


def lying_length(folder: Path, rng: random.Random) -> None:
    path = shard(folder, rng)
    raw = path.read_bytes()
    true = int.from_bytes(raw[:8], "little")
    wrong = rng.choice([0, 1, true - 1, true + 8, true * 2, len(raw), 2**31, 2**63, 2**64 - 1])
    path.write_bytes(wrong.to_bytes(8, "little") + raw[8:])


def overlapping(folder: Path, rng: random.Random) -> None:
    def change(header: dict, name: str) -> None:
        begin, end = header[name]["data_offsets"]
        shift = rng.choice([-4, 4, -(end - begin), end - begin, 10**6, 2**62])
        header[name]["data_offsets"] = [begin + shift, end + shift]

    entry(shard(folder, rng), rng, change)


def twice_in_header(folder: Path, rng: random.Random) -> None:
    def change(header: dict, name: str) -> str:
        return json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'

    entry(shard(folder, rng), rng, change)


def twice_in_shards(folder: Path, rng: random.Random) -> None:
    first, second = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    shutil.copyfile(first, second)


def wrong_type(folder: Path, rng: random.Random) -> None:
    kind = rng.choice(["I32", "U32", "F16", "BF16", "F64", "F8_E4M3", "", 7, None, "f32", "I64", "BOOL"])
    entry(shard(folder, rng), rng, lambda header, name: header[name].update(dtype=kind))


def wrong_shape(folder: Path, rng: random.Random) -> None:
    def change(header: dict, name: str) -> None:
        shape = header[name]["shape"]
        # the same number of elements in another shape is for the plan to find, the rest for the reader
        wrong = [[*shape, 1], [1, *shape], [2**40, 2**40], shape[:-1], [shape[0] + 1, *shape[1:]], "x", [[]]]
        wrong += [[-size for size in shape], [float(size) for size in shape]]
        header[name]["shape"] = rng.choice(wrong)

    entry(shard(folder, rng), rng, change)


def wrong_offsets(folder: Path, rng: random.Random) -> None:
    entry(
        shard(folder, rng),
        rng,
        lambda header, name: header[name].update(
            data_offsets=rng.choice([[], [0], [0, 1, 2], "x", None, [5, 1], [-1, 3], [0, 10**30], {"0": 1}])
        ),
    )


def renamed(folder: Path, rng: random.Random) -> None:
    entry(
        shard(folder, rng),
        rng,
        lambda header, name: header.update(
            {rng.choice([name + "x", name[:-1], "x\x00y", "../../x", "é" * 99]): header.pop(name)}
        ),
    )


def no_json(folder: Path, rng: random.Random) -> None:
    text = rng.choice(["[" * 100_000, "{", "[]", "null", '{"a": ' * 50_000, "\x00" * 50, "9" * 9999, '"x"'])
    edit_header(shard(folder, rng), lambda header: text)


def rewritten(folder: Path, rng: random.Random, change: Callable[[dict], object]) -> None:
    """The same model in one well-formed file, tensors changed."""
    reader = SafetensorsDir(folder)
    arrays = {name: reader.read(name) for name in reader.infos}
    reader.close()
    change(arrays)
    for path in folder.glob("*safetensors*"):
        path.unlink()
    with SafetensorsDirWriter(folder, list(MappingReader(arrays).infos.values()), 10**9) as writer:
        for name, array in arrays.items():
            writer.add(name, array)


def missing_tensor(folder: Path, rng: random.Random) -> None:
    rewritten(folder, rng, lambda arrays: arrays.pop(rng.choice(list(arrays))))


def extra_tensor(folder: Path, rng: random.Random) -> None:
    name = rng.choice(
        [
            "model.x",
            "model.layers.2.input_layernorm.weight",
            "lm_head.bias",
            "model.layers.0.block_sparse_moe.experts.3.w1.weight",
            "adam_m.model.norm.weight",
        ]
    )
    rewritten(folder, rng, lambda arrays: arrays.update({name: np.ones(3, np.float32)}))


def other_shape(folder: Path, rng: random.Random) -> None:
    def change(arrays: dict) -> None:
        name = rng.choice([name for name, array in arrays.items() if array.ndim == 2 and len(set(array.shape)) == 2])
        arrays[name] = np.ascontiguousarray(arrays[name].T)

    rewritten(folder, rng, change)


def config_value(folder: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    sizes = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_local_experts",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "head_dim",
    ]
    key = rng.choice(sizes)
    # null means Hugging Face's default there, and 2 * 2 heads of width 2 are right
    config[key] = rng.choice([value for value in HOSTILE if value is not None and value != config[key]])
    path.write_text(json.dumps(config))


def config_text(folder: Path, rng: random.Random) -> None:
    text = rng.choice(["", "{", "[]", "[" * 100_000, '{"hidden_size": ' + "9" * 9999 + "}", "\xff\xfe", "null"])
    (folder / "config.json").write_text(text, encoding="latin-1")


def config_key(folder: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    change = rng.choice(
        [
            {"model_type": "gpt2"},
            {"model_type": "llama"},
            {"tie_word_embeddings": True},
            {"hidden_act": "gelu"},
            {"num_hidden_layer": 2},
            {"rope_scaling": {"type": "su", "factor": 2}},
            {"num_local_experts": 4},
            {"num_local_experts": 2},
            {"quantization_config": {"bits": 4}},
        ]
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def index_text(folder: Path, rng: random.Random) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    places = index["weight_map"]
    name = rng.choice(list(places))
    kind = rng.randrange(6)
    if kind == 0:
        places[name] = "model-00009-of-00009.safetensors"
    elif kind == 1:
        places[name] = rng.choice(["../x.safetensors", f"{folder}/x.safetensors", 5, None, "config.json"])
    elif kind == 2:
        del places[name]
    elif kind == 3:
        places["model.x"] = places[name]
    elif kind == 4:
        index = rng.choice([[], {}, {"weight_map": []}, {"weight_map": {}}, None])
    path.write_text(json.dumps(index) if kind < 5 else rng.choice(["{", "[" * 100_000, "9" * 9999]))


def lost_shard(folder: Path, rng: random.Random) -> None:
    shard(folder, rng).unlink()


HF: list[Mutation] = [
    truncated,
    longer,
    lying_length,
    overlapping,
    twice_in_header,
    twice_in_shards,
    wrong_type,
    wrong_shape,
    wrong_offsets,
    renamed,
    no_json,
    missing_tensor,
    extra_tensor,
    other_shape,
    config_value,
    config_text,
    config_key,
    index_text,
    lost_shard,
]


def ckpt_truncated(folder: Path, rng: random.Random) -> None:
    path = folder / "m.ckpt"
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def ckpt_structure(folder: Path, rng: random.Random) -> None:
    """One byte of names, sizes and types changed (never one of the data)."""
    path = folder / "m.ckpt"
    raw = bytearray(path.read_bytes())
    reader = CkptFile(path)
    data = [block for tensor in reader._tensors.values() for block in tensor.blocks]
    reader.close()
    places = [at for at in range(len(raw)) if not any(b.offset <= at < b.offset + b.length for b in data)]
    at = rng.choice(places)
    raw[at] ^= rng.randrange(1, 256)
    path.write_bytes(raw)


def ckpt_rewritten(folder: Path, rng: random.Random) -> None:
    path = folder / "m.ckpt"
    reader = CkptFile(path)
    arrays = {name: reader.read(name) for name in reader.infos}
    reader.close()
    name = rng.choice(list(arrays))
    kind = rng.randrange(5)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[name + ".x"] = arrays.pop(name)
    elif kind == 2:
        arrays["model.x"] = np.ones(3, np.float32)
    elif kind == 3:
        arrays[name] = arrays[name].astype(rng.choice([np.int32, np.int8, np.float64]))
    else:
        arrays[name] = np.concatenate([arrays[name], arrays[name]])
    with CkptWriter(path) as writer:
        for key, array in arrays.items():
            writer.add(key, array)


def ckpt_twice(folder: Path, rng: random.Random) -> None:
    path = folder / "m.ckpt"
    path.write_bytes(path.read_bytes() * 2)


def ckpt_noise(folder: Path, rng: random.Random) -> None:
    (folder / "m.ckpt").write_bytes(rng.randbytes(rng.randrange(2000)))


def description(folder: Path, rng: random.Random) -> None:
    path = folder / "m.ckpt.json"
    words = json.loads(path.read_text())
    key = rng.choice([key for key in words if key not in ("source", "source_hash", "dtype")])
    if key == "config":
        size = rng.choice(["hidden_size", "num_local_experts", "num_hidden_layers"])
        words[key][size] = rng.choice([1, 5, 2**40, -1])
    else:
        words[key] = rng.choice([value for value in [*HOSTILE, "gmm", "0" * 64] if value != words[key] and value != ""])
    path.write_text(rng.choice([json.dumps(words), json.dumps(words), "{", "[" * 100_000, "9" * 9999]))


CKPT: list[Mutation] = [ckpt_truncated, ckpt_structure, ckpt_rewritten, ckpt_twice, ckpt_noise, description]


def fault_of(words: list[str], output: Path) -> str | None:
    """What is wrong with how the command ended, or None."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
    except SystemExit as stop:
        code = stop.code
    except BaseException:  # noqa: BLE001 - the point is that nothing escapes
        return "escaped: " + traceback.format_exc(limit=-2)
    if code != 2:
        return f"exit code {code}"
    left = sorted(path.name for path in output.parent.iterdir())
    return f"left behind: {left}" if left else None if "error: " in err.getvalue() else "no error text"


def run(folder: Path, first: int, count: int) -> dict:
    """Mutations ``first`` to ``first + count``."""
    hf_folder(folder / "hf")
    (folder / "ms").mkdir()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        assert main(["--input_path", str(folder / "hf"), "--output_path", str(folder / "ms" / "m.ckpt")]) == 0
    violations, done = [], Counter()
    for number in range(first, first + count):
        rng = random.Random(number)
        from_hf = rng.random() < 0.7
        mutate = rng.choice(HF if from_hf else CKPT)
        place, output = folder / "input", folder / "out" / ("m.ckpt" if from_hf else "hf")
        for old in (place, output.parent):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(folder / ("hf" if from_hf else "ms"), place)
        output.parent.mkdir()
        mutate(place, rng)
        words = ["--input_path", str(place if from_hf else place / "m.ckpt"), "--output_path", str(output)]
        fault = fault_of(words if from_hf else [*words, "--reversed"], output)
        done[mutate.__name__] += 1
        if fault:
            violations.append(f"{number} {mutate.__name__}: {fault}")
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return {"violations": violations, "done": done, "peak": int(peak[1]) * 1024 if peak else 0}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
