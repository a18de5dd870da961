# SPDX-License-Identifier: Apache-2.0
"""The JAX front."""

from __future__ import annotations

import numpy as np
import pytest

import power_attention as pa
import power_attention.numpy as pn
from conftest import attention, make_inputs

jax = pytest.importorskip("jax")
jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

from power_attention.jax import power_attention  # noqa: E402


def test_jit(rng):
    q, k, v, g = make_inputs(rng)
    run = jax.jit(lambda q, k, v, g: power_attention(q, k, v, log_g=g, degree=4))
    np.testing.assert_allclose(run(q, k, v, g), attention(q, k, v, g, 4), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_dtypes(rng, dtype):
    q, k, v, g = (jnp.asarray(x) for x in make_inputs(rng))
    q, k, v, g = q.astype(dtype), k.astype(dtype), v.astype(dtype), g.astype(jnp.float32)
    y = power_attention(q, k, v, log_g=g)
    assert y.dtype == dtype
    expected = attention(*(np.asarray(x, np.float64) for x in (q, k, v, g)))
    error = np.abs(np.asarray(y, np.float64) - expected).max()
    assert error <= 2 * float(jnp.finfo(dtype).eps) * max(np.abs(expected).max(), 1)


@pytest.mark.parametrize("options", [{}, {"rope": "half"}, {"degree": 3, "normalize": False}, {"eps": 0.2}])
def test_gradients(rng, options):
    inputs = make_inputs(rng, t=6, d=4)
    check_grads(lambda q, k, v, g: power_attention(q, k, v, log_g=g, **options), inputs, order=1, modes=["rev"])


def test_gradients_of_states(rng):
    q, k, v, g = make_inputs(rng, t=6, d=3)
    state = pn.forward(q, k, v, log_g=g, return_final_state=True).final_state

    def run(q, k, v, g, s, z):
        return power_attention(q, k, v, log_g=g, initial_state=(s, z), return_final_state=True)

    check_grads(run, (q, k, v, g, *state), order=1, modes=["rev"])


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("x64", [False, True])
def test_packed(rng, index, x64):
    """Offsets are 64-bit for the library, whichever integers JAX has."""
    dtype = np.float64 if x64 else np.float32
    q, k, v, g = make_inputs(rng, b=1, t=12, d=8, dtype=dtype)
    cu = np.array([0, 4, 4, 10], index)
    offset = np.array([3, 0, -2], index)
    run = jax.jit(lambda *x: power_attention(*x[:3], log_g=x[3], cu_seqlens=x[4], rope="half", rope_offset=x[5]))
    jax.config.update("jax_enable_x64", x64)
    try:
        y = run(q, k, v, g, cu, offset)
    finally:
        jax.config.update("jax_enable_x64", True)
    expected = pn.power_attention(q, k, v, log_g=g, cu_seqlens=cu, rope="half", rope_offset=offset)
    np.testing.assert_array_equal(y, expected)
    assert not y[:, 10:].any()


def test_vmap(rng):
    many = [np.stack(x) for x in zip(*(make_inputs(rng)[:3] for _ in range(3)), strict=True)]
    y = jax.vmap(power_attention)(*many)
    for i in range(3):
        np.testing.assert_allclose(y[i], pn.power_attention(*(x[i] for x in many)), rtol=1e-12)

    def gradient(q, k, v):
        return jax.grad(lambda q: power_attention(q, k, v).sum())(q)

    grads = jax.jit(jax.vmap(gradient))(*many)
    for i in range(3):
        np.testing.assert_allclose(grads[i], gradient(*(x[i] for x in many)), rtol=1e-12)


def test_split_and_resume(rng):
    q, k, v, g = make_inputs(rng)
    whole = power_attention(q, k, v, log_g=g)
    first, state = power_attention(q[:, :5], k[:, :5], v[:, :5], log_g=g[:, :5], return_final_state=True)
    second = power_attention(q[:, 5:], k[:, 5:], v[:, 5:], log_g=g[:, 5:], initial_state=state)
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, rtol=1e-9, atol=1e-12)


def test_bad_input_is_named(rng):
    q, k, v, g = make_inputs(rng)
    cases = [
        ((q, k.astype(np.float32), v), {}, TypeError, "k is float32"),
        ((q, k, v), {"log_g": g.astype(np.float32)}, TypeError, "log_g is float32"),
        ((q, k[:, 1:], v), {}, ValueError, "k has shape"),
        ((q, k, v), {"degree": 3}, ValueError, "degree is 3"),
        ((q, k, v), {"rope_offset": np.zeros(3, int)}, ValueError, "rope_offset"),
        ((q, k, v), {"rope_offset": np.zeros(2), "rope": "half"}, TypeError, "rope_offset is float"),
        ((q, k, v), {"cu_seqlens": np.array([0, 13])}, ValueError, "batch is 2"),
    ]
    for args, options, error, words in cases:
        with pytest.raises(error, match=words) as caught:
            power_attention(*args, **options)
        assert isinstance(caught.value, pa.PowerAttentionError)
    with pytest.raises(Exception, match="cu_seqlens"):  # known only when it runs, so the error is XLA's
        jax.block_until_ready(power_attention(q[:1], k[:1], v[:1], cu_seqlens=np.array([0, 9, 3])))
