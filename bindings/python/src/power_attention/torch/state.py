# SPDX-License-Identifier: Apache-2.0
"""States for decoding: a pool of slots that tokens are fed to, in place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._errors import DtypeError, InvalidArgumentError
from .._plan import Options, RopeLike, make_options, native, state_rows
from . import _native
from .function import State, autocast, index

_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_function_mode = torch._C._is_torch_function_mode_enabled
_autocasts = torch._C._is_any_autocast_enabled
_grad = torch.is_grad_enabled
_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)  # absent from builds for CPUs
_int64 = torch.int64


# Of a process that has a CUDA tensor: without asking whether CUDA is there.
_current_device = getattr(torch._C, "_cuda_getDevice", lambda: 0)  # absent from builds for CPUs


def _refuse_grad(*tensors: Tensor) -> None:
    """A step that silently cut the graph would be a model that silently does not train."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise InvalidArgumentError(
            "an input of step requires grad, and step has no gradient; call it under torch.no_grad(), or train "
            "through power_attention with initial_state and return_final_state"
        )


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | tuple[Tensor, Tensor],
    *,
    log_g: Tensor | None = None,
    degree: int = 2,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 0.0,
    slots: Tensor | Sequence[int] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    rope: RopeLike = None,
    rope_offset: Tensor | Sequence[int] | None = None,
    inplace: bool = True,
) -> Any:
    """Feeds one or a few tokens of each sequence to its state.

    Has no gradient. Costs the same at every position. In place it may be captured in a CUDA graph, with slots, lengths
    and offsets as tensors on the device.

    Args:
        q: queries ``[b, t, h, d]``, t tokens of this step.
        k: keys ``[b, t, hk, d]``.
        v: values ``[b, t, hk, e]``.
        state: pool ``(S, z)`` of float32, bfloat16 or float64: ``[slots, hk, D, e]`` and ``[slots, hk, D]``.
        log_g: log of the decay ``[b, t, hk]``, float32 (float64 with float64).
        degree: the power p.
        scale: of the scores; ``None`` means ``1/sqrt(d)``.
        normalize: divide by the sum of the weights.
        eps: added to that sum.
        slots: slot of each sequence, all different; negative skips it. Default: sequence b uses slot b.
        lengths: valid tokens of each sequence; the rest is padding, touches no state and gives zeros.
        rope: rotary embedding.
        rope_offset: position of the first token of each sequence.
        inplace: change ``state`` and return y; otherwise leave it alone and return ``(y, new_state)``.
    """
    options = _options(degree, normalize, scale, eps, rope)
    s, z = state
    if slots is not None or lengths is not None or rope_offset is not None:
        slots, lengths, rope_offset = index(slots, q), index(lengths, q), index(rope_offset, q)
    if not inplace:
        q, k, v = autocast(q, k, v)
        y, s, z = torch.ops.powerattn.step(q, k, v, log_g, s, z, slots, lengths, rope_offset, *options)
        return y, State(s, z)
    return _step_(q, k, v, s, z, log_g, slots, lengths, rope_offset, options)  # type: ignore[arg-type]


@lru_cache(maxsize=64, typed=True)  # typed: 2.0 is not a degree
def _cached_options(degree: int, normalize: bool, scale: float | None, eps: float, rope: RopeLike) -> Options:
    return make_options(degree, normalize, scale=scale, eps=eps, rope=rope)


def _options(degree: int, normalize: bool, scale: float | None, eps: float, rope: RopeLike) -> Options:
    if not _compiling():  # tracing would not see through the cache
        try:
            return _cached_options(degree, normalize, scale, eps, rope)
        except TypeError:  # something that cannot be looked up, and is refused by name below
            pass
    return make_options(degree, normalize, scale=scale, eps=eps, rope=rope)


def _step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    z: Tensor,
    log_g: Tensor | None,
    slots: Tensor | None,
    lengths: Tensor | None,
    rope_offset: Tensor | None,
    options: Options,
) -> Tensor:
    if _grad():
        _refuse_grad(q, k, v, s, z)
    if _autocasts():
        q, k, v = autocast(q, k, v)
    if _compiling() or type(q) is not Tensor or _modes() or _function_mode():
        # Only plain tensors that nothing traces or intercepts may go past the dispatcher.
        return torch.ops.powerattn.step_(  # type: ignore[no-any-return]
            q, k, v, log_g, s, z, slots, lengths, rope_offset, *options
        )
    device = q.get_device()
    if device < 0 or device == _current_device():
        return _native.step_here(q, k, v, log_g, s, z, slots, lengths, rope_offset, options)
    return _native.step(q, k, v, log_g, s, z, slots, lengths, rope_offset, *options)


class PowerAttentionState:
    """A pool of states for continuous batching, with the position that each slot has reached.

    The size does not depend on how many tokens a slot has seen.

    Attributes:
        s: ``[slots, heads_kv, D, value_dim]``.
        z: ``[slots, heads_kv, D]``.
    """

    def __init__(
        self,
        slots: int,
        heads_kv: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        degree: int = 2,
        scale: float | None = None,
        normalize: bool = True,
        eps: float = 0.0,
        rope: RopeLike = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes states that have seen no token.

        Args:
            slots: sequences that the pool can hold.
            heads_kv: key and value heads.
            head_dim: dimension of q and k.
            value_dim: dimension of v; ``None`` means ``head_dim``.
            degree: the power p.
            scale: of the scores; ``None`` means ``1/sqrt(head_dim)``.
            normalize: divide by the sum of the weights.
            eps: added to that sum.
            rope: rotary embedding, at the positions that the pool counts.
            dtype: float32, bfloat16 (half the memory traffic, less precise) or float64.
            device: where the states live.
        """
        if dtype not in _native.STATE_NUMBERS:
            raise DtypeError(f"dtype is {dtype}; states are float32, bfloat16 or float64")
        value_dim = head_dim if value_dim is None else value_dim
        rows = state_rows(head_dim, degree)
        self.s = torch.zeros((slots, heads_kv, rows, value_dim), dtype=dtype, device=device)
        self.z = torch.zeros((slots, heads_kv, rows), dtype=dtype, device=device)
        self.head_dim, self.degree, self.scale = head_dim, degree, scale
        self.normalize, self.eps, self.rope = normalize, eps, rope
        self._options = make_options(degree, normalize, scale=scale, eps=eps, rope=rope)
        self._position = torch.zeros((slots,), dtype=torch.int64, device=device)
        self._pending = 0  # tokens that every slot has seen and _position does not count yet
        self._pending_slots: list[int] = []  # and those that some have: slots, and as many numbers of tokens
        self._pending_tokens: list[int] = []
        self._pending_copies: list[list[Any]] = []  # the same on a GPU, copy of the slots and tokens of each
        self._copied: tuple[Tensor, int] | None = None  # the caller's slots of the last of them, and their version

    @property
    def slots(self) -> int:
        """Number of slots."""
        return int(self.s.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of S and z."""
        return self.s.nbytes + self.z.nbytes

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        log_g: Tensor | None = None,
        slots: Tensor | Sequence[int] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Feeds tokens to the slots, in place, and returns y. See :func:`step`.

        Positions are counted when they are read. A tensor of slots on a GPU may be written between steps by what
        PyTorch counts as a change (``copy_``, indexing, ..); something else that writes it, such as a replayed CUDA
        graph, needs ``position`` to be read before, or a pool with ``rope``, which counts at every step.
        """
        if slots is not None and not (type(slots) is Tensor and slots.dtype is _int64 and slots.is_contiguous()):
            slots = index(slots, q)
        if lengths is not None:
            lengths = index(lengths, q)
        position = None
        shape = q.shape
        b, t = shape[0], shape[1]
        if self.rope is not None:
            now = self.position
            position = now[:b] if slots is None else now[self._inside(slots)]
        y = _step_(q, k, v, self.s, self.z, log_g, slots, lengths, position, self._options)
        copied = self._copied
        if (
            copied is not None
            and copied[0] is slots
            and lengths is None
            and slots._version == copied[1]
            and not _capturing()
            and not _compiling()
        ):
            self._pending_copies[-1][1] += t
        else:
            self._advance(b, t, slots, lengths)
        return y

    @property
    def position(self) -> Tensor:
        """Tokens seen by each slot, int64 ``[slots]``; the offset of rotary embeddings."""
        if self._position.is_cuda and (self._pending or self._pending_copies) and _capturing():
            raise InvalidArgumentError(
                "position is read while a CUDA graph is captured, and steps before it are not counted yet; read it "
                "once before the capture"
            )
        if self._pending:
            self._position += self._pending
            self._pending = 0
        if self._pending_slots:
            slots, tokens = torch.tensor(self._pending_slots), torch.tensor(self._pending_tokens)
            self._pending_slots, self._pending_tokens = [], []
            self._add(slots, tokens)
        if self._pending_copies:
            copies, self._pending_copies, self._copied = self._pending_copies, [], None
            amounts = [a if isinstance(a, Tensor) else torch.full_like(slots, a) for slots, a in copies]
            self._add(torch.cat([slots for slots, _ in copies]), torch.cat(amounts))
        return self._position

    @position.setter
    def position(self, value: Tensor) -> None:
        self._position, self._pending = value, 0
        self._pending_slots, self._pending_tokens, self._pending_copies = [], [], []
        self._copied = None

    def _advance(self, b: int, t: int, slots: Tensor | None, lengths: Tensor | None) -> None:
        # Positions are counted when they are next read; the order does not matter. But what a captured graph has
        # to repeat, and what the next step's rotary embedding needs on a GPU, is work in the stream like the rest.
        cuda = self._position.is_cuda
        later = not _compiling() and not (cuda and (self.rope is not None or _capturing()))
        if slots is None:
            if later and lengths is None and b == self._position.size(0):
                self._pending += t
            else:
                self._position[:b] += t if lengths is None else lengths
        elif later and cuda:  # copies: the caller may write the next slots into the same tensor
            self._pending_copies.append([slots.clone(), t if lengths is None else lengths.clone()])
            counts = lengths is None and not slots.is_inference()  # inference tensors have no version
            self._copied = (slots, slots._version) if counts else None
            if len(self._pending_copies) == 256:
                self.position  # noqa: B018  counts what is pending
        elif later and b <= 64:
            self._pending_slots += slots.tolist()
            self._pending_tokens += (t,) * b if lengths is None else lengths.tolist()
            if len(self._pending_slots) >= 4096:
                self.position  # noqa: B018
        else:
            self._add(slots, t if lengths is None else lengths)

    def _add(self, slots: Tensor, amount: Tensor | int) -> None:
        valid = (slots >= 0) & (slots < self.slots)  # the others were skipped
        self._position.index_add_(0, self._inside(slots), valid * amount)

    def _inside(self, slots: Tensor) -> Tensor:
        """Slots of the pool, some other one in place of those that are skipped."""
        return slots.clamp(0, max(self.slots - 1, 0))

    def write(self, slots: Tensor | Sequence[int], state: State | tuple[Tensor, Tensor], position: Any) -> None:
        """Puts states, such as a prefill's final ones, into slots.

        Args:
            slots: where to.
            state: as many states as slots.
            position: tokens that they have seen, one number or one for each.
        """
        where = index(slots, self.s)
        assert where is not None
        self.s[where] = state[0].to(self.s.dtype)
        self.z[where] = state[1].to(self.z.dtype)
        self.position[where] = position

    def reset(self, slots: Tensor | Sequence[int] | None = None) -> None:
        """Forgets everything, or what some slots have seen."""
        if slots is None:
            self.s.zero_()
            self.z.zero_()
            self.position.zero_()
            return
        where = index(slots, self.s)
        self.s[where] = 0
        self.z[where] = 0
        self.position[where] = 0

    def fork(self, source: Tensor | Sequence[int], target: Tensor | Sequence[int]) -> None:
        """Copies slots to other slots: shared prefixes, beams, rollback."""
        src, dst = index(source, self.s), index(target, self.s)
        self.s[dst] = self.s[src]
        self.z[dst] = self.z[src]
        self.position[dst] = self.position[src]

    def clone(self) -> PowerAttentionState:
        """A copy that shares nothing."""
        new = object.__new__(PowerAttentionState)
        new.__dict__.update(self.__dict__)
        new.s, new.z, new.position = self.s.clone(), self.z.clone(), self.position.clone()
        return new

    def to_bytes(self, dtype: torch.dtype | None = None) -> bytes:
        """The states as a versioned block that any machine and device can read. Keep ``position`` beside it.

        Args:
            dtype: of the packed numbers; ``None`` keeps the type.
        """
        plan, count = _native.get_states_plan(self.s, self.head_dim, self.degree), self.slots
        number = _native.STATE_NUMBERS[dtype or self.s.dtype]
        size = native.state_pack_size(plan.handle, number, count)
        block = torch.empty(size, dtype=torch.uint8)
        with _native.guard(self.s):
            native.state_pack(
                plan.handle,
                number,
                *_native.state_numbers(self.s, self.z),
                count,
                block.data_ptr(),
                size,
                _native.stream_of(self.s),
            )
        return block.numpy().tobytes() if size else b""

    def from_bytes(self, block: bytes, position: Any = None) -> None:
        """Reads what :meth:`to_bytes` made.

        Args:
            block: of a pool with the same shape.
            position: tokens that the slots have seen, one number or one for each; needed to go on with ``rope``.
                ``None`` leaves the positions as they are.
        """
        plan = _native.get_states_plan(self.s, self.head_dim, self.degree)
        raw = torch.frombuffer(bytearray(block) or bytearray(1), dtype=torch.uint8)
        with _native.guard(self.s):
            native.state_unpack(
                plan.handle,
                *_native.state_numbers(self.s, self.z),
                self.slots,
                raw.data_ptr(),
                len(block),
                _native.stream_of(self.s),
            )
        if position is not None:
            self.position[:] = torch.as_tensor(position, dtype=torch.int64)
