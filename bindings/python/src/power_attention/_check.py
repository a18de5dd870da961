# SPDX-License-Identifier: Apache-2.0
"""Checks that the fronts share: every message names the argument, what it was and what is allowed.

Only shapes are looked at, so that the checks work on symbolic sizes while a compiler traces them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._errors import InvalidArgumentError


def _shape(shape: Sequence[Any]) -> str:
    return "[" + ", ".join(str(n) for n in shape) + "]"


def rank(name: str, shape: Sequence[Any], layout: str) -> None:
    """Refuses a tensor of the wrong number of dimensions."""
    if len(shape) != layout.count(",") + 1:
        raise InvalidArgumentError(f"{name} has shape {_shape(shape)}; {layout} is needed")


def shapes(q: Sequence[Any], k: Sequence[Any], v: Sequence[Any], log_g: Sequence[Any] | None) -> None:
    """Checks q, k, v and log_g against each other."""
    rank("q", q, "[batch, tokens, heads, head_dim]")
    rank("k", k, "[batch, tokens, heads_kv, head_dim]")
    rank("v", v, "[batch, tokens, heads_kv, value_dim]")
    if k[0] != q[0] or k[1] != q[1] or k[3] != q[3]:
        raise InvalidArgumentError(
            f"k has shape {_shape(k)}; q has {_shape(q)}: batch, tokens and head_dim must be equal"
        )
    if v[0] != k[0] or v[1] != k[1] or v[2] != k[2]:
        raise InvalidArgumentError(
            f"v has shape {_shape(v)}; k has {_shape(k)}: batch, tokens and heads_kv must be equal"
        )
    if k[2] == 0 or q[2] % k[2] != 0:
        raise InvalidArgumentError(f"q has {q[2]} heads; a multiple of k's {k[2]} heads is needed")
    if log_g is not None and tuple(log_g) != tuple(k[:3]):
        raise InvalidArgumentError(
            f"log_g has shape {_shape(log_g)}; [batch, tokens, heads_kv] = {_shape(k[:3])} is needed"
        )


def packed(batch: Any, cu_seqlens: Sequence[Any] | None) -> None:
    """Checks the shape of cu_seqlens."""
    if cu_seqlens is None:
        return
    if len(cu_seqlens) != 1 or cu_seqlens[0] < 2:
        raise InvalidArgumentError(
            f"cu_seqlens has shape {_shape(cu_seqlens)}; [sequences + 1] with at least one sequence is needed"
        )
    if batch != 1:
        raise InvalidArgumentError(f"batch is {batch}; with cu_seqlens it must be 1")


def state(
    name: str, s: Sequence[Any], z: Sequence[Any] | None, n: Any, heads_kv: Any, rows: Any, value_dim: Any
) -> None:
    """Checks a state of n sequences."""
    if tuple(s) != (n, heads_kv, rows, value_dim):
        raise InvalidArgumentError(
            f"{name}: S has shape {_shape(s)}; [sequences, heads_kv, D, value_dim] = "
            f"{_shape((n, heads_kv, rows, value_dim))} is needed"
        )
    if z is not None and tuple(z) != (n, heads_kv, rows):
        raise InvalidArgumentError(
            f"{name}: z has shape {_shape(z)}; [sequences, heads_kv, D] = {_shape((n, heads_kv, rows))} is needed"
        )


def degree(p: int, normalize: bool) -> None:
    """Odd degrees have no normaliser."""
    if not isinstance(p, int) or not 1 <= p <= 8:
        raise InvalidArgumentError(f"degree is {p!r}; an integer from 1 to 8 is needed")
    if normalize and p % 2:
        raise InvalidArgumentError(f"degree is {p} with normalize=True; an even degree is needed (or normalize=False)")
