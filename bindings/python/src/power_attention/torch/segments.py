# SPDX-License-Identifier: Apache-2.0
"""Segments of a sequence: summaries, their reverse, and composition. No gradients; see ``distributed``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._plan import ABSENT, NO_STATE, Options, native
from . import _native
from ._native import MaybeTensor
from .function import State


class Summary(NamedTuple):
    """A segment: its state from zero and its total log gate ``[n, heads_kv]``."""

    state: State
    total_log_g: Tensor


@torch.no_grad()
def summary(
    k: Tensor,
    v: Tensor,
    log_g: MaybeTensor,
    cu_seqlens: MaybeTensor,
    rope_offset: MaybeTensor,
    options: Options,
) -> Summary:
    """State of each sequence from zero, from keys, values and gates alone, and its total log gate."""
    _native.check_device(k)
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n = sequences or k.shape[0]
    _native.check_inputs(k, k, v, log_g, cu_seqlens, rope_offset, n, options)
    k, v = _native.unit(k), _native.unit(v)
    with _native.guard(k):
        # The normaliser plays no part; an odd degree is refused with it.
        options = options._replace(normalize=options.degree % 2 == 0)
        plan = _native.get_plan(k, v, sequences, True, options)
        s, z = _native.empty_state(k, v, n, options.degree)
        total = k.new_empty((n, k.shape[2]), dtype=s.dtype)
        work, _work = _native.workspace(plan.workspace_summary, k)
        native.summary(
            plan.handle,
            *_native.tensor_numbers(k),
            *_native.tensor_numbers(v),
            *_native.tensor_numbers(log_g),
            *_native.state_numbers(s, z),
            total.data_ptr(),
            _native.address(cu_seqlens),
            _native.address(rope_offset),
            work,
            plan.workspace_summary,
            _native.stream_of(k),
        )
    return Summary(State(s, z), total)


@torch.no_grad()
def summary_reverse(
    q: Tensor,
    log_g: MaybeTensor,
    y: Tensor,
    row_norm: Tensor,
    d_y: Tensor,
    heads_kv: int,
    cu_seqlens: MaybeTensor,
    rope_offset: MaybeTensor,
    options: Options,
) -> Summary:
    """Gradient of each sequence's initial state when its final state gets none, and the total log gate."""
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n = sequences or q.shape[0]
    q, y, d_y = _native.unit(q), _native.unit(y), _native.unit(d_y)
    v_like = y[:, :, :heads_kv]
    with _native.guard(q):
        plan = _native.get_plan(q, v_like, sequences, True, options)
        s, z = _native.empty_state(q, v_like, n, options.degree)
        total = q.new_empty((n, heads_kv), dtype=s.dtype)
        work, _work = _native.workspace(plan.workspace_summary, q)
        native.summary_reverse(
            plan.handle,
            *_native.tensor_numbers(q),
            *_native.tensor_numbers(log_g),
            *_native.tensor_numbers(y),
            *(_native.tensor_numbers(row_norm) if options.normalize else ABSENT),
            *_native.tensor_numbers(d_y),
            *_native.state_numbers(s, z),
            total.data_ptr(),
            _native.address(cu_seqlens),
            _native.address(rope_offset),
            work,
            plan.workspace_summary,
            _native.stream_of(q),
        )
    return Summary(State(s, z), total)


@torch.no_grad()
def compose(segments: State, total_log_g: MaybeTensor, head_dim: int, degree: int, reverse: bool = False) -> Summary:
    """Folds segments: ``S <- exp(L_m) S + S_m``, ``L <- L + L_m``.

    Args:
        segments: S ``[m, n, hk, D, e]`` and z ``[m, n, hk, D]``.
        total_log_g: ``[m, n, hk]``, or ``None`` without gates.
        head_dim: dimension of the keys.
        degree: the power p.
        reverse: fold the last one first.
    """
    s, z = segments
    m, n, heads_kv, _, value_dim = s.shape
    out_s, out_z = s.new_empty(s.shape[1:]), s.new_empty(z.shape[1:])
    total = s.new_zeros((n, heads_kv), dtype=_native.wide(s.dtype))
    first = m - 1 if reverse and m else 0
    sign = -1 if reverse else 1
    with _native.guard(s):
        plan = _native.get_states_plan(out_s, head_dim, degree)
        _check.state("segments", s.shape[1:], z.shape[1:], n, heads_kv, plan.state_rows, value_dim)
        gates = ABSENT
        if total_log_g is not None:
            strides = total_log_g.stride()
            gates = (total_log_g[first].data_ptr() if m else 0, sign * strides[0], strides[1], strides[2])
        native.state_compose(
            plan.handle,
            m,
            *(_native.state_numbers(s[first], z[first]) if m else NO_STATE),
            sign * s.stride(0),
            sign * z.stride(0),
            *gates,
            *_native.state_numbers(out_s, out_z),
            total.data_ptr(),
            _native.stream_of(s),
        )
    return Summary(State(out_s, out_z), total)
