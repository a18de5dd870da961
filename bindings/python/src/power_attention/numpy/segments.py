# SPDX-License-Identifier: Apache-2.0
"""Segments of a sequence: summaries, their reverse, and composition."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _check
from .._errors import DtypeError, InvalidArgumentError
from .._plan import ABSENT, RopeLike, dtype_number, make_options, native, states_plan
from . import _memory, states
from ._memory import Array
from .operation import Forward, optional, plan_of, read, results
from .states import State


class Summary(NamedTuple):
    """A segment: its state from zero and the total log gate ``[n, heads_kv]`` that an earlier state decays by."""

    state: State
    total_log_g: Any


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
    inputs = read(k, k, v, log_g, "k")
    cu = None if cu_seqlens is None else np.asarray(cu_seqlens)
    _check.packed(inputs.k.shape[0], None if cu is None else cu.shape)
    packed = 0 if cu is None else cu.shape[0] - 1
    options = make_options(degree, degree % 2 == 0, rope=rope)  # the normaliser plays no part
    plan = plan_of(inputs, options, True, sequences=packed, num_threads=num_threads)
    cu_address, _cu = _memory.index(cu, "cu_seqlens", packed + 1)
    offset_address, _offset = _memory.index(rope_offset, "rope_offset", plan.sequences)
    state, numbers = states.new(plan, plan.sequences, inputs.wide)
    total = np.empty((plan.sequences, plan.heads_kv), inputs.wide)
    work, _work = _memory.workspace(plan.workspace_summary)
    native.summary(
        plan.handle,
        *inputs.k.bth(),
        *inputs.v.bth(),
        *optional(inputs.log_g),
        *numbers,
        total.ctypes.data,
        cu_address,
        offset_address,
        work,
        plan.workspace_summary,
        0,
    )
    return Summary(state, total)


def summary_reverse(fwd: Forward, d_y: Array) -> Summary:
    """Gradient of each sequence's initial state when its final state gets none, with the total log gate.

    Args:
        fwd: a forward call with the true initial state.
        d_y: gradient of its y.
    """
    plan, call = fwd.plan, fwd._call
    if not call.use_state:
        raise InvalidArgumentError("fwd was run without a state; pass return_final_state=True or an initial state")
    wide = call.inputs.wide
    given = results(fwd, d_y)
    state, numbers = states.new(plan, plan.sequences, wide)
    total = np.empty((plan.sequences, plan.heads_kv), wide)
    work, _work = _memory.workspace(plan.workspace_summary)
    native.summary_reverse(
        plan.handle,
        *call.inputs.q.bth(),
        *optional(call.inputs.log_g),
        *given,
        *numbers,
        total.ctypes.data,
        call.cu_seqlens[0],
        call.rope_offset[0],
        work,
        plan.workspace_summary,
        0,
    )
    return Summary(state, total)


def compose(segments: State, total_log_g: Array | None, *, head_dim: int, degree: int = 2) -> Summary:
    """Folds segments in order: ``S <- exp(L_m) S + S_m``, ``L <- L + L_m``.

    Args:
        segments: states with a leading dimension: S ``[m, n, hk, D, e]``, z ``[m, n, hk, D]``.
        total_log_g: their total log gates ``[m, n, hk]``, or ``None`` without gates.
        head_dim: dimension of the keys.
        degree: the power p.
    """
    sv, zv = _memory.host(segments.s, "segments.s"), _memory.host(segments.z, "segments.z")
    _check.rank("segments.s", sv.shape, "[segments, sequences, heads_kv, D, value_dim]")
    if zv.dtype != sv.dtype:
        raise DtypeError(f"segments.z is {zv.dtype}; {sv.dtype} is needed")
    m, n, hk, rows, e = sv.shape
    wide = _memory.wide(sv.dtype)
    plan = states_plan(
        n, hk, head_dim, e, degree, dtype=dtype_number(wide), state_dtype=dtype_number(sv.dtype, "segments.s")
    )
    _check.state("segments", sv.shape[1:], zv.shape[1:], n, hk, plan.state_rows, e)
    if zv.shape[0] != m or (rows > 1 and sv.strides[3] != e):
        raise InvalidArgumentError("segments: S and z need equal lengths and contiguous [D, value_dim] blocks")
    gv = None if total_log_g is None else _memory.host(total_log_g, "total_log_g", wide, unit_last=False)
    if gv is not None and gv.shape != (m, n, hk):
        raise InvalidArgumentError(f"total_log_g has shape {list(gv.shape)}; [{m}, {n}, {hk}] is needed")
    out, numbers = states.new(plan, n, sv.dtype)
    total = np.zeros((n, hk), wide)
    native.state_compose(
        plan.handle,
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
