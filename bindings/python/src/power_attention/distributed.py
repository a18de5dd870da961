# SPDX-License-Identifier: Apache-2.0
"""Context parallelism on ``torch.distributed``: one sequence split over the ranks of a process group.

Rank r holds consecutive tokens, after those of rank r - 1. A segment is (L, S, z): its total log gate and its
state from zero. With ``S <- exp(L_m) S + S_m`` over the ranks before, each rank has its true initial state and
runs the ordinary operation; the gradients of states travel the other way. One all-gather each way, of a size that
does not depend on the length of the sequence. Works with any backend of the group: gloo on CPUs, NCCL on GPUs.

Packed sequences may cross ranks. Only the sequence that a rank shares with its neighbours enters the gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._errors import InvalidArgumentError, UnsupportedError
from ._plan import Options, RopeLike, make_options
from .torch import _native
from .torch._native import MaybeTensor
from .torch.function import State, StateLike, autocast
from .torch.segments import compose, summary, summary_reverse

__all__ = ["Shard", "context_parallel_attention", "shard_sequences"]


class Shard(NamedTuple):
    """The part of packed sequences that one rank holds.

    Attributes:
        cu_seqlens: cumulative lengths of the local pieces.
        sequences: index of the first and past the last global sequence with a local piece.
        offsets: position in its sequence of each local piece's first token.
        first_rank: rank where the first local piece's sequence starts.
        last_rank: rank where the last local piece's sequence ends.
    """

    cu_seqlens: list[int]
    sequences: tuple[int, int]
    offsets: list[int]
    first_rank: int
    last_rank: int


def shard_sequences(cu_seqlens: Sequence[int], tokens: Sequence[int], rank: int) -> Shard:
    """Cuts packed sequences at the borders of ranks.

    Args:
        cu_seqlens: global cumulative lengths, from 0.
        tokens: tokens that each rank holds, in rank order.
        rank: whose part.
    """
    cu = [int(n) for n in cu_seqlens]
    borders = [0]
    for n in tokens:
        borders.append(borders[-1] + int(n))
    if len(cu) < 2 or cu[0] != 0 or any(a > b for a, b in zip(cu, cu[1:], strict=False)) or cu[-1] > borders[-1]:
        raise InvalidArgumentError(
            f"cu_seqlens is {cu}; it must start at 0, not decrease and end at no more than {borders[-1]}, the tokens "
            "of all ranks"
        )
    start, end = borders[rank], borders[rank + 1]

    def owner(token: int) -> int:
        """The rank that holds a token; empty ranks hold none."""
        return next(r for r in range(len(tokens)) if borders[r] <= token < borders[r + 1])

    # An empty sequence belongs to the rank that holds the token after it; past the last token, to none.
    inside = [
        i
        for i in range(len(cu) - 1)
        if (cu[i] < end and cu[i + 1] > start) or (cu[i] == cu[i + 1] and start <= cu[i] < end)
    ]
    if not inside:
        return Shard([0], (0, 0), [], rank, rank)
    first, last = inside[0], inside[-1] + 1
    pieces = [(max(cu[i], start), max(min(cu[i + 1], end), max(cu[i], start))) for i in range(first, last)]
    local = [0]
    for a, b in pieces:
        if local[-1] != a - start and local != [0]:
            raise InvalidArgumentError(f"cu_seqlens is {cu}; sequences must follow each other without gaps")
        local.append(b - start)
    offsets = [a - cu[i] for (a, _), i in zip(pieces, range(first, last), strict=True)]
    first_rank = owner(cu[first]) if cu[first] < start else rank
    last_rank = owner(cu[last] - 1) if cu[last] > end else rank
    return Shard(local, (first, last), offsets, first_rank, last_rank)


def _gather(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """One all-gather of several tensors of one type: each comes back with a leading dimension of ranks."""
    world = dist.get_world_size(group)
    flat = torch.cat([p.reshape(-1) for p in parts])
    out = flat.new_empty(world * flat.numel())
    dist.all_gather_into_tensor(out, flat, group=group)
    rows, at, result = out.view(world, flat.numel()), 0, []
    for p in parts:
        result.append(rows[:, at : at + p.numel()].unflatten(1, p.shape))
        at += p.numel()
    return result


class _Call(NamedTuple):
    """What forward and backward share, without tensors that need gradients."""

    options: Options
    group: dist.ProcessGroup | None
    rank: int
    world: int
    first_rank: int  # of the sequence of the first local piece
    last_rank: int  # of the sequence of the last local piece
    cu: MaybeTensor
    offset: MaybeTensor
    slice: tuple[int, int] | None  # local pieces among the global initial states; None: a state per batch entry


def _fold(ranks: range, gathered: list[Tensor], head_dim: int, degree: int, reverse: bool) -> tuple[State, Tensor]:
    """Folds the segments of some ranks."""
    s, z, total = (x[ranks.start : ranks.stop] for x in gathered)
    result = compose(State(s, z), total, head_dim, degree, reverse)
    return result.state, result.total_log_g


def _grow(decay: Tensor, state: State) -> State:
    factor = decay.exp()
    return State(state.s * factor[..., None, None], state.z * factor[..., None])


class _ContextParallel(torch.autograd.Function):
    """Both directions in one function: the autograd of a plain all-gather would count gradients once per rank."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_g: MaybeTensor,
        s0: MaybeTensor,
        z0: MaybeTensor,
        call: _Call,
    ) -> tuple[Tensor, Tensor, Tensor]:
        options, rank, d = call.options, call.rank, q.shape[3]
        packed = call.cu is not None
        n = call.cu.shape[0] - 1 if call.cu is not None else q.shape[0]
        local = summary(k, v, log_g, call.cu, call.offset, options)
        tail = slice(n - 1, n) if packed else slice(0, n)  # what later ranks continue
        gathered = _gather([local.state.s[tail], local.state.z[tail], local.total_log_g[tail]], call.group)
        incoming, total = _fold(range(call.first_rank, rank), gathered, d, options.degree, False)

        own = State(torch.zeros_like(local.state.s), torch.zeros_like(local.state.z))
        if s0 is not None and z0 is not None:
            start, stop = (0, n) if call.slice is None else call.slice
            own = State(s0[start:stop].to(own.s.dtype, copy=True), z0[start:stop].to(own.z.dtype, copy=True))
        head = slice(0, 1) if packed else slice(0, n)
        initial = State(own.s.clone(), own.z.clone())
        grown = _grow(total, State(own.s[head], own.z[head]))
        initial.s[head], initial.z[head] = grown.s + incoming.s, grown.z + incoming.z

        cu_args = (call.cu, call.offset)
        y, norm, s, z = torch.ops.powerattn.forward(q, k, v, log_g, initial.s, initial.z, *cu_args, True, *options)
        ctx.save_for_backward(q, k, v, log_g, y, norm, initial.s, initial.z)
        ctx.call, ctx.initial_shape = call, None if s0 is None else s0.shape
        ctx.set_materialize_grads(False)
        return y, s, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: MaybeTensor, d_s: MaybeTensor, d_z: MaybeTensor) -> Any:
        q, k, v, log_g, y, norm, s0, z0 = ctx.saved_tensors
        call: _Call = ctx.call
        options, rank, d = call.options, call.rank, q.shape[3]
        packed = call.cu is not None
        n = s0.shape[0]
        d_y = torch.zeros_like(y) if d_y is None else d_y.to(y.dtype)
        outer = State(
            torch.zeros_like(s0) if d_s is None else d_s.clone(),
            torch.zeros_like(z0) if d_z is None else d_z.clone(),
        )
        # Gradient of this rank's initial state if nothing came from later ranks:
        # that of its outputs, and that of its own final state, decayed by the rank's gates.
        local = summary_reverse(q, log_g, y, norm, d_y, v.shape[2], call.cu, call.offset, options)
        head = slice(0, 1) if packed else slice(0, n)
        tail = slice(n - 1, n) if packed else slice(0, n)
        own = _grow(local.total_log_g, outer)
        reverse = State(local.state.s + own.s, local.state.z + own.z)
        gathered = _gather([reverse.s[head], reverse.z[head], local.total_log_g[head]], call.group)
        # A rank that the sequence only starts or ends in decays by that piece alone, which is what it gathered.
        incoming, _ = _fold(range(rank + 1, call.last_rank + 1), gathered, d, options.degree, True)
        outer.s[tail] += incoming.s
        outer.z[tail] += incoming.z
        d_q, d_k, d_v, d_log_g, d_s0, d_z0 = torch.ops.powerattn.backward(
            q, k, v, log_g, y, norm, d_y, s0, z0, outer.s, outer.z, call.cu, call.offset, True, True, *options
        )
        grads: tuple[MaybeTensor, MaybeTensor] = (None, None)
        if ctx.initial_shape is not None:
            grads = _initial_gradients(ctx.initial_shape, call, n, d_s0, d_z0)
        return d_q, d_k, d_v, None if log_g is None else d_log_g, *grads, None


def _initial_gradients(
    shape: torch.Size, call: _Call, n: int, d_s0: Tensor, d_z0: Tensor
) -> tuple[MaybeTensor, MaybeTensor]:
    """Gradient of the initial states on the rank where each sequence starts; zeros on the others."""
    d_s, d_z = d_s0.new_zeros(shape), d_z0.new_zeros(shape[:3])
    start = 0 if call.slice is None else call.slice[0]
    if call.first_rank == call.rank:
        d_s[start : start + n], d_z[start : start + n] = d_s0, d_z0
    elif call.cu is not None:
        d_s[start + 1 : start + n], d_z[start + 1 : start + n] = d_s0[1:], d_z0[1:]
    return d_s, d_z


def context_parallel_attention(
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
    cu_seqlens: Sequence[int] | Tensor | None = None,
    tokens: Sequence[int] | None = None,
    normalize: bool = True,
    rope: RopeLike = None,
    eps: float = 0.0,
    form: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> Any:
    """Power attention of a sequence that is split over the ranks of ``group``, forward and backward.

    Every rank of the group makes the call, with its own tokens and otherwise the same arguments.

    Args:
        q: this rank's queries ``[b, t, h, d]``; t may differ between ranks.
        k: this rank's keys ``[b, t, hk, d]``.
        v: this rank's values ``[b, t, hk, e]``.
        log_g: this rank's gates ``[b, t, hk]``.
        degree: the power p.
        scale: of the scores; ``None`` means ``1/sqrt(d)``.
        chunk_size: tokens per chunk, which asks for chunks; ``None`` lets the cost model choose.
        initial_state: ``(S, z)`` before the whole sequence, the same on every rank: ``[b, hk, D, e]``, or with
            ``cu_seqlens`` one per global sequence. Its gradient is on the rank where a sequence starts and zero
            elsewhere: sum over ranks.
        return_final_state: return also the state after this rank's last token. With ``cu_seqlens``: one for each
            local piece of a sequence.
        cu_seqlens: packed sequences: global cumulative lengths, the batch being 1. Host integers.
        tokens: tokens of each rank; needed with ``rope`` or ``cu_seqlens`` where ranks hold different numbers.
        normalize: divide by the sum of the weights.
        rope: rotary embedding, at positions in the whole sequence.
        eps: added to the denominator.
        form: ``"auto"``, ``"attention"`` or ``"chunked"``.
        group: process group; ``None`` is the default one.

    Returns:
        This rank's y ``[b, t, h, e]``, or ``(y, State)``.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise UnsupportedError("torch.distributed is not initialised; call init_process_group first")
    options = make_options(degree, normalize, scale=scale, eps=eps, chunk_size=chunk_size, form=form, rope=rope)
    q, k, v = autocast(q, k, v)
    _native.check_device(q)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if tokens is None:
        tokens = [q.shape[1]] * world
    if len(tokens) != world or tokens[rank] != q.shape[1]:
        raise InvalidArgumentError(
            f"tokens is {list(tokens)}; one number for each of {world} ranks is needed, and {q.shape[1]} for this one"
        )
    s0, z0 = (None, None) if initial_state is None else initial_state
    first, last, where = 0, world - 1, None
    cu = offset = None
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise InvalidArgumentError(f"batch is {q.shape[0]}; with cu_seqlens it must be 1")
        shard = shard_sequences([int(n) for n in cu_seqlens], tokens, rank)
        if shard.sequences == (
            0,
            0,
        ):  # nothing of any sequence here: one empty piece keeps the collectives in step
            shard = Shard([0, 0], (0, 1), [0], rank, rank)
        cu = torch.tensor(shard.cu_seqlens, dtype=torch.int64, device=q.device)
        first, last, where = shard.first_rank, shard.last_rank, shard.sequences
        positions = shard.offsets
    else:
        positions = [sum(tokens[:rank])] * q.shape[0]
    if rope is not None:
        offset = torch.tensor(positions, dtype=torch.int64, device=q.device)
    n = q.shape[0] if where is None else where[1] - where[0]
    _native.check_inputs(q, k, v, log_g, cu, offset, n, options)
    if s0 is not None and z0 is not None:
        count = n if cu_seqlens is None else len(cu_seqlens) - 1
        _native.check_state("initial_state", s0, z0, q, v, count, degree)
    call = _Call(options, group, rank, world, first, last, cu, offset, where)
    y, s, z = _ContextParallel.apply(q, k, v, log_g, s0, z0, call)
    return (y, State(s, z)) if return_final_state else y
