# SPDX-License-Identifier: Apache-2.0
"""Power attention on NumPy arrays, and on any host array that speaks DLPack.

Inputs are read where they are, with their strides; outputs are new NumPy arrays. Layouts: q ``[b, t, h, d]``,
k ``[b, t, hk, d]``, v ``[b, t, hk, e]``, log_g ``[b, t, hk]``; other orders by transposing views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from . import _check
from ._dlpack import View, view
from ._errors import DtypeError, InvalidArgumentError
from ._plan import (
    ABSENT,
    CUSTOM_SCALE,
    NO_STATE,
    UNNORMALIZED,
    USE_STATE,
    Plan,
    RopeLike,
    cached_plan,
    describe,
    dtype_number,
    form_number,
    monomial,
    native,
    plan,
    rope_numbers,
    state_bytes,
    state_rows,
)

__all__ = [
    "Forward",
    "Gradients",
    "State",
    "Summary",
    "backward",
    "compose",
    "convert",
    "describe",
    "forward",
    "monomial",
    "pack",
    "plan",
    "power_attention",
    "state_bytes",
    "state_rows",
    "step",
    "summary",
    "summary_reverse",
    "unpack",
    "zero_state",
]

Array = Any  # NumPy or DLPack


class State(NamedTuple):
    """States of n sequences: S ``[n, heads_kv, D, value_dim]`` and z ``[n, heads_kv, D]``."""

    s: Any
    z: Any


class Summary(NamedTuple):
    """A segment: its state from zero and the total log gate ``[n, heads_kv]`` that an earlier state decays by."""

    state: State
    total_log_g: Any


class Gradients(NamedTuple):
    """Gradients, in the order of the inputs; ``None`` where there was no input."""

    q: Any
    k: Any
    v: Any
    log_g: Any
    initial_state: State | None


def _numpy_dtype(name: str) -> Any:
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise DtypeError("bfloat16 arrays in NumPy need the package ml_dtypes") from None
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _wide(dtype: str) -> str:
    """Type of log_g, row_norm and of states by default."""
    return "float64" if dtype == "float64" else "float32"


def _host(array: Array, name: str, dtype: str | None = None, unit_last: bool = True) -> View:
    """The memory of an input, checked to be readable as it is."""
    v = view(array, name)
    if v.device != "cpu":
        raise InvalidArgumentError(
            f"{name} is on {v.device}:{v.device_index}; the NumPy front takes host memory (use power_attention.torch)"
        )
    if dtype is not None and v.dtype != dtype:
        raise DtypeError(f"{name} is {v.dtype}; {dtype} is needed")
    if unit_last and v.shape and v.shape[-1] > 1 and v.strides[-1] != 1 and 0 not in v.shape:
        raise InvalidArgumentError(f"{name} has stride {v.strides[-1]} in its last dimension; 1 is needed")
    return v


def _index(array: Array | None, name: str, length: int) -> tuple[int, Any]:
    """Address of an int64 vector, and what keeps it alive. Other integer types are converted: they are small."""
    if array is None:
        return 0, None
    a = np.asarray(array)
    if a.ndim != 1 or a.shape[0] != length:
        raise InvalidArgumentError(f"{name} has shape {list(a.shape)}; [{length}] is needed")
    if a.dtype.kind not in "iu":
        raise DtypeError(f"{name} is {a.dtype}; integers are needed")
    a = np.ascontiguousarray(a, np.int64)
    return a.ctypes.data, a


def _workspace(nbytes: int) -> tuple[int, Any]:
    """Address of scratch memory with the alignment that the library asks for."""
    if nbytes == 0:
        return 0, None
    buffer = np.empty(nbytes + 256, np.uint8)
    address = buffer.ctypes.data
    return (address + 255) // 256 * 256, buffer


def _out(shape: Sequence[int], dtype: str) -> tuple[Any, tuple[int, int, int, int]]:
    a = np.empty(shape, _numpy_dtype(dtype))
    size = a.itemsize
    b, t, h = (s // size for s in a.strides[:3])
    return a, (a.ctypes.data, b, t, h)


def _state_numbers(state: State | None, name: str, plan: Plan, n: int, dtype: str) -> tuple[int, ...]:
    if state is None:
        return NO_STATE
    s, z = state
    sv, zv = _host(s, f"{name}.s", dtype), _host(z, f"{name}.z", dtype)
    _check.state(name, sv.shape, zv.shape, n, plan.heads_kv, plan.state_rows, plan.value_dim)
    if sv.shape[2] > 1 and sv.strides[2] != plan.value_dim:
        raise InvalidArgumentError(f"{name}.s: each [D, value_dim] block must be contiguous")
    return (sv.address, zv.address, sv.strides[0], sv.strides[1], zv.strides[0], zv.strides[1])


def _new_state(plan: Plan, n: int, dtype: str, zero: bool = False) -> tuple[State, tuple[int, ...]]:
    make = np.zeros if zero else np.empty
    kind = _numpy_dtype(dtype)
    s = make((n, plan.heads_kv, plan.state_rows, plan.value_dim), kind)
    z = make((n, plan.heads_kv, plan.state_rows), kind)
    return State(s, z), _own_state_numbers(s, z)


def _own_state_numbers(s: Any, z: Any) -> tuple[int, ...]:
    size = s.itemsize
    return (
        s.ctypes.data,
        z.ctypes.data,
        s.strides[0] // size,
        s.strides[1] // size,
        z.strides[0] // size,
        z.strides[1] // size,
    )


@dataclass
class Forward:
    """What a forward call returned, with all that its backward needs."""

    y: Any
    final_state: State | None
    row_norm: Any
    plan: Plan
    _inputs: dict[str, Any] = field(repr=False)
    _saved: Any = field(repr=False, default=None)


def forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    log_g: Array | None = None,
    degree: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    form: str = "auto",
    initial_state: State | None = None,
    return_final_state: bool = False,
    cu_seqlens: Array | None = None,
    max_seq_len: int = 0,
    normalize: bool = True,
    eps: float = 0.0,
    rope: RopeLike = None,
    rope_offset: Array | None = None,
    num_threads: int = 0,
    save: bool = True,
) -> Forward:
    """Runs the operation and keeps what :func:`backward` needs.

    Args:
        q: queries ``[b, t, h, d]``: float32, float16, bfloat16 (ml_dtypes) or float64.
        k: keys ``[b, t, hk, d]``.
        v: values ``[b, t, hk, e]``.
        log_g: log of the decay ``[b, t, hk]``, float32 (float64 with float64).
        degree: the power p; even unless ``normalize=False``.
        scale: of the scores; ``None`` means ``1/sqrt(d)``.
        chunk_size: tokens per chunk; ``None`` lets the cost model choose.
        form: ``"auto"``, ``"attention"`` or ``"chunked"``.
        initial_state: state before the first token.
        return_final_state: compute the state after the last token.
        cu_seqlens: packed sequences: cumulative lengths ``[n + 1]``; the batch is 1 then.
        max_seq_len: longest packed sequence if known.
        normalize: divide by the sum of the weights.
        eps: added to that sum.
        rope: rotary embedding, see :class:`power_attention.Rope`.
        rope_offset: position of the first token of each sequence.
        num_threads: 0 means all.
        save: keep intermediate results that make the backward cheaper.
    """
    qv = _host(q, "q")
    kv, vv = _host(k, "k", qv.dtype), _host(v, "v", qv.dtype)
    wide = _wide(qv.dtype)
    gv = None if log_g is None else _host(log_g, "log_g", wide, unit_last=False)
    cu = None if cu_seqlens is None else np.asarray(cu_seqlens)
    _check.shapes(qv.shape, kv.shape, vv.shape, None if gv is None else gv.shape)
    _check.packed(qv.shape[0], None if cu is None else cu.shape)
    _check.degree(degree, normalize)
    b, t, h, d = qv.shape
    hk, e = vv.shape[2:]
    packed = 0 if cu is None else cu.shape[0] - 1
    use_state = return_final_state or initial_state is not None
    style, rope_dim, rope_base = rope_numbers(rope)
    p = cached_plan(
        0,
        0,
        dtype_number(qv.dtype, "q"),
        0,
        degree,
        (0 if normalize else UNNORMALIZED) | (0 if scale is None else CUSTOM_SCALE) | (USE_STATE if use_state else 0),
        form_number(form),
        b,
        t,
        h,
        hk,
        d,
        e,
        packed,
        max_seq_len,
        chunk_size or 0,
        0.0 if scale is None else float(scale),
        float(eps),
        rope_base,
        rope_dim,
        style,
        num_threads,
        0,
    )
    n = p.sequences
    cu_address, cu_owner = _index(cu, "cu_seqlens", packed + 1)
    ro_address, ro_owner = _index(rope_offset, "rope_offset", n)
    initial = _state_numbers(initial_state, "initial_state", p, n, wide)
    y, y_numbers = _out((b, t, h, e), qv.dtype)
    row_norm, norm_numbers = _out((b, t, h), wide) if normalize else (None, ABSENT)
    final_state, final = _new_state(p, n, wide) if return_final_state else (None, NO_STATE)
    saved_address, saved = _workspace(p.saved_bytes) if save else (0, None)
    work_address, _work = _workspace(p.workspace_forward)
    native.forward(
        p.handle,
        *qv.bth(),
        *kv.bth(),
        *vv.bth(),
        *(ABSENT if gv is None else gv.bth()),
        *y_numbers,
        *norm_numbers,
        *initial,
        *final,
        cu_address,
        ro_address,
        saved_address,
        p.saved_bytes if saved is not None else 0,
        work_address,
        p.workspace_forward,
        0,
    )
    inputs = {
        "q": qv,
        "k": kv,
        "v": vv,
        "log_g": gv,
        "initial_state": initial_state,
        "cu": (cu_address, cu_owner),
        "rope_offset": (ro_address, ro_owner),
        "saved": (saved_address, p.saved_bytes if saved is not None else 0),
        "use_state": use_state,
    }
    return Forward(y, final_state, row_norm, p, inputs, saved)


def backward(fwd: Forward, d_y: Array, d_final_state: State | None = None) -> Gradients:
    """Gradients of a loss with respect to all inputs of ``fwd``.

    Args:
        fwd: what :func:`forward` returned; its inputs must not have changed since.
        d_y: gradient of y.
        d_final_state: gradient of the final state.
    """
    p, inputs = fwd.plan, fwd._inputs
    qv, kv, vv, gv = inputs["q"], inputs["k"], inputs["v"], inputs["log_g"]
    wide = _wide(qv.dtype)
    n = p.sequences
    dyv = _host(d_y, "d_y", qv.dtype)
    if dyv.shape != fwd.y.shape:
        raise InvalidArgumentError(f"d_y has shape {list(dyv.shape)}; y has {list(fwd.y.shape)}")
    if d_final_state is not None and not inputs["use_state"]:
        raise InvalidArgumentError("d_final_state is given; the forward call had neither an initial nor a final state")
    d_q, dq_numbers = _out(qv.shape, qv.dtype)
    d_k, dk_numbers = _out(kv.shape, qv.dtype)
    d_v, dv_numbers = _out(vv.shape, qv.dtype)
    d_log_g, dg_numbers = _out(gv.shape, wide) if gv is not None else (None, ABSENT)
    initial_state = inputs["initial_state"]
    initial = _state_numbers(initial_state, "initial_state", p, n, wide)
    d_final = _state_numbers(d_final_state, "d_final_state", p, n, wide)
    d_initial_state, d_initial = _new_state(p, n, wide) if initial_state is not None else (None, NO_STATE)
    y_view = _host(fwd.y, "y")
    norm_view = None if fwd.row_norm is None else _host(fwd.row_norm, "row_norm", unit_last=False)
    saved_address, saved_bytes = inputs["saved"]
    size = p.workspace_backward_saved if saved_address else p.workspace_backward
    work_address, _work = _workspace(size)
    native.backward(
        p.handle,
        *qv.bth(),
        *kv.bth(),
        *vv.bth(),
        *(ABSENT if gv is None else gv.bth()),
        *y_view.bth(),
        *(ABSENT if norm_view is None else norm_view.bth()),
        *dyv.bth(),
        *dq_numbers,
        *dk_numbers,
        *dv_numbers,
        *dg_numbers,
        *initial,
        *d_final,
        *d_initial,
        inputs["cu"][0],
        inputs["rope_offset"][0],
        saved_address,
        saved_bytes,
        work_address,
        size,
        0,
    )
    return Gradients(d_q, d_k, d_v, d_log_g, d_initial_state)


def power_attention(q: Array, k: Array, v: Array, *, return_final_state: bool = False, **options: Any) -> Any:
    """The operation alone: y, or ``(y, final_state)``. Takes the options of :func:`forward`."""
    result = forward(q, k, v, return_final_state=return_final_state, save=False, **options)
    return (result.y, result.final_state) if return_final_state else result.y


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
    kind = _numpy_dtype(dtype)
    value_dim = head_dim if value_dim is None else value_dim
    return State(np.zeros((sequences, heads_kv, rows, value_dim), kind), np.zeros((sequences, heads_kv, rows), kind))


def step(
    state: State,
    q: Array,
    k: Array,
    v: Array,
    *,
    log_g: Array | None = None,
    degree: int = 2,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 0.0,
    slots: Array | None = None,
    lengths: Array | None = None,
    rope: RopeLike = None,
    rope_offset: Array | None = None,
    num_threads: int = 0,
) -> Any:
    """Feeds one or a few tokens to states, in place, and returns y.

    Args:
        state: pool of states: writable NumPy arrays, float32, float64 or bfloat16.
        q: queries ``[b, t, h, d]``.
        k: keys ``[b, t, hk, d]``.
        v: values ``[b, t, hk, e]``.
        log_g: log of the decay ``[b, t, hk]``.
        degree: the power p of the state.
        scale: of the scores; ``None`` means ``1/sqrt(d)``.
        normalize: divide by the sum of the weights.
        eps: added to that sum.
        slots: slot of each sequence in the pool; negative skips it. Default: sequence b uses slot b.
        lengths: valid tokens of each sequence; the rest is padding and touches no state.
        rope: rotary embedding.
        rope_offset: position of the first token of each sequence.
        num_threads: 0 means all.
    """
    qv = _host(q, "q")
    kv, vv = _host(k, "k", qv.dtype), _host(v, "v", qv.dtype)
    gv = None if log_g is None else _host(log_g, "log_g", _wide(qv.dtype), unit_last=False)
    _check.shapes(qv.shape, kv.shape, vv.shape, None if gv is None else gv.shape)
    _check.degree(degree, normalize)
    b, t, h, d = qv.shape
    hk, e = vv.shape[2:]
    for name, a in (("state.s", state.s), ("state.z", state.z)):
        if not isinstance(a, np.ndarray) or not a.flags.writeable:
            raise InvalidArgumentError(f"{name} is not a writable NumPy array; step changes states in place")
    state_dtype = state.s.dtype.name
    style, rope_dim, rope_base = rope_numbers(rope)
    p = cached_plan(
        0,
        0,
        dtype_number(qv.dtype, "q"),
        dtype_number(state_dtype, "state"),
        degree,
        (0 if normalize else UNNORMALIZED) | (0 if scale is None else CUSTOM_SCALE) | USE_STATE,
        0,
        b,
        t,
        h,
        hk,
        d,
        e,
        0,
        0,
        0,
        0.0 if scale is None else float(scale),
        float(eps),
        rope_base,
        rope_dim,
        style,
        num_threads,
        0,
    )
    pool = state.s.shape[0] if state.s.ndim else 0
    numbers = _state_numbers(state, "state", p, pool, state_dtype)
    slots_address, _slots = _index(slots, "slots", b)
    lengths_address, _lengths = _index(lengths, "lengths", b)
    ro_address, _ro = _index(rope_offset, "rope_offset", b)
    y, y_numbers = _out((b, t, h, e), qv.dtype)
    work_address, _work = _workspace(p.workspace_step)
    native.step(
        p.handle,
        *qv.bth(),
        *kv.bth(),
        *vv.bth(),
        *(ABSENT if gv is None else gv.bth()),
        *y_numbers,
        *numbers,
        pool,
        slots_address,
        lengths_address,
        ro_address,
        work_address,
        p.workspace_step,
        0,
    )
    return y


def summary(
    k: Array,
    v: Array,
    *,
    log_g: Array | None = None,
    degree: int = 2,
    cu_seqlens: Array | None = None,
    rope: RopeLike = None,
    rope_offset: Array | None = None,
    num_threads: int = 0,
) -> Summary:
    """State of each sequence from zero and its total log gate, from keys, values and gates alone."""
    kv = _host(k, "k")
    vv = _host(v, "v", kv.dtype)
    wide = _wide(kv.dtype)
    gv = None if log_g is None else _host(log_g, "log_g", wide, unit_last=False)
    cu = None if cu_seqlens is None else np.asarray(cu_seqlens)
    _check.shapes(kv.shape, kv.shape, vv.shape, None if gv is None else gv.shape)
    _check.packed(kv.shape[0], None if cu is None else cu.shape)
    packed = 0 if cu is None else cu.shape[0] - 1
    p = _state_plan(kv, vv.shape[3], degree, packed, rope, num_threads)
    cu_address, _cu = _index(cu, "cu_seqlens", packed + 1)
    ro_address, _ro = _index(rope_offset, "rope_offset", p.sequences)
    state, numbers = _new_state(p, p.sequences, wide)
    total = np.empty((p.sequences, p.heads_kv), wide)
    work_address, _work = _workspace(p.workspace_summary)
    native.summary(
        p.handle,
        *kv.bth(),
        *vv.bth(),
        *(ABSENT if gv is None else gv.bth()),
        *numbers,
        total.ctypes.data,
        cu_address,
        ro_address,
        work_address,
        p.workspace_summary,
        0,
    )
    return Summary(state, total)


def summary_reverse(fwd: Forward, d_y: Array) -> Summary:
    """Gradient of each sequence's initial state when its final state gets none, with the total log gate.

    Args:
        fwd: a forward call with the true initial state.
        d_y: gradient of its y.
    """
    inputs, old = fwd._inputs, fwd.plan
    qv, gv = inputs["q"], inputs["log_g"]
    if not inputs["use_state"]:
        raise InvalidArgumentError("fwd was run without a state; pass return_final_state=True or an initial state")
    wide = _wide(qv.dtype)
    dyv = _host(d_y, "d_y", qv.dtype)
    if dyv.shape != fwd.y.shape:
        raise InvalidArgumentError(f"d_y has shape {list(dyv.shape)}; y has {list(fwd.y.shape)}")
    state, numbers = _new_state(old, old.sequences, wide)
    total = np.empty((old.sequences, old.heads_kv), wide)
    y_view = _host(fwd.y, "y")
    norm_view = None if fwd.row_norm is None else _host(fwd.row_norm, "row_norm", unit_last=False)
    work_address, _work = _workspace(old.workspace_summary)
    native.summary_reverse(
        old.handle,
        *qv.bth(),
        *(ABSENT if gv is None else gv.bth()),
        *y_view.bth(),
        *(ABSENT if norm_view is None else norm_view.bth()),
        *dyv.bth(),
        *numbers,
        total.ctypes.data,
        inputs["cu"][0],
        inputs["rope_offset"][0],
        work_address,
        old.workspace_summary,
        0,
    )
    return Summary(state, total)


def _state_plan(kv: View, value_dim: int, degree: int, packed: int, rope: RopeLike, num_threads: int) -> Plan:
    """A plan for operations on states alone, where the normaliser plays no part."""
    b, t, hk, d = kv.shape
    style, rope_dim, rope_base = rope_numbers(rope)
    flags = USE_STATE | (UNNORMALIZED if degree % 2 else 0)
    dtype = dtype_number(kv.dtype, "k")
    return cached_plan(
        0, 0, dtype, 0, degree, flags, 0, b, t, hk, hk, d, value_dim, packed, 0, 0, 0.0, 0.0, rope_base, rope_dim,
        style, num_threads, 0,
    )  # fmt: skip


def _pool_plan(state: State, head_dim: int, degree: int, name: str) -> tuple[Plan, str]:
    sv = _host(state.s, f"{name}.s")
    _check.rank(f"{name}.s", sv.shape, "[sequences, heads_kv, D, value_dim]")
    n, hk, _, e = sv.shape
    dtype = "float64" if sv.dtype == "float64" else "float32"
    flags = USE_STATE | (UNNORMALIZED if degree % 2 else 0)
    state_dtype = dtype_number(sv.dtype, f"{name}.s")
    p = cached_plan(
        0, 0, dtype_number(dtype), state_dtype, degree, flags, 0, n, 1, hk, hk, head_dim, e, 0, 0, 0, 0.0, 0.0, 0.0,
        0, 0, 0, 0,
    )  # fmt: skip
    return p, sv.dtype


def compose(segments: State, total_log_g: Array | None, *, head_dim: int, degree: int = 2) -> Summary:
    """Folds segments in order: ``S <- exp(L_m) S + S_m``, ``L <- L + L_m``.

    Args:
        segments: states with a leading dimension: S ``[m, n, hk, D, e]``, z ``[m, n, hk, D]``.
        total_log_g: their total log gates ``[m, n, hk]``, or ``None`` without gates.
        head_dim: dimension of the keys.
        degree: the power p.
    """
    sv, zv = _host(segments.s, "segments.s"), _host(segments.z, "segments.z")
    _check.rank("segments.s", sv.shape, "[segments, sequences, heads_kv, D, value_dim]")
    m, n, hk, rows, e = sv.shape
    if zv.dtype != sv.dtype:
        raise DtypeError(f"segments.z is {zv.dtype}; {sv.dtype} is needed")
    wide = _wide(sv.dtype)
    flags = USE_STATE | (UNNORMALIZED if degree % 2 else 0)
    p = cached_plan(
        0, 0, dtype_number(wide), dtype_number(sv.dtype, "segments.s"), degree, flags, 0, n, 1, hk, hk, head_dim, e,
        0, 0, 0, 0.0, 0.0, 0.0, 0, 0, 0, 0,
    )  # fmt: skip
    _check.state("segments", sv.shape[1:], zv.shape[1:], n, hk, p.state_rows, e)
    if zv.shape[0] != m or (rows > 1 and sv.strides[3] != e):
        raise InvalidArgumentError("segments: S and z need equal lengths and contiguous [D, value_dim] blocks")
    gv = None if total_log_g is None else _host(total_log_g, "total_log_g", wide, unit_last=False)
    if gv is not None and gv.shape != (m, n, hk):
        raise InvalidArgumentError(f"total_log_g has shape {list(gv.shape)}; [{m}, {n}, {hk}] is needed")
    out, numbers = _new_state(p, n, sv.dtype)
    total = np.zeros((n, hk), wide)
    native.state_compose(
        p.handle,
        m,
        *(sv.address, zv.address, sv.strides[1], sv.strides[2], zv.strides[1], zv.strides[2]),
        sv.strides[0],
        zv.strides[0],
        *(ABSENT if gv is None else gv.bth()),
        *numbers,
        total.ctypes.data,
        0,
    )
    return Summary(out, total)


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
    p, src_dtype = _pool_plan(state, head_dim, degree, "state")
    pool = state.s.shape[0]
    count = pool if slots is None else len(np.asarray(slots))
    src = _state_numbers(state, "state", p, pool, src_dtype)
    if out is None:
        out, dst = _new_state(p, count, dtype or src_dtype, zero=slots is not None)
    else:
        dst = _state_numbers(out, "out", p, out.s.shape[0], out.s.dtype.name)
    src_slots, _src = _index(slots, "slots", count)
    dst_slots, _dst = _index(out_slots, "out_slots", count)
    native.state_convert(
        p.handle,
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


def pack(state: State, *, head_dim: int, degree: int = 2, dtype: str | None = None) -> bytes:
    """States as a versioned, self-describing block of bytes.

    Args:
        state: the states.
        head_dim: dimension of the keys.
        degree: the power p.
        dtype: of the packed numbers; ``None`` keeps the type.
    """
    p, src_dtype = _pool_plan(state, head_dim, degree, "state")
    count = state.s.shape[0]
    number = dtype_number(dtype or src_dtype)
    numbers = _state_numbers(state, "state", p, count, src_dtype)
    size = native.state_pack_size(p.handle, number, count)
    block = np.empty(size, np.uint8)
    native.state_pack(p.handle, number, *numbers, count, block.ctypes.data, size, 0)
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
    p, name = _pool_plan(state, head_dim, degree, "state")
    numbers = _state_numbers(state, "state", p, count, name)
    raw = np.frombuffer(block, np.uint8)
    native.state_unpack(p.handle, *numbers, count, raw.ctypes.data, raw.nbytes, 0)
    return state
