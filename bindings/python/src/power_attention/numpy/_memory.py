# SPDX-License-Identifier: Apache-2.0
"""Host memory as the execute calls take it: inputs where they are, outputs and scratch memory from NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._dlpack import View, view
from .._errors import DtypeError, InvalidArgumentError

Array = Any  # NumPy or DLPack


def numpy_dtype(name: str) -> Any:
    """NumPy's dtype of a name; bfloat16 is that of ml_dtypes."""
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise DtypeError("bfloat16 arrays in NumPy need the package ml_dtypes") from None
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def wide(dtype: str) -> str:
    """Type of log_g, row_norm and of states by default."""
    return "float64" if dtype == "float64" else "float32"


def host(array: Array, name: str, dtype: str | None = None, unit_last: bool = True) -> View:
    """The memory of an input, checked to be readable as it is."""
    v = view(array, name)
    if dtype is not None and v.dtype != dtype:
        raise DtypeError(f"{name} is {v.dtype}; {dtype} is needed")
    if unit_last and v.shape and v.shape[-1] > 1 and v.strides[-1] != 1 and 0 not in v.shape:
        raise InvalidArgumentError(f"{name} has stride {v.strides[-1]} in its last dimension; 1 is needed")
    return v


def index(array: Array | None, name: str, length: int) -> tuple[int, Any]:
    """Address of an int64 vector, and what keeps it alive. Other integer types are converted: they are small."""
    if array is None:
        return 0, None
    a = np.asarray(array)
    if a.ndim != 1 or a.shape[0] != length:
        raise InvalidArgumentError(f"{name} has shape {list(a.shape)}; [{length}] is needed")
    if a.dtype.kind not in "iu" and a.size:  # an empty list has no type of its own
        raise DtypeError(f"{name} is {a.dtype}; integers are needed")
    a = np.ascontiguousarray(a, np.int64)
    return a.ctypes.data, a


def workspace(nbytes: int) -> tuple[int, Any]:
    """Address of scratch memory with the alignment that the library asks for."""
    if nbytes == 0:
        return 0, None
    buffer = np.empty(nbytes + 256, np.uint8)
    address = buffer.ctypes.data
    return (address + 255) // 256 * 256, buffer


def out(shape: Sequence[int], dtype: str) -> tuple[Any, tuple[int, int, int, int]]:
    """A new output, with its address and strides."""
    a = np.empty(shape, numpy_dtype(dtype))
    size = a.itemsize
    b, t, h = (s // size for s in a.strides[:3])
    return a, (a.ctypes.data, b, t, h)
