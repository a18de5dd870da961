# SPDX-License-Identifier: Apache-2.0
"""Forward, backward and step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .. import _check
from .._dlpack import View
from .._errors import InvalidArgumentError
from .._plan import (
    ABSENT,
    NO_STATE,
    Options,
    Plan,
    RopeLike,
    cached_plan,
    dtype_number,
    make_options,
    native,
    plan_numbers,
)
from . import _memory, states
from ._memory import Array
from .states import State


class Gradients(NamedTuple):
    """Gradients, in the order of the inputs; ``None`` where there was no input."""

    q: Any
    k: Any
    v: Any
    log_g: Any
    initial_state: State | None


class Inputs(NamedTuple):
    """The tensors of a call as the library reads them."""

    q: View
    k: View
    v: View
    log_g: View | None

    @property
    def wide(self) -> str:
        """Type of log_g, row_norm and of states by default."""
        return _memory.wide(self.q.dtype)

    def numbers(self) -> tuple[int, ...]:
        """Addresses and strides, in the order of the execute calls."""
        return (*self.q.bth(), *self.k.bth(), *self.v.bth(), *optional(self.log_g))


def optional(view: View | None) -> tuple[int, int, int, int]:
    """Address and strides of a tensor that may be absent."""
    return ABSENT if view is None else view.bth()


def read(q: Array, k: Array, v: Array, log_g: Array | None, q_name: str = "q") -> Inputs:
    """Checks the tensors of a call against each other."""
    qv = _memory.host(q, q_name)
    kv, vv = _memory.host(k, "k", qv.dtype), _memory.host(v, "v", qv.dtype)
    gv = None if log_g is None else _memory.host(log_g, "log_g", _memory.wide(qv.dtype), unit_last=False)
    _check.shapes(qv.shape, kv.shape, vv.shape, None if gv is None else gv.shape)
    return Inputs(qv, kv, vv, gv)


@dataclass(frozen=True, eq=False)
class Forward:
    """What a forward call returned, with all that its backward needs.

    Attributes:
        y: ``[b, t, h, e]``.
        final_state: after the last token, if it was asked for.
        row_norm: ``[b, t, h]``, sum of the weights of each row; ``None`` if not normalised.
        plan: what ran.
    """

    y: Any
    final_state: State | None
    row_norm: Any
    plan: Plan
    _call: _Call = field(repr=False)


class _Call(NamedTuple):
    """What a backward call needs beside the results. Pairs are an address and what keeps it alive."""

    inputs: Inputs
    initial_state: State | None
    use_state: bool
    cu_seqlens: tuple[int, Any]
    rope_offset: tuple[int, Any]
    saved: tuple[int, Any]


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
        chunk_size: tokens per chunk, which asks for chunks; ``None`` lets the cost model choose.
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
    options = make_options(
        degree, normalize, scale=scale, eps=eps, chunk_size=chunk_size, form=form, max_seq_len=max_seq_len, rope=rope
    )
    inputs = read(q, k, v, log_g)
    cu = None if cu_seqlens is None else np.asarray(cu_seqlens)
    _check.packed(inputs.q.shape[0], None if cu is None else cu.shape)
    packed = 0 if cu is None else cu.shape[0] - 1
    use_state = return_final_state or initial_state is not None
    plan = plan_of(inputs, options, use_state, sequences=packed, num_threads=num_threads)
    n, wide = plan.sequences, inputs.wide
    cu_pair = _memory.index(cu, "cu_seqlens", packed + 1)
    offset_pair = _memory.index(rope_offset, "rope_offset", n)
    initial = states.numbers(initial_state, "initial_state", plan, n, wide)
    b, t, h, _ = inputs.q.shape
    y, y_numbers = _memory.out((b, t, h, plan.value_dim), inputs.q.dtype)
    row_norm, norm_numbers = _memory.out((b, t, h), wide) if normalize else (None, ABSENT)
    final_state, final = states.new(plan, n, wide) if return_final_state else (None, NO_STATE)
    saved = _memory.workspace(plan.saved_bytes) if save else (0, None)
    work, _work = _memory.workspace(plan.workspace_forward)
    native.forward(
        plan.handle,
        *inputs.numbers(),
        *y_numbers,
        *norm_numbers,
        *initial,
        *final,
        cu_pair[0],
        offset_pair[0],
        saved[0],
        plan.saved_bytes if saved[0] else 0,
        work,
        plan.workspace_forward,
        0,
    )
    call = _Call(inputs, initial_state, use_state, cu_pair, offset_pair, saved)
    return Forward(y, final_state, row_norm, plan, call)


def plan_of(inputs: Inputs, options: Options, use_state: bool, **rest: Any) -> Plan:
    """The plan of a call, from the cache."""
    dtype = dtype_number(inputs.q.dtype, "q")
    return cached_plan(*plan_numbers(dtype, options, use_state, inputs.q.shape, inputs.v.shape, **rest))


def results(fwd: Forward, d_y: Array) -> tuple[int, ...]:
    """Addresses and strides of y, row_norm and d_y, as a call that follows a forward takes them."""
    dy = _memory.host(d_y, "d_y", fwd._call.inputs.q.dtype)
    if dy.shape != fwd.y.shape:
        raise InvalidArgumentError(f"d_y has shape {list(dy.shape)}; y has {list(fwd.y.shape)}")
    norm = None if fwd.row_norm is None else _memory.host(fwd.row_norm, "row_norm", unit_last=False)
    return (*_memory.host(fwd.y, "y").bth(), *optional(norm), *dy.bth())


def backward(fwd: Forward, d_y: Array, d_final_state: State | None = None) -> Gradients:
    """Gradients of a loss with respect to all inputs of ``fwd``.

    Args:
        fwd: what :func:`forward` returned; its inputs must not have changed since.
        d_y: gradient of y.
        d_final_state: gradient of the final state.
    """
    plan, call = fwd.plan, fwd._call
    inputs, n = call.inputs, plan.sequences
    wide, dtype = inputs.wide, inputs.q.dtype
    given = results(fwd, d_y)
    if d_final_state is not None and not call.use_state:
        raise InvalidArgumentError("d_final_state is given; the forward call had neither an initial nor a final state")
    d_q, dq_numbers = _memory.out(inputs.q.shape, dtype)
    d_k, dk_numbers = _memory.out(inputs.k.shape, dtype)
    d_v, dv_numbers = _memory.out(inputs.v.shape, dtype)
    d_log_g, dg_numbers = (None, ABSENT) if inputs.log_g is None else _memory.out(inputs.log_g.shape, wide)
    initial = states.numbers(call.initial_state, "initial_state", plan, n, wide)
    d_final = states.numbers(d_final_state, "d_final_state", plan, n, wide)
    d_state, d_initial = (None, NO_STATE) if call.initial_state is None else states.new(plan, n, wide)
    saved = call.saved[0]
    size = plan.workspace_backward_saved if saved else plan.workspace_backward
    work, _work = _memory.workspace(size)
    native.backward(
        plan.handle,
        *inputs.numbers(),
        *given,
        *dq_numbers,
        *dk_numbers,
        *dv_numbers,
        *dg_numbers,
        *initial,
        *d_final,
        *d_initial,
        call.cu_seqlens[0],
        call.rope_offset[0],
        saved,
        plan.saved_bytes if saved else 0,
        work,
        size,
        0,
    )
    return Gradients(d_q, d_k, d_v, d_log_g, d_state)


def power_attention(q: Array, k: Array, v: Array, *, return_final_state: bool = False, **options: Any) -> Any:
    """The operation alone: y, or ``(y, final_state)``. Takes the options of :func:`forward`."""
    result = forward(q, k, v, return_final_state=return_final_state, save=False, **options)
    return (result.y, result.final_state) if return_final_state else result.y


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
    options = make_options(degree, normalize, scale=scale, eps=eps, rope=rope)
    inputs = read(q, k, v, log_g)
    states.writable("state", state)
    state_dtype = state.s.dtype.name
    plan = plan_of(inputs, options, True, state_dtype=dtype_number(state_dtype, "state.s"), num_threads=num_threads)
    b, t, h, _ = inputs.q.shape
    pool = state.s.shape[0] if state.s.ndim else 0
    numbers = states.numbers(state, "state", plan, pool, state_dtype)
    slots_address, _slots = _memory.index(slots, "slots", b)
    lengths_address, _lengths = _memory.index(lengths, "lengths", b)
    offset_address, _offset = _memory.index(rope_offset, "rope_offset", b)
    y, y_numbers = _memory.out((b, t, h, plan.value_dim), inputs.q.dtype)
    work, _work = _memory.workspace(plan.workspace_step)
    native.step(
        plan.handle,
        *inputs.numbers(),
        *y_numbers,
        *numbers,
        pool,
        slots_address,
        lengths_address,
        offset_address,
        work,
        plan.workspace_step,
        0,
    )
    return y
