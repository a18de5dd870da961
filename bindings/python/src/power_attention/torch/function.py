# SPDX-License-Identifier: Apache-2.0
"""The function ``power_attention`` for PyTorch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._errors import InvalidArgumentError
from .._plan import Options, RopeLike, make_options
from . import _native
from . import ops as _ops  # noqa: F401  registers the operators


class State(NamedTuple):
    """States of n sequences: S ``[n, heads_kv, D, value_dim]`` and z ``[n, heads_kv, D]``."""

    s: Tensor
    z: Tensor


StateLike = State | tuple[Tensor, Tensor]
_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in the type of an enclosing autocast region; log_g and states are never cast."""
    if not torch._C._is_any_autocast_enabled():  # a step asks this often
        return tensors
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype in _CASTABLE else x for x in tensors)


def index(x: Any, like: Tensor) -> Tensor | None:
    """Cumulative lengths, slots and offsets as contiguous int64. Lists are taken too; tensors keep their device."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        return torch.tensor(x, dtype=torch.int64, device=like.device)
    if x.dtype is torch.int64 and x.is_contiguous():
        return x
    if x.dtype not in (torch.int64, torch.int32):
        raise InvalidArgumentError(f"an index tensor is {x.dtype}; int64 or int32 is needed")
    return x.to(torch.int64).contiguous()


def power_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_g: Tensor | None = None,
    degree: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    initial_state: StateLike | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    normalize: bool = True,
    rope: RopeLike = None,
    rope_offset: Tensor | Sequence[int] | None = None,
    eps: float = 0.0,
    form: str = "auto",
    max_seq_len: int = 0,
) -> Any:
    """Symmetric power attention.

    With ``G`` the inclusive cumulative sum of ``log_g`` and ``w_ij = exp(G_i - G_j) (scale q_i . k_j)**degree``
    for ``j <= i``, the output is ``y_i = sum_j w_ij v_j / sum_j w_ij``.

    Differentiable in q, k, v, log_g and the initial state, through y and the final state. Any strides are taken
    as they are, as long as the last dimension has stride 1.

    Args:
        q: queries ``[b, t, h, d]``; float32, float16, bfloat16 or, on the CPU, float64.
        k: keys ``[b, t, hk, d]``, h a multiple of hk.
        v: values ``[b, t, hk, e]``.
        log_g: log of the decay when a token arrives ``[b, t, hk]``, float32 (float64 with float64), <= 0.
        degree: the power p, even unless ``normalize=False``.
        scale: of the scores; ``None`` means ``1/sqrt(d)``. 0 is used as 0.
        chunk_size: tokens per chunk, which asks for chunks; ``None`` lets the cost model choose.
        initial_state: ``(S, z)`` before the first token: ``[n, hk, D, e]`` and ``[n, hk, D]``.
        return_final_state: return ``(y, State)`` instead of y.
        cu_seqlens: packed sequences: cumulative lengths ``[n + 1]`` on q's device, the batch being 1. Rows past
            the last sequence are zeros.
        normalize: divide by the sum of the weights.
        rope: rotary embedding fused into the operation: ``None``, ``"half"``, ``"interleaved"`` or a ``Rope``.
        rope_offset: position of the first token of each sequence ``[n]``.
        eps: added to the denominator.
        form: ``"auto"``, ``"attention"`` or ``"chunked"``.
        max_seq_len: longest packed sequence if known; helps the cost model.

    Returns:
        y ``[b, t, h, e]``, or ``(y, State(s, z))`` with ``return_final_state``.
    """
    options = make_options(
        degree, normalize, scale=scale, eps=eps, chunk_size=chunk_size, form=form, max_seq_len=max_seq_len, rope=rope
    )
    return run(q, k, v, log_g, initial_state, return_final_state, cu_seqlens, rope_offset, options)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    initial_state: StateLike | None,
    return_final_state: bool,
    cu_seqlens: Tensor | Sequence[int] | None,
    rope_offset: Tensor | Sequence[int] | None,
    options: Options,
) -> Any:
    """The same with options that are made."""
    _check.rank("q", q.shape, "[batch, tokens, heads, head_dim]")
    q, k, v = autocast(q, k, v)
    s0, z0 = (None, None) if initial_state is None else initial_state
    if q.device.type not in ("cpu", "cuda", "meta"):
        _native.check_device(q)
    y, _, s, z = torch.ops.powerattn.forward(
        q, k, v, log_g, s0, z0, index(cu_seqlens, q), index(rope_offset, q), return_final_state, *options
    )
    return (y, State(s, z)) if return_final_state else y
