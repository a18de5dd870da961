# SPDX-License-Identifier: Apache-2.0
"""Plans: what will be computed, chosen once and cached by shape, type and options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from . import _check
from . import _power_attention as _swig
from ._errors import DtypeError, InvalidArgumentError

# The C functions themselves, past SWIG's Python proxies: they are on the path of every call.
native: Any = _swig._power_attention_c  # type: ignore[attr-defined]

DTYPES = {
    "float32": _swig.FLOAT32,
    "float16": _swig.FLOAT16,
    "bfloat16": _swig.BFLOAT16,
    "float64": _swig.FLOAT64,
}
FORMS = {"auto": _swig.FORM_AUTO, "attention": _swig.FORM_ATTENTION, "chunked": _swig.FORM_CHUNKED}
# A form of the Python layers alone, for the drop-ins: chunks of chunk_size where the cost model would use chunks at
# all. To the library a chunk size asks for chunks, which can cost a thousand times what attention does.
FORM_CHUNK_SIZE_IS_A_HINT = -1
ROPE_STYLES = {"half": _swig.ROPE_HALF, "interleaved": _swig.ROPE_INTERLEAVED}
DEVICES = {"cpu": _swig.CPU, "cuda": _swig.CUDA}

UNNORMALIZED: int = _swig.UNNORMALIZED
CUSTOM_SCALE: int = _swig.CUSTOM_SCALE
USE_STATE: int = _swig.USE_STATE
ALLOW_TF32: int = _swig.ALLOW_TF32

# Threads come from here only where the environment does not say them.
ENV_THREADS = "POWERATTN_NUM_THREADS" in os.environ

ABSENT = (0, 0, 0, 0)  # a tensor that is not given
NO_STATE = (0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of q and k, fused into the operation.

    Pair ``i`` of a token at position ``m`` is rotated by ``m * base ** (-2 * i / dim)``.

    Attributes:
        style: ``"half"`` pairs ``(i, i + dim/2)`` (NeoX), ``"interleaved"`` pairs ``(2i, 2i + 1)`` (GPT-J).
        dim: leading dimensions that are rotated, even; ``None`` rotates all of them.
        base: base of the frequencies.
    """

    style: str = "half"
    dim: int | None = None
    base: float = 10000.0


RopeLike = Rope | str | None


def rope_numbers(rope: RopeLike) -> tuple[int, int, float]:
    """Style, dimension and base as the library takes them."""
    if rope is None:
        return 0, 0, 0.0
    if isinstance(rope, str):
        rope = Rope(rope)
    if not isinstance(rope, Rope) or rope.style not in ROPE_STYLES:
        raise InvalidArgumentError(f"rope must be None, 'half', 'interleaved' or a Rope, not {rope!r}")
    return ROPE_STYLES[rope.style], int(rope.dim or 0), float(rope.base)


def dtype_number(name: str, argument: str = "dtype") -> int:
    """The library's number of a dtype name."""
    try:
        return DTYPES[name]
    except KeyError:
        raise DtypeError(f"{argument} is {name}; allowed are {', '.join(DTYPES)}") from None


def form_number(form: str) -> int:
    """The library's number of a form."""
    try:
        return FORMS[form]
    except KeyError:
        raise InvalidArgumentError(f"form is {form!r}; allowed are {', '.join(FORMS)}") from None


class Plan:
    """An immutable plan. Holds no data; any number of threads may use one at once.

    Make one with :func:`plan`; the functions of the package make and cache their own.
    """

    __slots__ = (
        "__weakref__",
        "chunk_size",
        "degree",
        "form",
        "handle",
        "head_dim",
        "heads_kv",
        "heads_q",
        "predicted_backward_s",
        "predicted_forward_s",
        "saved_bytes",
        "scale",
        "sequences",
        "state_bytes",
        "state_rows",
        "value_dim",
        "workspace_backward",
        "workspace_backward_saved",
        "workspace_forward",
        "workspace_step",
        "workspace_summary",
    )

    def __init__(self, *numbers: float) -> None:
        self.handle: int = 0
        self.degree = int(numbers[4])
        self.heads_q, self.heads_kv, self.head_dim, self.value_dim = (int(n) for n in numbers[9:13])
        self.form: str = ""
        self.chunk_size: int = 0
        self.handle = native.plan_create(*numbers)
        info = _swig.plan_query(self.handle)
        self.form = "attention" if info.form == _swig.FORM_ATTENTION else "chunked"
        self.chunk_size = info.chunk_size
        self.sequences: int = info.sequences
        self.state_rows: int = info.state_rows
        self.state_bytes: int = info.state_bytes
        self.workspace_forward: int = info.workspace_forward
        self.workspace_backward: int = info.workspace_backward
        self.workspace_backward_saved: int = info.workspace_backward_saved
        self.workspace_step: int = info.workspace_step
        self.workspace_summary: int = info.workspace_summary
        self.saved_bytes: int = info.saved_bytes
        self.scale: float = info.scale
        self.predicted_forward_s: float = info.predicted_forward_s
        self.predicted_backward_s: float = info.predicted_backward_s

    def __del__(self, destroy: Any = native.plan_destroy) -> None:
        if self.handle:
            destroy(self.handle)
            self.handle = 0

    def describe(self) -> str:
        """The plan as text: form, kernels, tiling with reasons, costs of the alternatives, memory."""
        return str(native.plan_describe_text(self.handle))

    def __repr__(self) -> str:
        return (
            f"<power_attention.Plan degree={self.degree} heads={self.heads_q}/{self.heads_kv} "
            f"head_dim={self.head_dim} form={self.form} chunk_size={self.chunk_size}>"
        )


# Bounded and thread-safe; a plan that is evicted lives on while a call holds it.
cached_plan = lru_cache(maxsize=256)(Plan)


class Options(NamedTuple):
    """What of a call is neither a tensor nor its shape, as numbers: the order of the torch operators' schemas."""

    degree: int = 2
    scale: float | None = None
    eps: float = 0.0
    chunk_size: int = 0
    form: int = 0
    normalize: bool = True
    max_seq_len: int = 0
    rope_style: int = 0
    rope_dim: int = 0
    rope_base: float = 0.0


def make_options(
    degree: int,
    normalize: bool,
    *,
    scale: float | None = None,
    eps: float = 0.0,
    chunk_size: int | None = None,
    form: str = "auto",
    max_seq_len: int = 0,
    rope: RopeLike = None,
) -> Options:
    """The options as a user gives them, checked."""
    _check.degree(degree, normalize)
    if chunk_size is not None and chunk_size <= 0:
        raise InvalidArgumentError(f"chunk_size is {chunk_size}; a positive number or None is needed")
    return Options(
        degree,
        None if scale is None else float(scale),
        float(eps),
        chunk_size or 0,
        form_number(form),
        bool(normalize),
        max_seq_len,
        *rope_numbers(rope),
    )


def plan_numbers(
    dtype: int,
    options: Options,
    use_state: bool,
    q: Sequence[int],
    v: Sequence[int],
    *,
    sequences: int = 0,
    device: int = 0,
    device_index: int = 0,
    state_dtype: int = 0,
    num_threads: int = 0,
    state_limit: int = 0,
    allow_tf32: bool = False,
) -> tuple[Any, ...]:
    """The arguments of :class:`Plan` for a call on tensors of the shapes q and v."""
    degree, scale, eps, chunk_size, form, normalize, max_seq_len, rope_style, rope_dim, rope_base = options
    b, t, h, d = q
    return (
        device,
        device_index,
        dtype,
        state_dtype,
        degree,
        (0 if normalize else UNNORMALIZED)
        | (0 if scale is None else CUSTOM_SCALE)
        | (USE_STATE if use_state else 0)
        | (ALLOW_TF32 if allow_tf32 else 0),
        form,
        b,
        t,
        h,
        v[2],
        d,
        v[3],
        sequences,
        max_seq_len,
        chunk_size,
        0.0 if scale is None else scale,
        eps,
        rope_base,
        rope_dim,
        rope_style,
        num_threads,
        state_limit,
    )


def states_plan(n: int, heads_kv: int, head_dim: int, value_dim: int, degree: int, dtype: int, **where: int) -> Plan:
    """A plan for operations on n states alone, where the normaliser plays no part."""
    options = Options(degree, normalize=degree % 2 == 0)
    shapes = (n, 1, heads_kv, head_dim), (n, 1, heads_kv, value_dim)
    return cached_plan(*plan_numbers(dtype, options, True, *shapes, **where))  # type: ignore[arg-type]


def plan(
    *,
    batch: int = 1,
    seq_len: int,
    heads: int,
    heads_kv: int | None = None,
    head_dim: int,
    value_dim: int | None = None,
    degree: int = 2,
    dtype: str = "float32",
    state_dtype: str | None = None,
    device: str = "cpu",
    device_index: int = 0,
    form: str = "auto",
    scale: float | None = None,
    eps: float = 0.0,
    chunk_size: int | None = None,
    normalize: bool = True,
    use_state: bool = False,
    sequences: int = 0,
    max_seq_len: int = 0,
    rope: RopeLike = None,
    num_threads: int = 0,
    state_limit: int = 0,
    allow_tf32: bool = False,
) -> Plan:
    """Describes a problem and returns its plan.

    Args:
        batch: sequences that are computed side by side; 1 with packed sequences.
        seq_len: tokens per batch entry, or all packed tokens.
        heads: query heads, a multiple of ``heads_kv``.
        heads_kv: key and value heads; ``None`` means ``heads``.
        head_dim: dimension of q and k.
        value_dim: dimension of v and y; ``None`` means ``head_dim``.
        degree: the power p, 1 to 8; even unless ``normalize=False``.
        dtype: of q, k, v and y: ``float32``, ``float16``, ``bfloat16``, or ``float64`` on the CPU.
        state_dtype: of states; ``None`` is float32 (float64 with float64).
        device: ``"cpu"`` or ``"cuda"``.
        device_index: which of the devices.
        form: ``"auto"``, ``"attention"`` or ``"chunked"``.
        scale: of the scores; ``None`` means ``1/sqrt(head_dim)``. 0 is used as 0.
        eps: added to the denominator.
        chunk_size: tokens per chunk, which asks for chunks; ``None`` lets the cost model choose.
        normalize: divide by the sum of the weights.
        use_state: calls may pass an initial state or ask for the final one.
        sequences: number of packed sequences, 0 for none.
        max_seq_len: longest packed sequence if known.
        rope: see :class:`Rope`.
        num_threads: CPU threads of a call; 0 means all. Results do not depend on it.
        state_limit: bytes that states may take; 0 means the device's memory.
        allow_tf32: float32 on CUDA may round products to TF32.
    """
    if device not in DEVICES:
        raise InvalidArgumentError(f"device is {device!r}; allowed are {', '.join(DEVICES)}")
    options = make_options(
        degree, normalize, scale=scale, eps=eps, chunk_size=chunk_size, form=form, max_seq_len=max_seq_len, rope=rope
    )
    heads_kv = heads if heads_kv is None else heads_kv
    value_dim = head_dim if value_dim is None else value_dim
    return cached_plan(
        *plan_numbers(
            dtype_number(dtype),
            options,
            use_state,
            (batch, seq_len, heads, head_dim),
            (batch, seq_len, heads_kv, value_dim),
            sequences=sequences,
            device=DEVICES[device],
            device_index=device_index,
            state_dtype=0 if state_dtype is None else dtype_number(state_dtype, "state_dtype"),
            num_threads=num_threads,
            state_limit=state_limit,
            allow_tf32=allow_tf32,
        )
    )


def describe(**problem: Any) -> str:
    """Text of the plan for a problem; takes the arguments of :func:`plan`."""
    return plan(**problem).describe()


def state_rows(head_dim: int, degree: int) -> int:
    """D = C(head_dim + degree - 1, degree), the rows of a state."""
    return int(native.state_rows(head_dim, degree))


def state_bytes(
    head_dim: int, degree: int, *, value_dim: int | None = None, count: int = 1, dtype: str = "float32"
) -> int:
    """Bytes of S and z of ``count`` states (sequences x kv heads x layers).

    Needs no plan, so that sizes which fit nowhere can be printed.
    """
    value_dim = head_dim if value_dim is None else value_dim
    return int(native.state_bytes(head_dim, value_dim, degree, dtype_number(dtype), count))


def monomial(head_dim: int, degree: int, row: int) -> tuple[tuple[int, ...], float]:
    """Indices and weight of one row of a state: ``phi(x)[row] = weight * prod(x[i] for i in indices)``."""
    import ctypes

    indices = (ctypes.c_int32 * max(degree, 1))()
    weight = native.state_monomial(head_dim, degree, row, ctypes.addressof(indices))
    return tuple(indices), float(weight)


def device_count(device: str = "cuda") -> int:
    """Devices of a kind that can be used here; 0 where CUDA has none."""
    return int(native.device_count(DEVICES[device]))


def cuda_available() -> bool:
    """Whether this build and this machine can run on a CUDA device."""
    return device_count("cuda") > 0


def library_version() -> tuple[int, int, int]:
    """Version of the C library in use."""
    number = int(native.version())
    return number // 10000, number // 100 % 100, number % 100
