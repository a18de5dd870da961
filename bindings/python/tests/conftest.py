# SPDX-License-Identifier: Apache-2.0
"""Settings and the oracle: the formula in float64, sharing nothing with the library."""

from __future__ import annotations

import numpy as np
import pytest


def rotate(x: np.ndarray, positions: np.ndarray, style: str, dim: int, base: float = 10000.0) -> np.ndarray:
    """Rotary embedding of [t, h, d]."""
    x = x.copy()
    angle = positions[:, None] * base ** (-2 * np.arange(dim // 2) / dim)
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first = slice(0, dim // 2) if style == "half" else slice(0, dim, 2)
    second = slice(dim // 2, dim) if style == "half" else slice(1, dim, 2)
    a, b = x[..., first].copy(), x[..., second].copy()
    x[..., first], x[..., second] = a * c - b * s, a * s + b * c
    return x


def attention(q, k, v, log_g=None, degree=2, scale=None, normalize=True, eps=0.0):
    """y of one packed batch [b, t, h, d], straight from the definition."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, t, h, d = q.shape
    hk = k.shape[2]
    scale = d**-0.5 if scale is None else scale
    y = np.zeros((b, t, h, v.shape[3]))
    for i in range(b):
        for j in range(h):
            g = j // (h // hk)
            w = np.tril((scale * q[i, :, j] @ k[i, :, g].T) ** degree)
            if log_g is not None:
                total = np.cumsum(np.asarray(log_g, np.float64)[i, :, g])
                w = w * np.exp(np.minimum(total[:, None] - total[None], 0))
            out = w @ v[i, :, g]
            if normalize:
                norm = w.sum(1, keepdims=True) + eps
                out = np.divide(out, norm, out=np.zeros_like(out), where=norm != 0)
            y[i, :, j] = out
    return y


def phi(x: np.ndarray, degree: int) -> np.ndarray:
    """Symmetric power embedding of [..., d] in the canonical order."""
    import itertools
    import math

    columns = []
    for index in itertools.combinations_with_replacement(range(x.shape[-1]), degree):
        weight = math.factorial(degree)
        for i in set(index):
            weight //= math.factorial(index.count(i))
        columns.append(math.sqrt(weight) * np.prod([x[..., i] for i in index], axis=0))
    return np.stack(columns, -1)


def make_inputs(rng, b=2, t=13, h=4, hk=2, d=6, e=5, gated=True, dtype=np.float64):
    """Random q, k, v, log_g."""
    q, k = rng.standard_normal((b, t, h, d)), rng.standard_normal((b, t, hk, d))
    v, g = rng.standard_normal((b, t, hk, e)), -rng.random((b, t, hk))
    wide = np.float64 if dtype == np.float64 else np.float32
    return q.astype(dtype), k.astype(dtype), v.astype(dtype), g.astype(wide) if gated else None


@pytest.fixture
def rng():
    """Fresh numbers for each test, the same in each run."""
    return np.random.default_rng(20)
