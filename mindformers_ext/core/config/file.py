# SPDX-License-Identifier: Apache-2.0
"""YAML files and values, read and written safely: no tags, no duplicate keys, numbers such as 1e-5 are numbers.

A value that cannot be built (a date such as 2001-13-45, an integer of 5000 digits) is refused with its place. Sizes are
bounded while the text is read: PyYAML needs 50 microseconds for a value.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mindformers_ext.core.errors import UserError

SIZE_LIMIT = 2**20  # bytes; real files have a few thousand
NODE_LIMIT = 50_000  # values and names, aliases followed: a few lines of nested aliases can mean billions
DEPTH_LIMIT = 50
INT_BITS = 256  # of an integer; floats hold such a number too

# YAML 1.2's floats: YAML 1.1, which PyYAML follows, reads 1e-5 and 1.e5 without a sign as text
_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")

_LINE_ENDS = re.compile("[\r\x85\u2028\u2029]")
_TOO_DEEP = f"nested deeper than {DEPTH_LIMIT} levels (or an alias inside itself)"
_TOO_MANY = f"more than {NODE_LIMIT} values"
_SHOWN = 40  # characters of a value in a message


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that refuses a key given twice in one mapping, explicit tags and values that cannot be
    built, and stops reading where it is too deep or too long."""

    depth = -1
    count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node; refused here, as the scanner's time grows with the square of the depth."""
        self.depth += 1
        self.count += 1
        if self.depth > DEPTH_LIMIT:
            raise UserError(_TOO_DEEP)
        if self.count > NODE_LIMIT:
            raise UserError(_TOO_MANY)
        event = self.peek_event()  # type: ignore[no-untyped-call]
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise UserError(f"{_place(event.start_mark)}: the tag {_written(tag)} is refused: write the value alone")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of ``node``; ``UserError`` with its place where PyYAML's constructors fail."""
        try:
            value = super().construct_object(node, deep)
        except (UserError, yaml.YAMLError):
            raise
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            raise UserError(f"{_place(node.start_mark)}: {_refused(node)}") from error
        if isinstance(value, int) and value.bit_length() > INT_BITS:
            raise UserError(f"{_place(node.start_mark)}: {_refused(node)}")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of ``node``; merged anchors (``<<``) may be overridden, written keys may not repeat."""
        seen: dict[object, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            key = self.construct_object(key_node)
            line = key_node.start_mark.line + 1
            if key in seen:
                raise UserError(f"key '{key}' stands twice, in line {seen[key]} and line {line}: remove one of them")
            seen[key] = line
        return super().construct_mapping(node, deep)


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _written(tag: str) -> str:
    return "!!" + tag.removeprefix("tag:yaml.org,2002:") if tag.startswith("tag:yaml.org,2002:") else tag


def _refused(node: yaml.Node) -> str:
    """Why ``node``, which looks like a value of its kind, is none."""
    kind = node.tag.rpartition(":")[2]
    text = node.value if isinstance(node.value, str) else "..."
    shown = repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r} and {len(text) - _SHOWN} characters more"
    return f"{shown} looks like a value of the kind {kind} and is none: correct it, or quote it if it is a text"


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper that quotes a text which ``_Loader`` would read as a number, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        """A section used twice is written twice, so that one can be edited alone; never ``&id001``."""
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """``data``; rare line ends are escaped, which PyYAML would write as they are and read as a blank."""
        style = '"' if _LINE_ENDS.search(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)

for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file at ``path``.

    Raises:
        UserError: the file is missing, too large, not YAML, not a mapping, or holds a key twice.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"configuration file {path} {what}: give the path of a .yaml file")
    size = path.stat().st_size
    if size > SIZE_LIMIT:
        raise UserError(f"{path} has {size} bytes, more than {SIZE_LIMIT}: this is hardly a configuration file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise UserError(f"{path} {found}: a configuration is a mapping of keys to values")
    names = [key for key in content if not isinstance(key, str)]
    if names:
        raise UserError(f"{path}: the keys {names} are not text: quote them")
    return content


def parse_yaml(text: str, where: str) -> Any:
    """The value of YAML ``text``; ``where`` names its source in messages.

    Raises:
        UserError: the text is not YAML, holds a key twice, or is nested too deep or too wide.
    """
    try:
        loader = _Loader(text)  # already looks for characters that no YAML may hold
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, 0, [NODE_LIMIT])
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def dump_yaml(config: Mapping[str, Any]) -> str:
    """``config`` as YAML text in its own order; ``parse_yaml`` and any YAML 1.1 reader give it back.

    Raises:
        UserError: a value is no plain YAML value (an object of a framework, for example), or holds itself.
    """
    try:
        return yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    except yaml.representer.RepresenterError as error:
        raise UserError(f"not a plain YAML value: {error.args[-1]!r}") from error
    except RecursionError as error:
        raise UserError("a value holds itself: YAML text cannot say that") from error


def _measure(node: yaml.Node, depth: int, left: list[int]) -> None:
    """Refuse a document that is too deep or, with aliases followed, too large."""
    left[0] -= 1
    if depth > DEPTH_LIMIT:
        raise UserError(_TOO_DEEP)
    if left[0] < 0:
        raise UserError(f"{_TOO_MANY} once aliases are followed")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _measure(key, depth + 1, left)
            _measure(value, depth + 1, left)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _measure(item, depth + 1, left)
