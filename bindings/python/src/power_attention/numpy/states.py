# SPDX-License-Identifier: Apache-2.0
"""States of sequences: made, copied between pools and types, saved."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _check
from .._errors import InvalidArgumentError
from .._plan import NO_STATE, Plan, dtype_number, native, state_rows, states_plan
from . import _memory
from ._memory import Array


class State(NamedTuple):
    """States of n sequences: S ``[n, heads_kv, D, value_dim]`` and z ``[n, heads_kv, D]``."""

    s: Any
    z: Any


def numbers(state: State | None, name: str, plan: Plan, n: int, dtype: str) -> tuple[int, ...]:
    """Addresses and strides of a state, checked against a plan."""
    if state is None:
        return NO_STATE
    s, z = state
    sv, zv = _memory.host(s, f"{name}.s", dtype), _memory.host(z, f"{name}.z", dtype)
    _check.state(name, sv.shape, zv.shape, n, plan.heads_kv, plan.state_rows, plan.value_dim)
    if sv.shape[2] > 1 and sv.strides[2] != plan.value_dim:
        raise InvalidArgumentError(f"{name}.s: each [D, value_dim] block must be contiguous")
    return (sv.address, zv.address, sv.strides[0], sv.strides[1], zv.strides[0], zv.strides[1])


def new(plan: Plan, n: int, dtype: str, make: Any = np.empty) -> tuple[State, tuple[int, ...]]:
    """New states, with their addresses and strides."""
    kind = _memory.numpy_dtype(dtype)
    s = make((n, plan.heads_kv, plan.state_rows, plan.value_dim), kind)
    z = make((n, plan.heads_kv, plan.state_rows), kind)
    per_s, per_z = plan.state_rows * plan.value_dim, plan.state_rows
    return State(s, z), (s.ctypes.data, z.ctypes.data, plan.heads_kv * per_s, per_s, plan.heads_kv * per_z, per_z)


def zero_state(
    sequences: int,
    heads_kv: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    degree: int = 2,
    dtype: str = "float32",
) -> State:
    """States of sequences that have seen no token."""
    rows = state_rows(head_dim, degree)
    kind = _memory.numpy_dtype(dtype)
    value_dim = head_dim if value_dim is None else value_dim
    return State(np.zeros((sequences, heads_kv, rows, value_dim), kind), np.zeros((sequences, heads_kv, rows), kind))


def _pool_plan(state: State, head_dim: int, degree: int) -> tuple[Plan, str]:
    sv = _memory.host(state.s, "state.s")
    _check.rank("state.s", sv.shape, "[sequences, heads_kv, D, value_dim]")
    n, heads_kv, _, value_dim = sv.shape
    plan = states_plan(
        n,
        heads_kv,
        head_dim,
        value_dim,
        degree,
        dtype=dtype_number(_memory.wide(sv.dtype)),
        state_dtype=dtype_number(sv.dtype, "state.s"),
    )
    return plan, sv.dtype


def convert(
    state: State,
    *,
    head_dim: int,
    degree: int = 2,
    dtype: str | None = None,
    out: State | None = None,
    slots: Array | None = None,
    out_slots: Array | None = None,
) -> State:
    """Copies states between types, layouts and slots (fork, rollback, float32 to bfloat16 and back).

    Args:
        state: the pool that is read.
        head_dim: dimension of the keys.
        degree: the power p.
        dtype: of a new result; ``None`` keeps the type.
        out: the pool that is written; ``None`` makes one with as many slots as are copied.
        slots: slots that are read, in order; negative skips. ``None``: all.
        out_slots: slots that are written; negative skips. ``None``: 0, 1, 2, ...
    """
    plan, src_dtype = _pool_plan(state, head_dim, degree)
    pool = plan.sequences
    count = pool if slots is None else len(np.asarray(slots))
    src = numbers(state, "state", plan, pool, src_dtype)
    if out is None:
        out, dst = new(plan, count, dtype or src_dtype, np.empty if slots is None else np.zeros)
    else:
        writable("out", out)
        dst = numbers(out, "out", plan, out.s.shape[0], out.s.dtype.name)
    src_slots, _src = _memory.index(slots, "slots", count)
    dst_slots, _dst = _memory.index(out_slots, "out_slots", count)
    native.state_convert(
        plan.handle,
        dtype_number(src_dtype),
        dtype_number(out.s.dtype.name),
        *src,
        *dst,
        count,
        src_slots,
        dst_slots,
        pool,
        out.s.shape[0],
        0,
    )
    return out


def writable(name: str, state: State) -> None:
    """Refuses states that cannot be changed in place."""
    for part, a in (("s", state.s), ("z", state.z)):
        if not isinstance(a, np.ndarray) or not a.flags.writeable:
            raise InvalidArgumentError(f"{name}.{part} is not a writable NumPy array; it is changed in place")


def pack(state: State, *, head_dim: int, degree: int = 2, dtype: str | None = None) -> bytes:
    """States as a versioned, self-describing block of bytes.

    Args:
        state: the states.
        head_dim: dimension of the keys.
        degree: the power p.
        dtype: of the packed numbers; ``None`` keeps the type.
    """
    plan, src_dtype = _pool_plan(state, head_dim, degree)
    count = plan.sequences
    number = dtype_number(dtype or src_dtype)
    size = native.state_pack_size(plan.handle, number, count)
    block = np.empty(size, np.uint8)
    address = numbers(state, "state", plan, count, src_dtype)
    native.state_pack(plan.handle, number, *address, count, block.ctypes.data, size, 0)
    return block.tobytes()


def unpack(
    block: bytes,
    *,
    count: int,
    heads_kv: int,
    head_dim: int,
    value_dim: int | None = None,
    degree: int = 2,
    dtype: str = "float32",
) -> State:
    """States from a packed block, converted to ``dtype`` if need be.

    Args:
        block: what :func:`pack` made, on any machine.
        count: states in it.
        heads_kv: kv heads.
        head_dim: dimension of the keys.
        value_dim: dimension of the values; ``None`` means ``head_dim``.
        degree: the power p.
        dtype: of the result.
    """
    state = zero_state(count, heads_kv, head_dim, value_dim, degree=degree, dtype=dtype)
    plan, name = _pool_plan(state, head_dim, degree)
    raw = np.frombuffer(block, np.uint8)
    address = numbers(state, "state", plan, count, name)
    native.state_unpack(plan.handle, *address, count, raw.ctypes.data, raw.nbytes, 0)
    return state
