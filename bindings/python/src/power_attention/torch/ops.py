# SPDX-License-Identifier: Apache-2.0
"""The operators ``powerattn::forward``, ``backward``, ``step`` and ``step_``.

Forward and backward are two functional operators, so that torch.compile and torch.export see them as what they
are. Each has one kernel for the CPU and CUDA, and a fake kernel that gives the same shapes, types and strides
from symbolic sizes. Outputs never alias inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._errors import UnsupportedError
from .._plan import Options
from . import _native
from ._native import MaybeTensor

_OPTIONS = (
    "int degree, float? scale, float eps, int chunk_size, int form, bool normalize, int max_seq_len, "
    "int rope_style, int rope_dim, float rope_base"
)

_LIBRARY = torch.library.Library("powerattn", "DEF")
_LIBRARY.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor? log_g, Tensor? s0, Tensor? z0, Tensor? cu_seqlens, "
    f"Tensor? rope_offset, bool return_state, {_OPTIONS}) -> (Tensor y, Tensor row_norm, Tensor s, Tensor z)"
)
_LIBRARY.define(
    "backward(Tensor q, Tensor k, Tensor v, Tensor? log_g, Tensor y, Tensor row_norm, Tensor d_y, Tensor? s0, "
    "Tensor? z0, Tensor? d_s, Tensor? d_z, Tensor? cu_seqlens, Tensor? rope_offset, bool return_state, "
    f"bool need_d_state, {_OPTIONS}) "
    "-> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_log_g, Tensor d_s0, Tensor d_z0)"
)
_LIBRARY.define(
    "step_(Tensor q, Tensor k, Tensor v, Tensor? log_g, Tensor(a!) s, Tensor(b!) z, Tensor? slots, "
    f"Tensor? lengths, Tensor? rope_offset, {_OPTIONS}) -> Tensor"
)
_LIBRARY.define(
    "step(Tensor q, Tensor k, Tensor v, Tensor? log_g, Tensor s, Tensor z, Tensor? slots, Tensor? lengths, "
    f"Tensor? rope_offset, {_OPTIONS}) -> (Tensor y, Tensor s, Tensor z)"
)


def _step_functional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: MaybeTensor,
    s: Tensor,
    z: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    s, z = s.clone(memory_format=torch.contiguous_format), z.clone(memory_format=torch.contiguous_format)
    return _native.step(q, k, v, log_g, s, z, *rest), s, z


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("forward", _native.forward, _key)
    _LIBRARY.impl("backward", _native.backward, _key)
    _LIBRARY.impl("step_", _native.step, _key)
    _LIBRARY.impl("step", _step_functional, _key)


# ---- Fake kernels ------------------------------------------------------------------------------------------


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: MaybeTensor,
    s0: MaybeTensor,
    z0: MaybeTensor,
    cu_seqlens: MaybeTensor,
    rope_offset: MaybeTensor,
    return_state: bool,
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Options(*numbers)
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _native.check_inputs(q, k, v, log_g, cu_seqlens, rope_offset, n, options)
    _native.check_state("initial_state", s0, z0, q, v, n, options.degree)
    high = _native.wide(q.dtype)
    y = q.new_empty((*q.shape[:3], v.shape[3]))
    row_norm = q.new_empty(q.shape[:3] if options.normalize else (0,), dtype=high)
    if return_state:
        s, z = _native.empty_state(q, v, n, options.degree)
    else:
        s, z = q.new_empty((0,), dtype=high), q.new_empty((0,), dtype=high)
    return y, row_norm, s, z


def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: MaybeTensor,
    y: Tensor,
    row_norm: Tensor,
    d_y: Tensor,
    s0: MaybeTensor,
    z0: MaybeTensor,
    d_s: MaybeTensor,
    d_z: MaybeTensor,
    cu_seqlens: MaybeTensor,
    rope_offset: MaybeTensor,
    return_state: bool,
    need_d_state: bool,
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = Options(*numbers)
    high = _native.wide(q.dtype)
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if need_d_state:
        d_s0, d_z0 = _native.empty_state(q, v, n, options.degree)
    else:
        d_s0, d_z0 = q.new_empty((0,), dtype=high), q.new_empty((0,), dtype=high)
    d_log_g = q.new_empty((0,) if log_g is None else log_g.shape, dtype=high)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_log_g, d_s0, d_z0


def _step_fake_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: MaybeTensor,
    s: Tensor,
    z: Tensor,
    slots: MaybeTensor,
    lengths: MaybeTensor,
    rope_offset: MaybeTensor,
    *numbers: Any,
) -> Tensor:
    _native.check_step(q, k, v, log_g, s, z, slots, lengths, rope_offset, Options(*numbers))
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _step_fake(
    q: Tensor, k: Tensor, v: Tensor, log_g: MaybeTensor, s: Tensor, z: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _step_fake_(q, k, v, log_g, s, z, *rest), s.new_empty(s.shape), z.new_empty(z.shape)


torch.library.register_fake("powerattn::forward", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("powerattn::backward", _backward_fake, lib=_LIBRARY)
torch.library.register_fake("powerattn::step_", _step_fake_, lib=_LIBRARY)
torch.library.register_fake("powerattn::step", _step_fake, lib=_LIBRARY)


# ---- Autograd ----------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_g, s0, z0, cu_seqlens, rope_offset, return_state, *numbers = inputs
    y, row_norm, s, z = output
    ctx.save_for_backward(q, k, v, log_g, s0, z0, cu_seqlens, rope_offset, y, row_norm)
    ctx.mark_non_differentiable(*((row_norm,) if return_state else (row_norm, s, z)))
    ctx.set_materialize_grads(False)
    ctx.return_state = return_state
    ctx.numbers = tuple(numbers)


def _differentiate(
    ctx: Any, d_y: MaybeTensor, _d_norm: MaybeTensor, d_s: MaybeTensor, d_z: MaybeTensor
) -> tuple[MaybeTensor, ...]:
    q, k, v, log_g, s0, z0, cu_seqlens, rope_offset, y, row_norm = ctx.saved_tensors
    rest = (None,) * (3 + len(ctx.numbers))  # cu_seqlens, rope_offset, return_state and the options
    if d_y is None and d_s is None and d_z is None:
        return (None,) * 6 + rest
    if d_y is None:
        d_y = torch.zeros_like(y)
    if d_s is not None or d_z is not None:
        n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        s_like, z_like = _native.empty_state(q, v, n, ctx.numbers[0])
        d_s = torch.zeros_like(s_like) if d_s is None else d_s
        d_z = torch.zeros_like(z_like) if d_z is None else d_z
    need_d_state = s0 is not None and (ctx.needs_input_grad[4] or ctx.needs_input_grad[5])
    d_q, d_k, d_v, d_log_g, d_s0, d_z0 = torch.ops.powerattn.backward(
        q, k, v, log_g, y, row_norm, d_y, s0, z0, d_s, d_z, cu_seqlens, rope_offset, ctx.return_state,
        need_d_state, *ctx.numbers,
    )  # fmt: skip
    return (
        d_q,
        d_k,
        d_v,
        None if log_g is None else d_log_g,
        d_s0 if need_d_state else None,
        d_z0 if need_d_state else None,
        *rest,
    )


def _refuse(message: str) -> Any:
    def backward(ctx: Any, *grads: MaybeTensor) -> None:
        raise UnsupportedError(message)

    return backward


torch.library.register_autograd("powerattn::forward", _differentiate, setup_context=_setup_context, lib=_LIBRARY)
torch.library.register_autograd(
    "powerattn::backward",
    _refuse("power_attention has no second derivative; use first-order gradients (create_graph=False)"),
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "powerattn::step",
    _refuse("step has no gradient; use power_attention with initial_state and return_final_state to train"),
    lib=_LIBRARY,
)
