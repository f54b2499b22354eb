# SPDX-License-Identifier: Apache-2.0
"""Documents of a domain: where they lie, the blocks in which they are read, and what each of them holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.data.domains.manifest import MOST_DOMAINS, NAME, NAMES
from mindformers_ext.data.json_records import Record, read_records
from mindformers_ext.data.parquet import opened_parquet
from mindformers_ext.data.readers import find_files
from mindformers_ext.data.text_lines import PACKED, suffix_of

SUFFIXES = (".jsonl", ".json", ".parquet")  # the first two also behind .gz
TEXT_FIELDS = ("text", "content")
IDS = "input_ids"
FIELDS = (*TEXT_FIELDS, IDS)  # the first that a record has is its document, unless a field is asked for
ROWS = 256  # of a parquet file in memory at once
SMALLEST, LARGEST, BLOCKS = 4 << 20, 256 << 20, 4096  # bytes of a block; blocks of a corpus
WHOLE = -1


class Block(NamedTuple):
    """What one process reads at a time: bytes ``start`` to ``end`` of JSON lines, these row groups of a parquet file,
    or a whole file (``end`` WHOLE)."""

    domain: int
    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Row(Record):
    """A row of a parquet file."""

    @property
    def where(self) -> str:
        """How errors name it."""
        return f"{self.path}, row {self.number}"


def find_domains(source: str | None, given: Sequence[str]) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of every domain, and the names of what was left out.

    Args:
        source: a folder with a sub-folder or file per domain, which has its name; domains are in the order of names.
        given: ``name=path`` instead, in this order; a path is a file, a folder or a glob pattern.

    Raises:
        UserError: neither or both, a name that cannot be a domain's, nothing there, or a file of another kind.
    """
    left: list[str] = []
    if bool(source) == bool(given):
        raise UserError(
            "give either --input_glob FOLDER, which has a sub-folder per domain, or --domains NAME=PATH ..."
        )
    if given:
        pairs = [word.partition("=")[::2] for word in given]
        bare = [name for name, path in pairs if not path]
        if bare:
            raise UserError(f"--domains {bare[0]}: give NAME=PATH")
        places = [(name, path) for name, path in pairs]
    else:
        places, left = _children(Path(source or ""))
    problems = Problems("the domains")
    names = [name for name, _ in places]
    for name in dict.fromkeys(names):
        if not NAME.fullmatch(name):
            problems.add(f"'{name[:80]}' cannot be a domain's name", NAMES)
        if names.count(name) > 1:
            problems.add(
                f"'{name}' is given {names.count(name)} times", "give each domain once, as a folder of its files"
            )
    if len(names) > MOST_DOMAINS:
        problems.add(f"{len(names)} domains", f"give at most {MOST_DOMAINS}")
    problems.raise_if_any()
    found = {name: find_files(path, SUFFIXES) for name, path in places}
    for path in (path for files in found.values() for path in files):
        if suffix_of(path) not in SUFFIXES or path.suffixes[-2:] == [".parquet", PACKED]:
            raise UserError(f"'{path}' is of another kind: give .jsonl, .jsonl.gz or .parquet files")
    return found, left


def _children(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder: give one with a sub-folder or a file per domain, or --domains")
    found, left = [], []
    for child in sorted(folder.iterdir()):
        if child.name.startswith("."):
            continue
        if child.is_dir():
            found.append((child.name, str(child)))
        elif suffix_of(child) in SUFFIXES:
            found.append((child.name.removesuffix(PACKED).removesuffix(suffix_of(child)), str(child)))
        else:
            left.append(child.name)
    if not found:
        raise UserError(
            f"'{folder}' has no sub-folder and no .jsonl, .jsonl.gz or .parquet file: give the domains' folder"
        )
    return found, left


def plan_blocks(domains: Mapping[str, Sequence[Path]], size: int | None = None) -> list[Block]:
    """Every file in blocks, in the order of the domains and files; the same for the same files.

    A block has about ``size`` bytes, by default so many that there are some thousand blocks in all. What cannot be read
    from the middle is one block: a .gz file, and a JSON list.
    """
    paths = [path for files in domains.values() for path in files]
    total = sum(path.stat().st_size for path in paths)
    size = size or max(SMALLEST, min(LARGEST, total // BLOCKS))
    blocks = []
    for number, files in enumerate(domains.values()):
        for path in files:
            blocks += [Block(number, path, *place) for place in _places(path, size)]
    return blocks


def _places(path: Path, size: int) -> Iterator[tuple[int, int]]:
    if path.suffix == ".parquet":
        yield from _row_groups(path, size)
        return
    if path.suffix == PACKED or path.stat().st_size <= size or not _has_lines(path):
        yield 0, WHOLE
        return
    start, end = 0, path.stat().st_size
    with path.open("rb") as file:
        while start < end:
            following = _line_start(file, start + size, end)
            yield start, following
            start = following


def _line_start(file: BinaryIO, at: int, end: int) -> int:
    """The first place from ``at`` on where a line begins."""
    if at >= end:
        return end
    file.seek(at - 1)
    while (part := file.readline(1 << 20)) and not part.endswith(b"\n"):
        pass
    return min(file.tell(), end)


def _has_lines(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def _row_groups(path: Path, size: int) -> Iterator[tuple[int, int]]:
    with opened_parquet(path) as file:
        groups = file.metadata.num_row_groups
        step = max(1, groups * size // max(path.stat().st_size, 1))
        for start in range(0, groups, step):
            yield start, min(start + step, groups)


def read_block(block: Block, field: str | None, more: Sequence[str] = ()) -> Iterator[Record]:
    """The records of a block; ``more`` fields are wanted beside the document.

    Raises:
        UserError: a record that cannot be read, named by its place in the whole file.
    """
    if block.path.suffix == ".parquet":
        yield from _read_parquet(block, field, more)
        return
    try:
        place = None if block.end == WHOLE else (block.start, block.end)
        yield from read_records(block.path, place=place)
    except UserError as error:
        raise whole_error(block, error, field) from error


def whole_error(block: Block, error: UserError, field: str | None) -> UserError:
    """``error`` of a block's record with the record's and the line's number in the whole file: read from its start."""
    if block.end == WHOLE or not block.start or block.path.suffix == ".parquet":
        return error
    try:
        for record in read_records(block.path):
            document_of(record, field)
    except UserError as better:
        return better
    return error


def document_of(record: Record, field: str | None) -> str | npt.NDArray[np.int32]:
    """The document of a record: its text, or its token ids.

    Raises:
        UserError: no such field, or a value of another kind; the record is named.
    """
    name = field or next((name for name in FIELDS if name in record.value), TEXT_FIELDS[0])
    value = record.value.get(name)
    if not isinstance(value, list):
        return record.text(name, "name the field that holds the text or the token ids (--field)")
    wrong = next((item for item in value if type(item) is not int or not 0 <= item < 2**31), None)
    if wrong is not None:
        raise UserError(
            f"{record.where}: '{name}' holds {wrong!r:.40}, which is no token id: give whole numbers from 0"
        )
    return np.array(value, np.int32)


def score_of(record: Record, name: str) -> float:
    """The number in the field ``name`` of a record."""
    value: Any = record.value.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    have = "there is no such field" if name not in record.value else f"it is {value!r:.40}"
    raise UserError(f"{record.where}: the filter wants a number in '{name}', {have}: leave out the filter, or mend it")


def _read_parquet(block: Block, field: str | None, more: Sequence[str]) -> Iterator[Record]:
    with opened_parquet(block.path) as file:
        names = file.schema_arrow.names
        name = field or next((name for name in FIELDS if name in names), TEXT_FIELDS[0])
        missing = [column for column in (name, *more) if column not in names]
        if missing:
            have = ", ".join(names) or "none"
            raise UserError(f"{block.path} has the columns {have}, no '{missing[0]}': give another --field")
        groups = range(block.start, block.end)
        number = sum(file.metadata.row_group(group).num_rows for group in range(block.start))
        for batch in file.iter_batches(batch_size=ROWS, row_groups=groups, columns=[name, *more]):
            for value in batch.to_pylist():
                number += 1
                yield Row(block.path, number, 0, value)


def block_bytes(block: Block) -> int:
    """Bytes of the file that the block stands for, for a bar of progress."""
    size = block.path.stat().st_size
    if block.end == WHOLE:
        return size
    if block.path.suffix != ".parquet":
        return block.end - block.start
    with opened_parquet(block.path) as file:
        groups = max(int(file.metadata.num_row_groups), 1)
    return size * (block.end - block.start) // groups
