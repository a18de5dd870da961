# SPDX-License-Identifier: Apache-2.0
"""The drop-ins, with the names of the ``retention`` package."""

from __future__ import annotations

import inspect

import pytest

from conftest import attention

torch = pytest.importorskip("torch")

import power_attention as pa  # noqa: E402
from power_attention.power_full import power_full, power_retention, power_retention_inference  # noqa: E402


def make(t=40, b=2, h=4, hk=2, d=8, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    Q = torch.randn(b, t, h, d, generator=g).to(dtype)
    K = torch.randn(b, t, hk, d, generator=g).to(dtype)
    V = torch.randn(b, t, hk, d, generator=g).to(dtype)
    return Q, K, V, torch.nn.functional.logsigmoid(torch.randn(b, t, hk, generator=g) + 2)


def test_published_example():
    from power_attention.power_full import power_full

    batch_size = 2
    seq_len = 1024
    num_heads = 8
    head_dim = 64

    Q = torch.randn(batch_size, seq_len, num_heads, head_dim, dtype=torch.float16)
    K = torch.randn_like(Q)
    V = torch.randn_like(Q)
    log_G = torch.nn.functional.logsigmoid(torch.randn(batch_size, seq_len, num_heads, dtype=torch.float32))

    output = power_full(Q=Q, K=K, V=V, log_G=log_G, deg=4, chunk_size=128)

    assert output.shape == Q.shape
    assert output.dtype is torch.float16
    one = [x[:1, :, :1].double().numpy() for x in (Q, K, V, log_G[..., None])]
    expected = torch.tensor(attention(*one[:3], one[3][..., 0], degree=4))
    # q.k / 8 has errors of 2**-11 from products in float16 storage; the fourth power has four times that.
    assert (output[:1, :, :1].double() - expected).abs().max() < 8 * 2**-11 * expected.abs().max()


@pytest.mark.parametrize(
    ("t", "d", "deg", "expected"),
    [(1024, 64, 4, ("attention", 1024)), (16384, 16, 2, ("chunked", 128)), (64, 64, 6, ("attention", 64))],
)
def test_chunk_size_is_followed_where_chunks_pay(monkeypatch, t, d, deg, expected):
    """For the published example chunks of 128 cost a thousand times what attention does, and gigabytes."""
    from power_attention.torch import _native

    chosen = []

    class Planned(Exception):
        pass

    def workspace(nbytes, like):
        raise Planned  # what follows the choice is not of interest here

    get_plan = _native.get_plan
    monkeypatch.setattr(_native, "get_plan", lambda *args: chosen.append(get_plan(*args)) or chosen[-1])
    monkeypatch.setattr(_native, "workspace", workspace)
    Q = torch.randn(2, t, 8, d, dtype=torch.float16)
    with pytest.raises(Planned):
        power_full(Q, Q, Q, deg=deg, chunk_size=128)
    assert (chosen[-1].form, chosen[-1].chunk_size) == expected


def test_signatures():
    assert list(inspect.signature(power_full).parameters) == [
        "Q", "K", "V", "log_G", "initial_state", "deg", "scale", "chunk_size",
    ]  # fmt: skip
    assert list(inspect.signature(power_retention).parameters)[:10] == [
        "Q", "K", "V", "log_G", "initial_state", "return_final_state", "deg", "scale", "chunk_size",
        "switch_over_seq_len",
    ]  # fmt: skip
    assert list(inspect.signature(power_retention_inference).parameters) == [
        "Q", "K", "V", "log_G", "initial_state", "sum_of_keys", "deg", "scale", "switch_over_seq_len",
    ]  # fmt: skip
    assert inspect.signature(power_retention_inference).parameters["switch_over_seq_len"].default == 512
    assert pa.power_retention is power_retention


@pytest.mark.parametrize("chunk", [None, 1, 16, 40, 64])
@pytest.mark.parametrize("gated", [False, True])
def test_chunks_do_not_change_the_result(chunk, gated):
    Q, K, V, log_G = make()
    gate = log_G if gated else None
    expected = torch.tensor(attention(Q, K, V, gate)).float()
    torch.testing.assert_close(power_full(Q, K, V, gate, chunk_size=chunk), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(power_retention(Q, K, V, gate, chunk_size=chunk), expected, rtol=1e-4, atol=1e-5)


def test_final_state_has_the_last_chunk_and_no_padding():
    Q, K, V, log_G = make(t=37)
    _, S, s = power_retention(Q, K, V, log_G, return_final_state=True, chunk_size=16)
    assert S.shape == (2, 2, pa.state_rows(8, 2), 8)
    assert s.shape == (2, 2, pa.state_rows(8, 2))
    _, whole, _ = power_retention(Q, K, V, log_G, return_final_state=True)
    torch.testing.assert_close(S, whole, rtol=1e-4, atol=1e-5)


def test_training_initial_state():
    Q, K, V, log_G = (x.requires_grad_() for x in make())
    full = power_retention(Q, K, V, log_G)
    a, S, s = power_retention(Q[:, :17], K[:, :17], V[:, :17], log_G[:, :17], return_final_state=True)
    b = power_retention(
        Q=Q[:, 17:], K=K[:, 17:], V=V[:, 17:], log_G=log_G[:, 17:], initial_state=S, sum_of_keys=s, chunk_size=8
    )
    torch.testing.assert_close(torch.cat([a, b], 1), full, rtol=1e-4, atol=1e-5)
    pair = power_full(Q[:, 17:], K[:, 17:], V[:, 17:], log_G[:, 17:], initial_state=(S, s))
    torch.testing.assert_close(pair, b, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(full.square().sum(), (Q, K, V, log_G))
    actual = torch.autograd.grad(torch.cat([a, b], 1).square().sum(), (Q, K, V, log_G))
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "has_state"),
    [
        ({}, True),
        ({"chunk_size": 64}, True),  # 40 tokens are one chunk of 64
        ({"switch_over_seq_len": 40}, True),
        ({"switch_over_seq_len": 41}, False),
        ({"switch_over_seq_len": 48, "chunk_size": 16}, True),  # 40 tokens are three chunks of 16
        ({"switch_over_seq_len": 49, "chunk_size": 16}, False),
    ],
)
def test_short_sequences_return_no_state(options, has_state):
    """The answers of retention 1.0.7 to these calls, the first of which fails there."""
    Q, K, V, log_G = make()
    out, state, sum_of_keys = power_retention(Q, K, V, log_G, return_final_state=True, **options)
    assert out.shape == Q.shape
    assert (state is not None) == (sum_of_keys is not None) == has_state


def test_scale_zero_is_not_the_default():
    Q, K, V, _ = make()
    assert not power_retention(Q, K, V, scale=0.0).any()
    default = power_retention(Q, K, V)
    torch.testing.assert_close(default, power_retention(Q, K, V, scale=8**-0.5))


def test_values_are_not_changed():
    Q, K, V, log_G = make()
    kept = V.clone()
    power_retention_inference(Q, K, V, log_G, switch_over_seq_len=8)
    assert torch.equal(V, kept)


@pytest.mark.parametrize("tq", [1, 3])
@pytest.mark.parametrize("gated", [False, True])
def test_decoding_follows_the_whole(tq, gated):
    """Cache and state together give what the whole sequence gives, at any number of queries."""
    Q, K, V, log_G = make(t=60)
    full = torch.tensor(attention(Q, K, V, log_G if gated else None)).float()
    state = total = None
    start = switches = 0
    for end in range(tq, 61, tq):
        cache = slice(start, end)
        y, state, total = power_retention_inference(
            Q[:, end - tq : end],
            K[:, cache],
            V[:, cache],
            log_G[:, cache] if gated else None,
            state,
            total,
            switch_over_seq_len=16,
        )
        torch.testing.assert_close(y, full[:, end - tq : end], rtol=1e-3, atol=1e-4)
        if end - start >= 16:
            start, switches = end, switches + 1
    assert switches >= 3
    y, s, z = power_retention_inference(Q[:, -tq:], None, None, None, state, total)
    assert y.shape == Q[:, -tq:].shape
    assert s is state
    assert z is total
    # Gates without cached tokens fade numerator and denominator alike, down to nothing.
    faded, _, _ = power_retention_inference(Q[:, -tq:], None, None, log_G[:, -1:] - 300, state, total)
    torch.testing.assert_close(faded, y)
    reset, _, _ = power_retention_inference(Q[:, -tq:], None, None, log_G[:, -1:] - torch.inf, state, total)
    assert not reset.any()


def test_never_switching_keeps_the_state():
    Q, K, V, log_G = make()
    y, state, total = power_retention_inference(Q[:, -1:], K, V, log_G, switch_over_seq_len=None)
    assert state is None
    assert total is None
    torch.testing.assert_close(y, torch.tensor(attention(Q, K, V, log_G)[:, -1:]).float(), rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    Q, K, V, _log_G = make()
    with pytest.raises(ValueError, match="nothing to attend"):
        power_retention_inference(Q, None, None)
    with pytest.raises(ValueError, match="give both or neither"):
        power_retention_inference(Q, K, None)
    with pytest.raises(ValueError, match="sum_of_keys"):
        power_retention(Q, K, V, initial_state=torch.zeros(2, 2, 36, 8))
    with pytest.raises(ValueError, match="degree is 3"):
        power_full(Q, K, V, deg=3)
    with pytest.raises(ValueError, match="Q has 40 tokens"):
        power_retention_inference(Q, K[:, :3], V[:, :3])
    with pytest.raises(TypeError, match="k is torch.float16"):
        power_full(Q, K.half(), V)
