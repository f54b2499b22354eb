# SPDX-License-Identifier: Apache-2.0
"""The manifest of a prepared corpus: a folder of token rows by split and domain.

``OUT/manifest.json`` names the files ``OUT/<split>/<domain>.mindrecord`` (``<domain>-00000-of-00004.mindrecord`` and so
on where there are several), their rows, bytes and hashes, and what was counted; docs/formats.md has the fields. Whoever
reads it trusts nothing in it: every field is checked, names stay inside the split's folder and no link is followed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.core.plain_file import refuse_other
from mindformers_ext.formats.atomic import write_text

FORMAT = "mindformers_ext domains 1"
MANIFEST = "manifest.json"
EVAL, FOR_PRUNE, FOR_FT = SPLITS = ("eval", "for_prune", "for_ft")
MOST_DOMAINS, MOST_FILES = 1000, 99_999
LARGEST = 2**62  # tokens, bytes, rows: sums of a few stay below 2**63
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of a domain
_HASH = re.compile("[0-9a-f]{64}")
ADVICE = "prepare the data again with llama_preprocess.py --dataset_type domains, or copy the folder again"


@dataclass(frozen=True)
class RecordFile:
    """One MindRecord of a split: its name, rows, and the bytes and SHA-256 of the file itself (not of its index)."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DomainFiles:
    """The files of one domain in one split; rows follow each other in their order."""

    files: tuple[RecordFile, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)


@dataclass(frozen=True)
class DomainCounts:
    """What became of a domain's documents and tokens.

    ``documents`` were read; ``filtered`` of them, by the filter's name, were left out, and ``unused_documents`` because
    every split was full or another domain has a copy in an earlier split. Of the others ``tokens`` were used: they are
    rows, or ``dropped_tokens`` at the end of a split that fill none. ``unused_tokens`` are those of unused documents,
    and what a full split left of its last ones.
    """

    documents: int = 0
    filtered: Mapping[str, int] = field(default_factory=dict)
    tokens: int = 0
    dropped_tokens: int = 0
    unused_documents: int = 0
    unused_tokens: int = 0


@dataclass(frozen=True)
class TokenizerFacts:
    """Which tokenizer made the ids: the hash of its file, its number of ids, BOS and EOS."""

    sha256: str
    vocab_size: int
    bos: int
    eos: int


@dataclass(frozen=True)
class Manifest:
    """A prepared corpus. ``splits`` has every split and in each every domain; ``folder`` is where it was read."""

    tokenizer: TokenizerFacts
    seq_length: int
    seed: int
    domains: tuple[str, ...]
    splits: Mapping[str, Mapping[str, DomainFiles]]
    counts: Mapping[str, DomainCounts]
    folder: Path = field(default=Path(), compare=False)

    def as_json(self) -> str:
        """Canonical text: names sorted, one final line end."""
        splits = {
            split: {
                domain: {"rows": found.rows, "files": [vars(file) for file in found.files]}
                for domain, found in domains.items()
            }
            for split, domains in self.splits.items()
        }
        value = {
            "format": FORMAT,
            "tokenizer": vars(self.tokenizer),
            "seq_length": self.seq_length,
            "seed": self.seed,
            "domains": list(self.domains),
            "splits": splits,
            "counts": {name: {**vars(count), "filtered": dict(count.filtered)} for name, count in self.counts.items()},
        }
        return json.dumps(value, indent=1, sort_keys=True) + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical text: two prepared folders with one digest hold the same rows."""
        return sha256(self.as_json().encode()).hexdigest()


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write ``folder``/manifest.json, whole or not at all."""
    write_text(folder / MANIFEST, manifest.as_json())


def split_files(manifest: Manifest, split: str) -> dict[str, tuple[Path, ...]]:
    """The files of a split by domain, in the manifest's order; a domain without rows has none.

    Raises:
        UserError: no such split; a file or its index is missing, is a link, or has another size than it was written
            with.
    """
    problems = Problems(str(manifest.folder))
    problems.one_of("split", split, SPLITS)
    problems.raise_if_any()
    refuse_linked_folder(manifest.folder / split)
    result = {}
    for domain in manifest.domains:
        found = manifest.splits[split][domain].files
        result[domain] = tuple(manifest.folder / split / file.name for file in found)
        for path, file in zip(result[domain], found, strict=True):
            for part in (path, path.with_name(path.name + ".db")):
                refuse_other(part)
                if not part.is_file():
                    problems.add(f"'{part}' is missing", ADVICE)
            if path.is_file() and path.stat().st_size != file.bytes:
                problems.add(f"'{path}' has {path.stat().st_size} bytes, the manifest says {file.bytes}", ADVICE)
    problems.raise_if_any()
    return result


def refuse_linked_folder(folder: Path) -> None:
    """A ``UserError`` where ``folder`` is a link."""
    if folder.is_symlink():
        raise UserError(f"'{folder}' is a link, which is not followed: give the folder that holds the data itself")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the prepared ``folder``, every field checked. The files are looked at by ``split_files``.

    Raises:
        UserError: no manifest, not JSON, another format, or fields that do not fit; all of them are listed.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder: give one that llama_preprocess.py --dataset_type domains wrote")
    refuse_other(path)
    if not path.is_file():
        raise UserError(f"'{folder}' holds no {MANIFEST}: {ADVICE}")
    value = read_object(path, ADVICE)
    found = value.get("format")
    if found != FORMAT:
        raise UserError(f"'{path}' has the format {found!r:.60}, known is '{FORMAT}': {ADVICE}")
    return _Reader(path).manifest(value)


class _Reader:
    """Fields out of a manifest's values; what is wrong is collected."""

    def __init__(self, path: Path) -> None:
        self.folder, self.problems = path.parent, Problems(str(path))

    def manifest(self, value: dict[str, Any]) -> Manifest:
        """The checked manifest."""
        names = ("format", "tokenizer", "seq_length", "seed", "domains", "splits", "counts")
        self.table(value, "the manifest", names)
        self.problems.raise_if_any()
        domains = self.domains(value["domains"])
        self.problems.raise_if_any()
        splits = self.table(value["splits"], "splits", SPLITS)
        counts = self.table(value["counts"], "counts", domains)
        made = Manifest(
            self.tokenizer(value["tokenizer"]),
            self.number(value, "seq_length", 1, 2**31 - 1),
            self.number(value, "seed", 0, 2**63 - 1),
            domains,
            {split: self.split(split, splits.get(split), domains) for split in SPLITS},
            {domain: self.counts(domain, counts.get(domain)) for domain in domains},
            self.folder,
        )
        self.problems.raise_if_any()
        for domain in domains:
            rows = sum(made.splits[split][domain].rows for split in SPLITS)
            count = made.counts[domain]
            if rows * made.seq_length + count.dropped_tokens != count.tokens:
                self.wrong(
                    f"counts.{domain}: {rows} rows of {made.seq_length} tokens and {count.dropped_tokens} dropped ones "
                    f"are not {count.tokens} tokens"
                )
        self.problems.raise_if_any()
        return made

    def wrong(self, what: str) -> None:
        self.problems.add(what, ADVICE)

    def table(self, value: Any, where: str, names: tuple[str, ...], more: tuple[str, ...] = ()) -> dict[str, Any]:
        """A JSON object with exactly ``names``, and perhaps ``more``."""
        if not isinstance(value, dict):
            self.wrong(f"{where} is {value!r:.40}, not a table")
            return {}
        self.problems.add_names(
            "names", f"are missing in {where}", [name for name in names if name not in value], ADVICE
        )
        unknown = [name[:60] for name in value if name not in names and name not in more]
        self.problems.add_names("names", f"in {where} are unknown", unknown, ADVICE)
        return value

    def number(self, table: dict[str, Any], name: str, low: int = 0, high: int = LARGEST, where: str = "") -> int:
        value = table.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        if name in table:
            self.wrong(f"{where}{name}={value!r:.40} is no whole number from {low} to {high}")
        return low

    def digest(self, table: dict[str, Any], where: str) -> str:
        value = table.get("sha256")
        if isinstance(value, str) and _HASH.fullmatch(value):
            return value
        if "sha256" in table:
            self.wrong(f"{where}sha256={value!r:.40} is not 64 hexadecimal digits")
        return ""

    def domains(self, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not 1 <= len(value) <= MOST_DOMAINS:
            self.wrong(f"domains is {value!r:.40}, not a list of 1 to {MOST_DOMAINS} names")
            return ()
        for name in value:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                self.wrong(f"domain {name!r:.80}: {NAMES}")
        if not self.problems.lines and len(set(value)) < len(value):
            self.wrong("a domain is named twice")
        return tuple(value)

    def tokenizer(self, value: Any) -> TokenizerFacts:
        table = self.table(value, "tokenizer", ("sha256", "vocab_size", "bos", "eos"))
        size = self.number(table, "vocab_size", 1, 2**31 - 1, "tokenizer.")
        bos, eos = (self.number(table, name, 0, size - 1, "tokenizer.") for name in ("bos", "eos"))
        return TokenizerFacts(self.digest(table, "tokenizer."), size, bos, eos)

    def split(self, split: str, value: Any, domains: tuple[str, ...]) -> dict[str, DomainFiles]:
        table = self.table(value, f"splits.{split}", domains)
        result = {domain: self.files(f"splits.{split}.{domain}", table.get(domain)) for domain in domains}
        names = [file.name for found in result.values() for file in found.files]
        if len(set(names)) < len(names):
            self.wrong(f"splits.{split}: a file is named twice")
        return result

    def files(self, where: str, value: Any) -> DomainFiles:
        table = self.table(value, where, ("rows", "files"))
        listed = table.get("files", [])
        if not isinstance(listed, list) or len(listed) > MOST_FILES:
            self.wrong(f"{where}.files is {listed!r:.40}, not a list of up to {MOST_FILES} files")
            return DomainFiles()
        found = DomainFiles(tuple(self.file(f"{where}.files[{number}]", item) for number, item in enumerate(listed)))
        rows = self.number(table, "rows", where=f"{where}.")
        if rows != found.rows and not self.problems.lines:
            self.wrong(f"{where}.rows={rows}, its files have {found.rows}")
        return found

    def file(self, where: str, value: Any) -> RecordFile:
        table = self.table(value, where, ("name", "rows", "bytes", "sha256"))
        name = table.get("name", "")
        if not isinstance(name, str) or not is_file_name(name):
            self.wrong(f"{where}.name={name!r:.80} is no plain name that ends in .mindrecord")
            name = ""
        rows, size = (self.number(table, word, 1, where=f"{where}.") for word in ("rows", "bytes"))
        return RecordFile(name, rows, size, self.digest(table, f"{where}."))

    def counts(self, domain: str, value: Any) -> DomainCounts:
        where, plain = f"counts.{domain}", ("documents", "tokens", "dropped_tokens")
        later = ("unused_documents", "unused_tokens")
        table = self.table(value, where, (*plain, "filtered"), later)
        filtered = table.get("filtered", {})
        if not isinstance(filtered, dict) or len(filtered) > MOST_DOMAINS:
            self.wrong(f"{where}.filtered is {filtered!r:.40}, not a table of counts")
            filtered = {}
        removed = {name: self.number(filtered, name, where=f"{where}.filtered.") for name in filtered}
        numbers = {name: self.number(table, name, where=f"{where}.") for name in (*plain, *later)}
        return DomainCounts(filtered=removed, **numbers)


NAMES = "a name has letters, digits, '_', '-' and '.', begins with a letter or digit, and has at most 64 characters"


def is_file_name(name: str) -> bool:
    """Whether ``name`` is one that a prepared file may have: nothing that leads out of its folder."""
    base = name.removesuffix(".mindrecord")
    return base != name and bool(re.fullmatch(NAME.pattern.replace("63", "90"), base))
