# SPDX-License-Identifier: Apache-2.0
"""Power attention for JAX: ``jit``, ``grad``, ``vmap`` (one call after another), on the CPU and on CUDA.

The operation is an XLA custom call through ``jax.ffi`` with a ``custom_vjp``. The handlers are a small shared
object that is compiled against the installed jaxlib when this module is first used.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _check
from .._errors import DtypeError, InvalidArgumentError
from .._plan import RopeLike, cached_plan, dtype_number, make_options, plan_numbers, state_rows
from . import _shim

__all__ = ["State", "power_attention"]


class State(NamedTuple):
    """States of n sequences: S ``[n, heads_kv, D, value_dim]`` and z ``[n, heads_kv, D]``."""

    s: Any
    z: Any


class _Spec(NamedTuple):
    """A description: hashable, as a static argument must be."""

    numbers: tuple[Any, ...]  # as plan_numbers makes them; the device is the handler's own
    normalize: bool
    return_state: bool
    sequences: int
    rows: int

    def attributes(self) -> dict[str, Any]:
        # xla_ffi.cc reads both by position; scale, eps and rope_base stand between the integers.
        whole, real = self.numbers[:16] + self.numbers[19:], self.numbers[16:19]
        return {"spec": np.array(whole, np.int64), "real": np.array(real, np.float64)}


def _wide(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _absent(dtype: Any) -> Any:
    return jnp.zeros((0,), dtype)


def _offsets(x: Any, name: str) -> Any:
    """Memory of int64 whether or not JAX has 64-bit integers: pairs of int32 otherwise, low word first."""
    if x is None:
        return _absent(jnp.int32)
    if not jnp.issubdtype(jnp.result_type(x), jnp.integer):
        raise DtypeError(f"{name} is {jnp.result_type(x)}; integers are needed")
    if jax.config.read("jax_enable_x64"):
        return jnp.asarray(x, jnp.int64)
    low = jnp.asarray(x, jnp.int32)
    return jnp.stack((low, low >> 31), -1)


def _call(name: str, results: list[tuple[tuple[int, ...], Any]], spec: _Spec, *operands: Any) -> Any:
    _shim.load()
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    return jax.ffi.ffi_call(name, shapes, vmap_method="sequential")(*operands, **spec.attributes())


def _state_shapes(spec: _Spec, k: Any, v: Any, wanted: bool) -> list[tuple[tuple[int, ...], Any]]:
    wide = _wide(v.dtype)
    if not wanted:
        return [((0,), wide), ((0,), wide)]
    shape = (spec.sequences, k.shape[2], spec.rows)
    return [((*shape, v.shape[3]), wide), (shape, wide)]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec: _Spec, q: Any, k: Any, v: Any, log_g: Any, s0: Any, z0: Any, cu: Any, offset: Any) -> Any:
    return _forward(spec, q, k, v, log_g, s0, z0, cu, offset)[0]


def _forward(spec: _Spec, q: Any, k: Any, v: Any, log_g: Any, s0: Any, z0: Any, cu: Any, offset: Any) -> Any:
    norm = q.shape[:3] if spec.normalize else (0,)
    results = [((*q.shape[:3], v.shape[3]), q.dtype), (norm, _wide(q.dtype))]
    results += _state_shapes(spec, k, v, spec.return_state)
    y, row_norm, s, z = _call("powerattn_forward", results, spec, q, k, v, log_g, s0, z0, cu, offset)
    return (y, s, z), (q, k, v, log_g, s0, z0, cu, offset, y, row_norm)


def _backward(spec: _Spec, saved: Any, gradients: Any) -> Any:
    q, k, v, log_g, s0, z0, cu, offset, y, row_norm = saved
    d_y, d_s, d_z = gradients
    has_state = s0.ndim == 4
    results = [(q.shape, q.dtype), (k.shape, q.dtype), (v.shape, q.dtype), (log_g.shape, log_g.dtype)]
    results += _state_shapes(spec, k, v, has_state)
    operands = (q, k, v, log_g, y, row_norm, d_y, s0, z0, d_s, d_z, cu, offset)
    grads = _call("powerattn_backward", results, spec, *operands)
    integers = [np.zeros(x.shape, jax.dtypes.float0) for x in (cu, offset)]
    return (*grads, *integers)


_attention.defvjp(_forward, _backward)


def power_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    log_g: Any = None,
    degree: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    initial_state: State | tuple[Any, Any] | None = None,
    return_final_state: bool = False,
    cu_seqlens: Any = None,
    normalize: bool = True,
    rope: RopeLike = None,
    rope_offset: Any = None,
    eps: float = 0.0,
    form: str = "auto",
    num_threads: int = 0,
) -> Any:
    """Symmetric power attention, differentiable in q, k, v, log_g and the initial state.

    Args:
        q: queries ``[b, t, h, d]``: float32, float16, bfloat16, or float64 on the CPU with x64 enabled.
        k: keys ``[b, t, hk, d]``.
        v: values ``[b, t, hk, e]``.
        log_g: log of the decay ``[b, t, hk]``, float32 (float64 with float64).
        degree: the power p, even unless ``normalize=False``.
        scale: of the scores; ``None`` means ``1/sqrt(d)``.
        chunk_size: tokens per chunk, which asks for chunks; ``None`` lets the cost model choose.
        initial_state: ``(S, z)`` before the first token.
        return_final_state: return ``(y, State)``.
        cu_seqlens: packed sequences: cumulative lengths ``[n + 1]``, the batch being 1.
        normalize: divide by the sum of the weights.
        rope: rotary embedding.
        rope_offset: position of the first token of each sequence ``[n]``.
        eps: added to the denominator.
        form: ``"auto"``, ``"attention"`` or ``"chunked"``.
        num_threads: CPU threads; 0 means all.
    """
    options = make_options(degree, normalize, scale=scale, eps=eps, chunk_size=chunk_size, form=form, rope=rope)
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    wide = _wide(q.dtype)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise DtypeError(f"{name} is {x.dtype}; {q.dtype} is needed (q is {q.dtype})")
    if log_g is not None:
        log_g = jnp.asarray(log_g)
        if log_g.dtype != wide:
            raise DtypeError(f"log_g is {log_g.dtype}; {jnp.dtype(wide)} is needed (q is {q.dtype})")
    _check.shapes(q.shape, k.shape, v.shape, None if log_g is None else log_g.shape)
    _check.packed(q.shape[0], None if cu_seqlens is None else jnp.shape(cu_seqlens))
    d, (hk, e) = q.shape[3], v.shape[2:]
    packed = 0 if cu_seqlens is None else jnp.shape(cu_seqlens)[0] - 1
    n = packed or q.shape[0]
    rows = state_rows(d, degree)
    if initial_state is not None:
        s0, z0 = (jnp.asarray(x) for x in initial_state)
        _check.state("initial_state", s0.shape, z0.shape, n, hk, rows, e)
        if s0.dtype != wide or z0.dtype != wide:
            raise DtypeError(f"initial_state is {s0.dtype} and {z0.dtype}; {jnp.dtype(wide)} is needed")
    else:
        s0, z0 = _absent(wide), _absent(wide)
    if rope_offset is not None and jnp.shape(rope_offset) != (n,):
        raise InvalidArgumentError(f"rope_offset has shape {list(jnp.shape(rope_offset))}; [{n}] is needed")
    numbers = plan_numbers(
        dtype_number(str(q.dtype), "q"),
        options,
        return_final_state or initial_state is not None,
        q.shape,
        v.shape,
        sequences=packed,
        num_threads=num_threads,
    )
    if jax.default_backend() == "cpu":  # what cannot be planned is refused here, with its own exception
        cached_plan(*numbers)
    spec = _Spec(numbers, normalize, return_final_state, n, rows)
    y, s, z = _attention(
        spec,
        q,
        k,
        v,
        _absent(wide) if log_g is None else log_g,
        s0,
        z0,
        _offsets(cu_seqlens, "cu_seqlens"),
        _offsets(rope_offset, "rope_offset"),
    )
    return (y, State(s, z)) if return_final_state else y
