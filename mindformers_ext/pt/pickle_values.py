# SPDX-License-Identifier: Apache-2.0
"""The numbers inside an older pickle, read as data: a machine of our own goes through its instructions.

It builds lists, tuples, dictionaries, numbers, texts, numpy's numbers and arrays, and tensors, and knows no other name.
Nothing that a pickle names is imported or called. torch's own reader without code knows only protocol 2; the
reference's files are written with protocol 4 and hold numpy's numbers.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.pt.pickle_table import MAX_OPCODES

Stored = Callable[[str], bytes]  # the bytes of a storage, by its key
STORAGES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "LongStorage": "<i8", "IntStorage": "<i4",
    "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?", "BFloat16Storage": "<u2",
}  # fmt: skip
MOST_VALUES = 2**25  # of an array
_MARK = object()


class _Name(str):
    """A name that a pickle asks for, as text."""


def read_values(data: bytes, where: str, stored: Stored) -> Any:
    """What the pickle ``data`` of the file ``where`` holds; arrays and tensors as numpy arrays.

    Raises:
        UserError: it is damaged, too long, or asks for anything else.
    """
    machine = _Machine(stored)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPCODES:
                raise UserError(f"it has more than {MAX_OPCODES} instructions")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.do(opcode.name, argument)
    except UserError as error:
        raise UserError(f"'{where}' cannot be read as plain numbers: {error}") from error
    except Exception as error:  # noqa: BLE001 damaged bytes fail in many ways
        raise UserError(f"'{where}' has a damaged table ({type(error).__name__}): copy it again") from error
    raise UserError(f"'{where}' has a table without an end: copy it again")


class _Machine:
    """The stack of values and what is remembered by number."""

    def __init__(self, stored: Stored) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.stored = stored

    def do(self, name: str, argument: Any) -> None:
        """One instruction."""
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if argument is None else int(argument)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(argument)])
        elif name in _TUPLES:
            parts = self._popped(_TUPLES[name])
            stack.append(tuple(parts))
        elif name in ("TUPLE", "LIST", "APPENDS", "SETITEMS", "DICT", "POP_MARK"):
            self._collect(name, self._marked())
        elif name in ("APPEND", "SETITEM"):
            self._collect(name + "S", self._popped(1 if name == "APPEND" else 2))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_Name(argument if name == "GLOBAL" else " ".join(map(str, self._popped(2)))))
        elif name == "REDUCE":
            function, parts = self._popped(2)
            stack.append(_called(function, parts))
        elif name == "BUILD":
            target, state = self._popped(2)
            stack.append(_built(target, state))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            raise UserError(f"its table has the instruction {name}")

    def _popped(self, count: int) -> list[Any]:
        parts = self.stack[-count:]
        del self.stack[-count:]
        if len(parts) != count or any(part is _MARK for part in parts):
            raise ValueError("too few values")
        return parts

    def _marked(self) -> list[Any]:
        place = next(place for place in range(len(self.stack) - 1, -1, -1) if self.stack[place] is _MARK)
        parts = self.stack[place + 1 :]
        del self.stack[place:]
        return parts

    def _collect(self, name: str, parts: list[Any]) -> None:
        if name == "TUPLE":
            self.stack.append(tuple(parts))
        elif name == "LIST":
            self.stack.append(parts)
        elif name == "APPENDS":
            self.stack[-1].extend(parts)
        elif name in ("SETITEMS", "DICT"):
            if name == "DICT":
                self.stack.append({})
            self.stack[-1].update(zip(parts[::2], parts[1::2], strict=True))

    def _storage(self, asked: Any) -> tuple[str, bytes]:
        word, kind, key, _, _ = asked
        module, _, name = kind.partition(" ")
        if word != "storage" or module != "torch" or name not in STORAGES:
            raise UserError(f"it asks for the data {str(kind)[:80]!r}")
        return name, self.stored(str(key))


_VALUES = frozenset(
    """INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 STRING
    BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8""".split()
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "MARK": lambda: _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Array:
    """An array of numpy's whose content comes with the next instruction."""


def _called(function: Any, parts: Any) -> Any:
    """What the few known names give."""
    name = str(function).replace("numpy._core.", "numpy.core.") if isinstance(function, _Name) else ""
    if name == "numpy dtype":
        return np.dtype(_kind(parts[0]))
    if name == "numpy.core.multiarray scalar":
        return np.frombuffer(parts[1], parts[0], 1)[0].item()
    if name == "numpy.core.multiarray _reconstruct":
        return _Array()
    if name == "numpy.core.numeric _frombuffer":
        buffer, dtype, shape, order = parts
        return _shaped(np.frombuffer(buffer, dtype), shape, "F" if order == "F" else "C")
    if name == "_codecs encode" and parts[1] == "latin1":
        return parts[0].encode("latin1")
    if name == "collections OrderedDict":
        return dict(*parts)
    if name in ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2"):
        return _tensor(*parts[:4])
    if name == "torch._utils _rebuild_parameter":
        return parts[0]
    raise UserError(f"it asks to run {str(function)[:80]!r}")


def _built(target: Any, state: Any) -> Any:
    if isinstance(target, np.dtype):  # (version, byte order, ...), the rest is empty for plain kinds
        return target.newbyteorder(state[1]) if state[1] in "<>" else target
    if isinstance(target, _Array):
        _, shape, dtype, fortran, content = state
        return _shaped(np.frombuffer(content, dtype), shape, "F" if fortran else "C")
    return target  # what torch keeps beside a dictionary


def _kind(text: Any) -> str:
    if not isinstance(text, str) or text.lstrip("<>|=")[:1] not in "biuf" or len(text) > 4:
        raise UserError(f"it holds values of numpy's type {str(text)[:20]!r}, which are no numbers")
    return text


def _shaped(values: np.ndarray, shape: Any, order: Any) -> np.ndarray:
    return values.reshape(tuple(map(int, shape)), order=order).astype(values.dtype.newbyteorder("="))


def _tensor(storage: tuple[str, bytes], offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    values = np.frombuffer(storage[1], STORAGES[storage[0]])
    counts = [int(n) for n in (*shape, *strides, offset)]
    last = offset + sum((length - 1) * step for length, step in zip(shape, strides, strict=True))
    if min(counts, default=0) < 0 or int(np.prod(shape, dtype=object)) > min(MOST_VALUES, len(values)):
        raise UserError(f"it holds a tensor {tuple(shape)} with less data than its shape needs, or too large")
    if 0 not in shape and last >= len(values):
        raise UserError(f"it holds a tensor {tuple(shape)} that reaches beyond its data")
    item = values.itemsize
    view = np.lib.stride_tricks.as_strided(values[offset:], shape, [step * item for step in strides])
    if storage[0] == "BFloat16Storage":
        return (view.astype(np.uint32) << 16).view(np.float32)
    return view.copy()
