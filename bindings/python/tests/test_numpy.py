# SPDX-License-Identifier: Apache-2.0
"""The NumPy front against the formula."""

from __future__ import annotations

import numpy as np
import pytest

import power_attention as pa
import power_attention.numpy as pn
from conftest import attention, make_inputs, phi, rotate

ml_dtypes = pytest.importorskip("ml_dtypes")


def close(actual, expected, tolerance=1e-10):
    scale = max(np.abs(expected).max(initial=0), 1e-30)
    assert np.abs(np.asarray(actual, np.float64) - expected).max(initial=0) <= tolerance * max(scale, 1)


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("form", ["attention", "chunked"])
@pytest.mark.parametrize("gated", [False, True])
def test_forward(rng, degree, form, gated):
    q, k, v, g = make_inputs(rng, gated=gated, d=3)
    normalize, chunk = degree % 2 == 0, 4 if form == "chunked" else None
    y = pn.power_attention(q, k, v, log_g=g, degree=degree, form=form, normalize=normalize, chunk_size=chunk)
    close(y, attention(q, k, v, g, degree, normalize=normalize))


@pytest.mark.parametrize("t", [0, 1, 2, 7])
def test_short_sequences(rng, t):
    q, k, v, g = make_inputs(rng, t=t)
    close(pn.power_attention(q, k, v, log_g=g), attention(q, k, v, g))


def test_scale_zero_is_zero_and_eps_counts(rng):
    q, k, v, _ = make_inputs(rng)
    assert not pn.power_attention(q, k, v, scale=0.0).any()
    close(pn.power_attention(q, k, v, eps=0.5), attention(q, k, v, eps=0.5))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes(rng, dtype):
    q, k, v, g = make_inputs(rng, dtype=dtype, t=40)
    y = pn.power_attention(q, k, v, log_g=g)
    assert y.dtype == dtype
    # One rounding of the result, and as much again for sums in float32.
    close(y, attention(q, k, v, g), 2 * float(ml_dtypes.finfo(dtype).eps))


def test_strides_are_honoured_without_a_copy(rng):
    q, k, v, g = make_inputs(rng)
    expected = attention(q, k, v, g)
    moved = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v)]
    close(pn.power_attention(*moved, log_g=np.asfortranarray(g)), expected)
    padded = [np.full((*x.shape[:3], 9), np.nan) for x in (q, k, v)]
    for p, x in zip(padded, (q, k, v), strict=True):
        p[..., : x.shape[3]] = x
    close(
        pn.power_attention(*(p[..., : x.shape[3]] for p, x in zip(padded, (q, k, v), strict=True)), log_g=g),
        expected,
    )
    close(pn.power_attention(q[:, ::-1], k[:, ::-1], v[:, ::-1]), attention(q[:, ::-1], k[:, ::-1], v[:, ::-1]))


class Wrapped:
    """An array that speaks nothing but DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Old(Wrapped):
    """A producer that knows nothing of DLPack 1."""

    def __dlpack__(self):
        return self.array.__dlpack__()


@pytest.mark.parametrize("speak", [Wrapped, Old])
def test_dlpack_reads_strides(rng, speak):
    q, k, v, _ = make_inputs(rng)
    expected = attention(q[:, ::-1], k[:, ::-1], v[:, ::-1])
    close(pn.power_attention(*(speak(x[:, ::-1]) for x in (q, k, v))), expected)
    packed = rng.standard_normal((2, 11, 3, 4, 6))
    q, k, v = (packed[:, :, i] for i in range(3))
    gate = np.broadcast_to(-0.1, (2, 11, 4))
    close(pn.power_attention(*map(speak, (q, k, v)), log_g=gate), attention(q, k, v, gate))


def test_read_only_arrays_are_read(rng):
    q, k, v, g = make_inputs(rng)
    expected = attention(q, k, v, g)
    for x in (q, k, v, g):
        x.flags.writeable = False
    close(pn.power_attention(q, k, v, log_g=g), expected)
    close(pn.power_attention(*map(Wrapped, (q, k, v)), log_g=Wrapped(g)), expected)
    with pytest.raises(ValueError, match="k does not give its memory"):
        pn.power_attention(q, Old(k), v)  # the old protocol cannot say "read only", so NumPy refuses


@pytest.mark.parametrize(("device", "words"), [((2, 1), "q is on cuda:1"), ((10, 0), "q is on DLPack device type 10")])
def test_arrays_on_other_devices_are_refused_untouched(rng, device, words):
    class Far(Wrapped):
        def __dlpack__(self, **options):
            raise AssertionError("an export may wait for the device")

        def __dlpack_device__(self):
            return device

    q, k, v, _ = make_inputs(rng)
    with pytest.raises(ValueError, match=words):
        pn.power_attention(Far(q), k, v)


def test_arrays_of_other_packages(rng):
    """torch tensors and JAX arrays as they are, bfloat16 included, which NumPy's own DLPack lacks."""
    torch = pytest.importorskip("torch")
    q, k, v, g = make_inputs(rng, dtype=np.float32)
    low = [torch.tensor(x).bfloat16() for x in (q, k, v)]
    y = pn.power_attention(*low, log_g=torch.tensor(g))
    assert y.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(y, pn.power_attention(*(x.astype(ml_dtypes.bfloat16) for x in (q, k, v)), log_g=g))
    with pytest.raises(ValueError, match="q does not give its memory"):
        pn.power_attention(low[0].requires_grad_(), *low[1:])
    jax = pytest.importorskip("jax")
    np.testing.assert_array_equal(pn.power_attention(*map(jax.numpy.asarray, (q, k, v))), pn.power_attention(q, k, v))


def test_dlpack(rng):
    q, k, v, g = make_inputs(rng)
    moved = np.ascontiguousarray(q.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    y = pn.power_attention(Wrapped(moved), Wrapped(k), Wrapped(v), log_g=Wrapped(g))
    close(y, attention(q, k, v, g))


def test_packed(rng):
    q, k, v, g = make_inputs(rng, b=1, t=17)
    cu = [0, 5, 5, 6, 14]
    y = pn.power_attention(q, k, v, log_g=g, cu_seqlens=cu)
    for a, b in zip(cu, cu[1:], strict=False):
        close(y[:, a:b], attention(q[:, a:b], k[:, a:b], v[:, a:b], g[:, a:b]))
    assert not y[:, 14:].any()


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rope(rng, style):
    q, k, v, g = make_inputs(rng, d=8)
    offset = np.array([3, 1000])
    turned = [np.stack([rotate(x[i], offset[i] + np.arange(13), style, 4) for i in range(2)]) for x in (q, k)]
    y = pn.power_attention(q, k, v, log_g=g, rope=pa.Rope(style, dim=4), rope_offset=offset)
    close(y, attention(*turned, v, g))


def test_state_is_canonical(rng):
    q, k, v, g = make_inputs(rng)
    state = pn.forward(q, k, v, log_g=g, degree=4, return_final_state=True).final_state
    total = np.cumsum(g, 1)
    decay = np.exp(total[:, -1:] - total)
    close(state.s, np.einsum("bth,bthr,bthe->bhre", decay, phi(k, 4), v))
    close(state.z, np.einsum("bth,bthr->bhr", decay, phi(k, 4)))


@pytest.mark.parametrize("split", [0, 1, 6, 13])
def test_split_and_resume(rng, split):
    q, k, v, g = make_inputs(rng)
    whole = pn.forward(q, k, v, log_g=g, return_final_state=True)
    a, b = slice(0, split), slice(split, None)
    first = pn.forward(q[:, a], k[:, a], v[:, a], log_g=g[:, a], return_final_state=True)
    second = pn.forward(
        q[:, b], k[:, b], v[:, b], log_g=g[:, b], initial_state=first.final_state, return_final_state=True
    )
    close(np.concatenate([first.y, second.y], 1), whole.y)
    close(second.final_state.s, whole.final_state.s)


@pytest.mark.parametrize("pieces", [[1] * 13, [4, 1, 8], [13]])
def test_steps_are_forward(rng, pieces):
    q, k, v, g = make_inputs(rng)
    whole = pn.forward(q, k, v, log_g=g, return_final_state=True)
    state, done, ys = pn.zero_state(2, 2, 6, 5, dtype="float64"), 0, []
    for n in pieces:
        at = slice(done, done + n)
        ys.append(pn.step(state, q[:, at], k[:, at], v[:, at], log_g=g[:, at]))
        done += n
    close(np.concatenate(ys, 1), whole.y)
    close(state.s, whole.final_state.s)


def test_slots_lengths_and_skips(rng):
    q, k, v, g = make_inputs(rng, b=3, t=4)
    pool = pn.zero_state(5, 2, 6, 5, dtype="float64")
    pool.s[:], pool.z[:] = rng.standard_normal(pool.s.shape), rng.random(pool.z.shape)
    before = pn.State(pool.s.copy(), pool.z.copy())
    y = pn.step(pool, q, k, v, log_g=g, slots=[4, -1, 1], lengths=[4, 4, 2])
    assert not y[1].any()
    assert not y[2, 2:].any()
    assert (pool.s[[0, 2, 3]] == before.s[[0, 2, 3]]).all()
    alone = pn.State(before.s[[1]], before.z[[1]])
    close(pn.step(alone, q[2:, :2], k[2:, :2], v[2:, :2], log_g=g[2:, :2]), y[2:, :2])
    close(pool.s[1], alone.s[0])


@pytest.mark.parametrize("degree", [2, 4])
def test_gradients_by_finite_differences(rng, degree):
    q, k, v, g = make_inputs(rng, t=6, d=3)
    rows = pa.state_rows(3, degree)
    state = pn.State(rng.standard_normal((2, 2, rows, 5)), rng.random((2, 2, rows)) + 1)
    options = {"degree": degree, "return_final_state": True, "eps": 0.1}
    inputs = {"q": q, "k": k, "v": v, "log_g": g, "s": state.s, "z": state.z}

    def run(x):
        given = {"log_g": x["log_g"], "initial_state": pn.State(x["s"], x["z"])}
        return pn.forward(x["q"], x["k"], x["v"], **given, **options)

    result = run(inputs)
    dy, ds = rng.standard_normal(result.y.shape), rng.standard_normal(state.s.shape)
    dz = rng.standard_normal(state.z.shape)
    grads = pn.backward(result, dy, pn.State(ds, dz))
    given = dict(zip(inputs, (*grads[:4], *grads.initial_state), strict=True))
    for name, x in inputs.items():
        direction = rng.standard_normal(x.shape)

        def loss(step, name=name, direction=direction):
            out = run({**inputs, name: inputs[name] + step * direction})
            return (out.y * dy).sum() + (out.final_state.s * ds).sum() + (out.final_state.z * dz).sum()

        numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
        assert numeric == pytest.approx((given[name] * direction).sum(), rel=1e-6, abs=1e-6), name


def test_segments_compose(rng):
    q, k, v, g = make_inputs(rng, t=15)
    cuts = [0, 4, 4, 9, 15]
    parts = [pn.summary(k[:, a:b], v[:, a:b], log_g=g[:, a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    stacked = pn.State(np.stack([p.state.s for p in parts]), np.stack([p.state.z for p in parts]))
    whole = pn.compose(stacked, np.stack([p.total_log_g for p in parts]), head_dim=6)
    expected = pn.forward(q, k, v, log_g=g, return_final_state=True).final_state
    close(whole.state.s, expected.s)
    close(whole.state.z, expected.z)
    close(whole.total_log_g, g.sum(1))


def test_reverse_summary_is_the_gradient_of_the_initial_state(rng):
    q, k, v, g = make_inputs(rng)
    rows = pa.state_rows(6, 2)
    state = pn.State(rng.standard_normal((2, 2, rows, 5)), rng.random((2, 2, rows)) * 9)
    result = pn.forward(q, k, v, log_g=g, initial_state=state, eps=1.0)
    dy = rng.standard_normal(result.y.shape)
    reverse = pn.summary_reverse(result, dy)
    grads = pn.backward(result, dy)
    close(reverse.state.s, grads.initial_state.s)
    close(reverse.state.z, grads.initial_state.z)


def test_pack_convert_fork(rng):
    state = pn.State(rng.standard_normal((3, 2, 21, 5)).astype(np.float32), rng.random((3, 2, 21)).astype(np.float32))
    block = pn.pack(state, head_dim=6)
    assert block[:7] == b"PWRATTN"
    back = pn.unpack(block, count=3, heads_kv=2, head_dim=6, value_dim=5)
    assert (back.s == state.s).all()
    assert (back.z == state.z).all()
    half = pn.convert(state, head_dim=6, dtype="bfloat16")
    assert (half.s == state.s.astype(ml_dtypes.bfloat16)).all()
    pool = pn.zero_state(4, 2, 6, 5)
    pn.convert(state, head_dim=6, out=pool, slots=[2, -1, 0], out_slots=[0, 1, 3])
    assert (pool.s[0] == state.s[2]).all()
    assert (pool.s[3] == state.s[0]).all()
    assert not pool.s[[1, 2]].any()


def test_damaged_block_is_refused(rng):
    block = pn.pack(pn.zero_state(1, 1, 4), head_dim=4)
    other = bytearray(block)
    other[8] ^= 0x7F  # the format version follows the magic
    with pytest.raises(pa.StateVersionError, match="version"):
        pn.unpack(bytes(other), count=1, heads_kv=1, head_dim=4)
    with pytest.raises(pa.InvalidArgumentError):
        pn.unpack(block[:-1], count=1, heads_kv=1, head_dim=4)
    with pytest.raises(pa.InvalidArgumentError, match="head_dim"):
        pn.unpack(block, count=1, heads_kv=1, head_dim=5)


def test_bad_input_is_named(rng):
    q, k, v, g = make_inputs(rng)
    cases = [
        ((q, k.astype(np.float32), v), {}, TypeError, "k is float32"),
        ((q, k, v), {"log_g": g.astype(np.float32)}, TypeError, "log_g is float32"),
        ((q, k[:, 1:], v), {}, ValueError, "k has shape"),
        ((q, k, v[..., None]), {}, ValueError, "v has shape"),
        ((q[:, :, :3], k, v), {}, ValueError, "3 heads"),
        ((q, k, v), {"degree": 3}, ValueError, "degree is 3"),
        ((q, k, v), {"cu_seqlens": [0, 13]}, ValueError, "batch is 2"),
        ((q[:1], k[:1], v[:1]), {"cu_seqlens": [0, 14]}, ValueError, "cu_seqlens"),
        ((q[:1], k[:1], v[:1]), {"cu_seqlens": [0, 5, 3]}, ValueError, "cu_seqlens"),
        ((q[:1], k[:1], v[:1]), {"cu_seqlens": [1, 5]}, ValueError, "cu_seqlens"),
        ((q, k, v), {"rope_offset": [1]}, ValueError, "rope_offset"),
        ((q, k, v), {"initial_state": pn.zero_state(2, 2, 6, 5)}, TypeError, "initial_state.s is float32"),
        ((q, k, v), {"initial_state": pn.zero_state(1, 2, 6, 5, dtype="float64")}, ValueError, "initial_state"),
        ((q.astype(np.int64), k, v), {}, TypeError, "q|k"),
        ((list(q), k, v), {}, TypeError, "q is a list"),
        ((q.swapaxes(1, 3).copy().swapaxes(1, 3), k, v), {}, ValueError, "stride"),
        ((q.astype(">f8"), k, v), {}, TypeError, "byte order"),
    ]
    for args, options, error, words in cases:
        with pytest.raises(error, match=words) as caught:
            pn.power_attention(*args, **options)
        assert isinstance(caught.value, pa.PowerAttentionError)
    frozen = pn.zero_state(2, 2, 6, 5, dtype="float64")
    frozen.s.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        pn.step(frozen, q, k, v)
    with pytest.raises(ValueError, match="slot"):
        pn.step(pn.zero_state(2, 2, 6, 5, dtype="float64"), q, k, v, slots=[0, 7])
