# SPDX-License-Identifier: Apache-2.0
"""Execute calls on torch tensors: addresses, strides, the caller's stream and the caller's allocator.

Nothing here knows of autograd or of the dispatcher; :mod:`.ops` registers these functions as operators.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._errors import DtypeError, InvalidArgumentError, NoDeviceError
from .._plan import (
    ABSENT,
    ENV_THREADS,
    FORM_CHUNK_SIZE_IS_A_HINT,
    NO_STATE,
    Options,
    Plan,
    cached_plan,
    cuda_available,
    native,
    plan_numbers,
    state_rows,
    states_plan,
)

NUMBERS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.float64: 4}
STATE_NUMBERS = {torch.float32: 1, torch.bfloat16: 3, torch.float64: 4}
MaybeTensor = Tensor | None


def wide(dtype: torch.dtype) -> torch.dtype:
    """Type of log_g, row_norm and of states by default."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def check_like(q: Tensor, tensors: tuple[tuple[str, MaybeTensor, torch.dtype], ...]) -> None:
    """Refuses tensors of another device or type than the call's."""
    device = q.device
    for name, tensor, dtype in tensors:
        if tensor is None:
            continue
        if tensor.device != device:
            raise InvalidArgumentError(f"{name} is on {tensor.device}; q is on {device}: one device is needed")
        if tensor.dtype is not dtype:
            raise DtypeError(f"{name} is {tensor.dtype}; {dtype} is needed (q is {q.dtype})")


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: MaybeTensor,
    cu_seqlens: MaybeTensor,
    rope_offset: MaybeTensor,
    sequences: Any,
    options: Options,
) -> None:
    """The checks of a call, on shapes, types and devices."""
    if q.dtype not in NUMBERS:
        raise DtypeError(f"q is {q.dtype}; allowed are float32, float16, bfloat16 and, on the CPU, float64")
    check_like(
        q,
        (
            ("k", k, q.dtype),
            ("v", v, q.dtype),
            ("log_g", log_g, wide(q.dtype)),
            ("cu_seqlens", cu_seqlens, torch.int64),
            ("rope_offset", rope_offset, torch.int64),
        ),
    )
    _check.shapes(q.shape, k.shape, v.shape, None if log_g is None else log_g.shape)
    _check.packed(q.shape[0], None if cu_seqlens is None else cu_seqlens.shape)
    _check.degree(options.degree, options.normalize)
    if rope_offset is not None and (rope_offset.dim() != 1 or rope_offset.shape[0] != sequences):
        raise InvalidArgumentError(f"rope_offset has shape {list(rope_offset.shape)}; [{sequences}] is needed")


def check_state(name: str, s: MaybeTensor, z: MaybeTensor, q: Tensor, v: Tensor, n: Any, degree: int) -> None:
    """Checks a state that goes with q and v."""
    if s is None and z is None:
        return
    if s is None or z is None:
        raise InvalidArgumentError(f"{name}: S and z are needed together")
    check_like(q, ((f"{name} S", s, wide(q.dtype)), (f"{name} z", z, wide(q.dtype))))
    _check.state(name, s.shape, z.shape, n, v.shape[2], state_rows(int(q.shape[3]), degree), v.shape[3])


_cuda_available = cache(cuda_available)  # devices do not come and go while a process runs


def check_device(q: Tensor) -> None:
    """Refuses a device that this build cannot run on, by name."""
    kind = q.device.type
    if kind == "cpu":
        return
    if kind != "cuda":
        raise NoDeviceError(f"q is on {q.device}; the library runs on cpu and cuda")
    if not _cuda_available():
        raise NoDeviceError(
            f"q is on {q.device}, and this build of libpowerattn finds no CUDA device it can use; "
            "move q, k and v to the CPU or install a build with the CUDA backend"
        )


def unit(x: Tensor) -> Tensor:
    """X itself where its last dimension has stride 1, which is all that the library asks of a layout."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def blocks(s: Tensor) -> Tensor:
    """A state with contiguous blocks per (sequence, head), copied only where they are not."""
    return s if s[0, 0].is_contiguous() or s.numel() == 0 else s.contiguous()


def tensor_numbers(x: MaybeTensor) -> tuple[int, int, int, int]:
    """Address and strides of a [b, t, h, ...] tensor."""
    if x is None:
        return ABSENT
    strides = x.stride()
    return (x.data_ptr(), strides[0], strides[1], strides[2])


def state_numbers(s: MaybeTensor, z: MaybeTensor) -> tuple[int, int, int, int, int, int]:
    """Addresses and strides of a state."""
    if s is None or z is None:
        return NO_STATE
    a, b = s.stride(), z.stride()
    return (s.data_ptr(), z.data_ptr(), a[0], a[1], b[0], b[1])


_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_madvise: Any = None
if sys.platform == "linux":
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def large_pages(x: Tensor) -> Tensor:
    """x, which nobody has written yet, in pages of 2 MB where Linux has them.

    Large memory on the CPU is fresh in every call; a fault for each 4 kB of it took a twelfth of a forward.
    """
    nbytes = x.nbytes
    if nbytes >= 4 * _HUGE_PAGE and x.device.type == "cpu" and _madvise is not None:
        begin = -(-x.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (x.data_ptr() + nbytes) // _HUGE_PAGE * _HUGE_PAGE
        _madvise(begin, end - begin, _MADV_HUGEPAGE)  # advice: nothing depends on whether it is taken
    return x


def workspace(nbytes: int, like: Tensor) -> tuple[int, MaybeTensor]:
    """Scratch memory from torch's allocator, aligned as the library asks."""
    if nbytes == 0:
        return 0, None
    buffer = large_pages(torch.empty(nbytes + 256, dtype=torch.uint8, device=like.device))
    return (buffer.data_ptr() + 255) // 256 * 256, buffer


def stream_of(x: Tensor) -> int:
    """The current stream of x's device."""
    return int(torch._C._cuda_getCurrentRawStream(x.get_device())) if x.is_cuda else 0


def guard(x: Tensor) -> Any:
    """Makes x's device the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def place(device: torch.device) -> tuple[int, int]:
    """Type and index of a device, as a plan takes them."""
    return (1, device.index or 0) if device.type == "cuda" else (0, 0)


def get_plan(q: Tensor, v: Tensor, sequences: int, use_state: bool, options: Options, state_number: int = 0) -> Plan:
    """The plan of a call, from the cache."""
    if options.form == FORM_CHUNK_SIZE_IS_A_HINT:
        free = get_plan(q, v, sequences, use_state, options._replace(form=0, chunk_size=0), state_number)
        if free.form == "attention" or not options.chunk_size:
            return free
        options = options._replace(form=0)
    device, device_index = place(q.device)
    return cached_plan(
        *plan_numbers(
            NUMBERS[q.dtype],
            options,
            use_state,
            q.shape,
            v.shape,
            sequences=sequences,
            device=device,
            device_index=device_index,
            state_dtype=state_number,
            num_threads=0 if ENV_THREADS or device else torch.get_num_threads(),
        )
    )


def get_states_plan(s: Tensor, head_dim: int, degree: int) -> Plan:
    """A plan for operations on states ``[n, heads_kv, D, value_dim]`` alone."""
    n, heads_kv, _, value_dim = s.shape
    device, device_index = place(s.device)
    return states_plan(
        n,
        heads_kv,
        head_dim,
        value_dim,
        degree,
        dtype=NUMBERS[wide(s.dtype)],
        state_dtype=STATE_NUMBERS[s.dtype],
        device=device,
        device_index=device_index,
    )


def address(x: MaybeTensor) -> int:
    """Address of a contiguous vector, 0 if there is none."""
    return 0 if x is None else x.data_ptr()


def empty_state(q: Tensor, v: Tensor, n: Any, degree: int) -> tuple[Tensor, Tensor]:
    """Uninitialised states, also of symbolic sizes."""
    rows = state_rows(int(q.shape[3]), degree)
    dtype = wide(q.dtype)
    s = q.new_empty((n, v.shape[2], rows, v.shape[3]), dtype=dtype)
    return s, q.new_empty((n, v.shape[2], rows), dtype=dtype)


def forward(
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
    """y, row_norm and the final state; empty tensors for what was not asked for."""
    options = Options(*numbers)
    check_device(q)
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n = sequences or q.shape[0]
    check_inputs(q, k, v, log_g, cu_seqlens, rope_offset, n, options)
    check_state("initial_state", s0, z0, q, v, n, options.degree)
    q, k, v = unit(q), unit(k), unit(v)
    if s0 is not None and z0 is not None:
        s0, z0 = blocks(s0), unit(z0)
    use_state = return_state or s0 is not None
    b, t, h, _ = q.shape
    with guard(q):
        plan = get_plan(q, v, sequences, use_state, options)
        y = large_pages(q.new_empty((b, t, h, v.shape[3])))
        row_norm = q.new_empty((b, t, h) if options.normalize else (0,), dtype=wide(q.dtype))
        if return_state:
            s, z = empty_state(q, v, n, options.degree)
        else:
            s, z = q.new_empty((0,), dtype=wide(q.dtype)), q.new_empty((0,), dtype=wide(q.dtype))
        work, _work = workspace(plan.workspace_forward, q)
        native.forward(
            plan.handle,
            *tensor_numbers(q),
            *tensor_numbers(k),
            *tensor_numbers(v),
            *tensor_numbers(log_g),
            *tensor_numbers(y),
            *(tensor_numbers(row_norm) if options.normalize else ABSENT),
            *state_numbers(s0, z0),
            *(state_numbers(s, z) if return_state else NO_STATE),
            address(cu_seqlens),
            address(rope_offset),
            0,
            0,
            work,
            plan.workspace_forward,
            stream_of(q),
        )
    return y, row_norm, s, z


def backward(
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
    """Gradients of q, k, v, log_g and of the initial state; empty tensors for what has none."""
    options = Options(*numbers)
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n = sequences or q.shape[0]
    check_like(q, (("d_y", d_y, q.dtype), ("y", y, q.dtype), ("row_norm", row_norm, wide(q.dtype))))
    check_state("gradient of the final state", d_s, d_z, q, v, n, options.degree)
    q, k, v, d_y, y = unit(q), unit(k), unit(v), unit(d_y), unit(y)
    if s0 is not None and z0 is not None:
        s0, z0 = blocks(s0), unit(z0)
    if d_s is not None and d_z is not None:
        d_s, d_z = blocks(d_s), unit(d_z)
    high = wide(q.dtype)
    with guard(q):
        plan = get_plan(q, v, sequences, return_state or s0 is not None, options)
        d_q, d_k, d_v = (large_pages(x.new_empty(x.shape)) for x in (q, k, v))
        d_log_g = q.new_empty((0,) if log_g is None else log_g.shape, dtype=high)
        if need_d_state:
            d_s0, d_z0 = empty_state(q, v, n, options.degree)
        else:
            d_s0, d_z0 = q.new_empty((0,), dtype=high), q.new_empty((0,), dtype=high)
        work, _work = workspace(plan.workspace_backward, q)
        native.backward(
            plan.handle,
            *tensor_numbers(q),
            *tensor_numbers(k),
            *tensor_numbers(v),
            *tensor_numbers(log_g),
            *tensor_numbers(y),
            *(tensor_numbers(row_norm) if options.normalize else ABSENT),
            *tensor_numbers(d_y),
            *tensor_numbers(d_q),
            *tensor_numbers(d_k),
            *tensor_numbers(d_v),
            *(ABSENT if log_g is None else tensor_numbers(d_log_g)),
            *state_numbers(s0, z0),
            *state_numbers(d_s, d_z),
            *(state_numbers(d_s0, d_z0) if need_d_state else NO_STATE),
            address(cu_seqlens),
            address(rope_offset),
            0,
            0,
            work,
            plan.workspace_backward,
            stream_of(q),
        )
    return d_q, d_k, d_v, d_log_g, d_s0, d_z0


def check_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: MaybeTensor,
    s: Tensor,
    z: Tensor,
    slots: MaybeTensor,
    lengths: MaybeTensor,
    rope_offset: MaybeTensor,
    options: Options,
) -> None:
    """The checks of a step."""
    check_inputs(q, k, v, log_g, None, rope_offset, q.shape[0], options)
    if s.dtype not in STATE_NUMBERS:
        raise DtypeError(f"state S is {s.dtype}; float32, bfloat16 or float64 is needed")
    check_like(
        q,
        (
            ("state S", s, s.dtype),
            ("state z", z, s.dtype),
            ("slots", slots, torch.int64),
            ("lengths", lengths, torch.int64),
        ),
    )
    for name, x in (("slots", slots), ("lengths", lengths)):
        if x is not None and (x.dim() != 1 or x.shape[0] != q.shape[0]):
            raise InvalidArgumentError(f"{name} has shape {list(x.shape)}; [{q.shape[0]}] is needed")
    rows = state_rows(int(q.shape[3]), options.degree)
    n = s.shape[0] if s.dim() else 0
    _check.state("state", s.shape, z.shape, n, v.shape[2], rows, v.shape[3])


class _Step(NamedTuple):
    """What the checks of a step found, for all steps on tensors like these."""

    handle: int  # of the plan, which the next field keeps
    plan: Plan
    workspace: int
    like: Tensor  # a tensor as y: making another like it is quicker than from a shape
    strides: tuple[int, int, int]
    state_strides: tuple[int, ...]
    slots: int
    device: int  # index of a CUDA device, -1 on the CPU


# The checks cost several times what a small step does. Steps whose tensors have the types, devices and sizes of an
# earlier one need no more than addresses and the strides of q, k and v. Where a tensor must be there, the index of its
# device says enough beside q's device: one of another kind of device with that index has no address, and is refused.
_steps: dict[tuple[Any, ...], _Step] = {}
_latest: tuple[tuple[Any, ...], _Step | None] = ((), None)  # comparing costs less than looking up, which hashes
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent from builds for CPUs
_empty_like = torch.empty_like
_num_threads = torch.get_num_threads


def _like(x: Tensor) -> tuple[Any, ...]:
    return (x.shape, x.dtype, x.device)


def _new_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: MaybeTensor,
    s: Tensor,
    z: Tensor,
    slots: MaybeTensor,
    lengths: MaybeTensor,
    rope_offset: MaybeTensor,
    options: Options,
) -> _Step:
    check_device(q)
    check_step(q, k, v, log_g, s, z, slots, lengths, rope_offset, options)
    if (s.numel() and not s[0, 0].is_contiguous()) or z.stride(-1) != 1:
        raise InvalidArgumentError(
            f"state: [D, value_dim] blocks must be contiguous to be changed in place; strides are {s.stride()}"
        )
    plan = get_plan(q, v, 0, True, options, STATE_NUMBERS[s.dtype])
    b, t, h, e = (*q.shape[:3], v.shape[3])
    like = q.new_empty((b, t, h, e))
    strides = (t * h * e, h * e, e)
    state_strides = state_numbers(s, z)[2:]
    return _Step(plan.handle, plan, plan.workspace_step, like, strides, state_strides, s.shape[0], q.get_device())


def _other_step(key: tuple[Any, ...], *step: Any) -> _Step:
    """What is known of a step unlike the latest."""
    global _latest
    ready = _steps.get(key)
    if ready is None:
        ready = _new_step(*step)
        if len(_steps) >= 256:
            _steps.clear()
        _steps[key] = ready
    _latest = (key, ready)
    return ready


def step(
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
    """Feeds tokens to the states s and z, in place; returns y."""
    with guard(q):
        return step_here(q, k, v, log_g, s, z, slots, lengths, rope_offset, Options(*numbers))


def step_here(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: MaybeTensor,
    s: Tensor,
    z: Tensor,
    slots: MaybeTensor,
    lengths: MaybeTensor,
    rope_offset: MaybeTensor,
    options: Options,
) -> Tensor:
    """The same where q's device is the current one. Written out, since each call of a helper counts here."""
    key = (
        q.shape, q.dtype, q.device, k.shape, k.dtype, k.get_device(), v.shape, v.dtype, v.get_device(),
        s.shape, s.dtype, s.get_device(), s.stride(), z.shape, z.dtype, z.get_device(), z.stride(),
        log_g if log_g is None else _like(log_g),
        slots if slots is None else (slots.shape, slots.dtype, slots.device),
        lengths if lengths is None else _like(lengths), rope_offset if rope_offset is None else _like(rope_offset),
        options, _num_threads(),
    )  # fmt: skip
    latest, ready = _latest
    if ready is None or key != latest:
        ready = _other_step(key, q, k, v, log_g, s, z, slots, lengths, rope_offset, options)
    handle, _, nbytes, like, (y_b, y_t, y_h), (s_n, s_h, z_n, z_h), num_slots, device = ready
    q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
    if q_strides[3] != 1 or k_strides[3] != 1 or v_strides[3] != 1:
        q, k, v = unit(q), unit(k), unit(v)
        q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
    y = _empty_like(like)
    work, stream = 0, 0
    if device >= 0:
        if nbytes:  # torch's allocator knows when the stream is done with it
            work, _work = workspace(nbytes, q)
        stream = _raw_stream(device)  # type: ignore[misc]
    elif nbytes:
        work = _scratch.address if nbytes <= _scratch.nbytes else _scratch.grow(nbytes)
    g_at, g_b, g_t, g_h = ABSENT if log_g is None else tensor_numbers(log_g)
    native.step(
        handle,
        q.data_ptr(), q_strides[0], q_strides[1], q_strides[2],
        k.data_ptr(), k_strides[0], k_strides[1], k_strides[2],
        v.data_ptr(), v_strides[0], v_strides[1], v_strides[2],
        g_at, g_b, g_t, g_h,
        y.data_ptr(), y_b, y_t, y_h,
        s.data_ptr(), z.data_ptr(), s_n, s_h, z_n, z_h, num_slots,
        0 if slots is None else slots.data_ptr(),
        0 if lengths is None else lengths.data_ptr(),
        0 if rope_offset is None else rope_offset.data_ptr(),
        work, nbytes, stream,
    )  # fmt: skip
    return y


class _Scratch(threading.local):
    """Host scratch memory of a thread: calls on the CPU are over when they return, so it can be used again."""

    nbytes = address = 0  # at address, valid until the thread's next call
    buffer: MaybeTensor = None

    def grow(self, nbytes: int) -> int:
        """Makes it nbytes; its new address."""
        self.address, self.buffer = workspace(nbytes, torch.empty(0))
        self.nbytes = nbytes
        return self.address


_scratch = _Scratch()
