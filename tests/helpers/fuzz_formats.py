# SPDX-License-Identifier: Apache-2.0
"""Every format that is read from others, spoiled in general ways; run as a process of its own, to measure its memory.

    python -m tests.helpers.fuzz_formats FOLDER COUNT

A spoiled input may be read all the same (a name was changed, a number made another). What may not happen: anything but
a ``UserError`` or exit codes 0 and 2, more memory than is allowed, more seconds than is allowed. Prints one JSON line:
violations, counts by format and outcome, and the peak above what the process had before.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shutil
import sys
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mindformers_ext.core.config.file import load_yaml, parse_yaml
from mindformers_ext.core.errors import UserError
from tests.helpers import fuzz_domains as domains
from tests.helpers import fuzz_values as values
from tests.helpers.fuzz_weights import edit_header, hf_folder
from tests.helpers.spoil import spoiled_bytes, spoiled_json, spoiled_yaml

SECONDS = 20.0


@dataclass(frozen=True)
class Format:
    """A format: a file of it below the folder of whole inputs, how it is spoiled, and who reads it.

    ``read`` gets the folder with the spoiled copy and a folder for outputs, and returns an exit code, or None.
    """

    file: str
    spoil: Callable[[Path, random.Random], None]
    read: Callable[[Path, Path], int | None]


def as_bytes(file: str) -> Callable[[Path, random.Random], None]:
    """Spoil ``file`` as bytes."""
    return lambda folder, rng: _write(folder / file, spoiled_bytes((folder / file).read_bytes(), rng))


def as_json(file: str) -> Callable[[Path, random.Random], None]:
    """Spoil ``file`` as JSON."""
    return lambda folder, rng: _write(folder / file, spoiled_json((folder / file).read_text(), rng))


def as_lines(file: str) -> Callable[[Path, random.Random], None]:
    """Spoil one line of ``file`` as JSON."""

    def spoil(folder: Path, rng: random.Random) -> None:
        first, rest = (folder / file).read_text().split("\n", 1)
        _write(folder / file, spoiled_json(first, rng) + b"\n" + rest.encode())

    return spoil


def as_yaml(file: str) -> Callable[[Path, random.Random], None]:
    """Spoil ``file`` as YAML."""
    return lambda folder, rng: _write(folder / file, spoiled_yaml((folder / file).read_text(), rng))


def tables_of_tokens(folder: Path, rng: random.Random) -> None:
    """Spoil a tokenizer.json that stands alone."""
    (folder / "tokens" / "tokenizer.model").unlink()
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "ab": 5}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "unk_token": "<unk>", "byte_fallback": False}
    added = [{"id": 1, "content": "<s>", "special": True, "normalized": False}]
    whole = {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    _write(folder / "tokens" / "tokenizer.json", spoiled_json(json.dumps(whole), rng))


def header(folder: Path, rng: random.Random) -> None:
    """Spoil the header of a shard."""
    path = rng.choice(sorted((folder / "hf").glob("*.safetensors")))
    edit_header(path, lambda found: spoiled_json(json.dumps(found), rng).decode("utf-8", "replace"))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def convert(folder: Path, out: Path) -> int:
    from mindformers_ext.cli.convert import main

    return main(["--input_path", str(folder / "hf"), "--output_path", str(out / "m.ckpt")])


def inspect(folder: Path, out: Path) -> int:
    from mindformers_ext.cli.inspect_ckpt import main

    return main([str(folder / "ms" / "m.ckpt")])


def transform(folder: Path, out: Path) -> int:
    from mindformers_ext.cli.transform_ckpt import main

    words = ["--src_ckpt_dir", str(folder / "ms" / "m.ckpt"), "--dst_ckpt_strategy", str(folder / "strategy")]
    return main([*words, "--dst_ckpt_dir", str(out / "ranks"), "--dry_run"])


def rows(folder: Path, out: Path) -> None:
    from mindformers_ext.formats.mindrecord_file import MindRecordFile, row_count

    path = folder / "rows.mindrecord"
    row_count(path)
    file = MindRecordFile(path)
    for row in range(len(file)):
        file.read(row, file.fields)
    file.close()


def records(folder: Path, out: Path) -> None:
    from mindformers_ext.data.json_records import read_records

    for record in read_records(folder / "text.jsonl"):
        record.text("text")


def metrics(folder: Path, out: Path) -> None:
    from mindformers_ext.jobs.run.metrics import read_metrics

    read_metrics(folder / "run")


def tokens(folder: Path, out: Path) -> None:
    from mindformers_ext.data.tokenizers import open_tokenizer

    found = open_tokenizer(folder / "tokens")
    found.decode(found.encode_batch(["a text of words", "\U0001f600"])[0])


def settings(folder: Path, out: Path) -> None:
    load_yaml(folder / "job.yaml")


def recipe(folder: Path, out: Path) -> int:
    from mindformers_ext.cli.merge import main

    return main(["yaml", str(folder / "merge.yaml"), str(out / "merged"), "--dry-run"])


def table(folder: Path, out: Path) -> int:
    from mindformers_ext.cli.inspect_ckpt import main

    return main([str(folder / "bin")])


def pickled(folder: Path, rng: random.Random) -> None:
    """Spoil the table inside a file of torch.save; its checksum is right again."""
    path = folder / "bin" / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        items = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in items:
            archive.writestr(name, spoiled_pickle(data, rng) if name.endswith("data.pkl") else data)


def spoiled_pickle(data: bytes, rng: random.Random) -> bytes:
    """A pickle that asks for memory or code, or one with bytes spoiled."""
    hostile = [
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x28\x6b\xee\x00\x85R.",
        b"\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x05\x00\x28\x6b\xee\x00\x85R.",
        b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.",
        b"\x80\x02" + b"]" * 2_000_000 + b".",
        b"\x80\x02}" + b"(" * 100_000 + b".",
        b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.",
    ]
    return rng.choice(hostile) if rng.random() < 0.3 else spoiled_bytes(data, rng)


def words_of_launcher(folder: Path, rng: random.Random) -> None:
    """Arguments of the launchers with one of them hostile."""
    words = ["run_mindformer.py --config x", "4", "2", "127.0.0.1", "8118", "0", "logs", "True", "60"]
    if rng.random() < 0.4:
        words = [words[0], words[1], words[4], *words[6:]]
    hostile = ["9" * 5000, "-1", "", "a..b", "~nosuchuser/x", "\0", "'", "x" * 5000, "1e3", "\u0663", "$(ls)", "\ud800"]
    words[rng.randrange(len(words))] = rng.choice(hostile)
    (folder / "words.json").write_text(json.dumps(words))


def launch(folder: Path, out: Path) -> None:
    from mindformers_ext.jobs.launch.arguments import check_master, read_launch

    found = read_launch(json.loads((folder / "words.json").read_text()), {})
    check_master(found, "msrun_launcher.sh")


FORMATS: dict[str, Format] = {
    "config.json": Format("hf/config.json", as_json("hf/config.json"), convert),
    "index": Format("hf", as_json("hf/model.safetensors.index.json"), convert),
    "header": Format("hf", header, convert),
    "ckpt": Format("ms", as_bytes("ms/m.ckpt"), inspect),
    "sidecar": Format("ms", as_json("ms/m.ckpt.json"), inspect),
    "strategy.ckpt": Format("strategy", as_bytes("strategy/ckpt_strategy_rank_0.ckpt"), transform),
    "mindrecord": Format("rows.mindrecord", as_bytes("rows.mindrecord"), rows),
    "mindrecord index": Format("rows.mindrecord", as_bytes("rows.mindrecord.db"), rows),
    "jsonl": Format("text.jsonl", as_lines("text.jsonl"), records),
    "tokenizer.model": Format("tokens", as_bytes("tokens/tokenizer.model"), tokens),
    "tokenizer_config.json": Format("tokens", as_json("tokens/tokenizer_config.json"), tokens),
    "tokenizer.json": Format("tokens", tables_of_tokens, tokens),
    "job.yaml": Format("job.yaml", as_yaml("job.yaml"), settings),
    "metrics": Format("run", as_lines("run/metrics/rank_0.jsonl"), metrics),
    "launcher": Format("words.json", words_of_launcher, launch),
    "merge.yaml": Format("merge.yaml", as_yaml("merge.yaml"), recipe),
    "merges": Format("recipes.json", values.one_of("recipes.json", values.MERGE_WORDS), values.merge("yaml")),
    "mixtures": Format("mixtures.json", values.one_of("mixtures.json", values.MOE_WORDS), values.merge("moe")),
    "jobs": Format("job.yaml", values.job, values.check),
    "launches": Format("words.json", values.launch_words, values.launch),
    "bin": Format("bin", as_bytes("bin/pytorch_model.bin"), table),
    "table of a bin": Format("bin", pickled, table),
    "manifest": Format("prepared", as_json("prepared/manifest.json"), domains.prepared),
    "mds index": Format("mds", as_json("mds/index.json"), domains.mds),
    "mds shard": Format("mds", as_bytes("mds/shard.00000.mds"), domains.mds),
    "frames": Format("part", as_bytes("part"), domains.frames),
    "parquet": Format("rows.parquet", as_bytes("rows.parquet"), domains.documents),
}


NEEDED: dict[str, list[str]] = {  # where it is more, or less, than the file's own part
    "strategy.ckpt": ["ms", "strategy"],
    "mindrecord": ["rows.mindrecord", "rows.mindrecord.db"],
    "mindrecord index": ["rows.mindrecord", "rows.mindrecord.db"],
    "launcher": [],
    "launches": [],
}
STEP: dict[str, Any] = {
    **dict.fromkeys("epoch loss lm_loss aux_loss drop_rate learning_rate global_norm loss_scale seconds".split(), 1.0),
    "overflow": False,
    "tokens_per_second": 5.0,
    "dropped": [0.5, 0.5],
    "expert_load": [[1.0, 2.0], [2.0, 1.0]],
}
TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": {"content": "<s>", "lstrip": False},
    "add_bos_token": True,
    "added_tokens_decoder": {"400": {"content": "<|end|>", "special": True}},
    "chat_template": "{{ messages }}",
}
MERGE = """merge_method: linear
models:
  - model: HF/hf
    parameters: {weight: 0.5}
  - model: HF/other
    parameters: {weight: [0.5, 1.0]}
parameters: {normalize: true}
dtype: bfloat16
"""


def whole_inputs(folder: Path, root: Path) -> None:
    """One whole file of every format."""
    from mindformers_ext.cli.convert import main
    from mindformers_ext.data.tokenizers import train_sentencepiece
    from mindformers_ext.jobs.engine.door import open_record_writer
    from mindformers_ext.jobs.run.metrics_file import StepRecord
    from tests.helpers.tiny_run import SEQ, YAML

    folder.mkdir()
    hf_folder(folder / "hf")
    shutil.copytree(folder / "hf", folder / "other")
    values.write_whole(folder)
    (folder / "ms").mkdir()
    assert main(["--input_path", str(folder / "hf"), "--output_path", str(folder / "ms" / "m.ckpt")]) == 0
    shutil.copytree(root / "golden" / "strategies" / "dp4_mp2_ep2_opt", folder / "strategy")
    writer = open_record_writer(folder / "rows.mindrecord", ("input_ids", "labels"), 1, 9)
    ids = np.arange(90, dtype=np.int32).reshape(10, 9)
    writer.write({"input_ids": ids, "labels": ids})
    writer.close()
    domains.write_domains(folder)
    (folder / "text.jsonl").write_text('{"text": "one", "n": [1, 2]}\n{"text": "two \\u00e9"}\n')
    text = YAML.replace("dataset_dir: ''", f"dataset_dir: {folder / 'rows.mindrecord'}").replace(f"th: {SEQ}", "th: 8")
    (folder / "job.yaml").write_text(
        text.replace("vocab_file: ''", f"vocab_file: {folder / 'tokens' / 'tokenizer.model'}")
    )
    texts = [path.read_text() for path in sorted((root / "unit" / "core").glob("*.py"))]
    train_sentencepiece(texts, folder / "tokens" / "tokenizer.model", 400)
    (folder / "tokens" / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    (folder / "run" / "metrics").mkdir(parents=True)
    (folder / "run" / "metrics" / "rank_0.jsonl").write_text(
        "".join(StepRecord(step, **STEP).line() for step in (1, 2))
    )
    (folder / "merge.yaml").write_text(MERGE.replace("HF", str(folder)))
    (folder / "bin").mkdir()
    torch.save({"a.weight": torch.ones(3, 4), "b.bias": torch.ones(4)}, folder / "bin" / "pytorch_model.bin")


def fault_of(form: Format, folder: Path, out: Path) -> tuple[str, str | None]:
    """How reading ended, and what is wrong with that."""
    said = io.StringIO()
    started = time.process_time()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = form.read(folder, out)
    except UserError:
        code = 2
    except BaseException:  # noqa: BLE001 - the point is that nothing else escapes
        return "escaped", "escaped: " + traceback.format_exc(limit=-3)
    seconds = time.process_time() - started
    if code not in (None, 0, 2) or "Traceback" in said.getvalue():
        return "wrong", f"exit code {code}: {said.getvalue()[-300:]}"
    if seconds > SECONDS:
        return "slow", f"{seconds:.0f} s"
    return ("refused" if code == 2 else "read"), None


def peak() -> int:
    """The process's largest resident set so far, bytes."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def run(folder: Path, count: int, root: Path) -> dict[str, Any]:
    """``count`` mutations of every format."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        whole_inputs(folder / "whole", root)
        values.warm(folder / "whole", folder / "warm")
    violations, done, before = [], Counter[str](), peak()
    for name, form in FORMATS.items():
        for number in range(count):
            rng = random.Random(f"{name} {number}")
            place, out = folder / "input", folder / "out"
            for old in (place, out):
                shutil.rmtree(old, ignore_errors=True)
            place.mkdir()
            for part in NEEDED.get(name, [Path(form.file).parts[0]]):
                copy = shutil.copytree if (folder / "whole" / part).is_dir() else shutil.copyfile
                copy(folder / "whole" / part, place / part)
            out.mkdir()
            form.spoil(place, rng)
            ending, fault = fault_of(form, place, out)
            done[f"{name}: {ending}"] += 1
            if fault:
                violations.append(f"{name} {number}: {fault}")
    return {"violations": violations, "done": done, "above": peak() - before}


if __name__ == "__main__":
    parse_yaml("a: 1", "warm")
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), Path(__file__).resolve().parents[1])))
