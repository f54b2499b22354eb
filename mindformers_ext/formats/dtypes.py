# SPDX-License-Identifier: Apache-2.0
"""One table of element types: numpy's, safetensors' name, MindSpore's name, the command line's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import DTYPE_NAMES, DTYPE_WORDS, dtype_name
from mindformers_ext.formats.tensors import Array

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
FLOAT16: np.dtype[Any] = np.dtype("<f2")
HALF_START, HALF_END = (127 - 14) << 7, (127 + 16) << 7  # bits of 2**-14 and 2**16 as bfloat16


@dataclass(frozen=True)
class DtypeRow:
    """One element type; an empty name means that the format cannot hold it."""

    numpy: np.dtype[Any]
    safetensors: str
    mindspore: str
    long: str


# The numpy view of a file is little-endian on every machine ("<" where it matters).
TABLE = (
    DtypeRow(np.dtype("<f8"), "F64", "Float64", "float64"),
    DtypeRow(np.dtype("<f4"), "F32", "Float32", "float32"),
    DtypeRow(np.dtype("<f2"), "F16", "Float16", "float16"),
    DtypeRow(BFLOAT16, "BF16", "BFloat16", "bfloat16"),
    DtypeRow(np.dtype("<i8"), "I64", "Int64", "int64"),
    DtypeRow(np.dtype("<i4"), "I32", "Int32", "int32"),
    DtypeRow(np.dtype("<i2"), "I16", "Int16", "int16"),
    DtypeRow(np.dtype("i1"), "I8", "Int8", "int8"),
    DtypeRow(np.dtype("<u8"), "U64", "UInt64", "uint64"),
    DtypeRow(np.dtype("<u4"), "U32", "UInt32", "uint32"),
    DtypeRow(np.dtype("<u2"), "U16", "UInt16", "uint16"),
    DtypeRow(np.dtype("u1"), "U8", "UInt8", "uint8"),
    DtypeRow(np.dtype("?"), "BOOL", "Bool", "bool"),
)
BY_NUMPY = {row.numpy: row for row in TABLE}
BY_SAFETENSORS = {row.safetensors: row.numpy for row in TABLE}
BY_MINDSPORE = {row.mindspore: row.numpy for row in TABLE}
FLOATS = {row.long: row.numpy for row in TABLE if row.long in ("float64", "float32", "float16", "bfloat16")}


def float_dtype(name: str) -> np.dtype[Any]:
    """The numpy type that any word of ``core.layers.dtype_name`` means; anything else is a ``UserError``."""
    known = dtype_name(name)
    if known is None:
        raise UserError(f"dtype '{name}' is unknown: choose one of {', '.join((*DTYPE_NAMES, *DTYPE_WORDS))}")
    return FLOATS[known]


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether weights may have this type (bfloat16 included, which numpy itself does not call floating)."""
    return dtype in FLOATS.values()


def cast(array: Array, dtype: np.dtype[Any]) -> tuple[Array, int]:
    """``array`` in ``dtype`` and how many finite values became infinite on the way (float16 ends at 65504)."""
    if array.dtype == dtype:
        return array, 0
    if array.dtype == BFLOAT16 and dtype == FLOAT16 and array.ndim and array.flags.c_contiguous:
        halves = _half_of_bfloat16(array)
        if halves is not None:
            return halves, 0
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype.itemsize > array.dtype.itemsize or _all_finite(result):
        return result, 0
    lost = ~np.isfinite(result) & np.isfinite(array)
    return result, int(np.count_nonzero(lost))


def _half_of_bfloat16(array: Array) -> Array | None:
    """float16 of bfloat16 by moving bits, twice as fast as ``astype``; None where a value is too large.

    Between 2**-14 and 2**16 every bfloat16 is a float16: the exponent loses its offset of 112, the 7 bits of the
    mantissa move up by 3. The few smaller ones are rounded by ``astype``.
    """
    bits = array.view(np.uint16)
    result = bits & 0x7FFF
    if int(result.max(initial=0)) >= HALF_END:
        return None
    small = np.flatnonzero(result < HALF_START)
    result -= 112 << 7
    result <<= 3
    result |= bits & 0x8000
    halves = result.view(FLOAT16)
    halves.reshape(-1)[small] = array.reshape(-1)[small].astype(FLOAT16)
    return halves


def _all_finite(array: Array) -> bool:
    """Whether no 16-bit float is infinite or NaN, by its bits: a tenth of the time of ``isfinite``."""
    if array.dtype.itemsize != 2 or array.size == 0 or array.ndim == 0:
        return False
    infinite = int(np.array(np.inf, array.dtype).view(np.uint16))
    # the positive are the largest of the signed, the negative (highest bit set) the largest of the unsigned
    return int(array.view(np.int16).max()) < infinite and int(array.view(np.uint16).max()) < infinite + 0x8000
