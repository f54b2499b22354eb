# SPDX-License-Identifier: Apache-2.0
"""MindFormers' public YAMLs of LLaMA's shape as facts, for tests/unit/jobs/test_mindformers_yamls.py.

    python -m tests.helpers.mindformers_yamls CHECKOUT

reads every version that the branches and tags of a git checkout of MindFormers hold of research/mixtral, and every
dense one of r1.3 to r1.7 whose network LlamaConfig describes, and writes tests/golden/mindformers_yamls.json: names,
releases, hashes, and of the sections that our checks read the keys with their numbers, switches and single words.
Paths, comments and all other text stay out. Equal sections are kept once.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).resolve().parents[1] / "golden" / "mindformers_yamls.json"
RELEASE = re.compile(r"(?:origin/)?[rv](1\.\d)")
DENSE = ("1.3", "1.4", "1.5", "1.6", "1.7")
SECTIONS = (
    "model moe_config parallel_config parallel recompute_config swap_config runner_config optimizer lr_schedule "
    "runner_wrapper callbacks context"
).split()
ABSENT = "-"
CONTEXT = ("mode", "device_target", "jit_config", "max_device_memory")
WORD = re.compile(r"[\w.+-]{0,40}")  # a single word
PATTERN = ("target_modules", "exclude_layers")  # texts that are read: regular expressions over layers' names
TRUTH = (sorted("true"), sorted("false"))
LISTED = ("select_recompute", "select_comm_recompute")


class _Loader(yaml.SafeLoader):
    """PyYAML's own, with the numbers that YAML 1.2 knows (1e-5), as MindFormers reads them later."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*\.?\d*[eE][-+]?\d+$"), list("-+0123456789")
)


def versions(checkout: Path) -> dict[tuple[str, str], set[str]]:
    """Releases (``dev`` for anything between) by (name of the file, git's hash of its content)."""
    found: dict[tuple[str, str], set[str]] = {}
    for ref in _git(checkout, "for-each-ref", "--format=%(refname:short)").splitlines():
        match = RELEASE.match(ref)
        release = match[1] if match else "dev"
        for line in _git(checkout, "ls-tree", "-r", ref).splitlines():
            words, name = line.split("\t")
            kind, blob = words.split()[1:]
            if kind != "blob" or not name.endswith(".yaml") or name.startswith("tests/"):
                continue
            if "research/mixtral/" in name or release in DENSE:
                found.setdefault((name, blob), set()).add(release)
    return found


def facts(text: str) -> dict[str, Any] | None:
    """What is kept of one file; None for a network of another kind."""
    try:
        content = yaml.load(text, _Loader)  # noqa: S506  a safe loader
    except yaml.YAMLError:
        return None
    if not isinstance(content, dict) or "run_mode" not in content:
        return None
    model = content.get("model")
    if not isinstance(model, dict) or (model.get("model_config") or {}).get("type") != "LlamaConfig":
        return None
    kept: dict[str, Any] = {}
    for name, value in content.items():
        if name == "context":
            value = {key: value[key] for key in CONTEXT if key in (value or {})}
        whole = name in SECTIONS or not isinstance(value, (Mapping, list))
        kept[name] = _plain(value) if whole else None
    return kept


def table(checkout: Path) -> dict[str, Any]:
    """The whole table."""
    sections: list[Any] = []
    places: dict[str, int] = {}
    files = []
    for (name, blob), releases in sorted(versions(checkout).items()):
        data = subprocess.run(["git", "-C", str(checkout), "cat-file", "blob", blob], capture_output=True, check=True)
        kept = facts(data.stdout.decode("utf-8", "replace"))
        if kept is None or (not (moe := _experts(kept)) and not releases & set(DENSE)):
            continue
        if moe and "research/mixtral/" not in name:
            continue
        top = {key: kept[key] for key in sorted(kept) if key not in SECTIONS}
        parts = []
        for value in (top, *(kept.get(key, ABSENT) for key in SECTIONS)):
            place = places.setdefault(json.dumps(value), len(sections))
            if place == len(sections):
                sections.append(value)
            parts.append(place)
        files.append(
            {
                "name": name,
                "releases": sorted(releases),
                "sha256": hashlib.sha256(data.stdout).hexdigest(),
                "devices": devices(name, kept),
                "verdict": verdict(kept),
                "parts": parts,
            }
        )
    return {"sections": sections, "files": files}


def verdict(kept: Mapping[str, Any]) -> str:
    """What a file deserves: ``ours`` or ``theirs``, whose network runs it, or why it may be refused: ``typo``,
    ``quantised``, or ``broken``: MindFormers' AdamW takes betas, and no release trains without an optimizer."""
    words = kept["model"].get("model_config") or {}
    if any(sorted(text.lower()) in TRUTH and text.lower() not in ("true", "false") for text in _texts(kept)):
        return "typo"
    if any(words.get(name) for name in ("quant", "quant_config", "quantization", "quantization_config")):
        return "quantised"
    optimizer = kept.get("optimizer") or {}
    if optimizer.get("type") == "AdamW" and "beta1" in optimizer:
        return "broken"
    if kept["run_mode"] in ("train", "finetune") and not optimizer:
        return "broken"
    return "ours" if _experts(kept) or (kept.get("context") or {}).get("device_target") == "CPU" else "theirs"


def devices(name: str, kept: Mapping[str, Any]) -> int:
    """What the name says (``_32p``), else the product of the split, 1 without ``use_parallel``."""
    if said := re.search(r"_(\d+)p\b", name.replace(".yaml", "")):
        return int(said[1])
    sizes = kept.get("parallel_config") or {}
    product = 1
    for key in ("data_parallel", "model_parallel", "pipeline_stage", "context_parallel"):
        product *= sizes.get(key) or 1
    return product if kept.get("use_parallel") else 1


def configurations(text: str | None = None) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each file's row of the table, and its configuration."""
    held = json.loads(text or TABLE.read_text(encoding="utf-8"))
    for row in held["files"]:
        top, *parts = (json.loads(json.dumps(held["sections"][place])) for place in row["parts"])
        yield row, {**top, **{key: part for key, part in zip(SECTIONS, parts, strict=True) if part != ABSENT}}


def _experts(kept: Mapping[str, Any]) -> bool:
    words = kept.get("moe_config") or (kept["model"].get("model_config") or {}).get("moe_config") or {}
    return (words.get("expert_num") or 1) > 1


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _plain(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, key) for item in value]
    if isinstance(value, str) and key not in (*PATTERN, *LISTED) and not WORD.fullmatch(value):
        return ""
    return value


def _git(checkout: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, check=True, text=True).stdout


if __name__ == "__main__":
    found = table(Path(sys.argv[1]))
    lines = [json.dumps(item, separators=(",", ":")) for item in found["sections"]]
    rows = [json.dumps(item, separators=(",", ":")) for item in found["files"]]
    TABLE.write_text(
        '{"sections":[\n' + ",\n".join(lines) + '\n],"files":[\n' + ",\n".join(rows) + "\n]}\n", encoding="utf-8"
    )
    print(f"{len(rows)} files, {len(lines)} sections, {TABLE.stat().st_size} bytes")
