# SPDX-License-Identifier: Apache-2.0
"""What a Linux shared library defines and what it asks of others, read from its dynamic symbol table (ELF, 64 bit).

Layout: System V ABI, chapters 4 and 5; symbol versions: Linux Standard Base, "Symbol Versioning".
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mindformers_ext.core.errors import UserError

MACHINES = {62: "x86_64", 183: "aarch64"}
_DYNSYM, _DYNAMIC, _VERSYM = 11, 6, 0x6FFFFFFF
_NEEDED, _UNDEFINED, _GLOBAL = 1, 0, 1
_UNVERSIONED = 1  # the version index of a symbol bound to no version


@dataclass(frozen=True)
class Library:
    """Names in the dynamic symbol table of one library.

    ``undefined`` leaves out weak symbols, which may stay unresolved, and those bound to a version of their library,
    as the C and C++ runtime's are.
    """

    machine: str
    needed: frozenset[str]
    defined: frozenset[str]
    undefined: frozenset[str]


def read_library(path: Path) -> Library:
    """The dynamic symbols of ``path``.

    Raises:
        UserError: no 64-bit little-endian ELF file, or cut short.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:6] != b"\x7fELF\x02\x01":
            raise UserError(f"{path} is not a 64-bit little-endian ELF library")
        try:
            return _read(data)
        except (struct.error, ValueError, StopIteration) as error:
            raise UserError(f"{path} is damaged: its symbol table cannot be read ({error})") from error


@dataclass(frozen=True)
class _Section:
    kind: int
    offset: int
    size: int
    link: int


def _read(data: mmap.mmap) -> Library:
    (machine,) = struct.unpack_from("<H", data, 18)
    (start,) = struct.unpack_from("<Q", data, 40)
    width, count = struct.unpack_from("<HH", data, 58)
    sections = []
    for place in range(count):
        _, kind, _, _, offset, size, link = struct.unpack_from("<IIQQQQI", data, start + place * width)
        sections.append(_Section(kind, offset, size, link))
    found = {section.kind: section for section in sections}
    needed = set()
    if _DYNAMIC in found:
        names = sections[found[_DYNAMIC].link]
        for tag, value in _pairs(data, found[_DYNAMIC]):
            if tag == _NEEDED:
                needed.add(_text(data, names, value))
    defined, undefined = set(), set()
    for name, bind, home, version in _symbols(data, sections, found):
        if home != _UNDEFINED:
            defined.add(name)
        elif bind == _GLOBAL and version <= _UNVERSIONED:
            undefined.add(name)
    return Library(MACHINES.get(machine, str(machine)), frozenset(needed), frozenset(defined), frozenset(undefined))


def _pairs(data: mmap.mmap, section: _Section) -> Iterator[tuple[int, int]]:
    yield from struct.iter_unpack("<QQ", data[section.offset : section.offset + section.size // 16 * 16])


def _symbols(
    data: mmap.mmap, sections: list[_Section], found: dict[int, _Section]
) -> Iterator[tuple[str, int, int, int]]:
    """(name, binding, section index, version index) of every dynamic symbol that has a name."""
    if _DYNSYM not in found:
        return
    table = found[_DYNSYM]
    names = sections[table.link]
    versions = found.get(_VERSYM)
    for place in range(table.size // 24):
        name, info, _, home = struct.unpack_from("<IBBH", data, table.offset + 24 * place)
        if name:
            version = struct.unpack_from("<H", data, versions.offset + 2 * place)[0] if versions else 0
            yield _text(data, names, name), info >> 4, home, version


def _text(data: mmap.mmap, names: _Section, start: int) -> str:
    first = names.offset + start
    return data[first : data.find(b"\0", first)].decode("ascii", "replace")
