# SPDX-License-Identifier: Apache-2.0
"""Decoding: steps, pools of states, the module and its cache."""

from __future__ import annotations

import pytest

import power_attention as pa

torch = pytest.importorskip("torch")

from power_attention.torch import PowerAttention, PowerAttentionState, Rope, power_attention, step  # noqa: E402


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def tokens(b=2, t=10, h=4, hk=2, d=6, e=5, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(b, t, h, d, dtype=dtype, generator=g)
    k = torch.randn(b, t, hk, d, dtype=dtype, generator=g)
    v = torch.randn(b, t, hk, e, dtype=dtype, generator=g)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return q, k, v, -torch.rand(b, t, hk, dtype=wide, generator=g)


def pool(slots, rope=None, dtype=torch.float64, **options):
    return PowerAttentionState(slots, 2, 6, 5, rope=rope, dtype=dtype, **options)


@pytest.mark.parametrize("rope", [None, "half", Rope("interleaved", dim=4)])
@pytest.mark.parametrize("pieces", [[1] * 10, [3, 1, 1, 5]])
def test_steps_are_the_whole(rope, pieces):
    q, k, v, g = tokens()
    whole, final = power_attention(q, k, v, log_g=g, rope=rope, return_final_state=True)
    state, ys = pool(2, rope), []
    for part in zip(*(x.split(pieces, 1) for x in (q, k, v, g)), strict=True):
        ys.append(state.step(*part[:3], log_g=part[3]))
    torch.testing.assert_close(torch.cat(ys, 1), whole)
    torch.testing.assert_close(state.s, final.s)
    assert state.position.tolist() == [10, 10]


def test_pool_of_slots():
    q, k, v, g = tokens(b=3)
    state = pool(5, "half")
    state.step(q[:2], k[:2], v[:2], log_g=g[:2], slots=[3, 1])
    before = state.clone()
    y = state.step(q, k, v, log_g=g, slots=[1, -1, 4], lengths=[10, 10, 4])
    assert state.position.tolist() == [0, 20, 0, 10, 4]
    assert not y[1].any()
    assert not y[2, 4:].any()
    for slot in (0, 2, 3):
        assert torch.equal(state.s[slot], before.s[slot])
    alone = pool(1, "half")
    torch.testing.assert_close(alone.step(q[2:, :4], k[2:, :4], v[2:, :4], log_g=g[2:, :4]), y[2:, :4])
    torch.testing.assert_close(alone.s[0], state.s[4])


def test_fork_write_reset_and_bytes():
    q, k, v, g = tokens()
    state = pool(4)
    _, final = power_attention(q, k, v, log_g=g, return_final_state=True)
    state.write([2, 0], final, 10)
    assert torch.equal(state.s[0], final.s[1])
    state.fork([2], [3])
    assert torch.equal(state.s[3], final.s[0])
    assert state.position.tolist() == [10, 0, 10, 10]
    block = state.to_bytes()
    state.reset([2])
    assert not state.s[2].any()
    other = pool(4)
    other.from_bytes(block)
    assert torch.equal(other.s[2], final.s[0])
    assert not other.position.any()
    other.from_bytes(block, position=[10, 0, 10, 10])
    assert other.position.tolist() == [10, 0, 10, 10]
    state.reset()
    assert not state.s.any()
    assert not state.position.any()
    with pytest.raises(pa.InvalidArgumentError, match="count"):
        pool(3).from_bytes(block)
    damaged = bytearray(block)
    damaged[8] ^= 0x7F
    with pytest.raises(pa.StateVersionError, match="version"):
        pool(4).from_bytes(bytes(damaged))


def test_functional_twin_leaves_the_state_alone():
    q, k, v, g = tokens()
    state = pool(2)
    kept = state.clone()
    y, new = step(q, k, v, (state.s, state.z), log_g=g, inplace=False)
    assert torch.equal(state.s, kept.s)
    again = state.step(q, k, v, log_g=g)
    assert torch.equal(y, again)
    assert torch.equal(new.s, state.s)


def test_repeated_calls_take_the_short_way_and_agree():
    """The second of equal calls skips the checks; it must compute the same, also after the state is replaced."""
    from power_attention.torch import _native

    q, k, v, g = tokens(t=1, dtype=torch.float32)
    a, b = pool(2, dtype=torch.float32), pool(2, dtype=torch.float32)
    _native._steps.clear()
    for i in range(6):
        if i == 3:
            a.s, a.z = a.s.clone(), a.z.clone()
        if i == 4:
            q = q.transpose(1, 2).contiguous().transpose(1, 2)
        ya = a.step(q, k, v, log_g=g)
        yb, (b.s, b.z) = step(q, k, v, (b.s, b.z), log_g=g, inplace=False)
        assert torch.equal(ya, yb)
        assert torch.equal(a.s, b.s)
    assert len(_native._steps) == 1
    odd = [k.transpose(2, 3).contiguous().transpose(2, 3), q[..., :5], q.double(), q.to("meta")]
    y, expected = a.clone().step(q, odd[0], v, log_g=g), a.clone().step(q, k, v, log_g=g)
    assert torch.equal(y, expected), "a last stride other than 1 is copied"
    for x in odd[1:]:
        with pytest.raises(pa.PowerAttentionError):
            a.step(q, x[:, :, :2], v, log_g=g)
    with pytest.raises(ValueError, match="log_g"):
        a.step(q, k, v, log_g=g[:, :0])
    with pytest.raises(pa.InvalidArgumentError, match="no gradient"), torch.enable_grad():
        a.step(q.requires_grad_(), k, v, log_g=g)
    assert a.position.tolist() == [6, 6]
    for i in range(300):  # the memory of the checks is bounded
        step(
            *tokens(b=1, t=1 + i, d=1, e=1, h=1, hk=1)[:3],
            (torch.zeros(1, 1, 1, 1).double(), torch.zeros(1, 1, 1).double()),
        )
    assert len(_native._steps) <= 256


def test_positions_are_counted_when_they_are_read():
    """Whatever order of calls: some slots, all of them, lengths, and index tensors that are used again."""
    q, k, v, _ = tokens(b=3, t=2)
    state, expected = pool(4), [0, 0, 0, 0]
    slots, lengths = torch.tensor([2, -1, 0]), torch.tensor([2, 2, 1])
    for i in range(100):
        state.step(q, k, v, slots=slots, lengths=lengths if i % 2 else None)
        expected[int(slots[0])] += 2
        expected[int(slots[2])] += 1 if i % 2 else 2
        slots[0] = 3 if i % 3 else 2  # the caller's buffer
        if i % 7 == 0:
            state.step(q[:1].expand(4, 2, 4, 6), k[:1].expand(4, 2, 2, 6), v[:1].expand(4, 2, 2, 5))
            expected = [n + 2 for n in expected]
    copy = state.clone()
    assert state.position.tolist() == copy.position.tolist() == expected


def test_bfloat16_state():
    q, k, v, g = tokens(dtype=torch.float32)
    wide, narrow = pool(2, dtype=torch.float32), pool(2, dtype=torch.bfloat16)
    assert narrow.nbytes * 2 == wide.nbytes
    for _ in range(2):  # the first step reads a state of zeros, which both types hold exactly
        a, b = wide.step(q, k, v, log_g=g), narrow.step(q, k, v, log_g=g)
    assert (a - b).abs().max() < 0.1
    assert not torch.equal(a, b)


def test_gradients_are_refused_not_dropped():
    q, k, v, _ = tokens()
    with torch.enable_grad(), pytest.raises(pa.InvalidArgumentError, match="no gradient"):
        pool(2).step(q.requires_grad_(), k, v)


def test_compile_fullgraph():
    q, k, v, g = tokens(t=1)

    def decode(q, k, v, g, s, z):
        y = step(q * 1.0, k, v, (s, z), log_g=g)
        return y + 1

    a, b = pool(2), pool(2)
    torch._dynamo.reset()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(q, k, v, g, a.s, a.z), decode(q, k, v, g, b.s, b.z))
        torch.testing.assert_close(a.s, b.s)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_slots_dynamic(backend):
    """One graph for any batch and any number of tokens: in place on the pool, and functional."""

    def decode(q, k, v, g, s, z, slots, lengths):
        y = step(q * 2, k, v, (s, z), log_g=g, slots=slots, lengths=lengths, rope="half", rope_offset=slots + 3)
        again, new = step(q, k, v, (s, z), log_g=g, slots=slots, inplace=False)
        return y + again, new.s.sum()

    a, b = pool(6), pool(6)
    torch._dynamo.reset()
    compiled = torch.compile(decode, fullgraph=True, dynamic=True, backend=backend)
    for batch, t in ((2, 3), (3, 2), (4, 5)):
        q, k, v, g = tokens(b=batch, t=t, d=6)
        slots, lengths = torch.arange(batch) * 2 - 2, torch.full((batch,), t - 1)  # the first is negative: skipped
        for x, y in zip(
            compiled(q, k, v, g, a.s, a.z, slots, lengths),
            decode(q, k, v, g, b.s, b.z, slots, lengths),
            strict=True,
        ):
            torch.testing.assert_close(x, y)
        torch.testing.assert_close(a.s, b.s)
    assert not torch.equal(a.s, torch.zeros_like(a.s))


def test_export_of_a_step():
    class Decode(torch.nn.Module):
        def forward(self, q, k, v, s, z):
            y, new = step(q, k, v, (s, z), inplace=False)
            return y, new.s, new.z

    q, k, v, _ = tokens(b=3, t=1)
    state = pool(3)
    program = torch.export.export(Decode(), (q, k, v, state.s, state.z))
    for a, b in zip(program.module()(q, k, v, state.s, state.z), Decode()(q, k, v, state.s, state.z), strict=True):
        torch.testing.assert_close(a, b)


def test_bad_input_is_named():
    q, k, v, _g = tokens()
    state = pool(2)
    with pytest.raises(pa.InvalidArgumentError, match="slots has shape"):
        state.step(q, k, v, slots=[0])
    with pytest.raises(pa.InvalidArgumentError, match="slot"):
        state.step(q, k, v, slots=[0, 5])
    with pytest.raises(pa.InvalidArgumentError, match="slot"):
        state.step(q, k, v, slots=[1, 1])
    with pytest.raises(pa.InvalidArgumentError, match="lengths"):
        state.step(q, k, v, lengths=[11, 0])
    with pytest.raises(pa.InvalidArgumentError, match="state: S has shape"):
        PowerAttentionState(2, 2, 7, 5, dtype=torch.float64).step(q, k, v)
    with pytest.raises(pa.DtypeError, match="float16"):
        PowerAttentionState(2, 2, 7, dtype=torch.float16)
    with pytest.raises(pa.StateTooLargeError, match="B"):
        pa.plan(seq_len=1, heads=1, head_dim=128, degree=6, use_state=True)


@pytest.mark.parametrize("options", [{}, {"rope": "half"}, {"gated": False, "degree": 4}, {"num_kv_heads": 1}])
def test_module_generates_what_it_was_trained_on(options):
    torch.manual_seed(0)
    layer = PowerAttention(24, 4, **{"num_kv_heads": 2, **options})
    x = torch.randn(2, 21, 24)
    whole = layer(x)
    cache = layer.make_cache(2)
    size = cache.nbytes
    parts = [layer(p, cache=cache) for p in x.split([12, 3, 1, 1, 1, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert cache.nbytes == size


def test_module_trains_under_autocast_and_compile():
    torch.manual_seed(0)
    layer = PowerAttention(24, 4, num_kv_heads=2, rope="half")
    x = torch.randn(2, 16, 24)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
        y.float().square().mean().backward()
    assert y.dtype is torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_module_in_other_types(dtype):
    """Parameters in 16 bits keep states and gates in float32; generation follows the whole as closely as they allow."""
    torch.manual_seed(0)
    layer = PowerAttention(32, 4, num_kv_heads=2, rope="half", dtype=dtype)
    x = torch.randn(1, 12, 32, dtype=dtype)
    cache = layer.make_cache(1)
    assert cache.state.s.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    parts = torch.cat([layer(p, cache=cache) for p in x.split([9, 1, 2], 1)], 1)
    assert parts.dtype is dtype
    # Three roundings each: of y, of the projection, and of the values that both read.
    torch.testing.assert_close(parts, layer(x), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_module_packed():
    torch.manual_seed(0)
    layer = PowerAttention(24, 4, rope="half")
    x = torch.randn(1, 12, 24)
    y = layer(x, cu_seqlens=torch.tensor([0, 5, 12]))
    torch.testing.assert_close(y[:, 5:], layer(x[:, 5:]))
