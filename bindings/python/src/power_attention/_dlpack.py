# SPDX-License-Identifier: Apache-2.0
"""Host memory of arrays: NumPy's, and any object's that speaks DLPack, as address, shape and strides."""

from __future__ import annotations

import ctypes
import sys
from typing import Any, NamedTuple

from ._errors import DtypeError, InvalidArgumentError


class _DLDevice(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


_LITTLE = sys.byteorder == "little"
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}
_HOST, _CUDA = (1, 3), (2, 13)  # plain and pinned; device and managed

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype = ctypes.c_int
_capsule_is.argtypes = (ctypes.py_object, ctypes.c_char_p)


class View(NamedTuple):
    """An array's memory. ``owner`` keeps it alive; strides count elements."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    owner: Any

    def bth(self) -> tuple[int, int, int, int]:
        """Address and strides of (batch, token, head), as an execute call takes a tensor."""
        b, t, h = self.strides[:3]
        return (self.address, b, t, h)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(shape[i + 1], 1)
    return tuple(strides)


def _export(array: Any, name: str) -> tuple[Any, _DLTensor]:
    """The capsule of ``array`` and the tensor in it, of either generation of the protocol."""
    try:
        try:
            # From version 1 on, arrays that must not be written can be exported; inputs are only read.
            capsule = array.__dlpack__(max_version=(1, 0))
        except TypeError:
            capsule = array.__dlpack__()
    except (BufferError, RuntimeError, ValueError) as error:
        raise InvalidArgumentError(f"{name} does not give its memory through DLPack: {error}") from error
    if _capsule_is(capsule, b"dltensor_versioned"):
        managed = _DLManagedTensorVersioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:
            raise InvalidArgumentError(
                f"{name} speaks DLPack {managed.major}.{managed.minor}; 1.x and 0.x are understood"
            )
        return capsule, managed.tensor
    return capsule, _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))


def view(array: Any, name: str) -> View:
    """The memory of ``array``, without a copy.

    Args:
        array: a NumPy array or an object with ``__dlpack__``, on the host.
        name: the argument's name, for messages.
    """
    interface = getattr(array, "__array_interface__", None)
    if interface is not None and hasattr(array, "itemsize"):  # NumPy, whose DLPack has no bfloat16
        dtype = array.dtype
        if dtype.byteorder not in "=|" + ("<" if _LITTLE else ">"):
            raise DtypeError(f"{name} has byte order {dtype.byteorder!r}; only the machine's own is allowed")
        size = array.itemsize
        if any(s % size for s in array.strides):
            raise InvalidArgumentError(f"{name} has strides {array.strides} that are no multiple of {size} bytes")
        return View(
            interface["data"][0],
            array.shape,
            tuple(s // size for s in array.strides),
            dtype.name,
            array,
        )
    if not hasattr(array, "__dlpack__"):
        raise DtypeError(f"{name} is a {type(array).__name__}; a NumPy array or an array with __dlpack__ is needed")
    kind, index = array.__dlpack_device__()
    if int(kind) not in _HOST:
        where = f"cuda:{int(index)}" if int(kind) in _CUDA else f"DLPack device type {int(kind)}"
        raise InvalidArgumentError(f"{name} is on {where}; host memory is needed (for tensors: power_attention.torch)")
    capsule, tensor = _export(array, name)
    if tensor.dtype.lanes != 1:
        raise DtypeError(f"{name} has elements of {tensor.dtype.lanes} lanes; plain numbers are needed")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else _contiguous(shape)
    code = _KINDS.get(tensor.dtype.code, f"type{tensor.dtype.code}_")
    # The capsule stays unconsumed: its own destructor gives the memory back when the view goes.
    return View(
        (tensor.data or 0) + tensor.byte_offset,
        shape,
        strides,
        f"{code}{tensor.dtype.bits}",
        (capsule, array),
    )
