# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of llama_preprocess.py, against SentencePiece's own encode and a loop with MindFormers' tokenizer.

The text is real and not repeated: a text file where one is given, and the documentation inside Python's standard
library and the installed packages (``--sources``: their source code instead, with far more different words). All of it
is one plain text, one document per paragraph. What is measured, each call in a process of its own:

- ours: the whole command from its start to the files on the disk, with one and with two workers;
- rows: the same from the first batch read to the last row handed to the writer;
- sentencepiece: ``encode`` of the list of paragraphs, one thread, model loaded, nothing written;
- line by line: ``LlamaTokenizer(line)`` of MindFormers 1.9 for a part of the text, tokenizer loaded, nothing written.

Calls alternate; medians of wall and processor seconds (all processes of a call) and ratios of tokens per second.

With ``--ray``: processes of this machine against a Ray cluster of one node with as many cores on it, rates from the
first quarter of the batches to the last (both have a start of some seconds that a long corpus does not notice).

    python tools/bench/preprocess.py --model_file tokenizer.model [--text FILE] [--megabytes 30] [--rounds 3] \\
        [--sources] [--ray]
"""

from __future__ import annotations

import set_up  # noqa: F401 (first)

# isort: split
import argparse
import atexit
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from mindformers_ext.data.corpus import docstrings, library_files, standard_library_text

TIMER = """
import json, os, sys, time
def figures(start, cpu, tokens):
    times = os.times()
    used = times.user + times.system + times.children_user + times.children_system
    print(json.dumps(dict(wall=time.perf_counter() - start, cpu=used - cpu, tokens=tokens)))
def used():
    times = os.times()
    return times.user + times.system
model, text, folder, extra = sys.argv[1:5]
"""
OURS = (
    TIMER
    + """
if __name__ == "__main__":
    start = time.perf_counter()
    from mindformers_ext.jobs.preprocess import preprocess as job
    from mindformers_ext.jobs.preprocess.request import PreprocessRequest
    from pathlib import Path
    inner = {}
    work = job._Run.work
    def timed(self):
        begun = time.perf_counter()
        work(self)
        inner["rows"] = time.perf_counter() - begun
    job._Run.work = timed
    count, seen = job._Run._count, []
    def counted(self, tokens):
        seen.append((time.perf_counter(), tokens.ids.size))
        count(self, tokens)
    job._Run._count = counted
    workers, _, address = extra.partition("@")
    sys.stderr = open(os.devnull, "w")
    done = job.preprocess(PreprocessRequest(dataset_type="text", document="paragraph", input_glob=text,
        output_file=Path(folder) / "x.mindrecord", model_file=Path(model), seq_length=2048, workers=int(workers),
        ray=address or None, overwrite=True))
    late = seen[len(seen) // 4 :]
    inner["steady"] = sum(size for _, size in late[1:]) / max(late[-1][0] - late[0][0], 1e-9)
    sys.stderr = sys.__stderr__
    figures(start, 0.0, done.tokens)
    print(json.dumps(inner))
"""
)
PEER = (
    TIMER
    + """
import sentencepiece
processor = sentencepiece.SentencePieceProcessor(model_file=model)
parts = [part for part in open(text, encoding="utf-8").read().split("\\n\\n") if part.strip()]
cpu, start = used(), time.perf_counter()
ids = processor.encode(parts, num_threads=int(extra), out_type=int)
figures(start, cpu, sum(map(len, ids)) + 2 * len(ids))
"""
)
LOOP = (
    TIMER
    + """
os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"
from mindformers.models.llama.llama_tokenizer import LlamaTokenizer
tokenizer = LlamaTokenizer(vocab_file=model)
lines = [line for line in open(text, encoding="utf-8").read()[:int(extra)].split("\\n") if line.strip()]
cpu, start, tokens = used(), time.perf_counter(), 0
for line in lines:
    tokens += len(tokenizer(line)["input_ids"])
figures(start, cpu, tokens)
"""
)
LOOP_CHARACTERS = 500_000  # the loop is slow; its speed does not depend on the amount


def measured(code: str, folder: Path, *arguments: object) -> dict:
    """Run a measurement in a process; its figures."""
    script = folder / "measure.py"
    script.write_text(code, encoding="utf-8")
    command = [sys.executable, str(script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "GLOG_v": "4"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(done.stderr)
    result: dict = {}
    for line in lines:
        result |= json.loads(line)
    return result


def documentation(path: Path) -> Iterator[str]:
    """Docstrings that can be written as UTF-8."""
    for text in docstrings(path):
        yield text.encode("utf-8", errors="ignore").decode("utf-8")


def make_text(path: Path, given: Path | None, megabytes: int, sources: bool) -> int:
    """The text to encode; returns its bytes."""
    parts = [given.read_text(encoding="utf-8")] if given else []
    parts += standard_library_text(megabytes * 10**6)
    size = sum(map(len, parts))
    for source in [*library_files(), *sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))]:
        if size > megabytes * 10**6:
            break
        found = [source.read_text(encoding="utf-8", errors="ignore")] if sources else list(documentation(source))
        parts += found
        size += sum(map(len, found))
    text = "\n\n".join(parts)
    path.write_text(text, encoding="utf-8")
    return path.stat().st_size


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_file", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--megabytes", type=int, default=30, help="of text, at most")
    parser.add_argument("--sources", action="store_true", help="source code instead of documentation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="processes against a Ray cluster on this machine")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", SyntaxWarning)  # of packages that are parsed for their documentation
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_text(folder / "text.txt", arguments.text, arguments.megabytes, arguments.sources)
        common = (arguments.model_file.resolve(), folder / "text.txt", folder)
        calls = {
            "ours, 1 worker": (OURS, "1"),
            "ours, 2 workers": (OURS, "2"),
            "sentencepiece": (PEER, "1"),
            "line by line": (LOOP, str(LOOP_CHARACTERS)),
        }
        if arguments.ray:
            calls = {"processes": (OURS, "2"), "ray": (OURS, f"2@{start_cluster(2)}")}
        print(
            f"machine: {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; "
            f"{size / 1e6:.1f} MB of text"
        )
        samples: dict[str, list[dict]] = {name: [] for name in calls}
        for _ in range(arguments.rounds):
            for name, (code, extra) in calls.items():
                samples[name].append(measured(code, folder, *common, extra))
    if arguments.ray:
        report_ray(samples)
    else:
        report(samples)


def start_cluster(cores: int) -> str:
    """A Ray cluster of one node on this machine, which ends with this process; its address."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": cores, "object_store_memory": 200 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    atexit.register(cluster.shutdown)
    return cluster.address


def report_ray(samples: dict[str, list[dict]]) -> None:
    """Rates behind the first quarter of the batches, and their ratio by rounds."""
    for name, taken in samples.items():
        rates = ", ".join(f"{sample['steady']:,.0f}" for sample in taken)
        walls = ", ".join(f"{sample['wall']:.1f}" for sample in taken)
        print(f"{name:<10} {taken[0]['tokens']:>9} tokens  {rates} tokens/s  whole command {walls} s")
    pairs = zip(samples["ray"], samples["processes"], strict=True)
    ratios = [ray["steady"] / processes["steady"] for ray, processes in pairs]
    print(f"ray / processes: {statistics.median(ratios):.2f} (rounds {', '.join(f'{ratio:.2f}' for ratio in ratios)})")


def report(samples: dict[str, list[dict]]) -> None:
    """Medians, and ratios against the peers."""

    def median(name: str, what: str) -> float:
        return statistics.median(sample[what] for sample in samples[name])

    speed = {}
    for name, taken in samples.items():
        tokens = taken[0]["tokens"]
        speed[name] = tokens / median(name, "wall")
        line = f"{name:<16} {tokens:>9} tokens  {median(name, 'wall'):7.2f} s  CPU {median(name, 'cpu'):7.2f} s  "
        print(line + f"{speed[name]:>12,.0f} tokens/s")
    for name in ("ours, 1 worker", "ours, 2 workers"):
        rows = samples[name][0]["tokens"] / median(name, "rows")
        for peer in ("sentencepiece", "line by line"):
            cpu = samples[peer][0]["tokens"] / median(peer, "cpu") / samples[name][0]["tokens"] * median(name, "cpu")
            print(
                f"{name} / {peer}: tokens/s {speed[name] / speed[peer]:.2f} for the whole command, "
                f"{rows / speed[peer]:.2f} from first batch to last row; per CPU second {1 / cpu:.2f}"
            )


if __name__ == "__main__":
    main()
