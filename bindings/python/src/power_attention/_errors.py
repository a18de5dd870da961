# SPDX-License-Identifier: Apache-2.0
"""Exceptions, one per status of the C library.

Each is a ``PowerAttentionError`` and also the built-in exception that Python code would expect, so that
``except ValueError`` works without knowing this package.
"""

from __future__ import annotations


class PowerAttentionError(Exception):
    """Base of all errors of this package. ``status`` is the number of the C library's status."""

    status: int = 9


class InvalidArgumentError(PowerAttentionError, ValueError):
    """An argument is outside what is allowed; the message names it, what it was and what is allowed."""

    status = 1


class DtypeError(InvalidArgumentError, TypeError):
    """A tensor has a type that is not allowed, or that differs from the others'."""


class UnsupportedError(PowerAttentionError, NotImplementedError):
    """Legal, but no implementation of this build or device runs it."""

    status = 2


class StateTooLargeError(PowerAttentionError, MemoryError):
    """The state needs more memory than there is; the message tells how much."""

    status = 3


class OutOfMemoryError(PowerAttentionError, MemoryError):
    """The library could not allocate its own small objects."""

    status = 4


class WorkspaceTooSmallError(InvalidArgumentError):
    """The workspace or the saved buffer is smaller than the plan needs."""

    status = 5


class NoDeviceError(PowerAttentionError, RuntimeError):
    """No such device, no driver, or a driver that is too old."""

    status = 6


class DeviceError(PowerAttentionError, RuntimeError):
    """The device reported an error."""

    status = 7


class StateVersionError(InvalidArgumentError):
    """A packed state of another format version."""

    status = 8


class InternalError(PowerAttentionError, RuntimeError):
    """A defect of the library; please report it."""

    status = 9


_BY_STATUS: dict[int, type[PowerAttentionError]] = {
    cls.status: cls
    for cls in (
        InvalidArgumentError,
        UnsupportedError,
        StateTooLargeError,
        OutOfMemoryError,
        WorkspaceTooSmallError,
        NoDeviceError,
        DeviceError,
        StateVersionError,
        InternalError,
    )
}


def from_status(status: int, name: str, message: str) -> PowerAttentionError:
    """Makes the exception of a failed call; called by the native module."""
    cls = _BY_STATUS.get(status, PowerAttentionError)
    error = cls(message or name)
    error.status = status
    return error
