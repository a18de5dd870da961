# SPDX-License-Identifier: Apache-2.0
"""Functions with the names and arguments of the ``retention`` package: change one import.

``power_full``, ``power_retention`` and ``power_retention_inference`` take the arguments of ``retention`` 1.0.7 and
return the same tuples. Where that package departs from the formula these do not; ``docs/porting.md`` lists each
difference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._errors import InvalidArgumentError
from ._plan import FORM_CHUNK_SIZE_IS_A_HINT, Options, make_options
from .torch import _native
from .torch.function import State, power_attention, run
from .torch.segments import compose, summary
from .torch.state import _refuse_grad

__all__ = ["power_full", "power_retention", "power_retention_inference"]


def _gate(log_G: Tensor | None, like: Tensor) -> Tensor | None:
    return None if log_G is None else log_G.to(_native.wide(like.dtype))


def _options(deg: int, scale: float | None, chunk_size: int | None) -> Options:
    options = make_options(deg, True, scale=scale, chunk_size=chunk_size)
    return options._replace(form=FORM_CHUNK_SIZE_IS_A_HINT)


def _state(initial_state: Any, sum_of_keys: Tensor | None, like: Tensor) -> State | None:
    """(S, z) in float32 from a pair, or from a state and its sum of keys."""
    if initial_state is None:
        if sum_of_keys is not None:
            raise InvalidArgumentError("sum_of_keys is given without initial_state")
        return None
    if isinstance(initial_state, (tuple, list)):
        initial_state, sum_of_keys = initial_state
    if sum_of_keys is None:
        raise InvalidArgumentError(
            "initial_state is given without sum_of_keys; the normaliser needs both (or a pair (state, sum_of_keys))"
        )
    kind = _native.wide(like.dtype)
    return State(initial_state.to(kind), sum_of_keys.to(kind))


def power_full(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    initial_state: Any = None,
    deg: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Symmetric power attention of a whole sequence.

    Args:
        Q: ``[b, t, h, d]``, float16, bfloat16 or float32 (float64 on the CPU).
        K: ``[b, t, hk, d]``, h a multiple of hk.
        V: ``[b, t, hk, e]``.
        log_G: log of the decay ``[b, t, hk]``.
        initial_state: ``(state, sum_of_keys)``: ``[b, hk, D, e]`` and ``[b, hk, D]``.
        deg: the power, even.
        scale: of the scores; ``None`` means ``1/sqrt(d)``.
        chunk_size: tokens per chunk where the chunked form runs; t need not be a multiple of it. The form is the
            cheaper one at this length, degree and head_dim: they give the same result.

    Returns:
        ``[b, t, h, e]``.
    """
    options = _options(deg, scale, chunk_size)
    state = _state(initial_state, None, Q)
    return run(Q, K, V, _gate(log_G, Q), state, False, None, None, options)  # type: ignore[no-any-return]


def power_retention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    initial_state: Any = None,
    return_final_state: bool = False,
    deg: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    switch_over_seq_len: int | None = None,
    *,
    sum_of_keys: Tensor | None = None,
) -> Any:
    """Symmetric power attention for training, with states.

    Args:
        Q: ``[b, t, h, d]``.
        K: ``[b, t, hk, d]``.
        V: ``[b, t, hk, e]``.
        log_G: log of the decay ``[b, t, hk]``.
        initial_state: state before the first token ``[b, hk, D, e]``, or a pair ``(state, sum_of_keys)``.
        return_final_state: return ``(out, state, sum_of_keys)``.
        deg: the power, even.
        scale: of the scores; ``None`` means ``1/sqrt(d)``.
        chunk_size: tokens per chunk where the chunked form runs.
        switch_over_seq_len: with ``return_final_state``, sequences that are shorter when they are rounded up to
            whole chunks return ``None`` for state and sum of keys: their caller still keeps keys and values.
        sum_of_keys: normaliser of ``initial_state`` ``[b, hk, D]``.

    Returns:
        ``[b, t, h, e]``, or with ``return_final_state`` a tuple with the state ``[b, hk, D, e]`` and the sum of
        keys ``[b, hk, D]``, after the last token.
    """
    options = _options(deg, scale, chunk_size)
    state = _state(initial_state, sum_of_keys, Q)
    tokens = Q.shape[1]
    if chunk_size is not None:
        tokens += -tokens % chunk_size
    keep_cache = state is None and switch_over_seq_len is not None and tokens < switch_over_seq_len
    wants_state = return_final_state and not keep_cache
    out = run(Q, K, V, _gate(log_G, Q), state, wants_state, None, None, options)
    if not return_final_state:
        return out
    if keep_cache:
        return out, None, None
    y, final = out
    return y, final.s, final.z


def _recent(Q: Tensor, K: Tensor, V: Tensor, total: Tensor | None, deg: int, scale: float) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the last tq queries over a cache of tk >= tq tokens.

    With few queries this is a matrix-vector product: there is no tile to fill.
    """
    b, tq, h, d = Q.shape
    tk, hk = K.shape[1], K.shape[2]
    kind = _native.wide(Q.dtype)
    q = Q.to(kind).view(b, tq, hk, h // hk, d)
    weights = (torch.einsum("bihrd,bjhd->bhrij", q, K.to(kind)) * scale) ** deg
    if total is not None:
        g = total.transpose(1, 2)  # [b, hk, tk]
        decay = g[:, :, tk - tq :, None] - g[:, :, None, :]
        weights = weights * decay.clamp(max=0).exp()[:, :, None]
    allowed = torch.ones(tq, tk, dtype=torch.bool, device=Q.device).tril(tk - tq)
    weights = weights.masked_fill(~allowed, 0)
    numerator = torch.einsum("bhrij,bjhe->bihre", weights, V.to(kind)).reshape(b, tq, h, V.shape[3])
    return numerator, weights.sum(-1).permute(0, 3, 1, 2).reshape(b, tq, h)


def _from_state(Q: Tensor, state: State, options: Options) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of queries against a state, without any gate."""
    b, tq, _, d = Q.shape
    hk, e = state.s.shape[1], state.s.shape[3]
    kind = _native.wide(Q.dtype)
    # Keys of zero add nothing. In float32, so that the numerator is not rounded twice.
    zero_k, zero_v = Q.new_zeros((1, 1, hk, d), dtype=kind), Q.new_zeros((1, 1, hk, e), dtype=kind)
    k, v = zero_k.expand(b, tq, hk, d), zero_v.expand(b, tq, hk, e)
    y, norm, _, _ = torch.ops.powerattn.forward(Q.to(kind), k, v, None, state.s, state.z, None, None, False, *options)
    return y * norm[..., None], norm


@torch.no_grad()
def _inference(
    Q: Tensor,
    K: Tensor | None,
    V: Tensor | None,
    log_G: Tensor | None,
    state: State | None,
    deg: int,
    scale: float | None,
    switch: int | None,
) -> tuple[Tensor, State | None]:
    d, tq = Q.shape[3], Q.shape[1]
    options = make_options(deg, True, scale=scale)
    factor = 1.0 / d**0.5 if scale is None else scale
    if K is None or V is None:
        assert state is not None
        numerator, norm = _from_state(Q, state, options)
        if log_G is not None:  # a decay of the whole state cancels, unless it leaves nothing
            left = log_G.sum(1).isneginf().logical_not().repeat_interleave(Q.shape[2] // log_G.shape[2], 1)
            norm = norm * left[:, None]
        return torch.where(norm[..., None] > 0, numerator / norm[..., None], 0).to(Q.dtype), state
    tk = K.shape[1]
    switching = switch is not None and tk >= switch
    if tq == tk:
        out = power_attention(
            Q, K, V, log_g=log_G, degree=deg, scale=scale, initial_state=state, return_final_state=switching
        )
        return out if switching else (out, state)
    total = None if log_G is None else log_G.cumsum(1)
    numerator, norm = _recent(Q, K, V, total, deg, factor)
    if state is not None:
        state_numerator, state_norm = _from_state(Q, state, options)
        if total is not None:  # each query discounts the state by its own position
            decay = total[:, tk - tq :].exp().repeat_interleave(Q.shape[2] // K.shape[2], 2)
            state_numerator, state_norm = state_numerator * decay[..., None], state_norm * decay
        numerator, norm = numerator + state_numerator, norm + state_norm
    y = torch.where(norm[..., None] > 0, numerator / norm[..., None], 0).to(Q.dtype)
    if not switching:
        return y, state
    segment = summary(K, V, log_G, None, None, options)
    if state is None:
        return y, segment.state
    segments = State(torch.stack((state.s, segment.state.s)), torch.stack((state.z, segment.state.z)))
    gates = torch.stack((torch.zeros_like(segment.total_log_g), segment.total_log_g))
    return y, compose(segments, gates, d, deg).state


def power_retention_inference(
    Q: Tensor,
    K: Tensor | None,
    V: Tensor | None,
    log_G: Tensor | None = None,
    initial_state: Any = None,
    sum_of_keys: Tensor | None = None,
    deg: int = 2,
    scale: float | None = None,
    switch_over_seq_len: int | None = 512,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The last tokens of a sequence, against a short cache of keys and values and a state of all before it.

    Args:
        Q: queries of the last tokens ``[b, tq, h, d]``.
        K: cached keys since the state, those of Q included ``[b, tk, hk, d]``, or ``None``: only the state.
        V: cached values ``[b, tk, hk, e]``, or ``None``.
        log_G: log of the decay of the cached tokens ``[b, tk, hk]``.
        initial_state: state before the cached tokens ``[b, hk, D, e]``.
        sum_of_keys: its normaliser ``[b, hk, D]``.
        deg: the power, even.
        scale: of the scores; ``None`` means ``1/sqrt(d)``.
        switch_over_seq_len: with as many cached tokens or more, they are folded into the state that is returned,
            and the caller empties its cache. ``None``: never.

    Returns:
        ``(out, state, sum_of_keys)``: out ``[b, tq, h, e]``; the state given, or the new one.
    """
    if (K is None) != (V is None):
        raise InvalidArgumentError("K and V: one is None; give both or neither")
    state = _state(initial_state, sum_of_keys, Q)
    if K is None and state is None:
        raise InvalidArgumentError("initial_state is None and K and V are None; there is nothing to attend to")
    if K is not None and V is not None:
        for name, x in (("K", K), ("V", V)):
            if x.dtype is not Q.dtype or x.device != Q.device:
                raise InvalidArgumentError(f"{name} is {x.dtype} on {x.device}; Q is {Q.dtype} on {Q.device}")
        if Q.shape[1] > K.shape[1]:
            raise InvalidArgumentError(f"Q has {Q.shape[1]} tokens, K has {K.shape[1]}; Q's are the last ones of K's")
        options = make_options(deg, True, scale=scale)
        _native.check_inputs(K, K, V, _gate(log_G, Q), None, None, K.shape[0], options)
        if Q.shape[0] != K.shape[0] or Q.shape[3] != K.shape[3] or Q.shape[2] % K.shape[2]:
            raise InvalidArgumentError(
                f"Q has shape {list(Q.shape)}, K {list(K.shape)}: equal batch and head_dim, and heads of Q a multiple"
            )
    given = [x for x in (Q, K, V, log_G) if x is not None] + ([] if state is None else list(state))
    _refuse_grad(*given)
    y, new = _inference(Q, K, V, _gate(log_G, Q), state, deg, scale, switch_over_seq_len)
    if new is state and state is not None and not isinstance(initial_state, (tuple, list)):
        return y, initial_state, sum_of_keys
    return y, (None if new is None else new.s), (None if new is None else new.z)
