# SPDX-License-Identifier: Apache-2.0
"""Calibration text as token rows: the domains of LLaMA's pretraining from jsonl files, or one plain text.

A text of n tokens gives ceil(n / room) chunks, room being the tokens of a row beside what frames a text (BOS), so that
no token is lost; each chunk is framed and padded on the right with EOS.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from hashlib import sha256
from itertools import islice
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.json_text import TABLES, JsonError, parse_json
from mindformers_ext.data.json_records import LONGEST
from mindformers_ext.data.readers import Cutting, read_text
from mindformers_ext.data.text_lines import decoded
from mindformers_ext.data.tokenizers import Tokenizer, encode_glued, puts_blank
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.jobs.experts.probe import Rows

# per mille of LLaMA's pretraining data (Touvron et al. 2023, arXiv:2302.13971, table 1)
DOMAINS = {
    "commoncrawl": 670,
    "c4": 150,
    "github": 45,
    "wikipedia": 45,
    "books": 45,
    "arxiv": 25,
    "stackexchange": 20,
}
FIELD = "content"
MOST_BAD = 0.01  # share of lines that may be unusable
BATCH = 64  # texts encoded at once
MOST_CHUNK = 1 << 20  # tokens of a row


@dataclass(frozen=True)
class Chunks:
    """Rows of different lengths, one behind the other: ids (tokens) int32, ends (rows) int64."""

    ids: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, index: int) -> np.ndarray:
        """One row."""
        return self.ids[self.ends[index - 1] if index else 0 : self.ends[index]]


@dataclass(frozen=True)
class Reading:
    """What reading one domain's files found: lines, those that cannot be used, those without a token, and why."""

    lines: int = 0
    bad: int = 0
    empty: int = 0
    first: str = ""


def domain_counts(lengths: Mapping[str, int], percent: float, weights: Mapping[str, int]) -> dict[str, int]:
    """Rows to take of each domain: floor(w * min_j(length_j / w_j)), of which a share of ``percent`` is used.

    Exact, in fractions. The domain that limits all gives all its rows at ``percent`` 1.
    """
    limit = min(Fraction(lengths[key], weight) for key, weight in weights.items())
    return {key: int(int(weight * limit) * percent) for key, weight in weights.items()}


def read_domains(
    folder: Path,
    cache: Path | None,
    tokenizer: Tokenizer,
    length: int,
    percent: float = 0.01,
    weights: Mapping[str, int] = DOMAINS,
    seed: int = 0,
    keep: bool = True,
) -> tuple[Rows, list[str]]:
    """The domains' rows, shuffled by ``seed``, and what to tell the user.

    Files are ``<folder>/*<key>*.jsonl`` with a text in ``content`` on each line; tokens are kept in
    ``<cache>/<key>_cached.npz`` and made anew when texts, tokenizer or ``length`` differ; written where ``keep``.

    Raises:
        UserError: a key without files, more than one line in a hundred that cannot be used, or no row at all.
    """
    check_percent(percent)
    files = domain_files(folder, weights)
    found: dict[str, Chunks] = {}
    notes: list[str] = []
    for key, paths in files.items():
        found[key], reading = _chunks(key, paths, cache, tokenizer, length, keep)
        if reading.bad:
            notes.append(f"{key}: {reading.bad} of {reading.lines} lines cannot be used ({reading.first})")
        if reading.empty:
            notes.append(f"{key}: {reading.empty} texts without a token were left out")
    counts = domain_counts({key: len(chunks) for key, chunks in found.items()}, percent, weights)
    none = [key for key, count in counts.items() if not count]
    if len(none) == len(counts):
        sizes = ", ".join(f"{key} {len(chunks)}" for key, chunks in found.items())
        raise UserError(
            f"data_use_percent {percent} of these texts is not one row of any domain (rows of {length} tokens: {sizes})"
            ": raise --data_use_percent, or lower --block_size"
        )
    if none:
        notes.append(f"no row of {', '.join(none)}: raise --data_use_percent to have them")
    draws = np.random.default_rng(seed)
    rows = [
        found[key].row(int(place))
        for key, count in counts.items()
        for place in draws.choice(len(found[key]), count, replace=False)
    ]
    notes.append("rows: " + ", ".join(f"{key} {count}" for key, count in counts.items()))
    order = draws.permutation(len(rows))
    return padded([rows[place] for place in order], length, padding_of(tokenizer)), notes


def read_plain_text(path: Path, tokenizer: Tokenizer, length: int) -> Rows:
    """A whole text file as rows in its order: each but the last is full."""
    cutting = Cutting(blank=puts_blank(tokenizer))
    ids: list[np.ndarray] = []
    for fragment in read_text(path, "file", cutting):
        found = encode_glued(tokenizer, [fragment.text]) if fragment.glued else tokenizer.encode_batch([fragment.text])
        ids.append(np.asarray(found[0], np.int32))
    every = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    if not len(every):
        raise UserError(f"'{path}' holds no text: give a file with some")
    return padded(list(_framed(every, tokenizer, length)), length, padding_of(tokenizer))


def padded(rows: Sequence[np.ndarray], length: int, padding: int) -> Rows:
    """Rows of one length."""
    ids = np.full((len(rows), length), padding, np.int32)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
    return Rows(ids, np.array([len(row) for row in rows], np.int64))


def limited(rows: Rows, tokens: int | None) -> Rows:
    """The first rows with ``tokens`` tokens in all, the last of them cut; all where None."""
    if tokens is None or rows.tokens <= tokens:
        return rows
    before = np.cumsum(rows.lengths) - rows.lengths
    count = int((before < tokens).sum())
    lengths = np.minimum(rows.lengths[:count], tokens - before[:count])
    return replace(rows.at(slice(count)), lengths=lengths)


def check_percent(percent: float) -> None:
    """A share above 0, up to 1; ``UserError`` otherwise."""
    if not 0 < percent <= 1:
        raise UserError(f"--data_use_percent {percent}: give a share above 0, up to 1")


def check_length(length: int, tokenizer: Tokenizer, positions: int) -> None:
    """``UserError`` where no row of so many tokens can be made, or the model was not made for one."""
    before, behind = tokenizer.frame
    least = len(before) + len(behind) + 1
    if not least <= length <= min(positions, MOST_CHUNK):
        raise UserError(
            f"--block_size {length}: give {least} to {min(positions, MOST_CHUNK)} tokens a row, which is what the "
            "model's positions allow (max_position_embeddings)"
        )


def check_vocabulary(rows: Rows, folder: Path, size: int) -> None:
    """``UserError`` where the tokenizer in ``folder`` gives an id for which the embedding has no row; ``size``: V."""
    largest = int(rows.ids.max(initial=0))
    if largest >= size:
        raise UserError(
            f"the tokenizer in '{folder}' gives the id {largest}, the embedding has {size} rows: they belong to "
            "different models"
        )


def domain_files(folder: Path, weights: Mapping[str, int]) -> dict[str, list[Path]]:
    """The files of each domain; ``UserError`` where one has none."""
    if not folder.is_dir():
        raise UserError(f"--train_data_path '{folder}' is no folder: give the one with *<key>*.jsonl files")
    problems = Problems(f"texts in '{folder}'")
    found = {key: sorted(path for path in folder.glob(f"*{key}*.jsonl") if path.is_file()) for key in weights}
    for key, paths in found.items():
        if not paths:
            problems.add(f"no file *{key}*.jsonl", "put one there, or leave the domain out with --domain_weights")
    problems.raise_if_any()
    return found


def _chunks(
    key: str, paths: Sequence[Path], cache: Path | None, tokenizer: Tokenizer, length: int, keep: bool
) -> tuple[Chunks, Reading]:
    """The rows of one domain: from the cache where it is of the same texts, tokenizer and length."""
    wanted = {
        "texts": texts_hash(paths),
        "tokenizer": tokenizer_hash(tokenizer.path),
        "block_size": length,
    }
    place = cache / f"{key}_cached.npz" if cache else None
    if place is not None and place.is_file():
        known = _read_cache(place, wanted)
        if known is not None:
            return known
    reading = _LineReading(key)
    flat, lengths = bytearray(), array("q")  # grows in place: the ids are in memory once
    texts = reading.texts(paths)
    while batch := list(islice(texts, BATCH)):
        for row in reading.rows(batch, tokenizer, length):
            flat += row.tobytes()
            lengths.append(len(row))
    reading.check()
    chunks = Chunks(np.frombuffer(flat, np.int32), np.cumsum(np.array(lengths, np.int64)))
    if place is not None and keep:
        _write_cache(place, chunks, reading.result(), wanted)
    return chunks, reading.result()


class _LineReading:
    """Reads lines and counts those that cannot be used."""

    def __init__(self, key: str) -> None:
        self.key, self.lines, self.bad, self.empty, self.first = key, 0, 0, 0, ""

    def texts(self, paths: Sequence[Path]) -> Iterator[str]:
        for path in paths:
            for number, line in enumerate(_lines(path), 1):
                if not line.strip():
                    continue
                self.lines += 1
                try:
                    yield _content(line)
                except JsonError as error:
                    self.bad += 1
                    self.first = self.first or f"{path.name}, line {number}: {error}"

    def rows(self, texts: list[str], tokenizer: Tokenizer, length: int) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for ids in tokenizer.encode_batch(texts) if texts else ():
            if not len(ids):
                self.empty += 1
                continue
            found += _framed(np.asarray(ids, np.int32), tokenizer, length)
        return found

    def check(self) -> None:
        if not self.lines:
            raise UserError(f"the files of {self.key} hold no line: give texts, one JSON object with '{FIELD}' a line")
        if self.bad == self.lines or self.bad > MOST_BAD * self.lines:
            raise UserError(
                f"{self.bad} of {self.lines} lines of {self.key} cannot be used (the first: {self.first}): write one "
                f"JSON object with a text in '{FIELD}' on each line; up to {MOST_BAD:.0%} may be wrong"
            )
        if self.empty + self.bad == self.lines:
            raise UserError(f"no text of {self.key} has a token: give files with text in '{FIELD}'")

    def result(self) -> Reading:
        return Reading(self.lines, self.bad, self.empty, self.first)


def _lines(path: Path) -> Iterator[str]:
    """Lines of a file; one beyond any text's length is a ``UserError``."""
    rest = ""
    for part in decoded(path):
        *whole, rest = (rest + part).split("\n")
        yield from whole
        if len(rest) > LONGEST:
            raise UserError(f"'{path}' has a line of more than {LONGEST} characters: cut the text")
    if rest:
        yield rest


def _content(line: str) -> str:
    value = parse_json(line, TABLES)
    if not isinstance(value, dict):
        raise JsonError("no JSON object")
    if not isinstance(value.get(FIELD), str):
        raise JsonError(f"no text in '{FIELD}'")
    return str(value[FIELD])


def _framed(ids: np.ndarray, tokenizer: Tokenizer, length: int) -> Iterator[np.ndarray]:
    before, behind = (np.array(part, np.int32) for part in tokenizer.frame)
    room = length - len(before) - len(behind)
    for start in range(0, len(ids), room):
        yield np.concatenate((before, ids[start : start + room], behind))


def padding_of(tokenizer: Tokenizer) -> int:
    """The id that fills rows up: EOS, or 0 where there is none."""
    return max(tokenizer.special_ids["eos_id"], 0)


def tokenizer_hash(path: Path) -> str:
    """One name for the files that make a tokenizer."""
    hashed = sha256()
    beside = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    for file in (path, *(path.parent / name for name in beside)):
        hashed.update(sha256(file.read_bytes()).digest() if file.is_file() else b"-")
    return hashed.hexdigest()


def texts_hash(paths: Sequence[Path]) -> str:
    """One name for the files' names and all they hold."""
    hashed = sha256()
    for path in paths:
        hashed.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
    return hashed.hexdigest()


def _write_cache(path: Path, chunks: Chunks, reading: Reading, wanted: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    note = json.dumps({**wanted, "lines": reading.lines, "bad": reading.bad, "empty": reading.empty,
                       "first": reading.first})  # fmt: skip
    with fresh_file(path, overwrite=True) as beside, beside.open("wb") as file:
        np.savez(file, ids=chunks.ids, ends=chunks.ends, about=np.frombuffer(note.encode(), np.uint8))


def _read_cache(path: Path, wanted: Mapping[str, object]) -> tuple[Chunks, Reading] | None:
    """What the cache holds; None where it is of something else, or no cache."""
    try:
        with np.load(path, allow_pickle=False) as found:
            about = parse_json(found["about"].tobytes())
            if not isinstance(about, dict) or any(about.get(key) != value for key, value in wanted.items()):
                return None
            ids, ends = found["ids"], found["ends"]
            reading = Reading(int(about["lines"]), int(about["bad"]), int(about["empty"]), str(about["first"]))
    except (OSError, ValueError, TypeError, KeyError, EOFError, JsonError, BadZipFile, zlib.error):
        return None
    if ids.dtype != np.int32 or ends.dtype != np.int64 or (ids.ndim, ends.ndim) != (1, 1):
        return None
    if (np.diff(ends, prepend=0) < 1).any() or (ends[-1:] != len(ids)).any() or (ids < 0).any():
        return None
    return Chunks(ids, ends), reading
