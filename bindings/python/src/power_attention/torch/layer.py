# SPDX-License-Identifier: Apache-2.0
"""A multi-head layer: projections, gates, grouped heads, rotary embedding, and a cache for generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._errors import InvalidArgumentError
from .._plan import RopeLike
from .function import State, power_attention
from .state import PowerAttentionState


class PowerAttentionCache:
    """What a layer remembers of the tokens so far: a state, in place of a key/value cache that grows."""

    def __init__(self, state: PowerAttentionState) -> None:
        self.state = state

    @property
    def nbytes(self) -> int:
        """Bytes, the same at every position."""
        return self.state.nbytes

    def reset(self) -> None:
        """Forgets everything."""
        self.state.reset()


class PowerAttention(nn.Module):
    """Power attention in place of a softmax attention layer: ``[b, t, embed_dim]`` to ``[b, t, embed_dim]``.

    Training and prefill use the whole sequence; with a cache the same module continues from it, several tokens or
    one at a time, at a cost per token that does not grow.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        degree: int = 2,
        scale: float | None = None,
        gated: bool = True,
        normalize: bool = True,
        rope: RopeLike = None,
        bias: bool = False,
        chunk_size: int | None = None,
        eps: float = 1e-6,
        gate_bias: float = 6.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes the layer.

        Args:
            embed_dim: dimension of the input and of the output.
            num_heads: query heads.
            num_kv_heads: key and value heads, a divisor of ``num_heads``; ``None`` means as many.
            head_dim: dimension of a head; ``None`` means ``embed_dim // num_heads``.
            degree: the power p, even with ``normalize``.
            scale: of the scores; ``None`` means ``1/sqrt(head_dim)``.
            gated: learn a decay for each token and kv head, ``log_g = logsigmoid(W x + gate_bias)``.
            normalize: divide by the sum of the weights.
            rope: rotary embedding: ``None``, ``"half"``, ``"interleaved"`` or a ``Rope``.
            bias: of the projections.
            chunk_size: tokens per chunk, which asks for chunks; ``None`` lets the cost model choose.
            eps: added to the denominator.
            gate_bias: where gates start; 6 forgets about a quarter of a percent per token.
            device: of the parameters.
            dtype: of the parameters.
        """
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise InvalidArgumentError(
                f"num_heads is {num_heads}; a multiple of num_kv_heads = {num_kv_heads} is needed"
            )
        if head_dim is None:
            if embed_dim % num_heads:
                raise InvalidArgumentError(f"embed_dim is {embed_dim}; a multiple of num_heads = {num_heads} is needed")
            head_dim = embed_dim // num_heads
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = (
            embed_dim,
            num_heads,
            num_kv_heads,
            head_dim,
        )
        self.degree, self.scale, self.normalize, self.rope = degree, scale, normalize, rope
        self.chunk_size, self.eps, self.gate_bias = chunk_size, eps, gate_bias
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias, **kind)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias, **kind)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias, **kind)
        self.gate_proj = nn.Linear(embed_dim, num_kv_heads, bias=bias, **kind) if gated else None
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias, **kind)

    def extra_repr(self) -> str:
        """What print shows."""
        return (
            f"heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, degree={self.degree}, "
            f"gated={self.gate_proj is not None}, rope={self.rope!r}"
        )

    def make_cache(self, batch: int, dtype: torch.dtype = torch.float32) -> PowerAttentionCache:
        """An empty cache for ``batch`` sequences on the layer's device."""
        return PowerAttentionCache(
            PowerAttentionState(
                batch,
                self.num_kv_heads,
                self.head_dim,
                degree=self.degree,
                scale=self.scale,
                normalize=self.normalize,
                eps=self.eps,
                rope=self.rope,
                dtype=torch.float64 if self.q_proj.weight.dtype is torch.float64 else dtype,
                device=self.q_proj.weight.device,
            )
        )

    def forward(
        self, x: Tensor, *, cache: PowerAttentionCache | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Runs the layer.

        Args:
            x: ``[b, t, embed_dim]``.
            cache: continue from it and leave it after the last token; such calls have no gradient.
            cu_seqlens: packed sequences, with b = 1.
        """
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(b, t, self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).view(b, t, self.num_kv_heads, self.head_dim)
        log_g = None
        if self.gate_proj is not None:
            gate = self.gate_proj(x)
            # In float32 also under autocast: the sum over thousands of tokens needs the bits.
            log_g = F.logsigmoid((gate if gate.dtype is torch.float64 else gate.float()) + self.gate_bias)
        if cache is None:
            y = power_attention(q, k, v, log_g=log_g, cu_seqlens=cu_seqlens, chunk_size=self.chunk_size, **self._how())
        else:
            if cu_seqlens is not None:
                raise InvalidArgumentError("cu_seqlens is given with a cache; feed the sequences as a batch")
            y = self._continue(q, k, v, log_g, cache.state)
        return self.out_proj(y.reshape(b, t, self.num_heads * self.head_dim))  # type: ignore[no-any-return]

    def _how(self) -> dict[str, Any]:
        return {
            "degree": self.degree,
            "scale": self.scale,
            "normalize": self.normalize,
            "eps": self.eps,
            "rope": self.rope,
        }

    @torch.no_grad()
    def _continue(self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: PowerAttentionState) -> Tensor:
        b, t = q.shape[:2]
        if b != state.slots:
            raise InvalidArgumentError(f"x has a batch of {b}; the cache holds {state.slots} sequences")
        if t <= 8 or state.s.dtype is torch.bfloat16:
            return state.step(q, k, v, log_g=log_g)
        y, final = power_attention(
            q,
            k,
            v,
            log_g=log_g,
            initial_state=State(state.s, state.z),
            return_final_state=True,
            rope_offset=None if self.rope is None else state.position,
            **self._how(),
        )
        state.s, state.z = final
        state.position += t
        return y  # type: ignore[no-any-return]
